"""Row 36: updates of any size: 1e30, 1e-30, denormal, experts 1e12 times one another, float64 beyond float32.

Every rule merges them in memory, as factors and by folders. What comes out is finite, or one line names the rule or
the tensor; updates of ordinary size are merged by every rule.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import acemerge
from acemerge.methods import METHODS, make
from attacks.harness import Must, Tally, check, clean, main
from attacks.merging import moments_for

ROW = 36
_OUT, _IN, _RANK = 12, 9, 2
_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The sizes of two experts' updates. Those of ordinary size any rule must merge.
_SIZES: dict[str, tuple[float, float]] = {
    "1": (1.0, 1.0), "1e-4": (1e-4, 1e-4), "1e4": (1e4, 1e4), "1e30": (1e30, 1e30), "1e-30": (1e-30, 1e-30),
    "denormal": (1e-40, 1e-40), "the least of float32": (1.4e-45, 1.4e-45), "the most of float32": (1e38, 1e38),
    "1e12 and 1": (1e12, 1.0), "1 and 1e-12": (1.0, 1e-12), "1e30 and 1e-30": (1e30, 1e-30),
    "0 and 1e30": (0.0, 1e30), "beyond float32": (1e39, 1e39), "1e200": (1e200, 1e200), "1e-200": (1e-200, 1e-200),
    "the most of float64": (3e307, 3e307), "the least of float64": (5e-324, 5e-324), "1e300 and 1": (1e300, 1.0),
}  # fmt: skip
_ORDINARY = ("1", "1e-4", "1e4")

Case = tuple[str, Callable[[Path], object], Must]


def attack(folder: Path, count: int, seed: int) -> Tally:
    """All cases, or `count` of them."""
    tally, cases = Tally(), list(_cases())
    for label, call, must in random.Random(seed).sample(cases, min(count, len(cases))):
        clean(tally, label, partial(call, folder), must)
    return tally


def _cases() -> Iterator[Case]:
    for rule in METHODS:
        for name, sizes in _SIZES.items():
            must: Must = "accept" if name in _ORDINARY else "either"
            for kind in ("float64", "float32"):
                yield f"{rule}, deltas of {name}, {kind}", partial(_deltas, rule, sizes, _DTYPES[kind]), must
            if make(rule, {}).needs.calibration is None:
                yield f"{rule}, factors of {name}", partial(_factors, rule, sizes), must
                for kind, dtype in _DTYPES.items():
                    own = must if kind != "float16" or name == "1" else "either"
                    yield f"{rule}, folders of {name}, {kind}", partial(_folders, rule, sizes, dtype), own


def _experts(rule: str) -> int:
    return min(make(rule, {}).needs.most_experts or 2, 2)


def _unit(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _scaled(rule: str, sizes: tuple[float, float], *shape: int) -> Tensor:
    """Entries of at most 3 times these sizes, float64."""
    D = _unit(_experts(rule), *shape).clamp(-3, 3)
    return D * torch.tensor(sizes, dtype=torch.float64)[: len(D)].view(-1, *[1] * len(shape))


def _deltas(rule: str, sizes: tuple[float, float], dtype: torch.dtype, _: Path) -> None:
    D = _scaled(rule, sizes, _OUT, _IN).to(dtype)
    if not bool(D.isfinite().all()):
        D = D.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)  # as a checkpoint might hold it
    found = acemerge.merge_deltas(D, rule, moments=moments_for(rule, _unit(len(D), _OUT, _IN).to(dtype)))
    check(bool(found.delta.isfinite().all()) and found.delta.dtype == dtype, "is not finite")


def _factors(rule: str, sizes: tuple[float, float], _: Path) -> None:
    U = _scaled(rule, sizes, _OUT, _RANK)
    pairs = [(u, torch.ones(_RANK, _IN, dtype=torch.float64) + torch.eye(_RANK, _IN)) for u in U]
    found = acemerge.merge_factors(pairs, rule).delta()
    check(bool(found.isfinite().all()), "is not finite")


def _folders(rule: str, sizes: tuple[float, float], dtype: torch.dtype, folder: Path) -> None:
    """Checkpoints whose own values are of this size."""
    most = torch.finfo(dtype).max
    base = {"layers.0.up.weight": _unit(_OUT, _IN).to(dtype), "norm.weight": torch.ones(_IN).to(dtype)}
    moved = {n: (v.double() + _scaled(rule, sizes, *v.shape)).clamp(-most, most).to(dtype) for n, v in base.items()}
    models = [base, *({n: v[t].contiguous() for n, v in moved.items()} for t in range(_experts(rule)))]
    for i, tensors in enumerate(models):
        (folder / f"{i}").mkdir(exist_ok=True)
        save_file(tensors, folder / f"{i}" / "model.safetensors")
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    try:
        acemerge.merge(folder / "0", [folder / f"{i}" for i in range(1, len(models))], rule, out, force=True)
    except acemerge.AcemergeError as refusal:
        check(not (out / "acemerge.json").exists(), "is published")
        named = "weight" in str(refusal) or str(refusal).startswith("an update: ")  # ranked over all tensors
        check(named, f"names no tensor: {refusal}")
        raise
    for name, value in load_file(out / "model.safetensors").items():
        check(bool(value.isfinite().all()) and value.dtype == dtype, f"{name} is not finite")


FULL = len(list(_cases()))

if __name__ == "__main__":
    main(("sizes",))
