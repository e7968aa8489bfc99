"""What is behind the page of `acemerge ui`: folders, choices, work, what is shown, and who may ask."""

from __future__ import annotations

import asyncio
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import PlainModel, load_folder, write_adapter, write_checkpoint
from commands import failed, run

from acemerge.engine.execute import OnProgress, Progress
from acemerge.engine.opening import RunOptions, open_recipe
from acemerge.errors import AcemergeError, CheckpointError, UsageError
from acemerge.inspection.survey import survey
from acemerge.methods import METHODS
from acemerge.methods.about import parameters, summary
from acemerge.recipes.recipe import load_recipe, make_recipe
from acemerge.ui import steps, view
from acemerge.ui.choice import Choice, rules
from acemerge.ui.folders import Folders, Listing
from acemerge.ui.guard import Guard
from acemerge.ui.runner import Runner, State, line

HOSTILE = "<img src=x onerror=alert(1)>${alert(2)}{{alert(3)}}"


@pytest.fixture
def shelf(plain: PlainModel, monkeypatch: pytest.MonkeyPatch) -> Folders:
    """The folder `models` with a base and three experts, and `outside` beside it."""
    monkeypatch.chdir(plain.root)
    plain.root = plain.root / "models"
    plain.save()
    write_checkpoint(Path("outside"), plain.base)
    return Folders([Path("models")])


def picked(*experts: str, **more: Any) -> Choice:
    return Choice("./models/base", [f"./models/{name}" for name in experts], **more)


# --- folders -------------------------------------------------------------------------------------------------


def test_checkpoints_are_found_at_any_depth_by_the_names_of_recipes(shelf: Folders) -> None:
    weights = {"w": torch.ones(4, 4)}
    write_checkpoint(Path("models/deep/er"), weights, {"model_type": "gpt2"})
    write_adapter(Path("models/lora"), {"layers.0.up": (torch.ones(1, 6), torch.ones(8, 1))})
    write_checkpoint(Path("models/.cache/hidden"), weights)
    Path("models/empty").mkdir()
    listing = shelf.find()
    kinds = {found.name: found.kind for found in listing.found}
    plain = {f"./models/{name}": "" for name in ("base", "e1", "e2", "e3")}
    assert kinds == plain | {"./models/deep/er": "gpt2", "./models/lora": "LoRA"}
    sizes = {found.name: found.nbytes for found in listing.found}
    assert sizes["./models/deep/er"] == Path("models/deep/er/model.safetensors").stat().st_size
    assert listing.passed_over == ()
    assert [found.name for found in Folders([Path()]).find().found if "out" in found.name] == ["./outside"]


def test_what_leads_outside_is_neither_listed_nor_opened(shelf: Folders) -> None:
    Path("models/link").symlink_to(Path("outside").resolve())
    Path("models/within").symlink_to(Path("models/e1").resolve())
    Path("models/half").mkdir()
    Path("models/half/model.safetensors").symlink_to(Path("outside/model.safetensors").resolve())
    listing = shelf.find()
    assert {found.name for found in listing.found} == {f"./models/{name}" for name in ("base", "e1", "e2", "e3")}
    assert len(listing.passed_over) == 2
    assert all("outside" in line for line in listing.passed_over)
    for name in ("./outside", "models/../outside", "./models/link", "/etc", "../..", "models/link/new"):
        with pytest.raises(UsageError, match="outside the folders named at start"):
            shelf.inside(name)
    with pytest.raises(CheckpointError):
        shelf.inside("models/\0")
    assert shelf.inside(" ./models/within ") == Path("models/e1").resolve()
    assert shelf.inside("models/new/one") == Path("models").resolve() / "new/one"


