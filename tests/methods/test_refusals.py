"""Numbers that a rule cannot work with are refused in one line, before the work or in the place of a wrong result."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any, get_args, get_type_hints

import pytest
import torch
from awkward import randn
from conformance import RULES, merged, result

import acemerge
from acemerge.errors import NumericalError, UsageError
from acemerge.methods import METHODS, make
from acemerge.methods.base import parameter_fields

over_rules = pytest.mark.parametrize("name", RULES)
FLOATS = [
    (name, field.name)
    for name, cls in METHODS.items()
    for field in dataclasses.fields(cls)  # type: ignore[arg-type]
    if float in (hint := get_type_hints(cls)[field.name], *get_args(hint))
]


@pytest.mark.parametrize(("name", "parameter"), FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_parameter_is_infinite_or_no_number(name: str, parameter: str, value: float) -> None:
    with pytest.raises(UsageError, match=parameter):
        make(name, {parameter: value})


@over_rules
def test_some_expert_must_have_a_weight(name: str) -> None:
    deltas = randn(3, 6, 5)[: RULES[name].experts]
    with pytest.raises(UsageError, match="no expert has a weight"):
        result(deltas, name, weights=[0.0] * len(deltas))


@over_rules
@pytest.mark.parametrize("weight", [5e-324, 1e-200, 1e200, 1e308])
def test_weights_that_cannot_be_squared_are_refused(name: str, weight: float) -> None:
    deltas = randn(3, 6, 5)[: RULES[name].experts]
    with pytest.raises(UsageError, match="whose square float64 does not hold"):
        result(deltas, name, weights=[weight] * len(deltas))


def test_weights_that_cancel_but_for_rounding_are_refused() -> None:
    assert sum([0.1, 0.2, -0.3]) != 0
    with pytest.raises(UsageError, match="sum to zero"):
        acemerge.merge_deltas(randn(3, 4, 4), "average", weights=[0.1, 0.2, -0.3])
    assert acemerge.merge_deltas(randn(2, 4, 4), "average", weights=[1.0, -0.999]).delta.isfinite().all()


def test_a_rule_is_not_replaced_by_another_of_its_name() -> None:
    @dataclasses.dataclass(frozen=True)
    class Other:
        name = "ace"

    with pytest.raises(UsageError, match="'ace': there is a rule of this name"):
        acemerge.register(Other)  # type: ignore[type-var]
    assert acemerge.register(METHODS["ace"]) is METHODS["ace"]


SIZES = {
    "1e30": 1e30,
    "1e-30": 1e-30,
    "denormal": 1e-40,
    "one 1e12 times another": torch.tensor([1.0, 1e12, 1e-12]).double()[:, None, None],
    "at the end of float32": 1e38,
}


@over_rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_whatever_the_size_a_result_is_finite_or_refused(name: str, dtype: torch.dtype) -> None:
    for size in SIZES.values():
        with contextlib.suppress(NumericalError):
            assert merged((size * randn(3, 12, 9).clamp(-3, 3)).to(dtype), name).isfinite().all()


@pytest.mark.parametrize(
    "name", ["iso_c", "iso_cts", "tsv_m", "ace_auto", "actmat", "swudi_a", "kron_auto", "model_stock"]
)
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_float32_of_any_size_is_merged_as_float64(name: str, size: float) -> None:
    """Squares of these are beyond the range of float32."""
    deltas = (size * randn(3, 12, 9)).float()
    expected = merged(deltas.double(), name)
    assert expected.norm() > 0.1 * size
    assert ((merged(deltas, name).double() - expected).norm() < 1e-4 * expected.norm()).item()


def test_what_float32_does_not_hold_is_refused_by_name() -> None:
    deltas = 1e39 * randn(2, 4, 3)
    assert acemerge.merge_deltas(deltas, "average").delta.isfinite().all()
    with pytest.raises(UsageError, match="deltas: has values beyond the range of float32"):
        acemerge.merge_deltas(deltas, "average", compute_dtype=torch.float32)
    pairs: list[Any] = [(randn(4, 2), randn(2, 3)), (1e39 * randn(4, 2), randn(2, 3))]
    with pytest.raises(UsageError, match="factors 2: has values beyond the range of float32"):
        acemerge.merge_factors(pairs, "average", compute_dtype=torch.float32)


FAR = (1e150, 1e160, 1e307)


@over_rules
def test_float64_beyond_what_can_be_squared_or_ranked_is_never_taken_for_nothing(name: str) -> None:
    """Such updates have no energy; a rule that leaves out experts without one would give nothing, silently."""
    unit = randn(3, 12, 9).clamp(-3, 3)
    given = merged(unit, name)
    for size in FAR:
        with contextlib.suppress(NumericalError):
            found = merged(size * unit, name) / size
            assert not RULES[name].scales or (found - given).norm() < 1e-6 * given.norm()


@pytest.mark.parametrize("size", [1e160, 1e307])
@pytest.mark.parametrize("name", ["average", "model_stock", "tsv_m", "svc", "kron_auto"])
def test_factors_beyond_what_can_be_squared_are_refused(name: str, size: float) -> None:
    pairs = [(size * randn(12, 2), randn(2, 9, seed=t)) for t in range(2)]
    with pytest.raises(NumericalError, match="factors: an update is so large that float64 does not hold its square"):
        acemerge.merge_factors(pairs, name)


@pytest.mark.parametrize("value", ["9" * 5000, 10**5000, [1.0] * 5000], ids=["text", "number", "list"])
def test_a_value_is_told_by_its_beginning(value: object) -> None:
    with pytest.raises(UsageError, match="no such rule") as caught:
        make("9" * 5000, {})
    assert len(str(caught.value)) < 1000
    with pytest.raises(UsageError, match="parameter 'scale'") as caught:
        make("ties", {"scale": value})
    assert len(str(caught.value)) < 300


def test_factors_whose_product_is_beyond_float32_are_refused() -> None:
    pairs = [(1e30 * randn(4, 2).float(), 1e30 * randn(2, 3).float())]
    with pytest.raises(NumericalError, match="not finite"):
        acemerge.merge_factors(pairs, "ties")


@pytest.mark.parametrize("method", [None, 5, {"eps": 1e-4}, {"name": "trust", "over": {"eps": 1e-4}}])
def test_what_names_no_rule_is_told_how_one_is_named(method: Any) -> None:
    with pytest.raises(UsageError, match=r"names no rule; give its `name`, as \{'name': 'ace', 'eps': 1e-4\}$"):
        acemerge.merge_deltas(torch.ones(2, 3, 4), method)


def test_a_rules_class_is_the_rule_as_it_is_by_default() -> None:
    deltas = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    ties: Any = acemerge.METHODS["ties"]
    assert torch.equal(acemerge.merge_deltas(deltas, ties).delta, acemerge.merge_deltas(deltas, "ties").delta)


def test_the_parameters_that_statuses_advise_exist() -> None:
    """A ridge has another name by rule, and so has what ends an iteration."""
    ridges = {"ace": "eps", **dict.fromkeys(("actmat", "tact", "anchored", "kron", "kron_auto", "kfac"), "lam")}
    ends = {**dict.fromkeys(("kron", "kron_auto", "kfac", "karcher"), "tol"), "cauchy": "stop"}
    named = [*ridges.items(), *ends.items(), *((rule, "steps") for rule in ends)]
    for rule, parameter in named:
        assert parameter in {field.name for field in parameter_fields(METHODS[rule])}, rule
