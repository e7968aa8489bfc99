"""The page itself: Gradio's components, and which button does what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from acemerge.cli.text import size
from acemerge.errors import AcemergeError
from acemerge.methods import METHODS
from acemerge.methods.about import Parameter, parameters, summary
from acemerge.ui import steps, view
from acemerge.ui.choice import Choice, rules
from acemerge.ui.folders import Folders
from acemerge.ui.runner import Runner, State, line

_TICK = 0.5  # seconds between looks at how far the work is
_BEGIN_WITH = "ace"
_BASE = "the model that all experts were fine-tuned from"
_EXPERTS = "the fine-tuned models, or LoRA adapters"
_WEIGHTS = "one for each expert, in their order; where it is empty all have 1"


def build(folders: Folders, runner: Runner) -> gr.Blocks:
    """The page over these folders, showing the work of this runner."""
    with gr.Blocks(title="acemerge", analytics_enabled=False) as page:
        gr.HTML(f"<h1>Merge models</h1>{view.roots(folders.roots)}")
        with gr.Column(elem_classes="step"):
            gr.HTML("<h2>1. Models</h2>")
            with gr.Row():
                base = gr.Dropdown([], value=None, label="Base", info=_BASE, elem_id="base")
                experts = gr.Dropdown([], value=[], label="Experts", info=_EXPERTS, multiselect=True, elem_id="experts")
            weights = gr.Textbox(label="Weights", info=_WEIGHTS, placeholder="1, 0.5, 1", elem_id="weights")
            with gr.Row(elem_classes="buttons"):
                look = gr.Button("Inspect", elem_id="look")
                stop_look = gr.Button("Stop", variant="stop", visible=False, elem_id="stop-look")
                again = gr.Button("Look for models again")
            found, inspected = gr.HTML(elem_id="found"), gr.HTML(elem_id="inspected")
        with gr.Column(elem_classes="step"):
            gr.HTML("<h2>2. Rule</h2>")
            offered = [(shown, name) for name, shown in rules().items()]
            rule = gr.Dropdown(offered, value=_BEGIN_WITH, label="Rule", elem_id="rule")
            about = gr.HTML(_about(_BEGIN_WITH))
            slots = _Slots()
            with gr.Row(elem_classes="buttons"):
                planning = gr.Button("Plan", elem_id="plan")
            planned = gr.HTML(elem_id="planned")
        with gr.Column(elem_classes="step"):
            gr.HTML("<h2>3. Merge</h2>")
            out = gr.Textbox(f"{folders.name(folders.roots[0])}/merged", label="Output folder", elem_id="out")
            overwrite = gr.Checkbox(label=view.REPLACE, elem_id="overwrite")
            force = gr.Checkbox(label=view.FORCE)
            with gr.Row(elem_classes="buttons"):
                merge = gr.Button("Merge", variant="primary", elem_id="merge")
                stop_merge = gr.Button("Stop", variant="stop", visible=False, elem_id="stop-merge")
            merged = gr.HTML(elem_id="merged")
        with gr.Column(elem_classes="step"):
            gr.HTML("<h2>4. Recipe</h2><p>The same on the command line: <code>acemerge merge recipe.yaml -o OUT</code>")
            recipe = gr.Code(language="yaml", show_label=False, interactive=False, elem_id="recipe")
        timer = gr.Timer(_TICK, active=False)

        picked = [base, experts, weights, rule, *slots.inputs]
        live = [inspected, planned, merged, look, planning, merge, stop_look, stop_merge, timer]

        def choice(*values: Any) -> Choice:
            return Choice(values[0], values[1] or [], values[3], values[2] or "", slots.values(values[3], values[4:]))

        def start(what: str, work: Callable[[], Callable[..., Any]]) -> list[Any]:
            try:
                runner.start(what, work())
            except Exception as error:
                return _with(_live(runner.state), what, view.failure(line(error)))
            return _live(runner.state)

        def inspect_now(*values: Any) -> list[Any]:
            return start("inspect", lambda: steps.inspect(choice(*values), folders))

        def merge_now(out: str, overwrite: bool, force: bool, *values: Any) -> list[Any]:
            return start("merge", lambda: steps.merge(choice(*values), folders, out, overwrite, force))

        def plan_now(*values: Any) -> list[Any]:
            return start("plan", lambda: steps.plan(choice(*values), folders))

        def recipe_now(*values: Any) -> str:
            try:
                return choice(*values).yaml(folders)
            except AcemergeError as error:
                return f"# {view.plain(str(error))}\n"

        def models() -> list[Any]:
            listing = folders.find()
            names = [(f"{f.name} ({', '.join(filter(None, (f.kind, size(f.nbytes))))})", f.name) for f in listing.found]
            return [gr.Dropdown(choices=names), gr.Dropdown(choices=names), view.listing(listing)]

        def stop() -> list[Any]:
            runner.stop()
            return _live(runner.state)

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        gr.on([page.load, again.click], models, None, [base, experts, found], **quiet)
        gr.on([page.load, timer.tick], lambda: _live(runner.state), None, live, **quiet)
        gr.on([stop_look.click, stop_merge.click], stop, None, live, **quiet)
        rule.change(lambda name: [_about(name), *slots.of(name)], rule, [about, *slots.inputs], **quiet)
        look.click(inspect_now, picked, live, **quiet)
        planning.click(plan_now, picked, live, **quiet)
        merge.click(merge_now, [out, overwrite, force, *picked], live, **quiet)
        changes = [page.load, *(component.change for component in picked)]
        gr.on(changes, recipe_now, picked, recipe, trigger_mode="always_last", **quiet)
    return page


def _about(rule: str) -> str:
    return view.about(summary(METHODS[rule]), METHODS[rule].source)


class _Slots:
    """As many text fields and as many menus as any rule has parameters; those that a rule has no use for are hidden."""

    def __init__(self) -> None:
        of_all = [parameters(METHODS[name]) for name in rules()]
        texts = max(len(_free(found)) for found in of_all)
        menus = max(len(found) - len(_free(found)) for found in of_all)
        first = _BEGIN_WITH
        with gr.Row():
            shown = enumerate([*_texts(first, texts), *_menus(first, menus)], 1)
            fields = [(gr.Textbox if i <= texts else gr.Dropdown)(**s, elem_id=f"parameter-{i}") for i, s in shown]
        self._texts, self._menus = fields[:texts], fields[texts:]

    @property
    def inputs(self) -> list[Any]:
        return [*self._texts, *self._menus]

    def of(self, rule: str) -> list[Any]:
        """Every slot as it is for this rule."""
        texts = [gr.Textbox(**shown) for shown in _texts(rule, len(self._texts))]
        return [*texts, *(gr.Dropdown(**shown) for shown in _menus(rule, len(self._menus)))]

    def values(self, rule: str, entered: Sequence[Any]) -> dict[str, Any]:
        """The rule's parameters with what was entered for them."""
        found = parameters(METHODS[rule])
        free, chosen = _free(found), [p for p in found if p.choices]
        pairs = [*zip(free, entered, strict=False), *zip(chosen, entered[len(self._texts) :], strict=False)]
        return {parameter.name: value for parameter, value in pairs}


