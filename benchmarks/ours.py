"""acemerge's side of a comparison, in a process of its own."""

from __future__ import annotations

import sys
from typing import Any

import torch
from floors import floor_of
from measure import Job, serve
from shapes import Case, base_weight, task_vectors
from torch import Tensor

import acemerge
from acemerge.methods import LayerResult, make


def prepare(case: Case) -> Job:
    """One call of `acemerge.merge_deltas`, or the whole way from weights to the merged weight."""
    deltas = task_vectors(case.experts, case.rows, case.columns, case.hetero)
    floor = floor_of(case)
    about = {"flop": floor.general + floor.symmetric, "symmetric": floor.symmetric, "eighs": floor.decompositions}
    if not case.weights:
        known = {"base": base_weight(case.rows, case.columns)} if make(case.rule, {}).needs.base_energy else {}

        def merge() -> LayerResult:
            return acemerge.merge_deltas(deltas, case.rule, **known, **case.params)

        return Job([merge], delta_of, status_of, about, floor.rates)
    base = base_weight(case.rows, case.columns)
    experts = [base + D for D in deltas]
    del deltas

    def merge_weights() -> LayerResult:
        differences = torch.empty(len(experts), *base.shape)
        for difference, expert in zip(differences, experts, strict=True):
            torch.sub(expert, base, out=difference)
        result = acemerge.merge_deltas(differences, case.rule, **case.params)
        return LayerResult(result.delta.add_(base), result.stats)

    return Job([merge_weights], lambda result: delta_of(result) - base, status_of, about, floor.rates)


def delta_of(result: Any) -> Tensor:
    delta: Tensor = result.delta
    return delta


def status_of(result: Any) -> str:
    return str(result.stats["status"])


if __name__ == "__main__":
    serve(prepare, Case.from_json(sys.argv[1]))
