"""The papers' figures of a merge, against slow float64 ones, and the files that hold them."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from builders import PlainModel, load_folder, write_adapter, write_checkpoint
from commands import failed, run
from safetensors.torch import save_file
from scipy.linalg import subspace_angles
from task_builders import save_encoder, sentences, write_tasks, write_tsv
from torch import Tensor

import acemerge
from acemerge.engine.opening import open_recipe
from acemerge.engine.run_options import RunOptions
from acemerge.inspection.analysis import Analysis, LayerAnalysis, analyse, with_data
from acemerge.inspection.analysis_files import write_analysis
from acemerge.inspection.analysis_tables import as_csv, as_json, layer_rows, markdown, summary
from acemerge.linalg import principal as by_principal
from acemerge.linalg.principal import first_cosines, matrix_cosine, overlaps, principal
from acemerge.output.manifest import load_manifest
from acemerge.recipes.recipe import make_recipe

REFINED = {"method": {"name": "ace", "k_frac": 0.5}}
UP, DOWN = "layers.0.up.weight", "layers.0.down.weight"


def looked(base: Path, experts: list[Path], **keys: Any) -> Analysis:
    recipe = make_recipe({"base": str(base), "experts": [str(path) for path in experts], **keys})
    data = open_recipe(with_data(recipe), None, RunOptions()) if "calibration" in keys else None
    return analyse(open_recipe(recipe, None, RunOptions()), workers=1, data=data)


def layer(found: Analysis, name: str) -> LayerAnalysis:
    return next(layer for layer in found.layers if layer.name == name)


def updates(plain: PlainModel, name: str) -> Tensor:
    return torch.stack([expert[name].double() - plain.base[name].double() for expert in plain.tuned])


def top_share(X: Tensor) -> float:
    s = torch.linalg.svdvals(X.double())
    return float(s[: -(-len(s) // 20)].square().sum() / s.square().sum())


# --- principal directions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5), (41, 60), (60, 41)])
def test_principal_directions_are_those_of_the_singular_values(shape: tuple[int, int]) -> None:
    X = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, s, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    found, k = principal(X), {5: 1, 41: 3}[min(shape)]
    torch.testing.assert_close(found.values, s)
    torch.testing.assert_close((found.left * U[:, :k]).sum(0).abs(), torch.ones(k).double())
    torch.testing.assert_close((found.right * Vh[:k].T).sum(0).abs(), torch.ones(k).double())
    assert found.share == pytest.approx(top_share(X), rel=1e-6)


def test_large_matrices_take_a_few_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """From below, whatever the spectrum: by rounding where it falls, by less than 5 per cent where it is flat."""
    monkeypatch.setattr(by_principal, "WHOLE_SPECTRUM", 100)
    flat = torch.randn(300, 200, generator=torch.Generator().manual_seed(1))
    U, _, Vh = torch.linalg.svd(flat, full_matrices=False)
    steep = U * torch.exp(-0.3 * torch.arange(200)) @ Vh
    for X, least, aligned in ((steep, 1 - 1e-5, 1 - 1e-5), (flat, 0.95, 0.5)):
        found, exact = principal(X), torch.linalg.svd(X.double(), full_matrices=False)
        assert len(found.values) == 10
        assert least * top_share(X) <= found.share <= top_share(X) * (1 + 1e-6)
        assert float(overlaps([found.right, exact.Vh[:10].T])[0, 1]) >= aligned
    low_rank = torch.outer(flat[:, 0], flat[0])
    assert (principal(low_rank).left.shape, principal(low_rank).share) == ((300, 1), pytest.approx(1))


def test_cosines_of_directions_are_those_of_the_principal_angles() -> None:
    generator = torch.Generator().manual_seed(2)
    bases = [torch.linalg.qr(torch.randn(9, k, generator=generator).double()).Q for k in (2, 2, 3)]
    bases.append(torch.zeros(9, 0).double())
    first, space = first_cosines(bases), overlaps(bases)
    for s in range(3):
        for t in range(3):
            angles = torch.tensor(subspace_angles(bases[s].numpy(), bases[t].numpy()))
            assert float(space[s, t]) == pytest.approx(float(angles.cos().square().mean().sqrt()))
            assert float(first[s, t]) == pytest.approx(abs(float(bases[s][:, 0] @ bases[t][:, 0])))
    assert first[3].isnan().all()
    assert space[:, 3].isnan().all()


def test_the_cosine_of_second_moments() -> None:
    X = torch.randn(3, 6, generator=torch.Generator().manual_seed(3))
    G, eye = X.T @ X, torch.eye(6)
    assert matrix_cosine(G, eye) == pytest.approx(flat_cosine(G.double(), eye.double()))
    assert matrix_cosine(G, eye) <= (3 / 6) ** 0.5
    assert matrix_cosine(G, 5 * G) == pytest.approx(1)
    assert matrix_cosine(G, 0 * G) is None


# --- layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_figures_of_a_merge_by_ace(tmp_path: Path, dtype: torch.dtype) -> None:
    plain = PlainModel(tmp_path, dtype)
    base, experts = plain.save()
    found = looked(base, experts, **REFINED)
    assert [each.name for each in found.layers] == [DOWN, UP]
    total = torch.zeros(3).double()
    for each in found.layers:
        D = updates(plain, each.name)
        n = D.square().sum((1, 2))
        total += n
        torch.testing.assert_close(each.energies, n, rtol=1e-5, atol=0)
        assert each.gamma == pytest.approx(float(n.log().var() / n.log().mean() ** 2), rel=1e-4)
        assert [own.share for own in each.own] == pytest.approx([top_share(d) for d in D], rel=1e-4)
        after, before = (oracles.ace(D, k_frac=0.5, ablation=rows) for rows in ("E4", "E3"))
        assert before is not None
        assert each.before is not None
        assert not torch.allclose(after, before)
        for spectrum, M in ((each.merged, after), (each.before, before)):
            torch.testing.assert_close(spectrum.values, torch.linalg.svdvals(M), rtol=1e-4, atol=1e-5)
            assert spectrum.share == pytest.approx(top_share(M), rel=1e-4)
        for directions, bases in (
            (each.inputs, [torch.linalg.svd(d)[2][:1].T for d in D]),
            (each.outputs, [torch.linalg.svd(d)[0][:, :1] for d in D]),
        ):
            torch.testing.assert_close(directions.first, first_cosines(bases), rtol=0, atol=1e-4)
            torch.testing.assert_close(directions.overlap, overlaps(bases), rtol=0, atol=1e-4)
    assert found.gamma == pytest.approx(float(total.log().var() / total.log().mean() ** 2), rel=1e-4)


def test_what_the_rule_says_is_what_a_merge_says(plain: PlainModel) -> None:
    base, experts = plain.save()
    acemerge.merge(base, experts, "ace", out=plain.root / "out", k_frac=0.5)
    records = load_manifest(plain.root / "out")["tensors"]
    for row in layer_rows(looked(base, experts, **REFINED)):
        record = records[row["name"]]
        assert (row["branch"], row["status"]) == (record["branch"], record["status"])
        assert [row[key] for key in ("gamma", "condition", "rank")] == pytest.approx(
            [record[key] for key in ("gamma", "condition", "rank")], rel=1e-6
        )


def test_a_rule_with_thresholds_of_the_whole_model(plain: PlainModel) -> None:
    base, experts = plain.save()
    acemerge.merge(base, experts, method="ties", out=plain.root / "out")
    merged = load_folder(plain.root / "out")
    found = looked(base, experts, method="ties")
    for each in found.layers:
        expected = torch.linalg.svdvals(merged[each.name].double() - plain.base[each.name].double())
        torch.testing.assert_close(each.merged.values, expected, rtol=1e-4, atol=1e-5)
        assert each.before is None
    assert summary(found, layer_rows(found))["condition"] is None


def test_stacks_are_taken_apart_and_turned_weights_turned(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    shapes = {"mlp.experts.up": (2, 7, 5), "h.0.mlp.c_fc.weight": (6, 9), "h.0.mlp.c_fc.bias": (9,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tuned = [{n: W + 0.1 * i * torch.randn(W.shape, generator=generator) for n, W in base.items()} for i in (1, 2)]
    folders = [write_checkpoint(tmp_path / str(i), model) for i, model in enumerate([base, *tuned])]
    found = looked(folders[0], folders[1:], **REFINED)
    assert {each.name: each.shape for each in found.layers} == {
        "mlp.experts.up[0]": (7, 5), "mlp.experts.up[1]": (7, 5), "h.0.mlp.c_fc.weight": (9, 6),
    }  # fmt: skip
    matrices = {f"mlp.experts.up[{i}]": [model["mlp.experts.up"][i] for model in (base, *tuned)] for i in (0, 1)}
    matrices["h.0.mlp.c_fc.weight"] = [model["h.0.mlp.c_fc.weight"].T for model in (base, *tuned)]
    for each in found.layers:
        W0, *own = matrices[each.name]
        D = torch.stack([W - W0 for W in own]).double()
        result = acemerge.merge_deltas(D, "ace", k_frac=0.5)
        torch.testing.assert_close(each.merged.values, torch.linalg.svdvals(result.delta), rtol=1e-4, atol=1e-5)
        assert each.stats.gamma == pytest.approx(result.stats.gamma, rel=1e-4)
        inputs = [torch.linalg.svd(d)[2][:1].T for d in D]
        torch.testing.assert_close(each.inputs.first, first_cosines(inputs), rtol=0, atol=1e-4)


def test_adapters_are_merged_from_their_factors(plain: PlainModel) -> None:
    base, _ = plain.save()
    generator = torch.Generator().manual_seed(5)
    pairs = [(torch.randn(1, 6, generator=generator), torch.randn(8, 1, generator=generator)) for _ in range(2)]
    experts = [write_adapter(plain.root / f"lora{i}", {"layers.0.up": pair}) for i, pair in enumerate(pairs)]
    acemerge.merge(base, experts, method="tsv_m", out=plain.root / "out")
    (up,) = looked(base, experts, method="tsv_m").layers  # of the others there is nothing to merge
    assert up.name == UP
    assert [own.share for own in up.own] == pytest.approx([1, 1], abs=1e-6)
    (A, _), (C, _) = pairs
    assert float(up.inputs.first[0, 1]) == pytest.approx(abs(float(torch.cosine_similarity(A, C))), abs=1e-5)
    merged = load_folder(plain.root / "out")[UP] - plain.base[UP]
    torch.testing.assert_close(up.merged.values, torch.linalg.svdvals(merged.double()), rtol=1e-4, atol=1e-5)


def test_a_layer_that_nobody_changed_has_no_figures(plain: PlainModel) -> None:
    for expert in plain.tuned:
        expert[DOWN] = plain.base[DOWN]
    found = looked(*plain.save(), **REFINED)
    down = layer(found, DOWN)
    assert (down.gamma, down.merged.share, down.before) == (None, None, None)
    assert down.inputs.first.isnan().all()
    content = as_json(found)
    assert content["model"]["shares"]["e1"] == layer(found, UP).own[0].share  # a mean over the others
    assert content["layers"][0]["spectra"]["merged"] == []


def test_an_expert_that_is_left_out_of_a_layer_counts_as_without_update_there(plain: PlainModel) -> None:
    plain.tuned[1][UP][0, 0] = torch.nan
    base, experts = plain.save()
    up = layer(looked(base, experts, nonfinite="skip-expert"), UP)
    assert up.energies[1] == 0
    assert up.own[1].share is None
    assert up.inputs.overlap[1].isnan().all()
    assert up.inputs.overlap[0, 2] == pytest.approx(
        float(overlaps([torch.linalg.svd(d)[2][:1].T for d in updates(plain, UP)[::2]])[0, 1]), abs=1e-4
    )


# --- against data --------------------------------------------------------------------------------------------


def test_estimates_beside_the_true_second_moments(tmp_path: Path) -> None:
    """Every text alone and every input kept, beside what is streamed."""
    from transformers import AutoModel, AutoTokenizer

    texts = sentences(5, seed=1)
    save_encoder(tmp_path / "base", 0)
    folders = [save_encoder(tmp_path / f"e{seed}", seed, rows=2) for seed in (1, 2)]
    for seed, folder in enumerate(folders):
        perturb_folder(folder, seed)
    write_tsv(tmp_path / "t.tsv", {"s": texts})
    task = {"kind": "classification", "data": "t.tsv", "text": "s", "pooling": "mean"}
    tasks = write_tasks(tmp_path, *({**task, "name": f"t{i}", "expert": f"e{i}"} for i in (1, 2)))
    name = "encoder.layer.1.intermediate.dense.weight"
    W0 = load_folder(tmp_path / "base")[name].double()
    D = [load_folder(folder)[name].double() - W0 for folder in folders]
    moments = []
    for folder in folders:
        network, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        Z: list[Tensor] = []
        network.encoder.layer[1].intermediate.dense.register_forward_hook(lambda _, given, __, Z=Z: Z.append(given[0]))
        with torch.no_grad():
            for text in texts:
                network(**tokenizer(text, return_tensors="pt"))
        moments.append(sum(z[0].double().T @ z[0].double() for z in Z))

    def cosines(estimates: list[Tensor]) -> list[float]:
        return [flat_cosine(Z.T @ Z, G) for Z, G in zip(estimates, moments, strict=True)]

    own: dict[str, Any] = {
        "ace": cosines([d - d.mean(0) for d in D]),
        "tact": cosines([d * oracles.largest(d, 0.5) for d in D]),
        "average": [None, None],
    }
    for method, expected in own.items():
        found = looked(tmp_path / "base", folders, calibration=str(tasks), method=method)
        seen = layer(found, name).covariances
        assert seen is not None
        assert seen.rule == pytest.approx(expected, abs=1e-5)
        assert seen.updates == pytest.approx(cosines(D), abs=1e-5)
        assert seen.nothing == pytest.approx(cosines([torch.eye(16).double()] * 2), abs=1e-5)
    frozen = load_folder(folders[1]) | load_folder(tmp_path / "base")  # with a head of its own
    save_file(frozen, folders[1] / "model.safetensors", metadata={"format": "pt"})
    seen = layer(looked(tmp_path / "base", folders, calibration=str(tasks)), name).covariances
    assert seen is not None
    assert (seen.updates[1], seen.rule[1], seen.nothing[1]) == (None, None, None)
    content = as_json(found)
    assert content["model"]["measured"] >= 12
    assert "covariances.png" in write_analysis(found, tmp_path / "seen")[-1]


def flat_cosine(A: Tensor, B: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(A.flatten(), B.flatten(), dim=0))


def perturb_folder(folder: Path, seed: int) -> None:
    """Move all weights, each with a mean of its own that centring takes away."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_folder(folder)
    moved = {n: W + 0.1 * (torch.randn(W.shape, generator=generator) + 0.5) for n, W in tensors.items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})


