"""Checkpoints in fp8: refused with the cure, or by --dequantize read as the values that they stand for."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import PlainModel, load_folder, make_model, perturb, write_checkpoint
from safetensors.torch import load_file
from torch import Tensor

import acemerge
from acemerge.api import run_opened
from acemerge.checkpoints.float8 import dequantised
from acemerge.checkpoints.folder import open_checkpoint
from acemerge.engine.convert import open_conversion
from acemerge.engine.run_options import RunOptions
from acemerge.errors import CheckpointError
from acemerge.output.verify import verify
from acemerge.planning import pieces

BLOCK = (4, 3)  # no side of the plain model's layers is a multiple of both
FP8: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}
NAME = "layers.0.up.weight"
STORED = (NAME, "layers.0.down.weight", "score.weight")


def _in_fp8(weights: dict[str, Tensor], block: tuple[int, int], suffix: str = "_scale_inv") -> dict[str, Tensor]:
    """Linear layers in e4m3 with a scale for each block, ragged at the ends, as DeepSeek's and Qwen3's are."""
    stored = {}
    for name, W in weights.items():
        if W.ndim != 2 or "embed" in name or "head" in name:
            stored[name] = W
            continue
        rows, columns = (-(-side // size) for side, size in zip(W.shape, block, strict=True))
        scale, values = torch.empty(rows, columns), torch.empty(W.shape, dtype=torch.float8_e4m3fn)
        for i, j in itertools.product(range(rows), range(columns)):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scale[i, j] = W[part].float().abs().max() / 448
            values[part] = (W[part].float() / scale[i, j]).to(values.dtype)
        stored |= {name: values, name + suffix: scale}
    return stored


def _plain(stored: dict[str, Tensor], block: tuple[int, int]) -> dict[str, Tensor]:
    """The oracle: every fp8 entry times the scale of its block, entry by entry."""
    weights = {}
    for name, value in stored.items():
        if value.dtype == torch.float8_e4m3fn:
            scale, W = stored[name + "_scale_inv"], torch.empty(value.shape)
            for i, j in itertools.product(*map(range, value.shape)):
                W[i, j] = value[i, j].double() * scale[i // block[0], j // block[1]].double()
            weights[name] = W
        elif not name.endswith("_scale_inv"):
            weights[name] = value
    return weights


def _folders(plain: PlainModel) -> tuple[list[Path], list[Path]]:
    """Base and experts in fp8, and the same values in float32."""
    plain.tuned[0]["score.weight"] = torch.ones(3, 6)
    stored, expected = [], []
    for i, weights in enumerate([plain.base, *plain.tuned]):
        in_fp8 = _in_fp8(weights, BLOCK)
        config = {"torch_dtype": "bfloat16", "quantization_config": FP8}
        stored.append(write_checkpoint(plain.root / f"m{i}", in_fp8, config))
        expected.append(write_checkpoint(plain.root / "plain" / f"m{i}", _plain(in_fp8, BLOCK), {}))
    return stored, expected


SHAPES = [  # weight, scale beside it, entries for each scale
    ((8, 6), (1, 1), (8, 6)),
    ((8, 6), (8, 1), (1, 6)),
    ((8, 6), (1, 6), (8, 1)),
    ((8, 6), (2, 2), (4, 3)),
    ((7, 8), (2, 3), (4, 3)),
    ((3, 7, 8), (3, 2, 3), (1, 4, 3)),
    ((3, 7, 8), (3, 1, 8), (1, 7, 1)),
]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize(("shape", "of_scale", "repeats"), SHAPES, ids=str)
def test_values_are_those_of_the_formula(
    shape: tuple[int, ...], of_scale: tuple[int, ...], repeats: tuple[int, ...], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(shape, generator=generator).to(dtype)
    scale = torch.rand(of_scale, generator=generator)
    exact = torch.empty(shape, dtype=torch.float64)
    for at in itertools.product(*map(range, shape)):
        exact[at] = stored[at].double() * scale[tuple(i // r for i, r in zip(at, repeats, strict=True))].double()
    assert torch.equal(dequantised(stored, scale, repeats), exact.float())
    for first, end in ((0, 2), (1, 3)):  # a range of rows, which knows where it begins
        assert torch.equal(dequantised(stored[first:end], scale, repeats, first), exact[first:end].float())


@pytest.mark.parametrize(("method", "piece"), [("ace", 1 << 23), ("average", 1 << 23), ("average", 64)])
def test_a_merge_is_that_of_the_values(
    plain: PlainModel, method: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in ranges of rows that do not begin with a block."""
    monkeypatch.setattr(pieces, "_PIECE", piece)
    stored, expected = _folders(plain)
    report = acemerge.merge(stored[0], stored[1:], method, out=plain.root / "out", dequantize=True)
    acemerge.merge(expected[0], expected[1:], method, out=plain.root / "expected")
    merged, exact = load_folder(plain.root / "out"), load_folder(plain.root / "expected")
    assert merged.keys() == exact.keys()
    for name, value in exact.items():
        assert torch.equal(merged[name], value.bfloat16() if name in STORED else value), name
    assert json.loads((plain.root / "out" / "config.json").read_text()) == {"torch_dtype": "bfloat16"}
    about = "2 tensors of F8_E4M3, 2 with scales"
    assert report.manifest["dequantized"] == {
        "base": about, "expert m1": "3 tensors of F8_E4M3, 3 with scales", "expert m2": about, "expert m3": about,
    }  # fmt: skip
    assert any("rounded by up to a sixteenth" in warning for warning in report.manifest["warnings"])
    head = load_file(plain.root / "out" / "heads" / "m1.safetensors")["score.weight"]
    assert torch.equal(head, torch.ones(3, 6, dtype=torch.bfloat16))
    verify(plain.root / "out")


