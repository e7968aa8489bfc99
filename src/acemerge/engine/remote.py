"""What a process on another machine does for a merge: it is sent bytes, and answers with plain data.

Nothing here imports torch before the process is set up for it, nor unpickles what another version has sent.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acemerge import errors
from acemerge.checkpoints import files, machine
from acemerge.errors import AcemergeError, LockedError, UsageError

if TYPE_CHECKING:
    from acemerge.engine.execute import Progress
    from acemerge.engine.run_options import RunOptions
    from acemerge.recipes.recipe import Recipe

_OFTEN = 0.25  # seconds between two words of a part's progress
# A lock outlives its process: on a shared file system until that learns that the machine is lost.
_PATIENCE = 120.0


@dataclass(frozen=True)
class Order:
    """A merge as it is sent: what has to be installed, with how many threads, in which folder, and what to merge."""

    versions: Mapping[str, str]
    threads: int
    folder: str
    content: bytes


@dataclass(frozen=True)
class Failure:
    """An error of ours on its way back."""

    kind: str
    where: str
    what: str
    cure: str

    def error(self, where: str) -> AcemergeError:
        """The same error, at the place that `where` adds."""
        kind: type[AcemergeError] = getattr(errors, self.kind)
        return kind(f"{where}: {self.where}", self.what, self.cure)


def order_of(recipe: Recipe, out: Path, options: RunOptions, threads: int) -> Order:
    return Order(_versions(), threads, os.getcwd(), pickle.dumps((recipe, out, options)))


def _versions() -> dict[str, str]:
    """What must be the same before anything is understood. The rest is told by the run's identity."""
    return {"python": ".".join(platform.python_version_tuple()[:2]), "acemerge": metadata.version("acemerge")}


def look(order: Order, marker: Path) -> Mapping[str, Any] | Failure:
    """What run the merge would be here. `marker` is a file in its output folder."""
    from acemerge.engine.opening import identity_of, open_recipe

    def looked() -> Mapping[str, Any]:
        recipe, _, options = _begin(order)
        if files.kind(marker) == "nothing":
            cure = "put it where every machine sees it under one path"
            raise UsageError(marker.parents[1], "is another folder here, or none", cure)
        return identity_of(open_recipe(recipe, None, options), options.device)

    found: Mapping[str, Any] | Failure = _answered(looked)
    return found


def compute(order: Order, board: Any, again: bool) -> Failure | None:
    """Compute the part of the order, and tell `board` how far it is; `again`: another process was lost with it."""

    def computed() -> None:
        recipe, out, options = _begin(order)
        from acemerge.engine.parts import compute_alone

        tell = _Teller(str(options.shard), board)
        _patiently(lambda: compute_alone(recipe, out, options, tell), _PATIENCE if again else 0.0)

    found: Failure | None = _answered(computed)
    return found


def _answered(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except AcemergeError as failure:
        return Failure(type(failure).__name__, failure.where, failure.what, failure.cure)


def _begin(order: Order) -> tuple[Recipe, Path, RunOptions]:
    """Set the process up and read the order; UsageError where other versions are installed."""
    for name, version in _versions().items():
        if version != order.versions[name]:
            what = f"version {name} is {version} and not {order.versions[name]}"
            raise UsageError("installed", what, "install the same versions on every machine")
    os.environ.setdefault("GOMP_SPINCOUNT", "50000")  # as the command line has it
    machine.keep_freed_memory()
    import torch

    torch.set_num_threads(order.threads)
    with contextlib.suppress(OSError):  # it need not be here where models are named by absolute paths
        os.chdir(order.folder)
    recipe, out, options = pickle.loads(order.content)
    return recipe, out, options


def _patiently(call: Callable[[], None], seconds: float) -> None:
    """Call it, and again for so long as a lock is held."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(LockedError):
            call()
            return
        time.sleep(0.5)
    call()


class Board:
    """The latest word of every part."""

    def __init__(self) -> None:
        self._latest: dict[str, dict[str, Any]] = {}

    def tell(self, part: str, now: dict[str, Any]) -> None:
        self._latest[part] = now

    def read(self) -> dict[str, dict[str, Any]]:
        latest, self._latest = self._latest, {}
        return latest


class _Teller:
    """Passes the progress of a part on, now and then."""

    def __init__(self, part: str, board: Any) -> None:
        self._part, self._board, self._last = part, board, 0.0

    def __call__(self, now: Progress) -> None:
        if time.monotonic() - self._last > _OFTEN:
            self._last = time.monotonic()
            self._board.tell.remote(self._part, asdict(now))
