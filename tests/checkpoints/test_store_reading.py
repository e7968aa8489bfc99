"""Models read from a store: by ranges, never whole, the same bytes; and every fault of the store survived or told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import PlainModel, write_sharded
from commands import failed, run
from hashes import stored_hashes, tensors_read
from hub_server import contents
from obstore import exceptions
from stores import KEY, S3, SECRET, FaultyClient

import acemerge
from acemerge.checkpoints import files
from acemerge.checkpoints.folder import open_checkpoint
from acemerge.errors import AcemergeError, CheckpointError


def put(memory: FaultyClient, folder: Path, prefix: str) -> str:
    for name, data in contents(folder).items():
        memory.held.put(f"{prefix}/{name}", data)
    return f"s3://bucket/{prefix}"


# --- the same bytes -----------------------------------------------------------------------------------------


def test_a_merge_from_s3_is_the_merge_of_folders(
    plain: PlainModel, s3: S3, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """An expert in shards, read with workers; the manifest differs in paths and times alone."""
    base, *experts = plain.save()[0], *plain.save()[1]
    items = list(plain.tuned[0].items())
    experts[0] = write_sharded(plain.root / "sharded", [dict(items[:3]), dict(items[3:])])
    bucket = s3.bucket()
    there = [s3.put(folder, f"s3://{bucket}/models/{folder.name}") for folder in (base, *experts)]
    options = {"max_shard_size": 300, "workers": 2}
    local = acemerge.merge(base, experts, out=tmp_path / "local", **options)
    remote = acemerge.merge(there[0], there[1:], out=tmp_path / "remote", **options)
    weights = [name for name in local.manifest["outputs"] if name.startswith("model")]
    assert {n: local.manifest["outputs"][n] for n in weights} == {n: remote.manifest["outputs"][n] for n in weights}
    assert [entry["files"] for entry in local.manifest["inputs"]] == [e["files"] for e in remote.manifest["inputs"]]
    assert [entry["path"] for entry in remote.manifest["inputs"]] == there
    secret = (tmp_path / "remote/acemerge.json").read_text()
    assert KEY not in secret
    assert SECRET not in secret


def test_headers_alone_are_read_of_weights(plain: PlainModel, memory: FaultyClient) -> None:
    """A plan reads the first bytes of each file, whatever lies behind."""
    big = {f"layers.{i}.weight": torch.ones(512, 256) for i in range(4)}
    from builders import write_checkpoint

    address = put(memory, write_checkpoint(plain.root / "big", big), "big")
    read = []

    def watched(name: str, key: str, call: Callable[[], Any]) -> Any:
        result = call()
        if name == "get":
            read.append(result.range)
        return result

    memory.fault = watched
    opened = open_checkpoint(Path(address))
    assert set(opened.tensors) == set(big)
    assert sum(end - start for start, end in read) <= 64 << 10
    assert torch.equal(opened.read("layers.3.weight"), big["layers.3.weight"])


def test_a_single_file_and_a_prefix_with_a_slash(plain: PlainModel, memory: FaultyClient) -> None:
    address = put(memory, plain.save()[0], "deep/base")
    assert open_checkpoint(Path(f"{address}/model.safetensors")).tensors.keys() == plain.base.keys()
    manifest = acemerge.merge(f"{address}/", [address]).manifest
    assert manifest["inputs"][0]["path"] == address


def test_what_is_not_there_is_said_in_one_line(s3: S3, capsys: pytest.CaptureFixture[str]) -> None:
    bucket = s3.bucket()
    failed(run(capsys, "plan", "--base", f"s3://{bucket}/no", "--expert", "e"), 3, f"s3://{bucket}/no: no such folder")
    result = run(capsys, "plan", "--base", "s3://no-such-bucket/x", "--expert", "e")
    failed(result, 3, "s3://no-such-bucket/x: there is no such bucket")
    assert SECRET not in result[2]


def test_without_obstore_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    from acemerge.checkpoints import objects

    monkeypatch.setitem(sys.modules, "obstore.store", None)
    objects.forget_stores()
    failed(run(capsys, "plan", "--base", "gs://bucket/x", "--expert", "e"), 2, r"pip install 'acemerge\[cloud\]'")


def test_another_scheme_goes_by_fsspec(plain: PlainModel, tmp_path: Path) -> None:
    import fsspec

    base, experts = plain.save()
    system = fsspec.filesystem("memory")
    for folder in (base, experts[0]):
        system.put(str(folder), f"/models/{folder.name}", recursive=True)
    merged = acemerge.merge("memory://models/base", ["memory://models/e1"], out=tmp_path / "out")
    local = acemerge.merge(base, experts[:1], out=tmp_path / "local")
    assert merged.manifest["outputs"]["model.safetensors"] == local.manifest["outputs"]["model.safetensors"]


# --- faults -------------------------------------------------------------------------------------------------

PASSING = {
    "500": exceptions.GenericError("Server returned status code: 500 Internal Server Error"),
    "503": exceptions.GenericError("status code: 503: <Code>SlowDown</Code>"),
    "reset": exceptions.GenericError("connection reset by peer"),
    "timed out": exceptions.GenericError("operation timed out"),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_tried_again(plain: PlainModel, memory: FaultyClient, name: str) -> None:
    """Every call of a merge fails twice in a row."""
    base, experts = plain.save()
    there = [put(memory, folder, folder.name) for folder in (base, *experts)]
    failures: dict[str, int] = {}

    def twice(call: str, key: str, do: Callable[[], Any]) -> Any:
        failures[f"{call} {key}"] = failures.get(f"{call} {key}", 0) + 1
        if failures[f"{call} {key}"] % 3:
            raise PASSING[name]
        return do()

    memory.fault = twice
    merged = acemerge.merge(there[0], there[1:])
    assert len(failures) >= 8
    assert [r.rule for r in merged.records.values()] == [r.rule for r in acemerge.merge(base, experts).records.values()]


def test_a_body_that_ends_early_is_asked_for_again(plain: PlainModel, memory: FaultyClient) -> None:
    address = put(memory, plain.save()[0], "base")
    seen: list[str] = []

    class Short:
        def __init__(self, data: bytes) -> None:
            self.data = data

        def bytes(self) -> bytes:
            return self.data[:-1]

    def cut(call: str, key: str, do: Callable[[], Any]) -> Any:
        result = do()
        seen.append(key)
        return Short(bytes(result.bytes())) if call == "get" and seen.count(key) % 2 else result

    memory.fault = cut
    opened = open_checkpoint(Path(address))
    assert all(torch.equal(opened.read(name), plain.base[name]) for name in plain.base)


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (PASSING["503"], r"the store answers 503 SlowDown"),
        (PASSING["reset"], r"the store does not answer"),
        (
            exceptions.PermissionDeniedError(f"403 <Code>AccessDenied</Code> {KEY}"),
            r"access is refused \(AccessDenied\)",
        ),
        (exceptions.GenericError(f"status code: 400 <Code>ExpiredToken</Code> {KEY}"), r"credentials are out of date"),
        (exceptions.UnauthenticatedError(SECRET), r"access is refused \(no credentials\)"),
    ],
)
def test_what_does_not_pass_is_one_line(
    plain: PlainModel, memory: FaultyClient, failure: Exception, said: str, tmp_path: Path
) -> None:
    """From any call on, within a bound of calls, with nothing published and no secret told. What is kept of a merge, it
    says how to go on with.
    """
    base, experts = plain.save()
    there = [put(memory, folder, folder.name) for folder in (base, *experts)]
    acemerge.merge(there[0], there[1:])
    total = len(memory.calls)
    for first in range(0, total, 5):
        memory.calls.clear()

        def broken(call: str, key: str, do: Callable[[], Any], first: int = first) -> Any:
            if len(memory.calls) > first:
                raise failure
            return do()

        memory.fault, out = broken, tmp_path / f"out-{first}"
        with pytest.raises(AcemergeError, match=said) as told:
            acemerge.merge(there[0], there[1:], out=out)
        assert KEY not in str(told.value)
        assert SECRET not in str(told.value)
        assert len(memory.calls) <= first + 60
        assert not (out / "acemerge.json").exists()
        assert out.exists() == told.value.cure.endswith("go on with --resume")


def test_a_stale_listing_is_found_out(plain: PlainModel, memory: FaultyClient) -> None:
    """Names that are not there any more, and names that are missing."""
    items = list(plain.base.items())
    address = put(memory, write_sharded(plain.root / "sharded", [dict(items[:3]), dict(items[3:])]), "base")
    memory.held.delete("base/model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="in the index but not in the folder"):
        open_checkpoint(Path(address))

    def stale(call: str, key: str, do: Callable[[], Any]) -> Any:
        result = do()
        if call == "list_with_delimiter":
            gone = {**result["objects"][0], "path": "base/model-00002-of-00002.safetensors"}
            return {**result, "objects": [*result["objects"], gone]}
        return result

    memory.fault = stale
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors: no such object"):
        open_checkpoint(Path(address))


def test_an_object_that_is_replaced_during_the_run(plain: PlainModel, memory: FaultyClient, tmp_path: Path) -> None:
    """At every call: the run is of the one object or of the other, or it is refused; never of both."""
    base, experts = plain.save()
    there = [put(memory, folder, folder.name) for folder in (base, *experts)]
    old = contents(experts[1])["model.safetensors"]
    new = old[:-1] + bytes([old[-1] ^ 1])
    acemerge.merge(there[0], there[1:], out=tmp_path / "first")
    total, outcomes = len(memory.calls), []
    versions = {frozenset(stored_hashes(data).items()): name for data, name in ((old, "old"), (new, "new"))}

    for at in range(0, total, 2):
        memory.held.put("e2/model.safetensors", old)
        memory.calls.clear()

        def replacing(call: str, key: str, do: Callable[[], Any], at: int = at) -> Any:
            if len(memory.calls) == at + 1:
                memory.held.put("e2/model.safetensors", new)
            return do()

        memory.fault = replacing
        out = tmp_path / f"out-{at}"
        try:
            merged = acemerge.merge(there[0], there[1:], out=out)
            outcomes.append(versions[frozenset(tensors_read(merged.manifest)[2].items())])
        except CheckpointError as failure:
            told = str(failure)
            outcomes.append("refused" if "e2/model.safetensors: changed during the run" in told else told)
        assert out.exists() == (outcomes[-1] != "refused")
    # Before it is opened, while it is read, after the last look.
    assert outcomes == sorted(outcomes, key=["new", "refused", "old"].index)
    assert outcomes.count("refused") > len(outcomes) / 3


def test_what_ends_too_early_is_an_error(plain: PlainModel, memory: FaultyClient) -> None:
    address = Path(put(memory, plain.save()[0], "base"))
    handle = files.open_for_reading(address / "model.safetensors")
    size = files.fingerprint(address / "model.safetensors")[0]
    with pytest.raises(CheckpointError, match="10 bytes too early"):
        files.read_into(handle, [memoryview(bytearray(size + 10))], 0, address)


# --- what is damaged there ----------------------------------------------------------------------------------


def _cut(memory: FaultyClient, key: str) -> None:
    memory.held.put(key, bytes(memory.held.get(key).bytes())[:-8])


DAMAGE = {
    "cut": ("model.safetensors", _cut, "truncated or has bytes appended: upload it again"),
    "configuration": ("config.json", _cut, "not valid JSON .*; upload the file again"),
    "lfs": (
        "model.safetensors",
        lambda memory, key: memory.held.put(key, b"version https://git-lfs.github.com/spec/v1\noid sha256:00"),
        "run git lfs pull in its repository, and upload the file itself",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_damaged_in_a_store_is_uploaded_again(kind: str, plain: PlainModel, memory: FaultyClient) -> None:
    """Fetching it again would give the same."""
    name, damage, cure = DAMAGE[kind]
    base, expert = put(memory, plain.save()[0], "base"), put(memory, plain.save()[1][0], "expert")
    memory.held.put("expert/config.json", b'{"model_type": "bert", "vocab_size": 11}')
    damage(memory, f"expert/{name}")
    with pytest.raises(CheckpointError, match=cure) as refusal:
        acemerge.merge(base, [expert], "average", force=True)
    assert refusal.value.where.startswith("s3://bucket/expert")
