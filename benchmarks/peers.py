"""The other libraries' side of a comparison: FusionBench 0.2.33 and mergekit 0.1.5, in a process of `.peers`.

FusionBench's functions take state dicts of task vectors. mergekit's take the base's and the experts' weights,
except `linear`, which is a mean of whatever it is given.

    .peers/bin/python benchmarks/peers.py --check        # can everything be imported?
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from typing import Any

from measure import Job, serve
from shapes import Case, base_weight, task_vectors
from torch import Tensor

KEY = "layer.weight"
WUDI_STEPS = 300
WUDI_FEW, WUDI_MORE = 1, 5  # the steps that are run where all would take minutes; the rest is extrapolated
WUDI_FLOP = 1e13  # from here on: about a minute on two cores
StateDict = dict[str, Tensor]


def prepare_tsv_m(case: Case, tasks: list[StateDict]) -> Job:
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils

    return Job([lambda: TSVM_utils.compute_and_sum_svd_mem_reduction(tasks, accelerator="cpu")], layer_of)


def prepare_iso_c(case: Case, tasks: list[StateDict]) -> Job:
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c

    return Job([lambda: iso_c(tasks, accelerator="cpu")], layer_of)


def prepare_wudi(case: Case, tasks: list[StateDict]) -> Job:
    """All 300 steps, or a few and a few more where 300 would take longer than a minute."""
    from fusion_bench.method.wudi.wudi import wudi_merging

    def steps(count: int) -> Callable[[], StateDict]:
        return lambda: wudi_merging(tasks, accelerator="cpu", iter_num=count)

    flop = WUDI_STEPS * 4 * case.experts * case.rows**2 * case.columns  # a product forward, a product back
    if flop < WUDI_FLOP:
        return Job([steps(WUDI_STEPS)], layer_of)
    factor = (WUDI_STEPS - WUDI_MORE) / (WUDI_MORE - WUDI_FEW)
    return Job([steps(WUDI_FEW), steps(WUDI_MORE)], None, about={"extrapolate": factor})


FUSION_BENCH = {"tsv_m": prepare_tsv_m, "iso_c": prepare_iso_c, "wudi": prepare_wudi}
MERGEKIT: dict[str, tuple[str, dict[str, Any]]] = {  # our rule: theirs, its parameters
    "average": ("linear", {"weight": 1.0}),
    "task_arithmetic": ("task_arithmetic", {"weight": 1.0}),
    "ties": ("ties", {"weight": 1.0, "density": 0.2}),
}


def prepare_mergekit(case: Case, deltas: Tensor) -> Job:
    from mergekit.merge_methods import merge_tensors

    method, parameters = MERGEKIT[case.rule]
    if not case.weights:
        tensors = list(deltas)
        return Job([lambda: merge_tensors(tensors, method, parameters=parameters)], lambda merged: merged)
    base = base_weight(case.rows, case.columns)
    weights = [base, *(base + D for D in deltas)]
    return Job(
        [lambda: merge_tensors(weights, method, parameters=parameters, base_index=0)], lambda merged: merged - base
    )


def prepare(case: Case) -> Job:
    deltas = task_vectors(case.experts, case.rows, case.columns, case.hetero)
    if case.rule in MERGEKIT:
        return prepare_mergekit(case, deltas)
    if case.rule in FUSION_BENCH:
        return FUSION_BENCH[case.rule](case, [{KEY: D} for D in deltas])
    raise ValueError(f"no peer for {case.rule}")


def layer_of(merged: StateDict) -> Tensor:
    return merged[KEY].detach()


def check() -> None:
    """Run every peer on a small layer."""
    for rule in (*FUSION_BENCH, *MERGEKIT):
        job = prepare(Case(rule, 3, 24, 16, weights=rule in ("task_arithmetic", "ties")))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            job.parts[-1]()
    print(f"{len(FUSION_BENCH) + len(MERGEKIT)} rules run")


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        check()
    else:
        serve(prepare, Case.from_json(sys.argv[1]))