def _free(found: Sequence[Parameter]) -> list[Parameter]:
    return [parameter for parameter in found if not parameter.choices]


def _texts(rule: str, slots: int) -> list[dict[str, Any]]:
    found = _free(parameters(METHODS[rule]))
    shown: list[dict[str, Any]] = [
        {
            "label": p.name,
            "info": p.meaning,
            "placeholder": "" if p.default is None else str(p.default),
            "value": "",
            "visible": True,
        }
        for p in found
    ]
    return shown + [{"value": "", "visible": False}] * (slots - len(found))


def _menus(rule: str, slots: int) -> list[dict[str, Any]]:
    found = [p for p in parameters(METHODS[rule]) if p.choices]
    shown: list[dict[str, Any]] = [
        {"label": p.name, "info": p.meaning, "choices": list(p.choices), "value": p.default, "visible": True}
        for p in found
    ]
    return shown + [{"value": None, "choices": [], "visible": False}] * (slots - len(found))


_AREAS = ("inspect", "plan", "merge")


def _live(state: State | None) -> list[Any]:
    """The areas, buttons and timer as they are in this state."""
    busy = state is not None and state.is_busy
    running = state.what if state is not None and state.phase == "running" else ""
    areas = [view.state(state) if state is not None and state.what == area else gr.skip() for area in _AREAS]
    buttons = [gr.Button(interactive=not busy) for _ in _AREAS]
    stops = [gr.Button(visible=running == what) for what in ("inspect", "merge")]
    return [*areas, *buttons, *stops, gr.Timer(active=busy)]


def _with(live: list[Any], what: str, html: str) -> list[Any]:
    """The same with `html` in the area of this kind of work."""
    return [html if i == _AREAS.index(what) else shown for i, shown in enumerate(live)]
