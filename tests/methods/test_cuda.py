"""The same numbers on a GPU. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from builders import PlainModel, load_folder
from conformance import DATA_FREE, RULES, accepted, result
from crossed import spread
from oracles import relative_error, task_vectors
from torch import Tensor

import acemerge

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def merged(deltas: Tensor, name: str, device: str) -> Tensor:
    return result(accepted(deltas, name).to(device), name).delta


@spread(name=RULES, shape=[(24, 16), (16, 24), (3, 40), (540, 530)])
def test_a_rule_gives_the_same_on_cuda(name: str, shape: tuple[int, int]) -> None:
    deltas = task_vectors(4, shape)
    there = merged(deltas, name, "cuda")
    assert there.device.type == "cuda"
    tolerance = 1e-6 if name == "wudi" else 1e-8
    assert relative_error(there.cpu(), merged(deltas, name, "cpu")) < tolerance
    assert relative_error(merged(deltas.float(), name, "cuda").cpu(), merged(deltas.float(), name, "cpu")) < 1e-4


@pytest.mark.parametrize("name", DATA_FREE)
def test_checkpoints_merge_on_cuda(name: str, plain: PlainModel) -> None:
    plain.tuned = plain.tuned[: RULES[name].experts]
    base, experts = plain.save()
    for device in ("cpu", "cuda"):
        acemerge.merge(base, experts, out=plain.root / device, method=name, device=device)
    there, here = load_folder(plain.root / "cuda"), load_folder(plain.root / "cpu")
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)
