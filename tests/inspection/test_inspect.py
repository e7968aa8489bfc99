"""The look at experts before a merge: its figures against slow float64 ones, and what it warns of."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import PlainModel, write_adapter, write_checkpoint
from commands import failed, run
from torch import Tensor
from torch.nn.functional import cosine_similarity as cosine

import acemerge
from acemerge.engine.opening import open_recipe
from acemerge.engine.run_options import RunOptions
from acemerge.inspection.statistics import squared_norms, stable_ranks, sums
from acemerge.inspection.survey import Inspection, survey
from acemerge.linalg.krylov import spectral_norms
from acemerge.planning import pieces
from acemerge.recipes.recipe import make_recipe

MERGED = (
    "embed_tokens.weight",
    "layers.0.up.weight",
    "layers.0.up.bias",
    "layers.0.down.weight",
    "layers.0.norm.weight",
)


def look(base: Path, experts: list[Path], **keys: Any) -> Inspection:
    recipe = make_recipe({"base": str(base), "experts": [str(path) for path in experts], "method": "ace", **keys})
    return survey(open_recipe(recipe, None, RunOptions()), workers=1)


def said(seen: Inspection) -> str:
    return "\n".join(map(str, seen.advice))


# --- figures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece", [pieces._PIECE, 8])
def test_figures_are_those_of_the_formulas(
    tmp_path: Path, dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole or in pieces; the oracle sees all entries at once in float64."""
    monkeypatch.setattr(pieces, "_PIECE", piece)
    plain = PlainModel(tmp_path, dtype)
    seen = look(*plain.save())
    assert {view.job.name for view in seen.views} == set(MERGED)

    def expected(names: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor, float]:
        W0 = torch.cat([plain.base[name].double().flatten() for name in names])
        D = torch.stack([torch.cat([e[n].double().flatten() for n in names]) for e in plain.tuned]) - W0
        lost = 1 - D.sum(0).abs().sum() / D.abs().sum()
        return D.norm(dim=1) ** 2, D.norm(dim=1) / W0.norm(), cosine(D[:, None], D[None], dim=2), float(lost)

    for found, names in [(seen.total, MERGED), *((view.sums, (view.job.name,)) for view in seen.views)]:
        energies, distances, cosines, cancelled = expected(names)
        torch.testing.assert_close(found.energies, energies, rtol=1e-6, atol=0)
        torch.testing.assert_close(found.shares, energies / energies.sum(), rtol=1e-6, atol=0)
        torch.testing.assert_close(found.distances, distances, rtol=1e-6, atol=0)
        torch.testing.assert_close(found.cosines, cosines, rtol=0, atol=1e-6)
        assert found.cancelled == pytest.approx(cancelled, abs=1e-6)


def test_how_far_the_sum_moves_a_layer_beside_its_weights_and_beside_right_angles() -> None:
    e1, e2, W0 = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0]), torch.tensor([10.0, 0.0])
    apart, alike, undone = (sums(torch.stack(pair), W0) for pair in ((e1, e2), (e1, e1), (e1, -e1)))
    assert (apart.added_beside_orthogonal, apart.added_beside_base) == pytest.approx((1, 0.5))
    assert (alike.added_beside_orthogonal, alike.added_beside_base) == pytest.approx((2**0.5, 0.6))
    assert (undone.added_beside_orthogonal, undone.added_beside_base) == (0, 0)
    # p = (9, 16) / 25: ||D||^2 = (27^2 + 64^2) / 25^2, the experts' mean energy by p is 337 / 25, w^2 = 100 + 25 / 2
    q = 1 - (27**2 + 64**2) / 25**2 / (337 / 25)
    assert apart.dissenting_step == pytest.approx((q * 25 / 112.5) ** 0.5)
    assert alike.dissenting_step == undone.dissenting_step == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(("method", "warned"), [("ace", True), ("ties", True), ("auto", False), ("trust", False)])
