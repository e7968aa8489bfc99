"""Checkpoints written anew as safetensors: the same values, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import ANY

import pytest
import torch
from builders import PlainModel, inputs_for, load_folder, make_model, write_checkpoint, write_sharded
from commands import failed, run
from safetensors.torch import load_file
from torch import Tensor

import acemerge
from acemerge import api
from acemerge.engine.convert import open_conversion
from acemerge.engine.run_options import RunOptions
from acemerge.output.verify import verify

TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
CONFIG = {"model_type": "nobody's", "x": [1, 2]}


def every_type() -> dict[str, Tensor]:
    """A tensor of each type with its awkward values: a negative zero, a subnormal number, the largest one."""
    tensors: dict[str, Tensor] = {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3)}
    for dtype in TYPES:
        values = torch.arange(12).reshape(3, 4).to(dtype)
        if dtype.is_floating_point:
            limits = torch.finfo(dtype)
            values[0] = torch.tensor([-0.0, limits.smallest_normal / 2, limits.max, limits.min], dtype=dtype)
        tensors[f"t.{str(dtype).removeprefix('torch.')}"] = values
    return tensors


def same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape)
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), theirs[name].reshape(-1).view(torch.uint8)), name


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Every type in two shards, with the files that belong to a model and some that do not."""
    items = list(every_type().items())
    folder = write_sharded(tmp_path / "in", [dict(items[::2]), dict(items[1::2])])
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text('{"version":  "1.0"}')
    (folder / "modeling.py").write_text("raise SystemExit")
    return folder