def test_weights_behind_a_link_of_a_cache_are_refused_where_the_cache_was_not_named(shelf: Folders) -> None:
    """Of a snapshot that was named alone, the blobs lie outside."""
    snapshot = Path("models--org--m/snapshots/abc")
    blobs = Path("models--org--m/blobs")
    blobs.mkdir(parents=True)
    shutil.copytree("models/base", snapshot)
    (snapshot / "model.safetensors").rename(blobs / "123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    choice = Choice(str(snapshot), ["./models/e1"])
    with pytest.raises(UsageError, match="blobs/123: lies outside"):
        steps.open_choice(choice, Folders([snapshot, Path("models")]))
    assert steps.open_choice(choice, Folders([Path()])).plan.jobs
    assert "lies outside" in Folders([snapshot]).find().passed_over[0]


def test_a_folder_that_is_not_there_is_an_error_and_one_that_is_named_twice_is_looked_at_once(shelf: Folders) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        Folders([Path("models"), Path("nowhere")])
    assert Folders([Path("models"), Path("models")]).find() == shelf.find()
    assert len(Folders([Path(), Path("models")]).find().found) == 5


def test_a_damaged_checkpoint_is_passed_over_with_a_reason(shelf: Folders) -> None:
    Path("models/e1/config.json").write_text("[]")
    listing = shelf.find()
    assert len(listing.found) == 3
    assert listing.passed_over[0].startswith(str(Path("models/e1/config.json").resolve()))


def test_the_command_says_what_is_missing(
    shelf: Folders, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed(run(capsys, "ui", "models", "nowhere"), 3, "nowhere: no such folder; name folders")
    monkeypatch.setitem(sys.modules, "gradio", None)
    failed(run(capsys, "ui", "models"), 2, r"the page needs gradio, .*; pip install 'acemerge\[ui\]'")


# --- choices -------------------------------------------------------------------------------------------------


def test_the_recipe_on_the_page_is_the_recipe_that_is_run(shelf: Folders) -> None:
    choice = picked("e1", "e2", rule="ties", weights="1, 0.5", values={"keep": "0.30", "trim": "tensor", "scale": ""})
    text = choice.yaml(shelf)
    assert text == (
        "method:\n  name: ties\n  keep: 0.3\n  trim: tensor\nbase: ./models/base\n"
        "experts:\n- ./models/e1\n- model: ./models/e2\n  weight: 0.5\n"
    )
    Path("recipe.yaml").write_text(text)
    opened = [open_recipe(r, None, RunOptions()) for r in (load_recipe(Path("recipe.yaml"), {}), choice.recipe(shelf))]
    assert opened[0].plan.jobs == opened[1].plan.jobs


@pytest.mark.parametrize("rule", rules())
def test_every_rule_takes_its_own_defaults_as_they_are_shown(rule: str, shelf: Folders) -> None:
    """Typed into a field they are text, chosen from a menu they are values."""
    shown = {p.name: p.default if p.choices or p.default is None else str(p.default) for p in parameters(METHODS[rule])}
    assert picked("e1", rule=rule, values=shown).content(shelf)["method"] == {"name": rule}


def test_what_a_rule_says_of_itself() -> None:
    found = {p.name: p for p in parameters(METHODS["ace"])}
    assert list(found) == ["eps", "tau", "k_frac", "ablation", "scale"]
    assert found["eps"].default == 1e-5
    assert found["eps"].meaning == "ridge on every second moment"
    assert found["ablation"].choices == ("E1", "E2", "E3", "E4")
    assert {p.name: p.choices for p in parameters(METHODS["mergekit_sum"])}["vote"] == (False, True)
    assert summary(METHODS["ace"]).startswith("ACE-Merging, exactly as published")
    assert "\n" not in summary(METHODS["ace"])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(None, ["./models/e1"]), "base: none is picked; pick"),
        (picked(), "experts: none is picked; pick"),
        (picked("e1", weights="one"), "weights: 'one' are no numbers; write"),
        (picked("e1", weights="1 2"), "weights: 2 weights for 1 experts; give one for each"),
        (picked("e1", weights="nan"), "page: 'experts.0.ExpertSpec.weight'|page: 'experts.0.weight'"),
        (picked("e1", values={"eps": "much"}), "method 'ace', parameter 'eps': .* not 'much'; see"),
        (picked("e1", rule="nothing"), "method 'nothing': no such rule; "),
        (Choice("./outside", ["./models/e1"]), "./outside: lies outside the folders named at start; use one inside"),
        (picked("../outside"), "./models/../outside: lies outside"),
    ],
)
def test_a_wrong_choice_is_one_line(choice: Choice, message: str, shelf: Folders) -> None:
    with pytest.raises(UsageError, match=message) as failure:
        choice.recipe(shelf)
    assert "\n" not in line(failure.value)


# --- work ----------------------------------------------------------------------------------------------------


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
    assert finished(runner).phase == "done"
    assert state.number + 1 == finished(runner).number


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
        go_on.wait(10)
        on_progress(Progress("report", "b", 2, 2, 20, 20))
        return "done with"

    runner.start("inspect", work)
    reached.wait(10)
    state = runner.state
    assert state is not None
    assert (state.phase, state.is_busy, state.progress) == ("running", True, Progress("inspect", "a", 1, 2, 10, 20))
    with pytest.raises(UsageError, match="inspect is running; wait for it, or stop it"):
        runner.start("merge", work)
    go_on.set()
    after = finished(runner)
    assert (after.phase, after.result, after.number) == ("done", "done with", 1)
    assert after.seconds <= state.seconds  # the second stage has just begun


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (CheckpointError("a\nb", "is\x1b[31m bad", "mend it"), r"a\nb: is\x1b[31m bad; mend it"),
        (MemoryError(), "memory: not enough for the largest tensor; use a larger machine"),
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


# --- what is shown -------------------------------------------------------------------------------------------


def test_what_is_shown_of_an_inspection_and_a_plan_is_what_was_found(shelf: Folders) -> None:
    opened = steps.open_choice(picked("e1", "e2", "e3"), shelf)
    seen = survey(opened, 1)
    html = view.inspection(seen)
    for expert in seen.table()["experts"]:
        assert f"{expert['share']:.1%}</td>" in html
        assert f"{expert['cosines']['e3']:.2f}</td>" in html
    for advice in seen.advice:
        assert f"<strong>{advice.what}</strong>" in html.replace("&#x27;", "'")
    assert "layers.0.down.weight" in view.plan(opened.plan)
    assert "<td>ace</td>" in view.plan(opened.plan)
    assert "No warnings" in view.inspection(survey(steps.open_choice(picked("e2", "e3"), shelf), 1))