def test_layers_that_an_addition_moves_far_are_named(plain: PlainModel, method: str, warned: bool) -> None:
    """Not where the rule minds the length by itself, and not where the updates are short."""
    base, experts = plain.save()
    for size, far in ((0.1, False), (5.0, True)):
        changed = {name: value for name, value in plain.base.items() if value.is_floating_point()}
        for i, folder in enumerate(experts):
            noise = torch.Generator().manual_seed(i)
            tuned = {
                name: W + size / 10 * W.norm() / W.numel() ** 0.5 * torch.randn(W.shape, generator=noise)
                for name, W in changed.items()
            }
            write_checkpoint(folder, plain.base | tuned)
        text = said(look(base, experts, method=method))
        assert ("added, the updates move 2 of 2 layers further than 0.25 of their weights" in text) == (far and warned)


def test_signs_that_agree_lose_nothing_and_opposite_ones_everything() -> None:
    D, W0 = torch.tensor([[1.0, -2.0, 0.0]]), torch.ones(3)
    assert sums(torch.cat([D, 3 * D]), W0).cancelled == 0
    assert sums(torch.cat([D, -D]), W0).cancelled == 1
    assert sums(torch.cat([D, 0 * D]), W0).cancelled == 0
    assert sums(torch.cat([0 * D, 0 * D]), W0).cancelled == 0
    many = torch.randn(4, 100_000, generator=torch.Generator().manual_seed(0))
    assert sums(many, many[0]).cancelled == pytest.approx(0.5, abs=0.01)  # 1 - 1 / sqrt(4)


@pytest.mark.parametrize("shape", [(7, 5), (48, 300), (300, 200), (60, 700)])
@pytest.mark.parametrize("decay", [0.0, 0.02, 0.5])
def test_spectral_norms_are_estimated_from_below(shape: tuple[int, int], decay: float) -> None:
    """A flat spectrum is the hardest; one with a gap comes out to rounding."""
    X = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    X = U * (s * torch.exp(-decay * torch.arange(s.shape[1])))[:, None] @ Vh
    exact = torch.linalg.svdvals(X.double())[:, 0]
    found = spectral_norms(X)
    assert (found <= exact * (1 + 1e-6)).all()
    assert (found >= exact * (1 - (1e-6 if decay == 0.5 or min(shape) <= 48 else 0.02))).all()


def test_the_stable_rank_of_a_stack_is_the_mean_over_its_matrices() -> None:
    D = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(2))
    s = torch.linalg.svdvals(D.double())
    energies, top = s.square().sum((1, 2)), s[..., 0].square()
    expected = ((s.square().sum(2) / top) * top).sum(1) / top.sum(1)
    torch.testing.assert_close(stable_ranks(energies, squared_norms(D)), expected, rtol=1e-6, atol=0)


def test_an_expert_that_is_left_out_of_a_tensor_counts_as_without_update_there(plain: PlainModel) -> None:
    plain.tuned[1]["layers.0.up.weight"][0, 0] = torch.nan
    folders = plain.save()
    seen = {view.job.name: view for view in look(*folders, nonfinite="skip-expert").views}
    up, down = seen["layers.0.up.weight"], seen["layers.0.down.weight"]
    assert up.sums.energies[1] == 0
    assert up.stable_ranks is not None
    assert up.stable_ranks[1] is None
    kept = [plain.tuned[i]["layers.0.up.weight"] - plain.base["layers.0.up.weight"] for i in (0, 2)]
    assert float(up.sums.products[0, 2]) == pytest.approx(float((kept[0] * kept[1]).sum()), rel=1e-5)
    assert down.sums.energies.all()


def test_adapters_have_the_rank_of_their_factors(plain: PlainModel) -> None:
    base, experts = plain.save()
    generator = torch.Generator().manual_seed(5)
    A, B = torch.randn(1, 6, generator=generator), torch.randn(8, 1, generator=generator)
    adapter = write_adapter(plain.root / "adapter", {"layers.0.up": (A, B)})
    seen = look(base, [adapter, experts[0]])
    assert seen.stable_ranks[0] == pytest.approx(1, abs=1e-5)
    assert seen.total.energies[0] == pytest.approx(float((B @ A).square().sum()), rel=1e-5)


# --- warnings ------------------------------------------------------------------------------------------------


def moved(plain: PlainModel, factor: float, expert: int = 0) -> dict[str, Tensor]:
    """The base with an expert's update so many times."""
    pairs = plain.base.items()
    return {n: W + (factor * (plain.tuned[expert][n] - W)).to(W.dtype) for n, W in pairs}


