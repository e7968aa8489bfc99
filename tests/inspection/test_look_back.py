"""The look back at a merge whose models are not plain matrices in folders: stacks, the Hub, other vocabularies."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from builders import PlainModel, load_folder, write_checkpoint
from commands import run
from hub_server import FakeHub, put
from huggingface_hub import constants
from vocabularies import EXPERTS, WORDS, save

import acemerge
from acemerge.checkpoints.hub import locate_cached
from acemerge.errors import CheckpointError
from acemerge.inspection.look_back import BEFORE, look_back, try_to_look_back
from acemerge.output.manifest import load_manifest
from acemerge.report.facts import page_facts

STACK = "model.layers.0.mlp.experts.down_proj"


def stacked(root: Path) -> tuple[Path, list[Path]]:
    """Three fused experts, (3, in, out) and of different sizes, as a mixture of experts stores them."""
    generator = torch.Generator().manual_seed(0)
    shapes = {STACK: (3, 12, 8), STACK.replace("down", "gate_up"): (3, 8, 24)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tuned = [
        {name: W + 0.1 * i * torch.randn(W.shape, generator=generator) for name, W in base.items()} for i in (1, 2, 3)
    ]
    folders = [write_checkpoint(root / f"m{i}", tensors) for i, tensors in enumerate([base, *tuned])]
    return folders[0], folders[1:]


def test_fused_experts_have_the_root_mean_square_of_their_slices_spectra(tmp_path: Path) -> None:
    base, experts = stacked(tmp_path)
    acemerge.merge(base, experts, "ace", out=tmp_path / "out", k_frac=0.5)
    manifest = load_manifest(tmp_path / "out")
    assert manifest["tensors"][STACK]["role"] == "experts"
    seen = look_back(tmp_path / "out", manifest)
    W0, M = load_folder(base)[STACK].double(), load_folder(tmp_path / "out")[STACK].double()
    D = torch.stack([load_folder(path)[STACK].double() - W0 for path in experts])
    before = torch.stack(
        [acemerge.merge_deltas(D[:, p].mT, "ace", k_frac=0.5, ablation="E3").delta.mT for p in range(3)]
    )
    expected = {"m1": D[0], "m2": D[1], "m3": D[2], "merged": M - W0, BEFORE: before}
    found = seen.tensors[STACK].spectra
    assert found.keys() == expected.keys()
    for label, X in expected.items():
        s = torch.linalg.svdvals(X)  # (slices, 8)
        torch.testing.assert_close(found[label], s.square().mean(0).sqrt(), rtol=1e-4, atol=1e-5)
    about = page_facts(manifest, seen, "").data["spectra"][STACK]["about"]
    assert about.startswith("all 8 singular values, the root mean square over 3 slices; ")


def test_models_from_the_hub_are_looked_up_in_the_cache_alone(
    plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "merge", *put(hub, plain), "-o", "out", "--quiet") == (0, "", "")
    manifest = load_manifest(Path("out"))
    hub.close()
    seen = look_back(Path("out"), manifest)
    acemerge.merge(plain.root / "base", [plain.root / f"e{i}" for i in (1, 2, 3)], out="local")
    same = look_back(Path("local"), load_manifest(Path("local")))
    assert seen.tensors.keys() == same.tensors.keys()
    assert torch.equal(seen.total.sums.products, same.total.sums.products)
    assert seen.experts == ("e1", "e2", "e3")
    shutil.rmtree(Path(constants.HF_HUB_CACHE) / "models--org--e2")
    nothing, why = try_to_look_back(Path("out"), manifest)
    assert nothing is None
    assert why.startswith(
        f"{manifest['inputs'][2]['path']}: is not in the cache, and nothing is fetched to look back; "
    )


def test_a_cached_model_of_another_commit_is_not_taken_for_it(
    plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "merge", *put(hub, plain), "-o", "out", "--quiet") == (0, "", "")
    hub.close()
    with pytest.raises(CheckpointError, match="is not in the cache"):
        locate_cached(f"org/e1@{'0' * 40}")


@pytest.mark.parametrize("policy", ["base", "union"])
def test_rows_that_are_matched_by_token_are_passed_over_and_named(tmp_path: Path, policy: str) -> None:
    vocabularies = [WORDS, *EXPERTS]
    folders = [save(tmp_path / f"m{i}", words, i) for i, words in enumerate(vocabularies)]
    for number, folder in enumerate(folders):  # that the layers differ, too
        tensors = load_folder(folder)
        layers = {n: W + 0.1 * number * torch.randn(W.shape) for n, W in tensors.items() if ".layers." in n}
        write_checkpoint(folder, {**tensors, **layers})
    acemerge.merge(folders[0], folders[1:], out=tmp_path / "out", vocabulary=policy)
    manifest = load_manifest(tmp_path / "out")
    seen = look_back(tmp_path / "out", manifest)
    passed_over = {"model.embed_tokens.weight", "lm_head.weight"}
    assert set(seen.passed_over) == passed_over
    assert seen.tensors.keys() == manifest["tensors"].keys() - passed_over
    notes = page_facts(manifest, seen, "").notes
    assert "lm_head.weight was passed over: its rows are matched by token" in notes