def test_names_from_files_are_text(tmp_path: Path) -> None:
    tensors = {f"layers.0.{HOSTILE}.weight": torch.eye(3)}
    base = write_checkpoint(tmp_path / "base", tensors)
    experts = [write_checkpoint(tmp_path / f"e{c}", {n: v * c for n, v in tensors.items()}) for c in (-1, 3)]
    content = {"method": "average", "base": str(base), "experts": [str(path) for path in experts]}
    opened = open_recipe(make_recipe(content), None, RunOptions())
    progress = Progress("merge", HOSTILE, 1, 2, 3, 4)
    shown: list[str] = [
        view.plan(opened.plan),
        view.inspection(survey(opened, 1)),
        view.state(State(1, "merge", "running", progress, 1.0)),
        view.state(State(1, "merge", "failed", error=HOSTILE)),
        view.listing(Listing((), (HOSTILE,))),
        view.about(HOSTILE, HOSTILE),
        view.roots([Path(HOSTILE)]),
    ]
    for html in shown:
        assert "&lt;img src=x" in html
        assert "<img" not in html


# --- who may ask ---------------------------------------------------------------------------------------------

Ask = Callable[..., tuple[int, dict[str, str]]]


@pytest.fixture
def guard() -> Guard:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"served"})

    return Guard(app, "127.0.0.1", 7860)


def ask(guard: Guard, path: str, query: str = "", **headers: str) -> tuple[int, dict[str, str]]:
    """The status and the headers of an answer."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    given = {"host": "127.0.0.1:7860", "cookie": f"a=b; acemerge-7860={guard.token}"} | headers
    raw = [(name.encode(), value.encode()) for name, value in given.items()]
    scope = {"type": "http", "path": path, "query_string": query.encode(), "headers": raw}
    asyncio.run(guard(scope, lambda: None, send))  # type: ignore[arg-type,return-value]
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


def test_the_link_leaves_a_cookie_that_no_other_page_may_use(guard: Guard) -> None:
    status, headers = ask(guard, "/", f"token={guard.token}", cookie="")
    assert (status, headers["location"]) == (303, "/")
    assert headers["set-cookie"] == f"acemerge-7860={guard.token}; Path=/; HttpOnly; SameSite=Strict"
    assert Guard(guard, "127.0.0.1", 7860).token != guard.token
    for path in (
        "/",
        "/config",
        "/gradio_api/queue/join",
        "/gradio_api/heartbeat/a1",
        "/assets/index-a_b.js",
        "/report/3",
    ):
        assert ask(guard, path)[0] == 200
        assert ask(guard, path, cookie="")[0] == 403
        assert ask(guard, path, cookie=f"acemerge-7861={guard.token}")[0] == 403
        assert ask(guard, path, "token=é", cookie="")[0] == 403


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "", "localhost.evil"])
def test_another_name_for_this_machine_is_refused(host: str, guard: Guard) -> None:
    assert ask(guard, "/", host=host)[0] == 403
    assert ask(guard, "/", f"token={guard.token}", host=host)[0] == 403


@pytest.mark.parametrize("host", ["localhost:7860", "127.0.0.1", "[::1]:7860", "LOCALHOST"])
def test_its_own_names_are_not(host: str, guard: Guard) -> None:
    assert ask(guard, "/", host=host)[0] == 200


def test_another_origin_is_refused(guard: Guard) -> None:
    for origin in ("http://evil.example", "null", "http://127.0.0.1:8000", "http://localhost:7860"):
        assert ask(guard, "/gradio_api/queue/join", origin=origin)[0] == 403
    assert ask(guard, "/gradio_api/queue/join", origin="http://127.0.0.1:7860")[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=models/base/config.json",
        "/gradio_api/file/etc/passwd",
        "/file=/etc/passwd",
        "/gradio_api/proxy=http://evil.example/",
        "/gradio_api/upload",
        "/gradio_api/run/predict",
        "/assets/../../secret",
        "/static/..",
        "/report/../config",
        "/monitoring",
        "/login",
        "/config\n",
    ],
)
def test_nothing_else_is_served(path: str, guard: Guard) -> None:
    assert ask(guard, path)[0] == 403


def test_the_browser_is_told_to_load_nothing_from_elsewhere(guard: Guard) -> None:
    policy = ask(guard, "/")[1]["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    assert "frame-ancestors 'none'" in policy
    assert "http" not in policy
    report = ask(guard, "/report/1")[1]["content-security-policy"]
    assert report.startswith("sandbox allow-scripts; default-src 'none';")
    assert "allow-same-origin" not in report
    assert "connect-src" not in report


def test_other_connections_are_closed(guard: Guard) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(guard({"type": "websocket", "headers": []}, lambda: None, send))  # type: ignore[arg-type,return-value]
    assert [message["type"] for message in sent] == ["websocket.close"]
