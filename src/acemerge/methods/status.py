"""How a tensor came to its value: every word for it, once."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

_AND = ", "  # between the phrases of several
_RIDGE = "a larger ridge (eps of ace, lam of other rules)"


class Status(Enum):
    """What became of a tensor: a phrase that never changes, for the manifest, a sentence that goes on from
    "3 tensors: ", and a cure where one can help.
    """

    OK = "ok", "merged as usual"
    KEPT = "kept", "not merged: the base's values are kept"
    NO_UPDATE = "no update", "no expert changed them, the base's values are kept"
    FLOAT64 = "float64", "ill-conditioned, computed again in float64", f"nothing to do; {_RIDGE} avoids it"
    REFINED = "refined", "ill-conditioned, corrected by residuals in float64", f"nothing to do; {_RIDGE} avoids it"
    PSEUDO_INVERSE = "pseudo-inverse", "singular, solved by the pseudo-inverse", f"{_RIDGE} makes them regular"
    NOT_CONVERGED = (
        "not converged",
        "stopped before the residual was small",
        "more steps, or a larger tol (stop of cauchy)",
    )
    FULL_UPDATES = "full updates formed", "merged from full updates, not from their factors"
    ONE_EXPERT = "one expert", "only one expert has a say: its update is taken as it is"
    STRAIGHT = "interpolated straight", "no arc leads between the weights: interpolated in a straight line"
    CANCELLED = "experts cancel", "the experts cancel one another, and little or nothing is left of their mean"
    VOCABULARY = "averaged, a side above 20,000", "averaged, for a side is above 20,000, as of a vocabulary"
    UNSEEN = (
        "averaged, not seen in calibration",
        "averaged, for the calibration data never reached them",
        "calibrate with data that does",
    )
    UNSEEN_SPECTRAL = (
        "by tsv_m, not seen in calibration",
        "merged by tsv_m, for the calibration data never reached them",
        "calibrate with data that does",
    )
    ON_HOST = "partly on the host", "products or factorings that the device lacks were left to the host"

    sentence: str
    cure: str

    def __new__(cls, phrase: str, sentence: str, cure: str = "") -> Status:
        member = object.__new__(cls)
        member._value_, member.sentence, member.cure = phrase, sentence, cure
        return member


Statuses = tuple[Status, ...]  # of one tensor, in the order in which they are spelled


def spelled(statuses: Statuses) -> str:
    """As the manifest says it."""
    return _AND.join(status.value for status in statuses)


def read_statuses(text: str) -> Statuses:
    """What `spelled` made of them; ValueError for words that are no status. A phrase may hold a comma."""
    for status in Status:
        if text == status.value:
            return (status,)
        if text.startswith(status.value + _AND):
            return (status, *read_statuses(text.removeprefix(status.value + _AND)))
    raise ValueError(f"{text[:60]!r} is no status; there are {', '.join(repr(status.value) for status in Status)}")


def of_all(parts: Iterable[Statuses]) -> Statuses:
    """Those of a tensor whose parts have these, in an order that does not depend on that of the parts."""
    return tuple(dict.fromkeys(status for part in sorted(set(parts), key=spelled) for status in part))
