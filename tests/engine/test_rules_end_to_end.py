"""Rules that need more than one tensor's task vectors: global thresholds, chance, masks, the base itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import PlainModel, load_folder, write_checkpoint
from conformance import DATA_FREE, RULES
from torch import Tensor

import acemerge
from acemerge.errors import CheckpointError, UsageError
from acemerge.output.packed_masks import pack, unpack
from acemerge.output.verify import verify
from acemerge.recipes.recipe import make_recipe

BY_RULE = ("layers.0.up.weight", "layers.0.down.weight")


def out_of(plain: PlainModel, folder: str = "out", **options: object) -> dict[str, Tensor]:
    base, experts = plain.save()
    acemerge.merge(base, experts, out=plain.root / folder, **options)
    return load_folder(plain.root / folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
def test_ties_trims_over_all_tensors_that_it_merges(tmp_path: Path, dtype: torch.dtype, compute_dtype: str) -> None:
    plain = PlainModel(tmp_path, dtype)
    plain.tuned = [t | {BY_RULE[0]: (t[BY_RULE[0]] + 0.2).to(dtype)} for t in plain.tuned]  # larger than the others
    merged = out_of(plain, method="ties", keep=0.3, compute_dtype=compute_dtype)
    deltas = [[(t[name].double() - plain.base[name].double()) for name in BY_RULE] for t in plain.tuned]
    trimmed = []
    for of_expert in deltas:
        flat = torch.cat([D.flatten() for D in of_expert]).float().abs()
        lowest = flat.sort(descending=True).values[int(0.3 * len(flat)) - 1]
        trimmed.append([D * (D.float().abs() >= lowest) for D in of_expert])
    for i, name in enumerate(BY_RULE):
        parts = torch.stack([expert[i] for expert in trimmed])
        agree = parts * parts.sum(0).sign() > 0
        mean = (parts * agree).sum(0) / agree.sum(0).clamp(min=1)
        torch.testing.assert_close(merged[name], (plain.base[name].double() + mean).to(dtype))


def test_a_share_is_taken_over_the_tensors_that_keep_it(plain: PlainModel) -> None:
    """Two shares in one recipe: each has thresholds of its own, and `trim: tensor` needs none."""
    alone = out_of(plain, "alone", method={"name": "ties", "trim": "tensor"})
    rules = [{"match": "*.down.*", "method": {"name": "ties", "keep": 0.5}}]
    together = out_of(plain, "together", method="ties", rules=rules)
    assert torch.equal(alone[BY_RULE[0]], together[BY_RULE[0]])  # the only tensor with the default share
    half = out_of(plain, "half", method={"name": "ties", "trim": "tensor", "keep": 0.5})
    assert torch.equal(half[BY_RULE[1]], together[BY_RULE[1]])


@pytest.mark.parametrize("keep", [0.2, 0.2000000001])
def test_a_rule_keeps_its_share_of_its_own_tensors_whatever_another_keeps(plain: PlainModel, keep: float) -> None:
    """Where the tensors' sizes are far apart one pool would keep nothing of the smaller."""
    for expert in plain.tuned:
        expert[BY_RULE[1]] = plain.base[BY_RULE[1]] + 1e-3 * (expert[BY_RULE[1]] - plain.base[BY_RULE[1]])
    rules = [{"match": BY_RULE[1], "method": {"name": "ties", "keep": keep}}]
    apart = out_of(plain, "apart", method="ties", rules=rules)
    alone = out_of(plain, "alone", method={"name": "ties", "trim": "tensor"})
    assert torch.equal(apart[BY_RULE[1]], alone[BY_RULE[1]])
    assert not torch.equal(apart[BY_RULE[1]], plain.base[BY_RULE[1]])


@pytest.mark.parametrize("method", DATA_FREE)
def test_workers_and_shards_do_not_change_a_byte(plain: PlainModel, method: str) -> None:
    plain.tuned = plain.tuned[: RULES[method].experts]
    one = out_of(plain, "one", method=method)
    many = out_of(plain, "many", method=method, workers=4, max_shard_size="200B")
    assert all(torch.equal(value.view(torch.uint8), many[name].view(torch.uint8)) for name, value in one.items())


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della"])
def test_chance_depends_on_seed_name_and_expert_alone(plain: PlainModel, method: str) -> None:
    whole = out_of(plain, "whole", method=method)
    assert not torch.equal(whole[BY_RULE[0]], out_of(plain, "other", method=method, seed=1)[BY_RULE[0]])
    for model in (plain.base, *plain.tuned):  # other tensors, in another order
        for name in ("layers.0.down.weight", "embed_tokens.weight"):
            del model[name]
        model["a.first.weight"] = torch.zeros(4, 4)
        model["layers.0.up.weight"] = model.pop("layers.0.up.weight")
    assert torch.equal(whole[BY_RULE[0]], out_of(plain, "fewer", method=method)[BY_RULE[0]])


