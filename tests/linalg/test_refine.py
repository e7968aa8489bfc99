"""What float32 lacks, seen in float64 and added: against the same problem solved in float64."""

from __future__ import annotations

import pytest
import torch
from oracles import matrix_with_condition, relative_error
from torch import Tensor

import acemerge
from acemerge.linalg.least_squares import least_squares
from acemerge.linalg.problem import Problem, as_given
from acemerge.linalg.refine import InInputs, InRows, probed_error
from acemerge.linalg.solve import ERROR_TOLERANCE, invert

CPU = torch.device("cpu")
SHAPES = {"in the input space": (3, 230, 600), "in the space of all rows": (2, 280, 600)}


def _problem(shape: tuple[int, int, int], condition: float, **asked: object) -> tuple[Problem, Tensor]:
    """Experts whose directions are as unlike as this says, one of them without a weight."""
    generator = torch.Generator().manual_seed(2)
    deltas = torch.stack([matrix_with_condition(*shape[1:], condition, generator).float() for _ in range(shape[0])])
    updates = as_given(deltas)
    weights = [1.0, 0.4, 0.0][: shape[0]]
    return Problem(updates, updates, weights, shape[1:], **asked), deltas  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    "asked",
    [
        {"ridge": 2e-6, "pulls": [2e-6, 1e-6, 3e-6], "prior": 2.0},
        {"ridge": 2e-6},
        {"ridge": 2e-6, "residual_of": lambda: torch.ones(230, 600)},
    ],
    ids=["pulls and a prior", "plain", "a residual"],
)
def test_a_wide_layer_that_float32_does_not_solve_is_refined(
    shape: tuple[int, int, int], asked: dict[str, object]
) -> None:
    pulls = asked.get("pulls")
    asked |= {"pulls": pulls[: shape[0]]} if isinstance(pulls, list) else {}
    if "residual_of" in asked:
        asked |= {"residual_of": lambda: torch.ones(shape[1:])}
    problem, _ = _problem(shape, 3e2, **asked)
    found, exact = least_squares(problem, torch.float32, CPU), least_squares(problem, torch.float64, CPU)
    assert (found.trusted, found.by) == (True, "refinement")
    assert relative_error(found.M, exact.M) < ERROR_TOLERANCE
    if found.residual is not None and exact.residual is not None:
        assert relative_error(found.residual, exact.residual) < ERROR_TOLERANCE


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_error_of_a_solution_is_seen_from_above(shape: tuple[int, int, int]) -> None:
    """Along all directions, and along the faintest alone."""
    problem, deltas = _problem(shape, 30.0, ridge=1e-3)
    F = torch.cat([a**0.5 * D.double() for a, D in zip(problem.weights, deltas, strict=True)])
    dual = problem.prefers_dual
    system = F @ F.T if dual else F.T @ F
    system.diagonal().add_(1e-3)
    own = torch.cat([a**0.5 * D.double() @ D.double().T for a, D in zip(problem.weights, deltas, strict=True)], 1)
    H = own if dual else own @ F
    inverse = invert(system.float())
    exact = torch.linalg.solve(system, H.T).T
    residual = InRows(problem, 1e-3) if dual else InInputs(problem, 1e-3)
    faintest = torch.linalg.eigh(system)[1][:, :1].T
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(exact.shape, generator=generator, dtype=torch.float64)
    for direction in (noise, noise[:, :1] @ faintest):
        wrong = (exact + 1e-3 * exact.norm() * direction / direction.norm()).float()
        assert 1e-3 < probed_error(wrong, residual, inverse) < 2.2e-3
    assert probed_error(exact.float(), residual, inverse) < 1e-6


def test_ace_says_how_a_layer_became_accurate() -> None:
    """By itself, for what it lacks is less than what might be; refined; or repeated, where it is not wide."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(3, 200, 600, generator=generator)  # just rows enough for every direction
    wide = torch.stack([matrix_with_condition(230, 600, 1e4, generator) for _ in range(3)]).float()
    square = torch.stack([matrix_with_condition(540, 540, 1e6, generator) for _ in range(3)]).float()
    for deltas, eps, status in ((noise, 0.2, "ok"), (wide, 1e-5, "refined"), (square, 1e-9, "float64")):
        single = acemerge.merge_deltas(deltas, "ace", eps=eps)
        double = acemerge.merge_deltas(deltas, "ace", eps=eps, compute_dtype=torch.float64)
        assert relative_error(single.delta, double.delta) < 1e-4
        assert single.stats["status"] == status
