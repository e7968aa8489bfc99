"""The work behind the page: one piece at a time, told of, stopped, and what it leaves."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import load_folder
from ui_choices import picked

from acemerge.engine.execute import OnProgress, Progress
from acemerge.engine.run_options import RunOptions
from acemerge.errors import AcemergeError, CheckpointError, UsageError, shortage_of
from acemerge.ui import steps, view
from acemerge.ui.folders import Folders
from acemerge.ui.runner import Runner, State


def finished(runner: Runner) -> State:
    runner.wait()
    assert runner.state is not None
    return runner.state


def test_a_merge_of_the_page_has_the_bytes_of_the_recipe_and_a_report(shelf: Folders) -> None:
    from acemerge.api import run_recipe

    choice = picked("e1", "e2", rule="task_arithmetic", weights="1, 0.5")
    runner = Runner()
    runner.start("merge", steps.merge(choice, shelf, "./models/new/merged", overwrite=False, force=False))
    state = finished(runner)
    assert state.phase == "done"
    assert runner.results == {1: state.result}
    assert state.result.page == Path("models/new/merged/report.html").resolve()
    assert state.result.page.read_text().startswith("<!doctype html>")
    run_recipe(choice.recipe(shelf), Path("same"), RunOptions())
    expected, got = load_folder(Path("same")), load_folder(Path("models/new/merged"))
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert "./models/e1" in Path("models/new/merged/README.md").read_text()
    assert str(Path.cwd()) not in Path("models/new/merged/README.md").read_text()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "output folder: is missing; write for example ./models/merged"),
        ("/tmp", "/tmp: lies outside the folders named at start"),
        ("./models/../outside/merged", "lies outside the folders named at start"),
    ],
)
def test_an_output_outside_is_refused_before_any_work(out: str, message: str, shelf: Folders) -> None:
    with pytest.raises(UsageError, match=message):
        steps.merge(picked("e1"), shelf, out, overwrite=True, force=True)


def test_an_output_that_is_there_stays_unless_it_is_to_be_replaced(shelf: Folders) -> None:
    taken = Path("models/taken")
    taken.mkdir()
    (taken / "model.safetensors").write_bytes(b"mine")
    runner = Runner()
    runner.start("merge", steps.merge(picked("e1"), shelf, "models/taken", overwrite=False, force=False))
    state = finished(runner)
    assert state.phase == "failed"
    assert state.error == f"{taken.resolve()}: is not empty; choose another folder or add --overwrite"
    assert (taken / "model.safetensors").read_bytes() == b"mine"
    runner.start("merge", steps.merge(picked("e1"), shelf, "models/taken", overwrite=True, force=False))
    assert "which no merge has written" in finished(runner).error
    assert (taken / "model.safetensors").read_bytes() == b"mine"
    (taken / "model.safetensors").unlink()
    for overwrite in (False, True):  # the second in the place of the first
        runner.start("merge", steps.merge(picked("e1"), shelf, "models/taken", overwrite=overwrite, force=False))
        assert finished(runner).phase == "done"
    assert state.number + 3 == finished(runner).number


def test_a_merge_that_is_stopped_leaves_nothing_behind(shelf: Folders) -> None:
    runner, work = Runner(), steps.merge(picked("e1"), shelf, "models/merged", overwrite=False, force=False)

    def stopping(on_progress: OnProgress) -> Any:
        def stop_first(progress: Progress) -> None:
            runner.stop()
            on_progress(progress)

        return work(stop_first)

    runner.start("merge", stopping)
    assert finished(runner).phase == "stopped"
    assert not Path("models/merged").exists()
    assert runner.results == {}


def test_a_stop_while_the_report_is_written_keeps_the_merge(shelf: Folders) -> None:
    runner, work = Runner(), steps.merge(picked("e1"), shelf, "models/merged", overwrite=False, force=False)

    def stopping(on_progress: OnProgress) -> Any:
        def stop_in_report(progress: Progress) -> None:
            if progress.stage == "report":
                runner.stop()
            on_progress(progress)

        return work(stop_in_report)

    runner.start("merge", stopping)
    state = finished(runner)
    assert state.phase == "done"
    assert state.result.page is None
    assert {path.name for path in Path("models/merged").iterdir()} >= {"acemerge.json", "model.safetensors"}
    assert not any(path.name.startswith("report") for path in Path("models/merged").iterdir())
    assert "The report was not finished." in view.state(state)


def test_one_piece_of_work_runs_at_a_time_and_tells_how_far_it_is() -> None:
    runner, reached, go_on = Runner(), threading.Event(), threading.Event()

    def work(on_progress: OnProgress) -> str:
        on_progress(Progress("inspect", "a", 1, 2, 10, 20))
        reached.set()
        go_on.wait(60)
        on_progress(Progress("report", "b", 2, 2, 20, 20))
        return "done with"

    runner.start("inspect", work)
    assert reached.wait(60)
    state = runner.state
    assert state is not None
    assert (state.phase, state.is_busy, state.progress) == ("running", True, Progress("inspect", "a", 1, 2, 10, 20))
    with pytest.raises(UsageError, match="inspect is running; wait for it, or stop it"):
        runner.start("merge", work)
    go_on.set()
    after = finished(runner)
    assert (after.phase, after.result, after.number) == ("done", "done with", 1)
    assert after.seconds <= state.seconds  # the second stage has just begun


def test_the_last_of_every_kind_is_known_also_of_what_failed_before_it_began() -> None:
    runner = Runner()
    runner.refuse("merge", UsageError("base", "none is picked", "pick one"), ["nothing"])
    runner.start("plan", lambda _: "planned", ["e1"])
    finished(runner)
    failed, planned = runner.last("merge"), runner.last("plan")
    assert failed is not None
    assert (failed.phase, failed.error, failed.of) == ("failed", "base: none is picked; pick one", ["nothing"])
    assert planned is runner.state
    assert (planned.number, planned.result, planned.of) == (2, "planned", ["e1"])
    assert runner.last("inspect") is None


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (CheckpointError("a\nb", "is\x1b[31m bad", "mend it"), r"a\nb: is\x1b[31m bad; mend it"),
        (MemoryError(), str(shortage_of(MemoryError()))),
        (ValueError("one\ntwo"), "internal: ValueError: one two; see the terminal, and report it"),
    ],
)
def test_a_failure_is_one_line(failure: Exception, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    def work(_: OnProgress) -> None:
        raise failure

    runner = Runner()
    runner.start("plan", work)
    state = finished(runner)
    assert (state.phase, state.error) == ("failed", message)
    assert ("Traceback" in capsys.readouterr().err) == (not isinstance(failure, AcemergeError | MemoryError))