def test_slerp_is_between_the_weights_themselves(plain: PlainModel) -> None:
    plain.tuned = plain.tuned[:1]
    merged = out_of(plain, method="slerp", t=0.25)
    for name in BY_RULE:
        W0, W1 = plain.base[name].double(), plain.tuned[0][name].double()
        angle = torch.arccos((W0 * W1).sum() / W0.norm() / W1.norm())
        expected = (torch.sin(0.75 * angle) * W0 + torch.sin(0.25 * angle) * W1) / torch.sin(angle)
        torch.testing.assert_close(merged[name], expected.float())


def test_too_many_experts_and_bad_weights_are_refused_before_anything_is_read(plain: PlainModel) -> None:
    base, experts = plain.save()
    for method, weights, message in [
        ("slerp", [1, 1, 1], "at most 2 experts"),
        ("actmat", [1, -1, 1], "negative weight"),
        ("average", [1, -2, 1], "sum to zero"),
    ]:
        with pytest.raises(UsageError, match=message):
            acemerge.api.open_recipe(
                make_recipe(
                    {
                        "base": str(base),
                        "method": method,
                        "experts": [{"model": str(e), "weight": w} for e, w in zip(experts, weights, strict=True)],
                    }
                ),
                None,
                acemerge.api.RunOptions(),
            )


# --- emr: masks beside the model -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 7), (16,), (1,), (2, 3, 5)], ids=str)
def test_masks_pack_eight_to_a_byte(shape: tuple[int, ...]) -> None:
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(0)) > 0
    packed = pack(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == ((mask.numel() + 7) // 8,)
    assert torch.equal(unpack(packed, shape), mask)


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_emr_writes_a_mask_per_expert_and_gives_the_expert_back(plain: PlainModel, scale: float) -> None:
    merged = out_of(plain, method="emr", scale=scale)
    assert sorted(f.name for f in (plain.root / "out" / "masks").iterdir()) == [f"e{i}.safetensors" for i in (1, 2, 3)]
    verify(plain.root / "out")
    assert "`masks/`" in (plain.root / "out" / "README.md").read_text()
    for i, tuned in enumerate(plain.tuned, 1):
        found = acemerge.expert_weights(plain.root / "out", plain.root / "base", f"e{i}")
        own = {name: tuned[name] - plain.base[name] for name in BY_RULE}
        unified = {n: (merged[n] - plain.base[n]) / scale for n in BY_RULE}
        kept = {n: (own[n] * unified[n] > 0) * unified[n] for n in BY_RULE}
        rescale = sum(D.abs().sum() for D in own.values()) / sum(D.abs().sum() for D in kept.values())
        for name in BY_RULE:
            torch.testing.assert_close(found[name], plain.base[name] + rescale * kept[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(found["layers.0.norm.weight"], merged["layers.0.norm.weight"])
    with pytest.raises(UsageError, match="did you mean `e1`"):
        acemerge.expert_weights(plain.root / "out", plain.root / "base", "e11")


def test_masks_are_part_of_the_published_output(plain: PlainModel) -> None:
    out_of(plain, method="emr")
    mask = plain.root / "out" / "masks" / "e2.safetensors"
    data = bytearray(mask.read_bytes())
    data[-1] ^= 1
    mask.write_bytes(data)
    with pytest.raises(CheckpointError, match="altered"):
        verify(plain.root / "out")
    out_of(plain, method="average", overwrite=True)
    assert not (plain.root / "out" / "masks").exists()


def test_emr_handles_an_expert_that_was_skipped(plain: PlainModel) -> None:
    plain.tuned[1][BY_RULE[0]][0, 0] = float("nan")
    out_of(plain, method="emr", nonfinite="skip-expert")
    found = acemerge.expert_weights(plain.root / "out", plain.root / "base", "e2")
    assert torch.equal(found[BY_RULE[0]], plain.base[BY_RULE[0]])
    assert not torch.equal(found[BY_RULE[1]], plain.base[BY_RULE[1]])


def test_conv1d_weights_are_trimmed_and_masked_as_they_are_stored(tmp_path: Path) -> None:
    """A transposed layer gives the same thresholds, masks and elementwise results."""
    shared = {"weight": torch.randn(6, 8, generator=torch.Generator().manual_seed(1))}
    moved = [{"weight": shared["weight"] + 0.1 * torch.randn(6, 8)} for _ in range(3)]
    for kind, config in (("plain", None), ("gpt2", {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1})):
        name = "h.0.mlp.c_proj.weight"
        folders = [
            write_checkpoint(tmp_path / f"{kind}{i}", {name: model["weight"]}, config)
            for i, model in enumerate((shared, *moved))
        ]
        for method in ("ties", "emr", "consensus"):
            acemerge.merge(folders[0], folders[1:], out=tmp_path / f"{kind}-{method}", method=method)
    for method in ("ties", "emr", "consensus"):
        ours, theirs = (load_folder(tmp_path / f"{kind}-{method}") for kind in ("plain", "gpt2"))
        torch.testing.assert_close(ours, theirs)
    masks = [(tmp_path / f"{kind}-emr" / "masks" / f"{kind}1.safetensors").read_bytes() for kind in ("plain", "gpt2")]
    assert masks[0] == masks[1]
