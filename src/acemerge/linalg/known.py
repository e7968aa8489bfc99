"""What was made of a tensor for one rule, and serves the next."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

from acemerge.shapes import Tensor

Made = TypeVar("Made")


class Known:
    """What was made of tensors that do not change, by which they are: memory, shape and type.

    It holds the tensors themselves too, so that no other takes their place; both go when it goes. The number of torch's
    threads is told apart: a product's rounding may depend on it.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[Tensor, Any]] = {}

    def once(self, what: Hashable, of: Tensor, make: Callable[[], Made]) -> Made:
        """`make()`, or what it gave before for `what` of this tensor."""
        key = what, of.data_ptr(), of.shape, of.stride(), of.dtype, torch.get_num_threads()
        if key not in self._made:
            self._made[key] = of, make()
        made: Made = self._made[key][1]
        return made


def once(known: Known | None, what: Hashable, of: Tensor, make: Callable[[], Made]) -> Made:
    """The same where there is something to keep it in."""
    return make() if known is None else known.once(what, of, make)