# --- files ---------------------------------------------------------------------------------------------------


def test_the_command_and_its_files(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    base, experts = plain.save()
    out = plain.root / "seen"
    words = ["analyse", "--base", base, *(word for path in experts for word in ("--expert", path)), "-o", out]
    code, printed, errors = run(capsys, *words, "--method", "ace", "--set", "k_frac=0.5")
    assert code == 0, errors
    assert "in the 2 layers that it refined, before" in printed
    pictures = {"conditions.png", "directions.png", "gamma.png", "spectra.png"}
    assert {file.name for file in out.iterdir()} == pictures | {"analysis.json", "analysis.md", "layers.csv"}
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    content = json.loads((out / "analysis.json").read_text())
    with open(out / "layers.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["name"] for row in rows] == [each["name"] for each in content["layers"]] == [DOWN, UP]
    for row, each in zip(rows, content["layers"], strict=True):
        assert float(row["share_merged"]) == each["share_merged"]
        assert float(row["share: e2"]) == each["shares"]["e2"]
        assert len(each["spectra"]["merged"]) == 6
    assert f"{content['model']['gamma']:.3g}" in (out / "analysis.md").read_text()
    failed(run(capsys, *words), 2, "holds an analysis")
    failed(run(capsys, *words[:-1], base / "in"), 2, "inside or around the input")
    code, printed, errors = run(capsys, *words, "--overwrite", "--method", "average", "--quiet")
    assert (code, printed, errors) == (0, "", "")
    assert json.loads((out / "analysis.json").read_text())["model"]["condition"] is None


def test_names_are_text_in_the_page_and_no_formula_in_the_rows(tmp_path: Path) -> None:
    from markdown_it import MarkdownIt

    parts = ["=1+1", "<img src=x onerror=alert(1)>", "[x](javascript:y)", "`a` __b__ *c* | d |", "&lt;b&gt;"]
    names = [f"{part}.weight" for part in sorted(parts)]
    tensors = {name: torch.eye(4) for name in names}
    base = write_checkpoint(tmp_path / "base", tensors)
    expert = write_checkpoint(tmp_path / "__e__", {name: 2 * value for name, value in tensors.items()})
    found = looked(base, [expert])
    rows = [row[0] for row in csv.reader(as_csv(found).splitlines())]
    assert sorted(rows[1:]) == sorted(f"'{name}" if name[0] == "=" else name for name in names)
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(markdown(found))
    inside = [child for token in tokens for child in token.children or ()]
    assert {child.type for child in inside} == {"text"}
    cells = ["".join(child.content for child in token.children or ()) for token in tokens if token.type == "inline"]
    assert {*names, "expert __e__"} <= {*cells}


def test_one_expert_alone_and_names_that_are_not_read(plain: PlainModel) -> None:
    base, experts = plain.save()
    found = replace(looked(base, experts[:1], **REFINED), experts=("$a|b$",))
    assert found.gamma is None
    assert as_json(found)["model"]["directions"]["first_inputs"] is None
    write_analysis(found, plain.root / "seen")
    assert "expert \\$a\\|b\\$ |" in (plain.root / "seen/analysis.md").read_text()
    assert not (plain.root / "seen/directions.png").exists()


def test_without_matplotlib_the_numbers_are_kept(plain: PlainModel, monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = plain.save()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = write_analysis(looked(base, experts), plain.root / "seen")
    assert said[0] == "no pictures: matplotlib is not installed; pip install 'acemerge[eval]'"
    assert sorted(f.name for f in (plain.root / "seen").iterdir()) == ["analysis.json", "analysis.md", "layers.csv"]
