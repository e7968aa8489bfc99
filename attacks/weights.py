"""Row 35: weights and parameters that no rule can work with: one clean line, before there is any work.

Every registered rule is given each weight, and each of its parameters each value, in memory, by folders and on the
command line. What is not refused gives finite numbers; the three agree on what is.
"""

from __future__ import annotations

import contextlib
import io
import math
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import acemerge
from acemerge.cli.app import main as command_line
from acemerge.errors import AcemergeError, UsageError, shown
from acemerge.methods import METHODS, make
from acemerge.methods.about import parameters
from attacks.harness import Must, Tally, check, clean, main
from attacks.merging import make_models, moments_for

ROW = 35
_SIDE = 8
_WEIGHTS: dict[str, tuple[list[float], Must]] = {
    "ordinary": ([1.0, 0.5], "accept"), "one of zero": ([0.0, 1.0], "accept"), "negative": ([1.0, -0.25], "either"),
    "zeros": ([0.0, 0.0], "refuse"), "zeros of either sign": ([0.0, -0.0], "refuse"),
    "all negative": ([-1.0, -2.0], "either"), "cancelling": ([1.0, -1.0], "either"),
    "cancelling to rounding": ([0.1 + 0.2, -0.3], "either"), "1e308": ([1e308, 1e308], "either"),
    "1e308 against 1e308": ([1e308, -1e308], "either"), "1e-308": ([1e-308, 1e-308], "either"),
    "denormal": ([5e-324, 5e-324], "either"), "1e300 beside 1e-300": ([1e300, 1e-300], "either"),
    "NaN": ([1.0, math.nan], "refuse"), "NaN and zero": ([math.nan, 0.0], "refuse"),
    "infinity": ([1.0, math.inf], "refuse"), "against infinity": ([math.inf, -math.inf], "refuse"),
    "too few": ([1.0], "refuse"), "too many": ([1.0, 1.0, 1.0], "refuse"), "none": ([], "refuse"),
}  # fmt: skip
_ENDLESS = 10**5000  # Python does not even write it
_NO_NUMBERS: tuple[Any, ...] = (math.nan, math.inf, -math.inf, "nan", "1e999", "-Infinity", "9" * 5000)
_NUMBERS: tuple[Any, ...] = (1e308, -1e308, 5e-324, 10**30, _ENDLESS, -1, 0, "x", "", None, [1.0], {"a": 1})

# A label, a rule, its weights or a parameter, and what must come of them.
Case = tuple[str, str, dict[str, Any], Must]


def attack(folder: Path, count: int, seed: int) -> Tally:
    """All cases, or `count` of them."""
    tally, cases = Tally(), list(_cases())
    base, experts = make_models(folder / "models", layers=1, side=_SIDE)
    out = folder / "out"
    for label, rule, asked, must in random.Random(seed).sample(cases, min(count, len(cases))):
        given = experts[: _most(rule)]
        if "weights" in asked and _most(rule) == 1:
            asked = {"weights": asked["weights"][-1:]}
        call = partial(_try, rule, asked, base, given, out, must)
        clean(tally, f"{rule}, {label}", call, must)
    return tally


def _cases() -> Iterator[Case]:
    for rule, cls in METHODS.items():
        for label, (weights, must) in _WEIGHTS.items():
            yield f"weights: {label}", rule, {"weights": weights}, must if _most(rule) > 1 else "either"
        for parameter in parameters(cls):
            for must, values in (("refuse", _NO_NUMBERS), ("either", _NUMBERS)):
                for value in values:
                    yield f"{parameter.name} = {shown(value)[:20]}", rule, {parameter.name: value}, must


def _most(rule: str) -> int:
    return make(rule, {}).needs.most_experts or 2


def _try(rule: str, asked: dict[str, Any], base: Path, experts: list[Path], out: Path, must: Must) -> None:
    """In memory, by folders, on the command line: refused alike, or finite."""
    found = [_refusal(partial(_in_memory, rule, asked, len(experts)))]
    if make(rule, {}).needs.calibration is None:
        found.append(_refusal(partial(_by_folders, rule, asked, base, experts, out)))
        check(not (isinstance(found[-1], UsageError) and out.exists()), "was refused when work had begun")
        if _can_be_typed(asked):
            _on_command_line(rule, asked, base, experts, out, found[-1])
    refused = [refusal for refusal in found if refusal is not None]
    before = [isinstance(refusal, UsageError) for refusal in found]
    if "weights" not in asked and None not in asked.values():  # norms are averaged; no scale is the rule's own
        check(all(before) or not any(before), f"is refused in one place alone: {found}")
    check(must != "refuse" or all(before), f"is found out in the work, if at all: {found}")
    if refused:
        raise refused[0]


def _refusal(call: Callable[[], object]) -> AcemergeError | None:
    try:
        call()
    except AcemergeError as refusal:
        check(str(refusal).isprintable() and len(str(refusal)) < 1000, f"said {str(refusal)[:200]!r}")
        return refusal
    return None


def _in_memory(rule: str, asked: dict[str, Any], experts: int) -> None:
    D = torch.randn(experts, _SIDE, _SIDE, generator=torch.Generator().manual_seed(0))
    found = acemerge.merge_deltas(D, rule, moments=moments_for(rule, D), **asked)
    check(bool(found.delta.isfinite().all()), "is not finite")


def _by_folders(rule: str, asked: dict[str, Any], base: Path, experts: list[Path], out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    acemerge.merge(base, experts, rule, out, force=True, **asked)
    for name, value in load_file(out / "model.safetensors").items():
        check(bool(value.isfinite().all()), f"{name} is not finite")


def _can_be_typed(asked: dict[str, Any]) -> bool:
    return all(isinstance(value, str | float | int) and value != _ENDLESS for value in asked.values()) or (
        "weights" in asked
    )


def _on_command_line(
    rule: str, asked: dict[str, Any], base: Path, experts: list[Path], out: Path, refusal: AcemergeError | None
) -> None:
    """The same answer by an exit code and a line."""
    shutil.rmtree(out, ignore_errors=True)
    words = ["merge", "--base", str(base), *(word for e in experts for word in ("--expert", str(e)))]
    words += ["--method", rule, "-o", str(out), "--quiet", "--force"]
    for key, value in asked.items():
        words += [f"--weights={','.join(map(str, value))}"] if key == "weights" else ["--set", f"{key}={value}"]
    said, code = io.StringIO(), 0
    with contextlib.redirect_stderr(said):
        try:
            command_line(words)
        except SystemExit as end:
            code = int(end.code or 0)
    expected = 0 if refusal is None else refusal.exit_code
    check(code == expected, f"exit code {code} for {expected}: {said.getvalue()[:200]!r}")
    check(said.getvalue().count("\n") == (code != 0), f"said {said.getvalue()[:200]!r}")


FULL = len(list(_cases()))

if __name__ == "__main__":
    main(("weights",))
