"""Shape annotations. Tests check them at run time with jaxtyping; without it they are plain tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
else:
    try:
        from jaxtyping import Bool, Float, Int
    except ModuleNotFoundError:

        class Float:
            """Stands in for `jaxtyping.Float`: `Float[Tensor, "out in"]` is `Tensor`."""

            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]

        Bool = Int = Float


__all__ = ["Bool", "Float", "Int", "Tensor"]
