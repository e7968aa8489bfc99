"""An adapter as output: whether to compress the merged update (last) or the adapters before it (first).

    .venv/bin/python benchmarks/suites/compress.py                       # the suites of adapters, ranks 8 and 16
    .venv/bin/python benchmarks/suites/compress.py language-lora --rules auto,average --ranks 4,8

Every linear layer gets the rule's update in its best factors of the rank, or `merge_compressed`'s; what no adapter
touches is the base's. `whole` is the rule's update as it is. Points are those of `benchmarks/suites`.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "text8"))  # for its packages

from catalogue import SUITES
from suite import Prepared, points
from torch import Tensor, nn

from acemerge.linalg.lowrank import LowRank
from acemerge.methods import make
from acemerge.methods.base import Layer, Method
from acemerge.methods.compressed import merge_compressed
from acemerge.methods.factors import merge_low_rank

Way = Callable[[Method, LowRank, Layer], Tensor]
_ADAPTERS = ("language-lora", "language-lora-4", "text8-lora")
_RANKED = 1e-5  # singular values below this share of the largest are rounding of U V


def main() -> None:
    parser = argparse.ArgumentParser(prog="compress", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("suites", nargs="*", default=_ADAPTERS)
    parser.add_argument("--rules", default="auto,average,task_arithmetic,tsv_m,iso_c")
    parser.add_argument("--ranks", default="8,16")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/acemerge/suites")
    arguments = parser.parse_args()
    ranks = [int(rank) for rank in arguments.ranks.split(",")]
    ways: dict[str, Way] = {"whole": _whole}
    for rank in ranks:
        ways |= {f"last {rank}": _last(rank), f"first {rank}": _first(rank)}
    print(f"| suite | rule | {' | '.join(ways)} |\n|---|---|{'--:|' * len(ways)}")
    for suite in SUITES:
        if suite.name in arguments.suites:
            prepared = suite.prepare(arguments.cache)
            updates = _updates(prepared)
            for name in arguments.rules.split(","):
                found = (f"{_points(prepared, updates, make(name, {}), way):.1f}" for way in ways.values())
                print(f"| {suite.name} | {name} | {' | '.join(found)} |", flush=True)


def _whole(rule: Method, updates: LowRank, layer: Layer) -> Tensor:
    result = merge_low_rank(rule, updates, layer, torch.float32)
    return result.left @ result.right


def _last(rank: int) -> Way:
    def way(rule: Method, updates: LowRank, layer: Layer) -> Tensor:
        U, s, Vh = torch.linalg.svd(_whole(rule, updates, layer).double(), full_matrices=False)
        return ((U[:, :rank] * s[:rank]) @ Vh[:rank]).float()

    return way


def _first(rank: int) -> Way:
    def way(rule: Method, updates: LowRank, layer: Layer) -> Tensor:
        result = merge_compressed(rule, updates, layer, torch.float32, rank)
        return result.left @ result.right

    return way


def _updates(prepared: Prepared) -> Mapping[str, LowRank]:
    """The adapters of every matrix that all experts changed, from their weights."""
    states = [expert.state_dict() for expert in prepared.experts.values()]
    base = prepared.base.state_dict()
    deltas = {name: [state[name] - W for state in states] for name, W in base.items() if W.ndim == 2}
    return {name: _factors(D) for name, D in deltas.items() if all(one.any() for one in D)}


def _factors(deltas: list[Tensor]) -> LowRank:
    pairs = []
    for D in deltas:
        U, s, Vh = torch.linalg.svd(D.double(), full_matrices=False)
        kept = s > _RANKED * s[0]
        pairs.append(((U[:, kept] * s[kept]).float(), Vh[kept].float()))
    return LowRank(tuple(U for U, _ in pairs), tuple(V for _, V in pairs))


@torch.no_grad()
def _points(prepared: Prepared, updates: Mapping[str, LowRank], rule: Method, way: Way) -> float:
    merged: nn.Module = copy.deepcopy(prepared.base)
    weights = dict(merged.named_parameters())
    for name, of_layer in updates.items():
        T = len(of_layer.left)
        layer = Layer(torch.ones(T, dtype=torch.float64), tuple(range(T)), base_energy=float(weights[name].norm() ** 2))
        weights[name] += way(rule, of_layer, layer)
    return points(prepared.outcome(merged), prepared.alone, prepared.likelihood)


if __name__ == "__main__":
    main()
