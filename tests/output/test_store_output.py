"""Outputs in a store: the bytes of a folder's, finished when the manifest is there, gone on with from anywhere."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import PlainModel
from commands import failed, run
from hub_server import contents
from obstore import exceptions
from stores import S3, FaultyClient, obeyed

import acemerge
from acemerge.errors import AcemergeError, UnreachableError, UsageError, WriteError
from acemerge.output.manifest import load_manifest
from acemerge.output.verify import verify
from attacks.faulty import failing, faulty, unfaulty

OUT = "s3://bucket/out"
Models = tuple[Path, list[Path]]
OPTIONS = {"max_shard_size": 300, "method": "average"}


@pytest.fixture
def models(plain: PlainModel) -> Models:
    base, experts = plain.save()
    (base / "config.json").write_text("{}")
    return base, experts


@pytest.fixture
def local(models: Models, tmp_path: Path) -> dict[str, bytes]:
    """The output in a folder, but for its manifest."""
    acemerge.merge(*models, out=tmp_path / "local", **OPTIONS)
    found = contents(tmp_path / "local")
    del found["acemerge.json"]
    return found


def held(memory: FaultyClient, prefix: str = "out/") -> dict[str, bytes]:
    keys = [about["path"] for batch in memory.held.list(prefix) for about in batch]
    return {key.removeprefix(prefix): bytes(memory.held.get(key).bytes()) for key in keys}


def is_whole(memory: FaultyClient, local: dict[str, bytes]) -> bool:
    found = held(memory)
    return "acemerge.json" in found and {n: d for n, d in found.items() if n != "acemerge.json"} == local


# --- as a folder --------------------------------------------------------------------------------------------


def test_a_merge_from_s3_to_s3(
    s3: S3, models: Models, local: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    bucket = s3.bucket()
    base, *experts = (s3.put(folder, f"s3://{bucket}/{folder.name}") for folder in (models[0], *models[1]))
    out = f"s3://{bucket}/merged/out"
    words = ["--base", base, *(word for expert in experts for word in ("--expert", expert))]
    merge = ["merge", *words, "-o", out, "--method", "average", "--max-shard-size", "300"]
    code, said, errors = run(capsys, *merge)
    assert (code, errors) == (0, "")
    assert f"{out}: " in said
    assert f"acemerge evaluate {out} --tasks" in said
    found = s3.contents(out)
    manifest = found.pop("acemerge.json")
    assert {name: data for name, data in found.items() if name != "README.md"} == {
        name: data
        for name, data in local.items()
        if name != "README.md"  # the card names the models
    }
    assert b"testing" not in manifest
    assert run(capsys, "verify", out)[1].startswith(f"{out}: {len(found)} files, 6 tensors")
    failed(run(capsys, "merge", *words, "-o", out), 2, f"{out}: holds a finished merge; .* --overwrite")
    code, said, _ = run(
        capsys, "merge", *words, "-o", out, "--method", "average", "--max-shard-size", "300", "--resume"
    )
    assert (code, "nothing was left to do" in said) == (0, True)
    key = f"merged/out/{min(found)}"
    s3.client.put_object(Bucket=bucket, Key=key, Body=b"x" * len(found[min(found)]))
    failed(run(capsys, "verify", out), 3, "was altered since it was written")


def test_other_commands_take_addresses(s3: S3, models: Models, tmp_path: Path) -> None:
    from acemerge.extract import extract_lora

    bucket = s3.bucket()
    base, expert = (s3.put(folder, f"s3://{bucket}/{folder.name}") for folder in (models[0], models[1][0]))
    extract_lora(expert, base, 2, f"s3://{bucket}/lora")
    extract_lora(models[1][0], models[0], 2, tmp_path / "lora")
    name = "adapter_model.safetensors"
    assert s3.contents(f"s3://{bucket}/lora")[name] == (tmp_path / "lora" / name).read_bytes()
    merged = acemerge.merge(base, [f"s3://{bucket}/lora"], method="average")
    assert merged.manifest["adapters"]


def test_a_conversion(memory: FaultyClient, models: Models, capsys: pytest.CaptureFixture[str]) -> None:
    for name, data in contents(models[0]).items():
        memory.held.put(f"in/{name}", data)
    assert run(capsys, "convert", "gs://bucket/in", "gs://bucket/out", "--quiet") == (0, "", "")
    assert held(memory)["model.safetensors"] == contents(models[0])["model.safetensors"]


def test_a_page_to_look_at_is_written_to_this_machine(
    memory: FaultyClient, models: Models, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No browser opens what lies in a store."""
    monkeypatch.chdir(models[0].parent)
    words = ["--base", models[0], *(word for expert in models[1] for word in ("--expert", expert))]
    said = run(capsys, "merge", *words, "-o", OUT, "--method", "average")[1]
    assert f"\nlook: acemerge report {OUT} -o report.html, then open report.html\n" in said
    said = run(capsys, "report", OUT)[1]
    assert re.fullmatch(rf"{OUT}/report.html: .* kB, for a page on this machine add -o report.html\n", said)
    assert run(capsys, "report", OUT, "-o", "report.html")[1].endswith(" kB, opens in any browser\n")
    assert Path("report.html").read_bytes().startswith(b"<!doctype html>")