def test_fp8_beside_plain_models_and_in_a_type_that_is_asked_for(plain: PlainModel) -> None:
    stored, expected = _folders(plain)
    for folders, out in (([expected[0], stored[1]], "out"), (expected[:2], "expected")):
        acemerge.merge(folders[0], folders[1:], out=plain.root / out, dequantize=True)
    merged, exact = load_folder(plain.root / "out"), load_folder(plain.root / "expected")
    assert all(torch.equal(merged[name], value) for name, value in exact.items())
    acemerge.merge(stored[0], stored[1:2], out=plain.root / "half", dequantize=True, dtype="float16")
    assert torch.equal(load_folder(plain.root / "half")[NAME], exact[NAME].half())


def test_a_conversion_writes_the_values(plain: PlainModel) -> None:
    stored, expected = _folders(plain)
    options = RunOptions(dequantize=True)
    run_opened(open_conversion(str(stored[1]), plain.root / "out", options), plain.root / "out", options)
    values, converted = load_folder(expected[1]), load_folder(plain.root / "out")
    assert converted.keys() == values.keys()
    assert all(torch.equal(converted[n], v.bfloat16() if n in STORED else v) for n, v in values.items())


def test_transformers_reads_the_same_values(tmp_path: Path) -> None:
    """A tiny Qwen3 in blocks of 128 x 128, beside what transformers makes of it."""
    import transformers

    model = perturb(make_model("qwen3", hidden_size=256, intermediate_size=384, head_dim=64), 1).bfloat16()
    model.save_pretrained(tmp_path)
    settings = {**FP8, "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": settings}
    write_checkpoint(tmp_path, _in_fp8(load_folder(tmp_path), (128, 128)), config)
    asked = transformers.FineGrainedFP8Config(weight_block_size=(128, 128), dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=asked).state_dict()
    ours = open_checkpoint(tmp_path, dequantize=True)
    assert len(ours.scales) == 14
    for name in ours.tensors:
        assert torch.equal(ours.read(name).bfloat16(), theirs[name]), name


COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}


@pytest.mark.parametrize("by_row", [True, False])
def test_scales_of_compressed_tensors(plain: PlainModel, by_row: bool) -> None:
    """For each row or for all of a weight; what belongs to activations is left out."""
    W = plain.base[NAME]
    scale = (W.abs().amax(1, keepdim=True) if by_row else W.abs().max().reshape(1)) / 448
    values = (W / scale).to(torch.float8_e4m3fn)
    of_activations = {"layers.0.up.input_scale": torch.ones(1), "layers.0.attn.k_scale": torch.ones(1)}
    stored = plain.base | {NAME: values, NAME + "_scale": scale} | of_activations
    folder = write_checkpoint(plain.root / "m", stored, {"quantization_config": COMPRESSED})
    checkpoint = open_checkpoint(folder, dequantize=True)
    assert checkpoint.tensors.keys() == plain.base.keys()
    assert torch.equal(checkpoint.read(NAME), (values.double() * scale.double()).float())


