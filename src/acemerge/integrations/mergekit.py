"""acemerge's rules as mergekit's merge methods: `merge_method: ace` and others in a mergekit YAML.

Importing this module registers them with mergekit 0.1.5. As a command it does what mergekit-yaml does, with them:

    python -m acemerge.integrations.mergekit RECIPE.yml OUT
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch

from acemerge.engine.one_layer import merge_deltas
from acemerge.errors import UsageError
from acemerge.methods import METHODS
from acemerge.shapes import Tensor

try:
    import mergekit.merge_methods as theirs
except ImportError as failure:
    raise UsageError("mergekit", "is not installed", "pip install 'mergekit==0.1.5'") from failure

NAMES = ("ace", "actmat", "tact", "tsv_m", "iso_c", "iso_cts", "wudi", "swudi_a")


def _method(name: str) -> Any:
    """One rule as mergekit wants it: a function of a group of tensors whose signature says its parameters."""
    cls: Any = METHODS[name]
    defaults = {field.name: getattr(cls(), field.name) for field in dataclasses.fields(cls)}
    # Its parameters are plain numbers, flags and words; what else a rule has keeps its default.
    known = {key: value for key, value in defaults.items() if type(value) in (bool, int, float, str)}
    merge = _with_signature(name, known)
    contract = theirs.InputContract(base=theirs.BasePolicy.REQUIRED, min_inputs=2)
    return theirs.merge_method(merge, name=name, pretty_name=f"{name} (acemerge)", contract=contract)


def _with_signature(name: str, known: dict[str, Any]) -> Callable[..., Tensor]:
    def merge(group: Any, weight: Any = 1.0, **params: Any) -> Tensor:
        deltas = torch.stack([entry.tensor for entry in group.non_base]).to(torch.float32)
        base = group.base.tensor
        weights = [float(weight[entry.id]) for entry in group.non_base]
        # As in acemerge's default policy: a token Gram is no input covariance, and what is no matrix is averaged.
        by_rule = base.ndim == 2 and group.metadata.vocabulary_axis is None
        rule, own = (name, params) if by_rule else ("average", {})
        result = merge_deltas(deltas - base.float(), rule, weights=weights, **own)
        merged: Tensor = (base.float() + result.delta).to(base.dtype)
        return merged

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    values = {"weight": (theirs.PerNonBase[float], 1.0), **{key: (type(v), v) for key, v in known.items()}}
    parameters = [inspect.Parameter("group", kind, annotation=theirs.TensorGroup)]
    parameters += [inspect.Parameter(key, kind, default=d, annotation=a) for key, (a, d) in values.items()]
    merge.__signature__ = inspect.Signature(parameters, return_annotation=torch.Tensor)  # type: ignore[attr-defined]
    merge.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": torch.Tensor}
    merge.__name__ = name
    return merge


for _name in NAMES:
    theirs.register(_method(_name))


if __name__ == "__main__":
    from mergekit.scripts.run_yaml import main

    main()
