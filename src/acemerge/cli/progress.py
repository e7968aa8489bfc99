"""What the command line shows while it reads tensors: a live view on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from acemerge.cli.text import duration, is_live, say, size
from acemerge.engine.execute import OnProgress, Progress
from acemerge.errors import printable

_QUIET_INTERVAL = 60.0  # seconds between lines where there is no terminal
_SOON = 2.0  # seconds before which nobody can say how long it takes
_BAR = 30  # columns at most
_LAST = ("merge", "report")  # stages after which there may be something else to see


@contextlib.contextmanager
def progress(console: Console, quiet: bool) -> Iterator[OnProgress]:
    """A live view on a terminal, one line a minute elsewhere, nothing when quiet."""
    if quiet:
        yield lambda _: None
    elif is_live(console):
        with _live(console) as on_progress:
            yield on_progress
    else:
        yield _lines(console)


@dataclass(frozen=True)
class Pace:
    """How a stage gets on; `seconds` since it began."""

    now: Progress
    seconds: float

    @property
    def left(self) -> str:
        """Time left, from the share of the work that is done; nothing until that says something."""
        if self.seconds < _SOON or not self.now.share:
            return ""
        return f"{duration(self.seconds * (1 - self.now.share) / self.now.share)} left"

    @property
    def rates(self) -> str:
        """What is read and written in a second; nothing of a stage that counts something else."""
        if not self.now.bytes_total:
            return ""
        per_second = 1 / max(self.seconds, 1e-9)
        read = f"reads {size(self.now.bytes_done * per_second)}/s"
        return f"{read}, writes {size(self.now.bytes_out * per_second)}/s" if self.now.bytes_out else read


class _Watch:
    """Times a stage from when the one before was done."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self._stage, self._done = "", 0

    def __call__(self, now: Progress) -> Pace:
        if now.stage != self._stage or now.done < self._done:  # another stage, and this its first report
            self._began = self._last
        self._stage, self._done, self._last = now.stage, now.done, time.monotonic()
        return Pace(now, self._last - self._began)


@contextlib.contextmanager
def _live(console: Console) -> Iterator[OnProgress]:
    watch, shown = _Watch(), view(None, console.width)

    def drawn() -> Live:
        live = Live(console=console, transient=True, refresh_per_second=8, get_renderable=lambda: shown)
        live.start()
        return live

    live: Live | None = drawn()

    def on_progress(done: Progress) -> None:
        nonlocal shown, live
        shown = view(watch(done), console.width)
        live = live or drawn()
        if done.stage in _LAST and done.done == done.total:
            live.stop()
            live = None  # another one: this would wipe out as many lines as it had

    try:
        yield on_progress
    finally:
        if live is not None:
            live.stop()


def view(pace: Pace | None, width: int) -> Group:
    """A bar with what is left, the rates, the tensor: no line longer than the terminal."""
    if pace is None:
        return Group(_cut("opening", width))
    now = pace.now
    figures = [f"{now.share:4.0%}", f"{now.done}/{now.total}", pace.left]
    bar = ProgressBar(total=1, completed=now.share, width=min(_BAR, max(8, width // 3)))
    line = Table.grid(padding=(0, 2, 0, 0))
    line.add_row(bar, *(Text(figure, no_wrap=True) for figure in figures if figure))
    stage = "" if now.stage == "merge" else f"{now.stage}: "
    texts = (pace.rates, f"{stage}{now.name}")
    return Group(line, *(_cut(text, width) for text in texts if text))


def _cut(text: str, width: int) -> Text:
    """The end of a name says more than its beginning."""
    text = printable(text)
    return Text(text if len(text) <= width else "…" + text[1 - width :], no_wrap=True)


def _lines(console: Console) -> OnProgress:
    watch, last = _Watch(), time.monotonic()

    def on_progress(done: Progress) -> None:
        nonlocal last
        pace = watch(done)
        if time.monotonic() - last < _QUIET_INTERVAL:
            return
        last = time.monotonic()
        stage = "" if done.stage == "merge" else f"{done.stage}: "
        figures = [figure for figure in (f"{done.done}/{done.total} {done.unit}", pace.rates, pace.left) if figure]
        say(console, f"{stage}{', '.join(figures)}, {done.name}")

    return on_progress