@pytest.mark.parametrize("options", [[], ["--resume"]])
def test_parts_of_a_merge_are_not_continued(
    options: list[str], plain: PlainModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """That the rule is another than theirs is not what is wrong."""
    base, experts = plain.save()
    acemerge.merge(base, experts, "average", tmp_path / "out", shard="1/2", max_shard_size=300)
    said = run(capsys, "convert", base, tmp_path / "out", *options)
    failed(
        said, 2, "out: holds parts of an unfinished merge, which no conversion continues; .*add --overwrite to remove"
    )


def test_shards_become_one_file(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    code, printed, errors = run(capsys, "convert", shards, out)
    assert (code, errors) == (0, "")
    assert "9 tensors" in printed
    same_bits(every_type(), load_file(out / "model.safetensors"))
    names = {"model.safetensors", "config.json", "tokenizer.json", "README.md", "acemerge.json"}
    assert {file.name for file in out.iterdir()} == names
    assert all((out / name).read_bytes() == (shards / name).read_bytes() for name in ("config.json", "tokenizer.json"))


def test_the_manifest_says_what_was_done(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "convert", shards, tmp_path / "out", "--quiet") == (0, "", "")
    manifest = verify(tmp_path / "out")
    assert [entry["path"] for entry in manifest["inputs"]] == [str(shards)]
    assert len(manifest["inputs"][0]["files"]) == 2
    assert manifest["experts"] == []
    assert {(record["rule"], record["status"]) for record in manifest["tensors"].values()} == {("base", "kept")}
    assert "# `in` as safetensors" in (tmp_path / "out/README.md").read_text()


def test_heads_beside_a_merged_model_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = write_checkpoint(tmp_path / "in/heads", {"score.weight": torch.ones(2, 3)}) / "model.safetensors"
    write_checkpoint(tmp_path / "in", every_type())
    (tmp_path / "in/heads/notes.txt").write_text("not ours")
    assert run(capsys, "convert", tmp_path / "in", tmp_path / "out") == (0, ANY, "")
    assert [file.name for file in (tmp_path / "out/heads").iterdir()] == ["model.safetensors"]
    assert (tmp_path / "out/heads/model.safetensors").read_bytes() == head.read_bytes()
    assert "heads/model.safetensors" in verify(tmp_path / "out")["outputs"]
    head.write_bytes(b"broken")
    failed(run(capsys, "convert", tmp_path / "in", tmp_path / "other"), 3, "heads/model.safetensors: ")


def test_one_file_becomes_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "in", every_type())
    assert run(capsys, "convert", folder, tmp_path / "out", "--max-shard-size", "100B", "--quiet") == (0, "", "")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    same_bits(every_type(), load_folder(tmp_path / "out"))
    assert run(capsys, "convert", tmp_path / "out", tmp_path / "back", "--quiet") == (0, "", "")
    same_bits(every_type(), load_file(tmp_path / "back/model.safetensors"))


def test_a_pickled_model_with_tied_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `torch.save` of a state dict leaves it: the tied head is there twice."""
    model = make_model("qwen3")
    folder = tmp_path / "in"
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    failed(run(capsys, "convert", folder, tmp_path / "out"), 3, "only pickled weights")
    assert run(capsys, "convert", folder, tmp_path / "out", "--allow-pickle", "--quiet") == (0, "", "")
    expected = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    same_bits(expected, load_file(tmp_path / "out/model.safetensors"))
    loaded = type(model).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs_for("qwen3")).logits, model(**inputs_for("qwen3")).logits)


def test_a_pickled_file_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names that share memory but that no configuration ties stay two tensors."""
    tensors = every_type()
    tensors["same"] = tensors["t.float16"]
    torch.save(tensors, tmp_path / "weights.pt")
    assert run(capsys, "convert", tmp_path / "weights.pt", tmp_path / "out", "--allow-pickle", "--quiet") == (0, "", "")
    same_bits(tensors, load_file(tmp_path / "out/model.safetensors"))
    torch.save({"turned": torch.ones(2, 3).mT}, tmp_path / "weights.pt")
    result = run(capsys, "convert", tmp_path / "weights.pt", tmp_path / "turned", "--allow-pickle")
    failed(result, 3, "tensor 'turned' is not stored row by row; save it again")


def test_tied_tensors_that_differ_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {"model.embed_tokens.weight": torch.ones(4, 3), "lm_head.weight": torch.zeros(4, 3)}
    folder = write_checkpoint(tmp_path / "in", tensors, {"tie_word_embeddings": True})
    failed(
        run(capsys, "convert", folder, tmp_path / "out"),
        3,
        f"error: {folder}: .*and 'lm_head.weight' should be tied but differ; set tie_word.* in its config.json$",
    )
    assert not (tmp_path / "out").exists()


def test_what_is_not_finite_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "in", {"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan])})
    failed(
        run(capsys, "convert", folder, tmp_path / "out"),
        3,
        rf"error: {folder}: tensor 'b' is nan at \[1\]; fetch it again",
    )
    assert not (tmp_path / "out").exists()


def test_the_output_is_treated_as_a_merges(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    failed(run(capsys, "convert", shards, shards), 2, "is the same folder as")
    failed(run(capsys, "convert", tmp_path / "nothing", out), 3, "no such folder; .*or a Hub id")
    assert run(capsys, "convert", shards, out, "--quiet")[0] == 0
    failed(run(capsys, "convert", shards, out), 2, "holds a finished merge; choose another folder or add --overwrite")
    assert run(capsys, "convert", shards, out, "--resume", "--quiet")[0] == 0
    assert run(capsys, "convert", shards, out, "--overwrite", "--quiet")[0] == 0


def test_an_interrupted_conversion_is_gone_on_with(plain: PlainModel, tmp_path: Path) -> None:
    folder, _ = plain.save()
    out = tmp_path / "out"

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.run_opened(open_conversion(str(folder), out, RunOptions()), out, RunOptions(), interrupt)
    assert not (out / "acemerge.json").exists()
    again = RunOptions(resume=True)
    api.run_opened(open_conversion(str(folder), out, again), out, again)
    same_bits(plain.base, load_file(out / "model.safetensors"))
    assert verify(out)
