"""The tables within a recipe: a rule, an expert, what some tensors get, whose layers a slice has."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from acemerge.methods import Method, make, rule_name


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MethodSpec(Strict):
    """A rule and its parameters: `ace`, or `{name: ace, eps: 2e-4}`. `auto` becomes the rule that it stands for."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: Annotated[str, AfterValidator(rule_name)]

    @model_validator(mode="before")
    @classmethod
    def _accept_a_bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    def build(self, scale: float | None = None) -> Method:
        params = dict(self.model_extra or {})
        if scale is not None:
            params["scale"] = scale
        return make(self.name, params)


class ExpertSpec(Strict):
    """One fine-tuned model and its weight, and an adapter that is applied to it first."""

    model: str
    adapter: str | None = None
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0

    @model_validator(mode="before")
    @classmethod
    def _accept_a_bare_path(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value


class TensorRule(Strict):
    """What tensors whose name matches a glob get: a rule, the base's own values, or the experts' kept beside.

    `weights` are the experts' weights there, instead of their own.
    """

    match: str
    method: MethodSpec | None = None
    weights: tuple[Annotated[float, Field(allow_inf_nan=False)], ...] | None = None
    action: Literal["base", "heads"] | None = None

    @model_validator(mode="after")
    def _one_of_the_two(self) -> TensorRule:
        if (self.method is None) == (self.action is None):
            has = "neither `method` nor" if self.method is None else "both `method` and"
            raise ValueError(f"has {has} `action`; give one of the two")
        if self.weights is not None and self.method is None:
            raise ValueError("has weights and no `method`; leave them out, or give a method")
        return self


_Range = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


class SliceSpec(Strict):
    """Layers of the output, and the layers [first, end) that they are made of: the base's and the experts'.

    All ranges have one length. `base_from` is the model whose layers are taken for the base's: 0 for the base, i for
    the i-th expert. An expert that is no part of the slice has none.
    """

    base: _Range
    base_from: Annotated[int, Field(ge=0)] = 0
    experts: list[_Range | None]

    @property
    def length(self) -> int:
        return self.base[1] - self.base[0]

    @model_validator(mode="after")
    def _of_one_length(self) -> SliceSpec:
        if self.length < 1 or any(own and own[1] - own[0] != self.length for own in self.experts):
            raise ValueError("its ranges differ in length, or are empty; give [first, end) of as many layers each")
        return self
