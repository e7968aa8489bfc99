"""One loop for every suite: a loss of a batch, an optimiser by name, a rate that warms up and decays."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn


def fit(
    module: nn.Module, loss_of: Callable[[int], Tensor], steps: int, rate: float, optimiser: str, what: str
) -> None:
    """Minimise `loss_of(step)`, which draws its own batch, by `adam`, `sgd` or `muon` (matrices by Muon, the rest by
    AdamW at a tenth of the rate).
    """
    module.train()
    optimisers = _optimisers(module, rate, optimiser)
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: _factor(step, steps)) for one in optimisers]
    started, mean = time.perf_counter(), float("nan")
    for step in range(steps):
        loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for one, schedule in zip(optimisers, schedules, strict=True):
            one.step()
            one.zero_grad()
            schedule.step()
        mean = loss.item() if step == 0 else 0.95 * mean + 0.05 * loss.item()
    module.eval()
    seconds = time.perf_counter() - started
    print(f"trained {what}: {steps} steps, {seconds:.0f} s, loss {mean:.3f}", file=sys.stderr, flush=True)


def _optimisers(module: nn.Module, rate: float, name: str) -> list[torch.optim.Optimizer]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    if name == "sgd":
        return [torch.optim.SGD(parameters, rate, momentum=0.9)]
    if name == "adam":
        return [torch.optim.AdamW(parameters, rate, weight_decay=0.01)]
    matrices = [p for p in parameters if p.ndim == 2]
    rest = [p for p in parameters if p.ndim != 2]
    return [torch.optim.Muon(matrices, rate, weight_decay=0.0), torch.optim.AdamW(rest, rate / 10, weight_decay=0.01)]


def _factor(step: int, steps: int) -> float:
    warm = max(1, steps // 10)
    return min((step + 1) / warm, (steps - step) / (steps - warm))
