"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const element = (id) => document.getElementById(id);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // --- charts ---
  function theme() {
    const axis = { labelColor: colour("--quiet"), titleColor: colour("--quiet"), gridColor: colour("--line"),
      domainColor: colour("--line"), tickColor: colour("--line"), labelLimit: 220, labelFontSize: 11, titleFontWeight: 400 };
    return { background: "transparent", aria: false, view: { stroke: null }, axis,
      legend: { labelColor: colour("--text"), titleColor: colour("--quiet"), labelLimit: 220, orient: "top", columns: 4 } };
  }
  async function draw(id, spec) {
    const place = element(id);
    if (!place) return null;
    const config = theme();
    const width = Math.max(220, place.clientWidth - 20);
    config.legend.columns = columns(spec.encoding, width);
    const whole = { $schema: "https://vega.github.io/schema/vega-lite/v6.json", width, autosize: { type: "fit-x", contains: "padding" }, padding: 2, ...spec, config };
    const drawn = await vegaEmbed(place, whole, { actions: false, renderer: "svg", tooltip: { theme: dark.matches ? "dark" : "light" } });
    return drawn.view;
  }
  // As many as fit beside each other, by the longest of the names that colour stands for.
  function columns(encoding, width) {
    const field = encoding && encoding.color && encoding.color.type === "nominal" && encoding.color.field;
    const names = field === "curve" ? [...data.experts, "before refinement"] : data.experts;
    const longest = Math.min(220, 7 * Math.max(...names.map((name) => name.length), 13)) + 30;
    return Math.max(1, Math.floor(width / longest));
  }
  const layerAxis = { field: "layer", type: "ordinal", sort: null, title: "layer", axis: { labelAngle: 0, labelOverlap: true } };
  const scheme = (name) => ({ scheme: name, reverse: false });

  function cosines() {
    const names = [...data.experts, "merged"];
    const long = Math.max(...names.map((n) => n.length));
    const fit = Math.min(element("chart-cosines").clientWidth - 20, 140 + 90 * names.length);
    const cell = (fit - Math.min(220, 6 * long)) / names.length;
    const angle = cell < 50 ? -90 : cell < 6 * long ? -40 : 0;
    const x = { field: "b", type: "ordinal", sort: names, title: null, axis: { orient: "top", labelAngle: angle } };
    const y = { field: "a", type: "ordinal", sort: names, title: null };
    const tooltip = [{ field: "a", title: "of" }, { field: "b", title: "with" }, { field: "cosine", format: ".4f" }];
    const layers = [{ mark: "rect", encoding: { x, y, tooltip,
      color: { field: "cosine", type: "quantitative", scale: { scheme: "blueorange", domain: [-1, 1], reverse: true }, legend: null } } }];
    if (names.length <= 12 && cell >= 34) {
      layers.push({ mark: { type: "text", fontSize: 11 }, encoding: { x, y,
        text: { field: "cosine", type: "quantitative", format: ".2f" },
        color: { condition: { test: "abs(datum.cosine) > 0.6", value: "#ffffff" }, value: "#1a1d21" } } });
    }
    return draw("chart-cosines", { width: fit, data: { values: data.cosines }, height: 28 * names.length, layer: layers });
  }
  const shares = () => draw("chart-shares", { data: { values: data.shares }, height: 220, mark: "bar", encoding: { x: layerAxis,
    y: { field: "share", type: "quantitative", stack: "zero", scale: { domain: [0, 1] }, axis: { format: "%" }, title: "share of the energy" },
    color: { field: "expert", type: "nominal", sort: data.experts, title: null, scale: { scheme: "tableau10" } },
    tooltip: [{ field: "layer" }, { field: "expert" }, { field: "share", format: ".1%" }] } });
  const time = () => draw("chart-time", { data: { values: data.seconds }, height: 160, mark: { type: "bar", color: colour("--accent") },
    encoding: { x: layerAxis, y: { field: "seconds", type: "quantitative", title: "seconds" },
      tooltip: [{ field: "layer" }, { field: "seconds", format: ".4f" }] } });

  const logarithmic = { energy: true, condition: true };
  async function heat() {
    const chosen = element("heat").value;
    const rows = data.layers.filter((row) => row[chosen] !== null && (!logarithmic[chosen] || row[chosen] > 0))
      .map((row) => ({ ...row, layer: row.layer === null ? "rest" : String(row.layer) }));
    element("heat-none").hidden = rows.length > 0;
    element("chart-heat").hidden = rows.length === 0;
    if (!rows.length) return;
    const color = chosen === "branch"
      ? { field: "branch", type: "nominal", title: null, scale: { domain: ["homogeneous", "heterogeneous", "mixed"], range: ["#4c9be8", "#f08c2e", "#9a6fd0"] } }
      : { field: chosen, type: "quantitative", title: chosen, scale: { type: logarithmic[chosen] ? "log" : "linear", scheme: "viridis" },
          legend: { format: chosen === "cancelled" ? "%" : ".3~g", gradientLength: Math.max(60, Math.min(160, element("chart-heat").clientWidth - 240)) } };
    const order = [...new Set(data.layers.map((row) => row.layer))].sort((a, b) => (a === null) - (b === null) || a - b)
      .map((layer) => (layer === null ? "rest" : String(layer)));
    const view = await draw("chart-heat", { data: { values: rows }, height: 18 * new Set(rows.map((row) => row.part)).size, mark: { type: "rect", cursor: "pointer", tooltip: true },
      encoding: { x: { ...layerAxis, sort: order }, y: { field: "part", type: "ordinal", sort: null, title: null }, color,
        tooltip: [{ field: "name" }, { field: "energy", format: ".4~g" }, { field: "gamma", format: ".3~g" }, { field: "branch" },
          { field: "condition", format: ".3~g" }, { field: "cancelled", format: ".1%" }] } });
    view.addEventListener("click", (_, item) => {
      if (item && item.datum && data.spectra[item.datum.name]) pick(item.datum.name);
    });
  }

  async function spectrum() {
    const name = element("layer").value;
    const { curves, about } = data.spectra[name];
    const labels = Object.keys(curves);
    const values = labels.flatMap((curve) => curves[curve].map(([index, power]) => ({ curve, index, value: 10 ** power })));
    await draw("chart-spectrum", { data: { values }, height: 300, mark: { type: "line", point: { size: 18 } }, encoding: {
      x: { field: "index", type: "quantitative", scale: { type: "log", nice: false }, title: "number of the singular value" },
      y: { field: "value", type: "quantitative", scale: { type: "log" }, title: "singular value", axis: { format: ".1~e" } },
      color: { field: "curve", type: "nominal", sort: labels, title: null, scale: { domain: labels, scheme: "tableau10" } },
      strokeDash: { field: "curve", type: "nominal", sort: labels, title: null, scale: { domain: labels, range: labels.map((c) => (c === "before refinement" ? [5, 4] : [1, 0])) } },
      strokeWidth: { condition: { test: "datum.curve === 'merged' || datum.curve === 'before refinement'", value: 3 }, value: 1.3 },
      tooltip: [{ field: "curve" }, { field: "index" }, { field: "value", format: ".4~g" }] } });
    const top = labels.filter((c) => curves[c].length).map((c) => `${c} ${(10 ** curves[c][0][1]).toPrecision(3)}`);
    element("spectrum-text").textContent = `${name}: ${about}. The largest: ${top.join(", ")}.`;
  }
  function pick(name) {
    element("layer").value = name;
    spectrum();
    element("spectrum").scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  }

  async function scores() {
    const facets = [...new Set(data.scores.map((point) => point.task))];
    const models = [...new Set(data.scores.map((point) => point.model))];
    element("chart-scores").replaceChildren();
    for (const task of facets) {
      const id = `chart-scores-${facets.indexOf(task)}`;
      const place = document.createElement("div");
      place.id = id;
      element("chart-scores").append(place);
      const values = data.scores.filter((point) => point.task === task);
      const title = values[0].kind === "perplexity" ? "perplexity, lower is better" : "percent, higher is better";
      const y = { field: "model", type: "ordinal", sort: models, title: null, scale: { domain: models } };
      const color = { condition: { test: "datum.merged", value: colour("--warn") }, value: colour("--accent") };
      const tooltip = [{ field: "model" }, { field: "score", format: ".2f" }, { field: "low", format: ".2f", title: "95 % from" }, { field: "high", format: ".2f", title: "to" }];
      const x = { type: "quantitative", title, scale: { zero: false, nice: true } };
      await draw(id, { title: { text: task, anchor: "start", color: colour("--text"), fontWeight: 600 }, data: { values }, height: 20 * models.length,
        encoding: { y, color, tooltip }, layer: [
          { mark: { type: "rule", strokeWidth: 2 }, encoding: { x: { ...x, field: "low" }, x2: { field: "high" } } },
          { mark: { type: "point", filled: true, size: 60, opacity: 1 }, encoding: { x: { ...x, field: "score" } } }] });
    }
  }

  async function all() {
    if (data.scores.length) await scores();
    if (data.cosines) await cosines();
    if (data.shares.length) await shares();
    await heat();
    if (element("layer")) await spectrum();
    await time();
    document.documentElement.dataset.drawn = "yes";
  }
  element("heat").addEventListener("change", heat);
  if (element("layer")) element("layer").addEventListener("change", spectrum);
  dark.addEventListener("change", all);
  let waiting, before = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === before) return;
    before = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(all, 200);
  });

  // --- table ---
  const body = element("table").tBodies[0];
  const rows = [...body.rows].map((row) => ({ row, text: row.textContent.toLowerCase() + " " + row.cells[2].title.toLowerCase() }));
  function filter() {
    const words = element("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const { row, text } of rows) {
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    element("count").textContent = `${shown} of ${rows.length} tensors`;
  }
  const order = new Intl.Collator("en", { numeric: true });
  function sort(column, header) {
    const down = header.getAttribute("aria-sort") === "ascending";
    for (const other of header.parentElement.cells) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const numeric = rows.some(({ row }) => row.cells[column].classList.contains("n"));
    const key = ({ row }) => (numeric ? parseFloat(row.cells[column].textContent) : row.cells[column].textContent);
    const sign = down ? -1 : 1;
    const empty = (value) => value === "" || Number.isNaN(value);
    const keyed = rows.map((entry) => [key(entry), entry.row]);
    keyed.sort(([a], [b]) => empty(a) - empty(b) || sign * (numeric ? a - b || 0 : order.compare(a, b)));
    body.append(...keyed.map(([, row]) => row));
  }
  [...element("table").tHead.rows[0].cells].forEach((header, column) =>
    header.querySelector("button").addEventListener("click", () => sort(column, header)));
  element("filter").addEventListener("input", filter);
  filter();
  all();
})();