def test_related_experts_of_one_size_get_no_warning(plain: PlainModel) -> None:
    base, (first, *_) = plain.save()
    second = write_checkpoint(plain.root / "second", moved(plain, 0.5, expert=1))
    seen = look(base, [first, second])
    assert seen.total.shares.tolist() == pytest.approx([0.5, 0.5], abs=0.1)
    assert not [line for line in seen.advice if "heterogeneous" not in line.what]


def test_frozen_identical_and_dominating_experts_are_named_with_a_cure(plain: PlainModel) -> None:
    base, (first, *_) = plain.save()
    frozen = write_checkpoint(plain.root / "frozen", plain.base)
    again = write_checkpoint(plain.root / "again", plain.tuned[0])
    large = write_checkpoint(plain.root / "large", moved(plain, 6, expert=1))
    lines = said(look(base, [first, frozen, again, large]))
    assert "expert frozen is frozen: it is the base itself; leave it out" in lines
    assert "experts e1 and again are the same, to 0.1 % of their updates; leave one out" in lines
    seen = look(base, [first, large])
    n = seen.total.energies
    assert f"expert large dominates: {n[1] / n.sum():.0%} of the energy, {n[1] / n[0]:.1f} times" in said(seen)
    weight = float((n[0] / n[1]).sqrt())
    assert f"give it a weight of {weight:.2g}:" in said(seen)
    assert "dominates" not in said(look(base, [first, write_checkpoint(plain.root / "less", moved(plain, 1.9))]))


