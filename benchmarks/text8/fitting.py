"""The rules that so many experts can be merged by."""

from __future__ import annotations

import acemerge
from acemerge.methods import make
from acemerge.methods.base import Needs


def rules_for(experts: int) -> dict[str, Needs]:
    """All that take so many, and what they need; mergekit's own variants of them are left out."""
    known = {name: make(name, {}).needs for name in acemerge.METHODS if not name.startswith("mergekit_")}
    return {name: needs for name, needs in known.items() if (needs.most_experts or experts) >= experts}
