"""What programs rely on: --json and --log-format, as docs/machines.md says, and a library that is silent."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from builders import PlainModel
from commands import failed, run
from examples import ROOT
from task_builders import save_family, sentences, write_tasks, write_tsv

import acemerge
from acemerge.checkpoints import files
from acemerge.cli.app import terminated
from acemerge.errors import UsageError

PAGE = (ROOT / "docs/machines.md").read_text()


def keys_of(command: str) -> set[str]:
    """What the page says that a command's object has."""
    table = re.split(rf"^`{command}`[^\n]*:\n", PAGE, flags=re.MULTILINE)[1].strip().split("\n\n")[0]
    return {key for row in table.splitlines()[2:] for key in re.findall(r"`(\w+)`", row.split("|")[1])}


def answer(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    code, printed, errors = run(capsys, *words, "--json")
    assert (code, errors) == (0, "")
    assert printed.count("\n") == 1
    found = json.loads(printed)
    assert isinstance(found, dict)
    return found


def arguments(plain: PlainModel) -> list[object]:
    base, experts = plain.save()
    return ["--base", base, *(word for folder in experts for word in ("--expert", folder))]


def test_merge_and_verify_answer_as_documented(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    words, out = arguments(plain), plain.root / "out"
    found = answer(capsys, "merge", *words, "-o", out)
    assert found.keys() == keys_of("merge")
    assert (found["rules"], found["was_complete"]) == ({"average": 3, "kron_auto": 2, "base": 1}, False)
    assert Path(found["manifest"]).is_file()
    again = answer(capsys, "merge", *words, "-o", out, "--resume")
    assert again == found | {"was_complete": True}
    verified = answer(capsys, "verify", out)
    assert verified.keys() == keys_of("verify")
    assert (verified["tensors"], verified["bytes"]) == (6, found["bytes"])


def test_conversions_and_adapters_answer_alike(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    base, (first, *_) = plain.save()
    converted = answer(capsys, "convert", base, plain.root / "new")
    assert converted.keys() == keys_of("merge")
    assert converted["adapter"] is None
    adapter = answer(capsys, "extract-lora", first, "--base", base, "--rank", 2, "-o", plain.root / "lora")
    assert adapter.keys() == keys_of("merge")
    assert adapter["adapter"]["layers"] == 2


def test_plan_answers_as_documented(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "plan", *arguments(plain))
    assert found.keys() == keys_of("plan")
    assert {tensor["name"] for tensor in found["tensors"]} == plain.base.keys()
    assert found["tensors"][1].keys() == {"name", "shape", "role", "rule", "reason"}


def test_methods_answer_as_documented(capsys: pytest.CaptureFixture[str]) -> None:
    one = answer(capsys, "methods", "auto")
    assert one.keys() == keys_of("methods NAME")
    assert one["recommended"]
    rules = answer(capsys, "methods")["rules"]
    assert [rule["name"] for rule in rules] == list(acemerge.METHODS)
    assert one in rules
    assert sum(rule["recommended"] for rule in rules) == 1


def test_scores_answer_as_documented(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_family(tmp_path, {"math": 3})
    capsys.readouterr()
    write_tsv(tmp_path / "math.tsv", {"s": sentences(6, seed=1), "y": [i % 3 for i in range(6)]})
    task = {"kind": "classification", "name": "math", "data": "math.tsv", "text": "s", "label": "y"}
    write_tasks(tmp_path, task | {"expert": "./math"}, resamples=100)
    words = ["--tasks", tmp_path / "tasks.yaml", "--log-format", "json"]
    code, printed, errors = run(capsys, "evaluate", tmp_path / "math", *words, "--json")
    assert code == 0, errors
    found = json.loads(printed)
    assert found.keys() == keys_of("evaluate")
    assert {json.loads(line)["event"] for line in errors.splitlines()} == {"progress"}


def test_an_error_leaves_stdout_empty(capsys: pytest.CaptureFixture[str]) -> None:
    failed(run(capsys, "verify", "nowhere", "--json"), 3, "no such folder")


def test_events_are_lines_of_json(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    for model in plain.tuned:
        model["layers.0.extra.weight"] = model["layers.0.up.weight"].clone()
    words = [*arguments(plain), "--method", "ace", "-o", plain.root / "out", "--log-format", "json"]
    code, _, errors = run(capsys, "merge", *words)
    assert code == 0
    events = [json.loads(line) for line in errors.splitlines()]
    names = [event["event"] for event in events]
    assert names[:4] == ["started"] + ["warning"] * 3
    assert set(names[4:-2]) == {"progress"}
    assert names[-2:] == ["warning", "finished"]  # how far it went is known at the end
    documented = {
        row.split("|")[1].strip(" `"): row.split("|")[2] for row in PAGE.splitlines() if row.startswith("| `")
    }
    for event in events:
        further = event.keys() - {"time", "level", "event", "message"}
        assert further == set(re.findall(r"`(\w+)`", documented[event["event"]]))
    code, printed, errors = run(capsys, "merge", *words)
    assert (code, printed) == (2, "")
    error = json.loads(errors)
    assert (error["event"], error["exit_code"]) == ("error", 2)
    assert error["message"].startswith(f"{plain.root / 'out'}: holds a finished merge; choose another folder")
    assert json.loads(run(capsys, "merge", "--log-format=json")[2])["exit_code"] == 2
    assert run(capsys, "merge", *words, "--overwrite", "--quiet") == (0, "", "")


def test_a_merge_in_parts(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*arguments(plain), "-o", plain.root / "out", "--max-shard-size", "400B"]
    failed(run(capsys, "merge", *words, "--shard", "4/3"), 2, r"--shard: '4/3' is no part of a merge; write K/N")
    code, printed, _ = run(capsys, "merge", *words, "--shard", "1/2", "--json")
    part = json.loads(printed)
    assert (code, part["part"], part["manifest"]) == (0, "1/2", None)
    failed(run(capsys, "merge", *words, "--finish"), 2, "part 2/2 is missing; run the merge with --shard 2/2")
    code, printed, errors = run(capsys, "merge", *words, "--shard", "2/2", "--log-format", "json")
    assert code == 0
    assert re.match(r"part 2/2 took \d\.\d s: \d tensors in model-0000\d", printed)
    *_, last = map(json.loads, errors.splitlines())
    assert (last["event"], last["part"], last["out"]) == ("part", "2/2", str(plain.root / "out"))
    code, printed, _ = run(capsys, "merge", *words, "--finish", "--json")
    whole = json.loads(printed)
    assert (code, whole["part"], whole["manifest"]) == (0, None, str(plain.root / "out/acemerge.json"))
    assert part.keys() == whole.keys()
    assert whole["tensors"] > part["tensors"] > 0


def test_the_library_is_silent_and_logs(
    plain: PlainModel, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for model in plain.tuned:
        model["layers.0.extra.weight"] = model["layers.0.up.weight"].clone()
    base, experts = plain.save()
    told: list[Any] = []
    acemerge.merge(base, experts, out=plain.root / "out", on_progress=told.append)
    assert capfd.readouterr() == ("", "")
    assert told[-1].done == told[-1].total == 6
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "acemerge"):
        acemerge.merge(base, experts, out=plain.root / "again")
    assert {record.name.split(".")[0] for record in caplog.records} == {"acemerge"}
    assert [record.levelname for record in caplog.records][:4] == ["INFO"] + ["WARNING"] * 3
    assert sum(record.levelname == "DEBUG" for record in caplog.records) == len(told)


def test_what_is_wrong_with_on_progress_is_said(plain: PlainModel) -> None:
    base, experts = plain.save()
    with pytest.raises(UsageError, match="on_progress: 'loud' cannot be called; give a function of one argument"):
        acemerge.merge(base, experts, on_progress="loud")


class _Interrupting:
    """Sends a signal where Python drops what its handler raises: while an object is finalized."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self._number)
        _wait_for_it()


def _wait_for_it() -> None:
    """A signal's handler runs when the interpreter gets to it."""
    for _ in range(6000):
        time.sleep(0.01)


@pytest.mark.parametrize("finalizing", [False, True])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_have_their_exit_codes(
    plain: PlainModel,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
    finalizing: bool,
) -> None:
    """In the middle of the work: what was written stays, and is gone on with."""
    words, out = [*arguments(plain), "-o", plain.root / "out"], plain.root / "out"
    write, sent = files.write_all, []

    def interrupted(descriptor: int, data: bytes | memoryview, path: Path) -> None:
        if not sent and path.name.endswith(".partial"):
            sent.append(number)
            if finalizing:
                _Interrupting(number)
            else:
                os.kill(os.getpid(), number)
            _wait_for_it()
        write(descriptor, data, path)

    # Tests that a shell started in the background ignore SIGINT, as it told them to.
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: terminated}
    before = {each: signal.signal(each, handler) for each, handler in handlers.items()}
    monkeypatch.setattr(files, "write_all", interrupted)
    what = {130: "interrupted", 143: "terminated"}[code]
    failed(run(capsys, "merge", *words), code, f"{what}: nothing unfinished was published; .* --resume to go on")
    assert list(out.glob("*.partial"))
    assert run(capsys, "merge", *words, "--resume")[0] == 0
    code, printed, _ = run(capsys, "merge", *words, "--resume")
    assert code == 0
    assert re.search("6 tensors, .* all as written: the merge was complete, nothing was left to do", printed)
    for each, handler in before.items():
        signal.signal(each, handler)