@pytest.mark.parametrize(("small", "times"), [(1.0, 6.0), (0.003, 1.0)])
def test_an_expert_with_the_weight_that_was_advised_dominates_no_more(
    small: float, times: float, plain: PlainModel, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever it was said; and no weight that is advised is nothing."""
    base, _ = plain.save()
    first = write_checkpoint(plain.root / "first", moved(plain, small))
    large = write_checkpoint(plain.root / "large", moved(plain, times, expert=1))
    words = ("--base", base, "--expert", first, "--expert")
    (weight,) = re.findall(r"give it a weight of (\S+):", said(look(base, [first, large])))
    for command in (["inspect"], ["merge", "--report", "-o", plain.root / "out"]):
        _, before, errors = run(capsys, *command, *words, large)
        assert re.search(f"expert large dominates: .*; give it a weight of {re.escape(weight)}:", before), errors
        _, after, _ = run(capsys, *command, *words, f"{large}={weight}", *(["--overwrite"] if "-o" in command else []))
        assert "dominates" not in after
    assert "give it a weight" not in (plain.root / "out/report.html").read_text()


def test_experts_that_undo_each_other_are_in_conflict(plain: PlainModel) -> None:
    base, (first, *_) = plain.save()
    against = write_checkpoint(plain.root / "against", moved(plain, -1))
    seen = look(base, [first, against])
    assert "experts pull against each other in 2 of 2 layers" in said(seen)
    assert "cosine -1.00" in said(seen)
    assert seen.in_conflict[0].sums.cancelled == pytest.approx(1, abs=1e-5)


def test_heterogeneity_is_a_warning_where_ace_acts_on_it(plain: PlainModel) -> None:
    folders = plain.save()
    gammas = [view.gamma for view in look(*folders).views if view.squared_norms is not None]
    assert all(gamma is not None and 5 < gamma < 7 for gamma in gammas)
    assert "(gamma above 0.3) in 2 of 2 layers" in said(look(*folders))
    assert "(gamma above 6) in 1 of 2 layers" in said(look(*folders, method={"name": "ace", "tau": 6}))
    assert "gamma" not in said(look(*folders, method="average"))


def test_a_stranger_and_shared_factors_are_warned_of(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    folders = [
        write_checkpoint(tmp_path / name, {"layers.0.weight": torch.randn(64, 64, generator=generator)})
        for name in ("base", "other")
    ]
    assert "expert other does not come from this base: cosine" in said(look(folders[0], folders[1:]))
    A = torch.randn(2, 64, generator=generator)
    adapters = [
        write_adapter(tmp_path / f"a{i}", {"layers.0": (A, torch.randn(64, 2, generator=generator))}) for i in range(2)
    ]
    assert "the adapters share A in all 1 layers" in said(look(folders[0], adapters))


# --- the command ---------------------------------------------------------------------------------------------


def test_the_command_prints_tables_or_json(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    base, experts = plain.save()
    words = ["inspect", "--base", base, *(word for path in experts for word in ("--expert", path)), "--method", "ace"]
    code, text, _ = run(capsys, *words)
    assert code == 0
    for phrase in (
        "stable rank",
        "cosine between the experts",
        "layers in conflict",
        "move furthest",
        "warning: ",
        "lose 42%",
    ):
        assert phrase in text
    code, text, _ = run(capsys, *words, "--json")
    table = json.loads(text)
    assert code == 0
    assert [expert["name"] for expert in table["experts"]] == ["e1", "e2", "e3"]
    assert table["experts"][0]["cosines"]["e1"] == pytest.approx(1)
    assert {layer["name"] for layer in table["layers"]} == set(MERGED)
    assert all(warning.keys() == {"what", "cure"} for warning in table["warnings"])
    assert run(capsys, *words, "--quiet") == (0, "", "")


def test_json_has_no_numbers_that_json_lacks(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    """An expert without an update has no direction, and a base of zeros no distance."""
    zeros = {name: 0 * value if value.is_floating_point() else value for name, value in plain.base.items()}
    base, frozen = (write_checkpoint(plain.root / name, zeros) for name in ("zeros", "frozen"))
    _, experts = plain.save()
    code, text, _ = run(capsys, "inspect", "--base", base, "--expert", frozen, "--expert", experts[0], "--json")
    first, second = json.loads(text)["experts"]
    assert code == 0
    assert (first["distance"], second["distance"], first["cosines"]["e1"], first["stable_rank"]) == (None,) * 4


def test_values_that_are_not_finite_are_named(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    plain.tuned[0]["layers.0.up.weight"][1, 2] = torch.inf
    base, experts = plain.save()
    result = run(capsys, "inspect", "--base", base, "--expert", experts[0])
    failed(result, 3, r"'layers\.0\.up\.weight' is inf at \[1, 2\]")


def test_what_a_merge_would_refuse_is_found_before_it(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is refused for what the tensors hold: by `inspect`, and by `plan` where that need not read them all."""
    strange, spelt = torch.Generator().manual_seed(9), {"lm_head.weight": plain.base["embed_tokens.weight"] + 1}
    config = {"tie_word_embeddings": True}
    cases = {
        "an integer": ({"position_ids": torch.arange(1, 6)}, r"integer tensor 'position_ids' differs", True),
        "a tied tensor": (spelt, r"should be tied but differ", True),
        "a head": ({"score.weight": torch.full((3, 6), torch.nan)}, r"'score\.weight' is nan", False),
        "a norm": ({"layers.0.norm.weight": torch.full((6,), torch.inf)}, r"'layers\.0\.norm\.weight' is inf", False),
    }
    base = write_checkpoint(plain.root / "base", plain.base, config)
    for case, (changes, said, by_plan) in cases.items():
        expert = write_checkpoint(plain.root / case, plain.tuned[0] | changes, config)
        with pytest.raises(acemerge.CheckpointError, match=said):
            acemerge.merge(base, [expert], "average", out=plain.root / "out")
        for command in ("inspect", "plan") if by_plan else ("inspect",):
            failed(run(capsys, command, "--base", base, "--expert", expert), 3, said)
    stranger = {n: torch.randn(v.shape, generator=strange) if v.ndim == 2 else v for n, v in plain.base.items()}
    expert = write_checkpoint(plain.root / "a stranger", stranger, config)
    failed(run(capsys, "plan", "--base", base, "--expert", expert), 3, "does not come from this base")
    assert run(capsys, "plan", "--base", base, "--expert", expert, "--force")[0] == 0


def test_a_kept_tensor_of_the_base_is_looked_at_too(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    plain.base["position_bias"] = torch.full((3,), torch.nan)
    base, experts = plain.save()
    for i, folder in enumerate(experts):
        write_checkpoint(folder, plain.tuned[i] | {"position_bias": torch.zeros(3)})
    recipe = plain.root / "recipe.yaml"
    rules = [{"match": "position_bias", "action": "base"}]
    recipe.write_text(json.dumps({"base": str(base), "experts": list(map(str, experts)), "rules": rules}))
    failed(run(capsys, "inspect", recipe), 3, r"'position_bias' is nan at \[0\]")