def test_what_is_in_the_way_is_said_before_any_work(
    memory: FaultyClient, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, data in contents(models[0]).items():
        memory.held.put(f"in/base/{name}", data)
    memory.held.put("used/mine.txt", b"mine")
    memory.held.put("foreign/model.safetensors", b"mine")
    memory.held.put("file", b"mine")
    before = held(memory, "")
    cases = {
        "s3://bucket/used": (UsageError, "is not empty"),
        "s3://bucket/file": (UsageError, "is a file"),
        "s3://bucket/in/base": (UsageError, "is the same folder as, inside or around the input"),
        "s3://bucket/in": (UsageError, "inside or around the input"),
        "s3://bucket/in/base/out": (UsageError, "inside or around the input"),
    }
    for out, (error, said) in cases.items():
        with pytest.raises(error, match=said):
            acemerge.merge("s3://bucket/in/base", models[1], out=out)
    with pytest.raises(UsageError, match="which no merge has written"):
        acemerge.merge(*models, out="s3://bucket/foreign", overwrite=True)
    with pytest.raises(UsageError, match="the output is in a store"):
        acemerge.merge(*models, out=OUT, push="org/name")
    assert held(memory, "") == before


def test_an_endpoint_without_tls_is_only_taken_where_it_is_allowed(
    s3: S3, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(UsageError, match=r"AWS_ENDPOINT_URL has no TLS.*; set AWS_ALLOW_HTTP=true"):
        acemerge.merge(*models, out=f"s3://{s3.bucket()}/out")


def test_a_bucket_that_takes_nothing(s3: S3, models: Models, memory: FaultyClient) -> None:
    """That is not there, or may only be read."""

    def read_only(call: str, key: str, do: Callable[[], Any]) -> Any:
        if call == "put":
            raise exceptions.PermissionDeniedError("status code: 403 <Code>AccessDenied</Code>")
        return do()

    memory.fault = read_only
    with pytest.raises(WriteError, match=r"s3://bucket/out/.*: access is refused \(AccessDenied\)"):
        acemerge.merge(*models, out=OUT)
    assert held(memory) == {}


def test_a_bucket_that_is_not_there(s3: S3, models: Models) -> None:
    with pytest.raises(WriteError, match="s3://no-such-bucket/out: there is no such bucket"):
        acemerge.merge(*models, out="s3://no-such-bucket/out")


def test_an_output_is_replaced_and_other_objects_are_not(
    memory: FaultyClient, models: Models, local: dict[str, bytes]
) -> None:
    acemerge.merge(*models, out=OUT, max_shard_size=200)
    memory.held.put("out/mine.txt", b"mine")
    acemerge.merge(*models, out=OUT, overwrite=True, **OPTIONS)
    assert held(memory).pop("mine.txt") == b"mine"
    memory.held.delete("out/mine.txt")
    assert is_whole(memory, local)


def test_a_failed_run_leaves_an_earlier_output_until_its_own_is_uploaded(
    memory: FaultyClient, plain: PlainModel, models: Models
) -> None:
    acemerge.merge(*models, out=OUT)
    before = held(memory)
    plain.tuned[0]["layers.0.up.weight"][0, 0] = float("nan")
    _, experts = plain.save()
    with pytest.raises(AcemergeError, match=r"layers\.0\.up\.weight"):
        acemerge.merge(models[0], experts, out=OUT, overwrite=True)
    assert held(memory) == before


# --- interrupted, and side by side --------------------------------------------------------------------------


def test_at_every_call_a_failure_leaves_nothing_finished_and_can_be_gone_on_with(
    memory: FaultyClient, models: Models, local: dict[str, bytes]
) -> None:
    """The store stops answering; `--resume` gives the same bytes, and uploads nothing twice that is there."""
    acemerge.merge(*models, out=OUT, **OPTIONS)
    total = len(memory.calls)
    assert is_whole(memory, local)
    told: list[tuple[bool, str]] = []
    for last in range(0, total, 3):
        for key in held(memory):
            memory.held.delete(f"out/{key}")
        memory.calls.clear()

        def silent(call: str, key: str, do: Callable[[], Any], last: int = last) -> Any:
            if len(memory.calls) > last:
                raise exceptions.GenericError("connection reset")
            return do()

        memory.fault = silent
        try:
            acemerge.merge(*models, out=OUT, **OPTIONS)
        except WriteError as failure:
            assert "acemerge.json" not in held(memory)
            told.append((bool(held(memory)), failure.cure.rpartition("then ")[2]))
        memory.fault = obeyed
        there = {name for name in held(memory) if f".acemerge.work/{name}" in held(memory)}
        memory.calls.clear()
        acemerge.merge(*models, out=OUT, resume=True, **OPTIONS)
        assert is_whole(memory, local)
        assert not there & {call.removeprefix("put out/") for call in memory.calls if call.startswith("put")}
    assert set(told) == {(False, "run again"), (True, "go on with --resume")}


@pytest.mark.parametrize("times", [1, 99])
def test_an_upload_that_the_store_lost_is_begun_again(
    memory: FaultyClient, models: Models, local: dict[str, bytes], times: int
) -> None:
    lost: list[str] = []

    def forgetful(call: str, key: str, do: Callable[[], Any]) -> Any:
        if call == "put" and key == "out/model-00002-of-00004.safetensors" and len(lost) < times:
            lost.append(key)
            raise FileNotFoundError("status code: 404 <Code>NoSuchUpload</Code>")
        return do()

    memory.fault = forgetful
    if times > 1:
        with pytest.raises(WriteError, match=r"safetensors: the store lost the upload; .*go on with --resume"):
            acemerge.merge(*models, out=OUT, **OPTIONS)
        memory.fault = obeyed
    acemerge.merge(*models, out=OUT, resume=times > 1, **OPTIONS)
    assert is_whole(memory, local)


@pytest.mark.parametrize("out", ["s3://bucket/out", "folder"])
def test_inputs_that_are_out_of_reach_for_a_while_cost_no_work(
    memory: FaultyClient, models: Models, local: dict[str, bytes], tmp_path: Path, out: str
) -> None:
    """The error says how to go on, and what was computed before is not computed again. Before the end, all inputs are
    looked at once more.
    """
    for model in (models[0], *models[1]):
        for name, data in contents(model).items():
            memory.held.put(f"in/{model.name}/{name}", data)
    base, *experts = (f"s3://bucket/in/{model.name}" for model in (models[0], *models[1]))
    place = out if "://" in out else tmp_path / out
    lost = {"gone": False}

    def silent(call: str, key: str, do: Callable[[], Any]) -> Any:
        if lost["gone"] and key.startswith("in/"):
            raise exceptions.GenericError("connection reset")
        return do()

    def progress(now: Any) -> None:
        lost["gone"] |= now.done > 2

    memory.fault = silent
    with pytest.raises(UnreachableError, match=r"does not answer; .*, then go on with --resume$"):
        acemerge.merge(base, experts, out=place, on_progress=progress, **OPTIONS)
    memory.fault = obeyed
    seen: list[Any] = []
    acemerge.merge(base, experts, out=place, resume=True, on_progress=seen.append, **OPTIONS)
    assert not seen
    found = held(memory) if place == out else contents(tmp_path / out)
    assert {name: found[name] for name in local if name.startswith("model")} == {
        name: data for name, data in local.items() if name.startswith("model")
    }


def test_a_full_disk_of_this_machine(memory: FaultyClient, models: Models, local: dict[str, bytes]) -> None:
    """Files wait here until they are uploaded: another address would not help."""

    def full(call: Any, *arguments: Any, **options: Any) -> Any:
        return (failing(errno.ENOSPC) if call is os.write else unfaulty)(call, *arguments, **options)

    cure = "free space, or set TMPDIR to another folder, then go on with --resume"
    with faulty(1, full, lasting=True), pytest.raises(WriteError, match="no space left on device") as failure:
        acemerge.merge(*models, out=OUT, **OPTIONS)
    assert failure.value.cure == cure
    acemerge.merge(*models, out=OUT, resume=True, **OPTIONS)
    assert is_whole(memory, local)


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_runs_on_one_address(memory: FaultyClient, models: Models, overwrite: bool) -> None:
    """The second runs within a call of the first: what is finished then is whole, and of one of them.

    Not within an upload: one that was begun lands when it does, whoever has taken the place by --overwrite since.
    """
    acemerge.merge(*models, out=OUT, **OPTIONS)
    calls, seen = list(memory.calls), set()
    for at in range(0, len(calls), 4):
        if overwrite and calls[at].startswith("put out/model"):
            continue
        for key in held(memory):
            memory.held.delete(f"out/{key}")
        memory.calls.clear()
        both: list[str] = []

        def beside(call: str, key: str, do: Callable[[], Any], at: int = at, both: list[str] = both) -> Any:
            if len(memory.calls) == at + 1:
                memory.fault = obeyed
                both.append(outcome(models, overwrite=overwrite, method="ties"))
            return do()

        memory.fault = beside
        both.append(outcome(models, method="average"))
        assert overwrite or both.count("done") == 1
        if "done" in both:
            assert verify(OUT)["recipe"]["method"]["name"] == ("ties" if both[0] == "done" else "average")
        else:
            assert "acemerge.json" not in held(memory)
        seen |= set(both)
    refused = {"another run has begun to write here"} if overwrite else {"another run has finished here"}
    assert refused <= seen


def outcome(models: Models, **options: Any) -> str:
    try:
        acemerge.merge(*models, out=OUT, max_shard_size=300, **options)
    except AcemergeError as failure:
        return failure.what
    return "done"


def test_a_killed_run_is_gone_on_with_elsewhere(
    s3: S3, models: Models, local: dict[str, bytes], tmp_path: Path
) -> None:
    """A process that is killed while it uploads its third file, and another that has nothing but the address."""
    bucket = s3.bucket()
    out = f"s3://{bucket}/out"
    program = (
        "import os, sys, acemerge\n"
        "from acemerge.checkpoints import objects\n"
        "upload, done = objects.upload, []\n"
        "def deadly(path, file):\n"
        "    done.append(path)\n"
        "    return upload(path, file) if len(done) < 3 else os.kill(os.getpid(), 9)\n"
        "objects.upload = deadly\n"
        "acemerge.merge(sys.argv[1], sys.argv[2:-1], out=sys.argv[-1], method='average', max_shard_size=300)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, *map(str, (models[0], *models[1])), out], check=False)
    assert killed.returncode == -9
    with pytest.raises(UsageError, match="holds an unfinished merge; if no run is at work there, add --resume"):
        acemerge.merge(*models, out=out, **OPTIONS)
    report = acemerge.merge(*models, out=out, resume=True, **OPTIONS)
    found = s3.contents(out)
    assert load_manifest(Path(out))["run"] == report.manifest["run"]
    del found["acemerge.json"]
    assert found == local
