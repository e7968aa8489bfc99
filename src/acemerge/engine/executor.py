"""Where the parts of a merge are computed: here, one after the other, or wherever an executor has them computed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from acemerge.engine.execute import Progress
from acemerge.engine.opening import Opened
from acemerge.engine.parts import compute_part
from acemerge.engine.run_options import RunOptions
from acemerge.planning.parts import Part

OnPart = Callable[[Part, Progress], None]


class Executor(Protocol):
    """Computes parts, each an ordinary run that any process can do which sees the models and the output."""

    @property
    def slots(self) -> int:
        """How many parts it computes at once."""
        ...

    def machines(self, out: Path, about: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the run is that its machines would do, where `about` is what it is here.

        UsageError lists the machines that do not go together, or do not see the models or `out`, which is there.
        """
        ...

    def compute(self, parts: Sequence[Part], told: OnPart) -> Generator[Part, None, None]:
        """Compute parts that may be begun or done already, and say of each that it is done.

        Closed before its end, it stops what is at work. Raises what a part raises.
        """
        ...


@dataclass(frozen=True)
class Here:
    """This process computes them."""

    opened: Opened
    out: Path
    about: Mapping[str, Any]
    options: RunOptions

    @property
    def slots(self) -> int:
        return 1

    def machines(self, out: Path, about: Mapping[str, Any]) -> Mapping[str, Any]:
        return about

    def compute(self, parts: Sequence[Part], told: OnPart) -> Generator[Part, None, None]:
        options = replace(self.options, resume=True)
        for part in parts:
            compute_part(replace(self.opened, part=part), self.out, self.about, options, partial(told, part))
            yield part
