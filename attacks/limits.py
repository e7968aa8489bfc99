"""Row 29: address space, threads and open files that end in the middle of a merge: exit 4 or 5 with the true reason.

What was computed stays, and --resume without the limit gives the same bytes. Root has no limit on threads: the merges
are those of another user then.
"""

from __future__ import annotations

import importlib
import os
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from attacks.harness import Tally, check, clean, main
from attacks.merging import Case, in_process

ROW, FULL = 29, 60
_NOBODY = 65534
# What a merge imports when it is asked for.
_LATE = ("acemerge.api", "acemerge.cli.progress", "rich.live", "rich.progress", "rich.table", "colorsys")
_LAYERS, _SIDE = 6, 256
_TRUE = {"memory": "memory|allocate", "threads": "threads|memory", "files": "too many files|too many open files"}


def attack(folder: Path, count: int, seed: int) -> Tally:
    """Levels of each limit, `count` of all together; the seed has nothing to choose."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as home:  # where others may enter
        os.chmod(home, 0o755)
        case = Case(Path(home), "ace", layers=_LAYERS, side=_SIDE)
        for path in Path(home).rglob("*.safetensors"):
            path.chmod(0o644)
        limits: dict[str, Callable[[int, int], None]] = {"memory": _memory, "threads": _threads, "files": _files}
        for kind, limit in limits.items():
            levels = max(1, count // len(limits))
            clean(tally, f"no limit on {kind}", partial(_try, case, kind, None, 0, levels), must="accept")
            for level in range(levels):
                label = f"{kind}, level {level} of {levels}"
                clean(tally, label, partial(_try, case, kind, limit, level, levels), must="accept")
    return tally


def _memory(level: int, levels: int) -> None:
    """From next to nothing more than there is to what is enough: up to 300 MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + 300_000_000 * (1 + level) // levels
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _threads(level: int, levels: int) -> None:
    """One and more of a user who has none."""
    resource.setrlimit(resource.RLIMIT_NPROC, (1 + level, 1 + level))


def _files(level: int, levels: int) -> None:
    """Those that are open, and some more."""
    most = max(map(int, os.listdir("/proc/self/fd"))) + level
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _try(case: Case, kind: str, limit: Callable[[int, int], None] | None, level: int, levels: int) -> None:
    out, errors = case.folder / "out", case.folder / "errors"
    for path in (out, errors):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        os.chmod(path, 0o777)
    process = in_process(_command_line, case, out, errors / "said", torch.get_num_threads(), limit, level, levels)
    process.join(60)
    check(process.exitcode is not None, "hangs")
    said = (errors / "said").read_text() if (errors / "said").exists() else ""
    if process.exitcode != 0:
        check(process.exitcode in (4, 5), f"exit code {process.exitcode}, {said!r}")
        check(re.search(_TRUE[kind], said) is not None and said.count("\n") == 1, f"said {said!r}")
        check("internal" not in said and not (out / "acemerge.json").exists(), f"said {said!r}")
    check(limit is not None or process.exitcode == 0, f"fails without a limit: {said!r}")
    begun = (out / ".acemerge.journal").exists()
    case.merge(out, resume=begun, overwrite=not begun)
    case.check_output(out)


def _command_line(
    case: Case,
    out: Path,
    said: Path,
    threads: int,
    limit: Callable[[int, int], None] | None,
    level: int,
    levels: int,
) -> None:
    from acemerge.cli.app import main as run

    for name in _LATE:  # another user may not be let to where they lie
        importlib.import_module(name)
    torch.set_num_threads(threads)
    words = ["merge", "--base", str(case.base), *(w for e in case.experts for w in ("--expert", str(e)))]
    with open(said, "w", buffering=1) as sys.stderr:
        if os.getuid() == 0:
            os.setuid(_NOBODY)
        if limit is not None:
            limit(level, levels)
        words += ["--method", case.options["method"], "--max-shard-size", case.options["max_shard_size"]]
        run([*words, "-o", str(out), "--quiet"])


if __name__ == "__main__":
    main(("limits",))
