"""Buffers such as attention masks, whose infinities are meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import load_folder, write_checkpoint
from commands import run

import acemerge
from acemerge.errors import CheckpointError
from acemerge.output.verify import verify

MASK = torch.full((8, 8), -torch.inf).triu(1)


def _models(root: Path, masks: list[torch.Tensor]) -> list[Path]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(8, 8, generator=generator)
    tuned = [base, *(base + 0.1 * torch.randn(8, 8, generator=generator) for _ in masks[1:])]
    return [
        write_checkpoint(root / f"m{i}", {"layers.0.up.weight": W, "attn_mask": mask, "odd.mask": mask[0].clone()})
        for i, (W, mask) in enumerate(zip(tuned, masks, strict=True))
    ]


@pytest.mark.parametrize("method", ["ace", "average", "ties", "emr", "slerp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_that_all_models_have_is_the_bases(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, *experts = _models(tmp_path, [MASK.to(dtype)] * 2)
    report = acemerge.merge(base, experts, method, tmp_path / "out")
    merged = load_folder(tmp_path / "out")
    assert torch.equal(merged["attn_mask"], MASK.to(dtype))
    assert torch.equal(merged["odd.mask"], MASK[0].to(dtype))
    assert merged["layers.0.up.weight"].isfinite().all()
    assert report.tensors["attn_mask"]["infinite"] is True
    verify(tmp_path / "out")


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 0.0])
def test_other_infinities_are_refused(value: float, tmp_path: Path) -> None:
    other = MASK.clone()
    other[3, 5] = value
    for masks in ([MASK, MASK, other], [other, MASK, MASK], [torch.zeros(8, 8), MASK, MASK]):
        base, *experts = _models(tmp_path / f"{len(list(tmp_path.iterdir()))}", masks)
        with pytest.raises(CheckpointError, match=r"(attn_mask|odd.mask)' is (-?inf|nan) at"):
            acemerge.merge(base, experts, "average")


def test_what_looks_at_models_passes_masks_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A broken weight that base and expert share looks the same: `inspect` says so, as errors promise."""
    base, *experts = _models(tmp_path, [MASK] * 3)
    words = [word for path in experts for word in ("--expert", path)]
    code, said, errors = run(capsys, "inspect", "--base", base, *words)
    assert code == 0, errors
    assert "the same in all models, which stay as the base has them: attn_mask and 1 more" in said
    assert run(capsys, "merge", "--base", base, *words, "-o", tmp_path / "out", "--report", "--quiet") == (0, "", "")
    assert "Cosines, conflict and spectra are missing" not in (tmp_path / "out/report.html").read_text()
    weights = load_folder(base)
    weights["layers.0.up.weight"][2, 3] = torch.inf
    write_checkpoint(base, weights)
    code, said, errors = run(capsys, "inspect", "--base", base, "--expert", base)
    assert code == 0, errors
    assert "layers.0.up.weight and 2 more" in said
    assert "of weights fetch the models again" in said
    assert run(capsys, "analyse", "--base", base, "--expert", base, "-o", tmp_path / "seen", "--quiet") == (0, "", "")
