"""What a look at the experts warns of, and what helps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt
from typing import Any

from acemerge.engine.relatedness import Relation
from acemerge.inspection.statistics import Sums
from acemerge.methods import DEFAULT
from acemerge.methods.status import Status, Statuses
from acemerge.methods.trust import STEP

# An expert dominates whose energy is so many times the mean of the others': its update is twice as long.
_DOMINATES = 4.0
# Updates are the same up to this share of their energy: a difference of 0.1 %.
_SAME = 1e-6
_OPPOSED = -0.1
_CHANCE = 4.0  # how many times the spread of unrelated updates' cosine, 1 / sqrt(entries), is no chance


@dataclass(frozen=True)
class Advice:
    """A warning and its cure; what a plan warns of has none."""

    what: str
    cure: str

    def __str__(self) -> str:
        return f"{self.what}; {self.cure}" if self.cure else self.what


def of_origin(relations: Iterable[Relation]) -> list[Advice]:
    """Experts that do not come from this base."""
    cure = "name its own base, or leave it out"
    return [
        Advice(f"expert {relation.label} does not come from this base: {relation.figures}", cure)
        for relation in relations
        if relation.is_stranger
    ]


def of_frozen(labels: Sequence[str], energies: Sequence[float]) -> list[Advice]:
    """Experts without an update, where others were compared with the base as well."""
    cure = "leave it out, or check that its folder is the right one"
    pairs = zip(labels, energies, strict=True)
    return [Advice(f"expert {label} is frozen: it is the base itself", cure) for label, energy in pairs if energy == 0]


def of_masks(names: Sequence[str]) -> list[Advice]:
    """Tensors with infinities that base and experts have in common: a merge leaves them as they are."""
    if not names:
        return []
    some = f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
    what = f"infinities, the same in all models, which stay as the base has them: {some}"
    return [Advice(what, "nothing to do for masks; of weights fetch the models again")]


def weights_of(recipe: Mapping[str, Any], experts: int) -> list[float]:
    """The experts' weights in a manifest's recipe; 1 for each where it has not that many."""
    found = [float(expert.get("weight", 1.0)) for expert in recipe.get("experts", ())]
    return found if len(found) == experts else [1.0] * experts


def of_energies(
    labels: Sequence[str],
    energies: Sequence[float],
    weights: Sequence[float],
    gammas: Sequence[float | None] = (),
    tau: float | None = None,
) -> list[Advice]:
    """Experts without an update, one that dominates with its weight, layers above ACE's tau where that is the rule."""
    found = of_frozen(labels, energies)
    own = dict(zip(labels, weights, strict=True))
    weighted = [energy * own[label] ** 2 for label, energy in zip(labels, energies, strict=True)]
    active = [(label, energy) for label, energy in zip(labels, weighted, strict=True) if energy > 0]
    for label, energy in active:
        others = [other for name, other in active if name != label]
        if not others or energy < _DOMINATES * sum(others) / len(others):
            continue
        mean, share = sum(others) / len(others), energy / sum(weighted)
        what = f"expert {label} dominates: {share:.0%} of the energy, {energy / mean:.1f} times the others'"
        weight = f"{own[label] * sqrt(mean / energy):.2g}"
        found.append(
            Advice(what, f"give it a weight of {weight}: rules that add updates then take as much of it as of them")
        )
    above = [gamma for gamma in gammas if gamma is not None and tau is not None and gamma > tau]
    if above:
        what = f"the experts' energies are heterogeneous (gamma above {tau:g}) in {len(above)} of {len(gammas)} layers"
        found.append(Advice(what, "nothing to do: ace normalises them there; its parameter tau moves the limit"))
    return found


def largest_update(labels: Sequence[str], energies: Sequence[float]) -> str:
    """Whose update is largest, beside what an equal share would be."""
    total = sum(energies)
    if not total:
        return "No expert changed anything."
    leader = max(range(len(labels)), key=lambda t: energies[t])
    share = energies[leader] / total
    return f"{labels[leader]} has {share:.0%} of the energy; an equal share would be {1 / len(labels):.0%}."


def of_statuses(tensors: Iterable[Statuses]) -> list[Advice]:
    """Tensors that were not merged as usual, or parts of them, by their statuses."""
    known = list(tensors)
    counts = Counter(status for statuses in known for status in statuses)
    return [
        Advice(f"{_count(status, count, known)}: {status.sentence}", status.cure)
        for status, count in counts.items()
        if status not in (Status.OK, Status.KEPT)
    ]


def _count(status: Status, count: int, tensors: Sequence[Statuses]) -> str:
    """How many tensors have the status; of some it may be that only slices or projections have it."""
    partly = any(status in found and {Status.OK, Status.NO_UPDATE} & {*found} - {status} for found in tensors)
    return f"{count} tensor{'s' if count > 1 else ''}{', in part' if partly else ''}"


def of_steps(layers: Sequence[tuple[str, Sums]]) -> list[Advice]:
    """Layers that the experts, added, would move further than a fit of first order holds; `layers` as below."""
    beyond = {name: sums for name, sums in layers if sums.dissenting_step > STEP}
    if not beyond:
        return []
    farthest = max(beyond, key=lambda name: beyond[name].dissenting_step)
    beside_base, beside_orthogonal = beyond[farthest].added_beside_base, beyond[farthest].added_beside_orthogonal
    what = (
        f"added, the updates move {len(beyond)} of {len(layers)} layers further than {STEP:g} of their weights, most "
        f"{farthest}: {beside_base:.2g} of them, {beside_orthogonal:.2g} times all at right angles"
    )
    return [Advice(what, f"{DEFAULT} and trust take shorter steps there; with other rules try a smaller --scale")]


def of_directions(labels: Sequence[str], total: Sums, layers: Sequence[tuple[str, Sums]]) -> list[Advice]:
    """Experts that are the same, and layers where two pull against each other; `layers` are names and sums."""
    found, n = [], total.energies.tolist()
    for s, t in combinations(range(len(labels)), 2):
        apart = n[s] + n[t] - 2 * float(total.products[s, t])
        if n[s] > 0 and n[t] > 0 and apart <= _SAME * min(n[s], n[t]):
            what = f"experts {labels[s]} and {labels[t]} are the same, to 0.1 % of their updates"
            found.append(Advice(what, "leave one out, or it counts twice"))
    lowest_of = [(name, float(sums.cosines.nan_to_num(0).min()), _CHANCE / sqrt(sums.entries)) for name, sums in layers]
    opposed = [(name, lowest) for name, lowest, chance in lowest_of if lowest < min(_OPPOSED, -chance)]
    if opposed:
        name, lowest = min(opposed, key=lambda layer: layer[1])
        where = f"{len(opposed)} of {len(layers)} layers"
        what = f"experts pull against each other in {where}, most in {name}: cosine {lowest:.2f}"
        found.append(Advice(what, "try a rule that settles conflicts, such as ties, or merge fewer experts"))
    return found
