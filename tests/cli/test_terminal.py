"""`acemerge merge` on a terminal, a narrow one, and a pipe; and how long it says that it takes."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
from builders import PlainModel, write_checkpoint
from commands import run
from hostile import TERMINAL as HOSTILE
from rich.console import Console

from acemerge import api
from acemerge.api import MergeReport
from acemerge.checkpoints.pace import FilePace
from acemerge.cli import progress as show_progress
from acemerge.cli.merge import after, before, next_steps, pairs
from acemerge.cli.progress import Pace, progress, view
from acemerge.cli.text import duration, say, table
from acemerge.engine.execute import Progress
from acemerge.engine.opening import Opened, open_recipe
from acemerge.engine.run_options import RunOptions
from acemerge.errors import printable
from acemerge.methods import make
from acemerge.planning import estimate
from acemerge.planning.estimate import Rates, measure_rates, plan_seconds
from acemerge.recipes.recipe import make_recipe

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Screen(io.StringIO):
    """What a terminal is sent."""

    def isatty(self) -> bool:
        return True


def terminal(width: int, **environment: str) -> Console:
    return Console(file=Screen(), force_terminal=True, width=width, _environ={"TERM": "xterm", **environment})


def pipe() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def opened(plain: PlainModel, **keys: object) -> Opened:
    base, experts = plain.save()
    recipe = make_recipe({"base": str(base), "experts": [str(path) for path in experts], "method": "ace", **keys})
    return open_recipe(recipe, plain.root / "out", RunOptions())


def at(share: float, **more: object) -> Progress:
    fields = {"stage": "merge", "name": "layers.7.up.weight", "done": 7, "total": 9, "bytes_total": 90}
    return Progress(**{**fields, "bytes_done": 50, "share": share, **more})  # type: ignore[arg-type]


# --- names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("console", [terminal(2000, NO_COLOR="1"), pipe()], ids=["terminal", "pipe"])
def test_a_name_is_shown_and_gives_no_orders(console: Console) -> None:
    shown = printable(HOSTILE)
    assert "\\x1b[31mr" in shown
    say(console, HOSTILE)
    pairs(console, [(HOSTILE, HOSTILE)])
    table(console, (HOSTILE,), [(HOSTILE,)])
    console.print(view(Pace(at(0.5, name=HOSTILE, stage=HOSTILE), 1.0), 2000))
    text = said(console)
    assert text.count(shown) >= 7 if console.is_terminal else text.replace("\n", "").count(shown[-20:]) >= 7
    assert re.sub(r"\x1b\[[01]?m|\n", "", text).isprintable()


def test_what_is_wrong_with_a_command_is_a_line_whatever_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["merge", f"--x{HOSTILE}"], [HOSTILE], ["verify", HOSTILE], ["methods", HOSTILE]):
        code, out, error = run(capsys, *words)
        assert (code, out) == (3 if words[0] == "verify" else 2, "")
        assert error.endswith("\n")
        assert error[:-1].isprintable()


# --- before --------------------------------------------------------------------------------------------------


def test_the_plan_says_what_goes_where(plain: PlainModel) -> None:
    plain.tuned[0]["score.weight"] = torch.ones(3, 6)
    console = terminal(100)
    rules = [{"match": "*.down.weight", "method": {"name": "ties", "keep": 0.4}}]
    before(console, opened(plain, rules=rules), plain.root / "out", resumed=False)
    text = CONTROL.sub("", said(console))
    assert re.search(r"^average +3 +320 B +1 \w+, 1 \w+, 1 \w+ *$", text, re.MULTILINE)
    assert re.search(r"^ace +1 +192 B +1 linear *$", text, re.MULTILINE)
    assert re.search(r"^ties +1 +192 B +1 linear *$", text, re.MULTILINE)
    assert re.search(r"^base +1 +40 B +1 \w+ *$", text, re.MULTILINE)
    assert re.search(r"^none +1 +72 B +an expert's own, in heads/ *$", text, re.MULTILINE)
    for phrase in ("experts  e1, e2, e3", "eps 1e-05, tau 0.3", "keep 0.4", "are free", "at most", "about 1 s"):
        assert phrase in text


def test_a_rule_with_many_values_of_a_parameter_says_between_which(plain: PlainModel) -> None:
    console, values = terminal(100), {"up": 1e-3, "down": 1e-2}
    rules = [{"match": f"*.{x}.weight", "method": {"name": "ace", "eps": eps}} for x, eps in values.items()]
    before(console, opened(plain, rules=rules), plain.root / "out", resumed=False)
    assert "eps 0.001 to 0.01" in said(console)


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_no_line_is_wider_than_the_terminal(plain: PlainModel, width: int) -> None:
    """But for the paths and commands to copy, which a terminal itself breaks."""
    found = opened(plain)
    console = terminal(width)
    before(console, found, plain.root / "out", resumed=True)
    for share in (0.0, 0.01, 0.5, 1.0):
        name = "model.layers.10.a_very_long_name_of_a_part." * 3 + "weight"
        console.print(view(Pace(at(share, name=name, bytes_out=7, total=14_400, done=14_399), 5000.0), width))
    lines = CONTROL.sub("", said(console)).splitlines()
    assert len(lines) > 15
    assert max(map(len, lines)) <= width


def test_without_colour_a_terminal_gets_none(plain: PlainModel) -> None:
    found = opened(plain)
    for environment, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        console = terminal(80, **environment)
        before(console, found, plain.root / "out", resumed=False)
        console.print(view(Pace(at(0.5), 5.0), 80))
        assert bool(re.search(r"\x1b\[[0-9;]*[39][0-9]m", said(console))) is coloured


# --- while ---------------------------------------------------------------------------------------------------


def test_the_view_has_share_tensor_rates_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    console = terminal(80)
    pace = Pace(at(0.25, bytes_done=50_000_000, bytes_out=10_000_000), 10.0)
    console.print(view(pace, 80))
    text = CONTROL.sub("", said(console))
    for phrase in (" 25%", "7/9", "30 s left", "reads 5.0 MB/s, writes 1.0 MB/s", "layers.7.up.weight"):
        assert phrase in text
    assert Pace(at(0.25), 0.5).left == ""  # too early to say
    assert [duration(s) for s in (0.2, 45, 150, 9000)] == ["1 s", "45 s", "2 min", "2.5 h"]


def test_a_stage_is_timed_from_the_end_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr(show_progress.time, "monotonic", lambda: next(clock))
    watch = show_progress._Watch()
    assert watch(at(1.0, stage="thresholds", bytes_done=90)).seconds == 10
    assert watch(at(0.1, bytes_done=9)).seconds == 10


def test_a_pipe_gets_no_control_codes_and_a_line_a_minute(monkeypatch: pytest.MonkeyPatch, plain: PlainModel) -> None:
    console, clock = Console(file=io.StringIO(), force_terminal=True, width=80), [0.0]  # as FORCE_COLOR has it
    monkeypatch.setattr(show_progress.time, "monotonic", lambda: clock[0])
    before(console, opened(plain), plain.root / "out", resumed=False)
    with progress(console, quiet=False) as on_progress:
        for second in range(1, 130):
            clock[0] = float(second)
            on_progress(at(second / 130, bytes_done=second))
    assert said(console).splitlines() == [
        "7/9 tensors, reads 1 B/s, 70 s left, layers.7.up.weight",
        "7/9 tensors, reads 1 B/s, 10 s left, layers.7.up.weight",
    ]


def test_a_terminal_is_drawn_on_until_the_merge_is_done_and_again_for_its_report() -> None:
    console = terminal(80)
    with progress(console, quiet=False) as on_progress:
        on_progress(at(1.0, done=9, name="the last of the merge"))
        before_it = said(console)
        on_progress(at(1.0, done=9, stage="report", name="the last of the report"))
    assert "the last of the merge" in before_it
    first, _, rest = said(console).removeprefix(before_it).partition("report: the last of the report")
    assert rest
    assert "\x1b[1A" not in first  # what stands above is left alone
    quiet = terminal(80)
    with progress(quiet, quiet=True) as on_progress:
        on_progress(at(1.0))
    assert said(quiet) == ""


def test_progress_tells_of_all_that_is_read_written_and_done(plain: PlainModel) -> None:
    found, told = opened(plain), []
    api.run_opened(found, plain.root / "out", RunOptions(), told.append)
    assert told[-1].share == pytest.approx(1)
    assert [p.share for p in told] == sorted(p.share for p in told)
    assert (told[-1].bytes_done, told[-1].bytes_out) == (found.plan.bytes_read, found.plan.bytes_written)


# --- after ---------------------------------------------------------------------------------------------------


def merged(plain: PlainModel, **options: object) -> MergeReport:
    base, experts = plain.save()
    return api.merge(base, experts, out=plain.root / "out", **options)


def test_the_summary_names_three_things_to_look_at(plain: PlainModel) -> None:
    console = pipe()
    report = merged(plain, method="ace")
    after(console, report)
    lines = said(console).splitlines()
    assert lines[0].startswith("merged 6 tensors (3 by average, 2 by ace, 1 by base) in ")
    rows = [torch.tensor(record["energies"]) for record in report.tensors.values() if "energies" in record]
    energies = torch.stack(rows).sum(0)
    share = float(energies.max() / energies.sum())
    assert f"experts: e3 has {share:.0%} of the energy; an equal share would be 33%." in lines
    gammas = {name: record["gamma"] for name, record in report.tensors.items() if "gamma" in record}
    worst = max(gammas, key=lambda name: gammas[name])
    assert re.search(rf"^layers: .*gamma {gammas[worst]:.3g} in {worst}$", said(console), re.MULTILINE)
    assert lines[-3:] == [
        f"load: as {plain.root / 'out/README.md'} says",  # there is no configuration
        f"score: acemerge evaluate {plain.root / 'out'} --tasks tasks.yaml",
        f"look: acemerge report {plain.root / 'out'}",
    ]
    assert lines[1].startswith("warning: the merged update overshoots")
    assert lines[2].startswith(f"{plain.root / 'out'}: ")
    assert any(line.startswith("length: ") for line in lines)


@pytest.mark.parametrize(
    ("config", "options", "call"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, {}, 'AutoModelForCausalLM.from_pretrained("{out}")'),
        ({"architectures": ["BertForMaskedLM"]}, {}, 'BertForMaskedLM.from_pretrained("{out}")'),
        ({"model_type": "x"}, {}, 'AutoModel.from_pretrained("{out}")'),
        ({"model_type": "x"}, {"as_lora": 2}, 'PeftModel.from_pretrained(base, "{out}")'),
    ],
)
def test_the_summary_says_how_to_load_the_output(
    plain: PlainModel, config: dict[str, object], options: dict[str, int], call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain.root)
    base, experts = plain.save()
    (base / "config.json").write_text(json.dumps(config))
    report = api.merge(base, experts, out="an out", report=True, **options)
    load, score, look = (text for _, text in next_steps(report))
    assert load == call.format(out="an out") + "; README.md there has it whole"
    assert score == "acemerge evaluate 'an out' --tasks tasks.yaml"
    assert look == "open an out/report.html"


def test_a_dominating_expert_comes_with_its_cure_and_fallbacks_are_counted(plain: PlainModel) -> None:
    large = {n: W + (20 * (plain.tuned[0][n] - W)).to(W.dtype) for n, W in plain.base.items()}
    plain.tuned = [*plain.tuned[:2], large]
    report = merged(plain, method="ace")
    report.manifest["tensors"]["layers.0.up.weight"]["status"] = "pseudo-inverse"
    console = pipe()
    after(console, report)
    assert re.search(r"^experts: expert e3 dominates: .* give it a weight of ", said(console), re.MULTILINE)
    told = "layers: 1 tensor: singular, solved by the pseudo-inverse; a larger ridge (eps of ace, lam of other rules) "
    assert f"{told}makes them regular; " in said(console)


def test_warnings_are_said_once(plain: PlainModel, tmp_path: Path) -> None:
    for model in plain.tuned:
        model["layers.0.extra.weight"] = torch.ones(2, 2)
    report = merged(plain)
    texts = []
    for warned in ((), report.manifest["warnings"]):
        console = pipe()
        after(console, report, warned)
        texts.append(said(console).count("warning: expert e1: layers.0.extra.weight is not in the base"))
    assert texts == [1, 0]


# --- the time to expect --------------------------------------------------------------------------------------


def test_the_estimate_follows_the_operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine whose every rate is known: products, steps over entries, hashing, reading and writing add up."""
    monkeypatch.setattr(estimate, "_AROUND", 0.0)
    monkeypatch.setattr(estimate, "_TENSOR", 0.0)
    side, experts, never = 64, 2, 1e30
    folders = [write_checkpoint(tmp_path / f"m{i}", {"layers.0.weight": torch.randn(side, side)}) for i in range(3)]
    nbytes = 4 * side**2

    def expected(method: str, products: float, entries: float, hashing: float, pace: FilePace | None = None) -> float:
        recipe = make_recipe({"base": str(folders[0]), "experts": [str(f) for f in folders[1:]], "method": method})
        return plan_seconds(open_recipe(recipe, None, RunOptions()).plan, Rates(products, entries, hashing), pace)

    assert expected("average", never, never, 200.0) == pytest.approx((3 + 1) * nbytes / 200)
    passes = (experts + 1) * side**2
    operations = make("average", {}).operations(experts, side, side)
    assert expected("average", never, 10.0, never) == pytest.approx((passes + operations * estimate._SUMMING) / 10)
    operations = make("ties", {}).operations(experts, side, side) * estimate._CHOOSING
    counts = 2 * experts * side**2 * estimate._COUNTING
    assert expected("ties", never, 10.0, never) == pytest.approx((passes + operations + counts) / 10)
    for method, times in (("actmat", 1.0), ("tsv_m", estimate._SPECTRAL)):
        operations = make(method, {}).operations(experts, side, side) * times * (1 + estimate._CALLS / side)
        assert expected(method, 10.0, never, never) == pytest.approx(operations / 10)

    computing, reading = 4 * nbytes / 200, 3 * nbytes * 0.1
    together = max(computing, reading) + min(computing, reading) / 3
    assert expected("average", never, never, 200.0, FilePace(0.1, 0.2, 0.5)) == pytest.approx(together + nbytes * 0.5)
    # What processors copy is work, and no time that passes beside it.
    computing, waiting = computing + 3 * nbytes * 0.04, 3 * nbytes * 0.06
    copied = FilePace(0.1, 0.2, 0.5, 0.04)
    assert expected("average", never, never, 200.0, copied) == pytest.approx(
        max(computing, waiting) + min(computing, waiting) / 3 + nbytes * 0.5
    )
    reading = 3 * nbytes * (0.1 + 2 * 0.2)  # ties counts twice before it merges
    assert expected("ties", never, never, never, FilePace(0.1, 0.2, 0.5)) == pytest.approx(reading + nbytes * 0.5)


def test_rates_are_measured_in_a_moment() -> None:
    rates = measure_rates(torch.device("cpu"))
    assert 1e8 < rates.operations < 1e15
    assert 1e6 < rates.entries < 1e13
    assert 1e6 < rates.hashing < 1e11
