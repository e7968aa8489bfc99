"""The check of shapes that the other tests run under: it covers every rule, and it can fail."""

import pytest
import torch
from conformance import RULES, accepted
from jaxtyping import TypeCheckError
from oracles import task_vectors
from shape_check import modules_with_shapes

import acemerge
from acemerge.linalg.gram import symmetric_product
from acemerge.methods import Layer, make


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_checked(name: str) -> None:
    deltas = accepted(task_vectors(3, (4, 3)), name)
    layer = Layer(torch.ones(len(deltas), dtype=torch.float64), (0,) * len(deltas))
    with pytest.raises(TypeCheckError):
        make(name, dict(RULES[name].params)).merge(deltas.tolist(), layer)  # type: ignore[arg-type]


def test_a_wrong_shape_is_refused() -> None:
    with pytest.raises(TypeCheckError):
        symmetric_product(torch.ones(3))


def test_modules_are_found_by_what_they_state() -> None:
    found = modules_with_shapes()
    assert {cls.__module__ for cls in acemerge.METHODS.values()} <= {*found}
    assert {"acemerge.linalg.gram", "acemerge.inspection.statistics"} <= {*found}