def test_a_single_number_and_an_empty_tensor(plain: PlainModel) -> None:
    stored = {"one": torch.tensor(3.0), "none": torch.zeros(0, 6)}
    in_fp8 = {name: value.to(torch.float8_e4m3fn) for name, value in stored.items()}
    scales = {"one_scale_inv": torch.tensor(0.5), "none_scale_inv": torch.zeros(0, 2)}
    folder = write_checkpoint(plain.root / "m", in_fp8 | scales, {"quantization_config": FP8})
    checkpoint = open_checkpoint(folder, dequantize=True)
    assert checkpoint.read("one").item() == 1.5
    assert checkpoint.read("none").shape == (0, 6)


def test_fp8_without_scales_is_its_own_value(plain: PlainModel) -> None:
    """As some save it to spare room: the configuration says nothing of it."""
    values = plain.base[NAME].to(torch.float8_e5m2)
    folder = write_checkpoint(plain.root / "m", plain.base | {NAME: values})
    with pytest.raises(CheckpointError, match="has the type F8_E5M2, which cannot be merged; add --dequantize"):
        open_checkpoint(folder)
    assert torch.equal(open_checkpoint(folder, dequantize=True).read(NAME), values.float())


def test_without_being_asked_for_it_is_refused(plain: PlainModel) -> None:
    stored, _ = _folders(plain)
    with pytest.raises(CheckpointError, match=r"m0/config\.json: the checkpoint is quantised \(fp8\); .*--dequantize"):
        acemerge.merge(stored[0], stored[1:])


@pytest.mark.parametrize(
    ("method", "cure"),
    [
        ("bitsandbytes", r"call dequantize\(\)"),
        ("mxfp4", r"Mxfp4Config\(dequantize=True\), .*save_original_format=False"),
        ("gptq", "merge the checkpoint that it was made from"),
        ("awq", "merge the checkpoint that it was made from"),
        ({}, "merge the checkpoint that it was made from"),
    ],
)
def test_other_quantisations_are_refused_with_the_cure(plain: PlainModel, method: Any, cure: str) -> None:
    folder = write_checkpoint(plain.root / "m", plain.base, {"quantization_config": {"quant_method": method}})
    with pytest.raises(CheckpointError, match=rf"config\.json: the checkpoint is quantised \(.*\); .*{cure}"):
        open_checkpoint(folder, dequantize=True)


BAD: dict[str, tuple[dict[str, Tensor | None], dict[str, Any], str]] = {
    "no scale": ({NAME + "_scale_inv": None}, {}, f"'{NAME}' is in fp8 and its scale is missing"),
    "a scale of other blocks": ({NAME + "_scale_inv": torch.ones(3, 2)}, {}, "has a scale that does not fit"),
    "a scale of one side": ({NAME + "_scale_inv": torch.ones(3)}, {}, "has a scale that does not fit"),
    "a scale of integers": ({NAME + "_scale_inv": torch.ones(2, 2, dtype=torch.int32)}, {}, "that does not fit"),
    "blocks that nobody told": ({}, {"weight_block_size": None}, "has a scale that does not fit"),
    "a scale of no side": ({NAME + "_scale_inv": torch.ones(2, 2, 2)}, {}, "that does not fit"),
    "blocks of nothing": ({}, {"weight_block_size": [0, 3]}, "has a scale that does not fit"),
    "a scale of a plain tensor": ({"layers.0.norm.weight_scale": torch.ones(1)}, {}, "that is not in fp8"),
    "packed integers": ({"layers.0.q.weight_packed": torch.zeros(2, 2, dtype=torch.int32)}, {}, "is no plain fp8"),
    "rotated weights": ({}, {"transform_config": {"u": 1}}, "its weights are rotated"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(plain: PlainModel, case: str) -> None:
    tensors, settings, message = BAD[case]
    stored = {n: v for n, v in (_in_fp8(plain.base, BLOCK) | tensors).items() if v is not None}
    folder = write_checkpoint(plain.root / "m", stored, {"quantization_config": FP8 | settings})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder, dequantize=True)


def test_values_that_are_not_finite_are_refused_by_name(plain: PlainModel) -> None:
    stored, _ = _folders(plain)
    damaged = _in_fp8(plain.tuned[1], BLOCK)
    damaged[NAME + "_scale_inv"][1, 0] = float("nan")
    write_checkpoint(stored[2], damaged)
    with pytest.raises(CheckpointError, match=rf"expert m2: tensor '{NAME}' is nan at \[4, 0\]"):
        acemerge.merge(stored[0], stored[1:], dequantize=True)
