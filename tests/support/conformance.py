"""What holds for which rule: the one table that every test over all rules reads. A new rule adds one line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from oracles import EXACT
from torch import Tensor

import acemerge
from acemerge.methods import make


@dataclass(frozen=True)
class Traits:
    """The laws that a rule obeys; `params` choose the form of it that they are stated for.

    `order`: the experts' order is irrelevant. `scales`: c D gives c M. `returns`: equal experts give the expert
    back. `rotates`: rotating inputs and outputs rotates M. `drops`: an expert with no update is as if it were not
    there. `rank`: its stats hold a rank. `experts`: how many it takes.
    """

    order: bool = True
    scales: bool = True
    returns: bool = False
    rotates: bool = False
    drops: bool = True
    rank: bool = False
    experts: int = 99
    params: tuple[tuple[str, Any], ...] = ()


RULES = {
    "average": Traits(returns=True, rotates=True, drops=False),
    "task_arithmetic": Traits(rotates=True),
    "ties": Traits(),
    "dare_linear": Traits(order=False),
    "dare_ties": Traits(order=False),
    "della": Traits(order=False),
    "breadcrumbs": Traits(),
    "consensus": Traits(drops=False),
    "emr": Traits(returns=True),
    "slerp": Traits(rotates=True, drops=False, experts=2),
    "model_stock": Traits(returns=True, rotates=True),
    "karcher": Traits(returns=True, rotates=True),
    "cart": Traits(returns=True, rotates=True, drops=False, rank=True),
    "tsv_m": Traits(rotates=True, rank=True),
    "iso_c": Traits(rotates=True, rank=True),
    "iso_cts": Traits(rotates=True, rank=True),
    "dc_merge": Traits(rotates=True, rank=True, params=(("top", 0.1),)),
    "svc": Traits(rotates=True, rank=True, params=(("over", "task_arithmetic"),)),
    "knots": Traits(rank=True),
    "core_space": Traits(rotates=True, rank=True),
    "trust": Traits(rotates=True, rank=True),
    "ace": Traits(scales=False, rank=True),
    "ace_auto": Traits(returns=True, rotates=True, rank=True),
    "anchored": Traits(rotates=True, rank=True),
    "kron": Traits(rotates=True, params=tuple(EXACT["kron"].items())),
    "kron_auto": Traits(rotates=True, params=tuple(EXACT["kron_auto"].items())),
    "actmat": Traits(returns=True, rotates=True, rank=True),
    "tact": Traits(returns=True, rotates=True, rank=True, params=(("keep", 1.0),)),
    "cauchy": Traits(returns=True, rotates=True, rank=True, params=tuple(EXACT["cauchy"].items())),
    "wudi": Traits(scales=False),
    "swudi_a": Traits(rotates=True, rank=True),
    "regmean": Traits(returns=True, rotates=True, drops=False, rank=True, params=(("a", 1.0),)),
    "regmean_pp": Traits(returns=True, rotates=True, drops=False, rank=True, params=(("a", 1.0),)),
    "kfac": Traits(rotates=True, drops=False, params=tuple(EXACT["kfac"].items())),
    "esm": Traits(rank=True),
    "fisher": Traits(returns=True, drops=False),
    "mergekit_linear": Traits(rotates=True),
    "mergekit_sum": Traits(params=(("trim", "largest"), ("density", 0.5), ("vote", True), ("normalize", True))),
    "mergekit_slerp": Traits(returns=True, rotates=True, drops=False, experts=2),
    "mergekit_sce": Traits(returns=True),
    "mergekit_multislerp": Traits(returns=True, rotates=True, drops=False, params=(("eps", 1e-30),)),
    "mergekit_nearswap": Traits(scales=False, drops=False, experts=1),
    "mergekit_ram": Traits(scales=False, returns=True),
    "arcee_fusion": Traits(scales=False, drops=False, experts=1),
}


DATA_FREE = [name for name in RULES if make(name, dict(RULES[name].params)).needs.calibration is None]


def measurements(deltas: Tensor, name: str) -> dict[str, Tensor]:
    """What a rule with data is given beside the task vectors: made of each of them alone, turned and permuted as it
    is, and the same whatever its size.
    """
    wanted = make(name, dict(RULES[name].params)).needs.calibration
    if wanted is None:
        return {}
    D = deltas.double()
    unit = D / D.flatten(1).norm(dim=1).clamp(min=1e-300).view(-1, *[1] * (D.ndim - 1))
    if wanted == "gradients":
        return {"moments": unit.square() + 1 / D[0].numel()}
    moments = unit.mT @ unit + torch.eye(D.shape[-1], dtype=torch.float64) / D.shape[-1]
    if wanted == "both sides":
        of_outputs = unit @ unit.mT + torch.eye(D.shape[-2], dtype=torch.float64) / D.shape[-2]
        moments = torch.cat([moments.flatten(1), of_outputs.flatten(1)], 1)
    return {"moments": moments}


def having(trait: str) -> list[str]:
    return [name for name, traits in RULES.items() if getattr(traits, trait)]


def merged(deltas: Tensor, name: str, **params: Any) -> Tensor:
    """The rule's result, in the form that its laws are stated for."""
    return result(deltas, name, **{**dict(RULES[name].params), **params}).delta


def result(deltas: Tensor, name: str, **params: Any) -> acemerge.LayerResult:
    deltas = accepted(deltas, name)
    return acemerge.merge_deltas(deltas, name, **{**measurements(deltas, name), **params})


def accepted(deltas: Tensor, name: str) -> Tensor:
    """As many of the experts as the rule takes."""
    return deltas[: RULES[name].experts]


def rotation(size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
