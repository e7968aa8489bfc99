"""What the user asks for: a YAML file or the command line's options, checked before anything is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from acemerge.checkpoints import files
from acemerge.checkpoints.address import parse
from acemerge.checkpoints.folder import open_checkpoint
from acemerge.checkpoints.header import TensorSpec
from acemerge.checkpoints.hub import locate
from acemerge.errors import UsageError
from acemerge.methods import DEFAULT, Method, as_table
from acemerge.models.depth import LayerStack
from acemerge.recipes.mergekit.translate import KEYS, from_mergekit, is_mergekit
from acemerge.recipes.tables import ExpertSpec, MethodSpec, SliceSpec, Strict, TensorRule
from acemerge.recipes.yaml_file import KeyPath, expanded, explain, read_yaml, relative_to

OutputDtype = Literal["auto", "float32", "bfloat16", "float16"]
ComputeDtype = Literal["float32", "float64"]
PolicyName = Literal["default", "paper"]


SELF = "self"  # in the place of calibration's task file: text that the experts write


class Recipe(Strict):
    """Everything that decides the values of the merged model."""

    method: MethodSpec = MethodSpec(name=DEFAULT)
    base: str
    experts: Annotated[list[ExpertSpec], Field(min_length=1)]
    scale: Annotated[float, Field(allow_inf_nan=False)] | None = None
    policy: PolicyName = "default"
    embeddings: Literal["average", "rule", "base"] = "average"
    convolutions: Literal["average", "rule"] = "average"
    vocabulary: Literal["refuse", "base", "union", "assets"] = "refuse"
    missing_tokens: Literal["skip", "base", "mean"] = "skip"
    orientation: Literal["input", "stored"] = "input"
    split_qkv: bool = False
    join_qkv: bool = False
    dtype: OutputDtype = "auto"
    compute_dtype: ComputeDtype = "float32"
    nonfinite: Literal["error", "skip-expert"] = "error"
    seed: int = 0
    assets: str = "base"
    as_lora: Annotated[int, Field(ge=1, strict=True)] | None = None  # `true` is no rank
    compress: Literal["first", "last"] = "last"
    calibration: str | None = None
    chat_template: str | None = None
    slices: tuple[SliceSpec, ...] = ()
    rules: tuple[TensorRule, ...] = ()

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: MethodSpec) -> MethodSpec:
        value.build()
        return value

    @model_validator(mode="after")
    def _data_for_the_rules_that_want_it(self) -> Recipe:
        built = (self.build_method(), *(rule.method.build() for rule in self.rules if rule.method))
        wanting = next((method.name for method in built if method.needs.calibration), None)
        if wanting is not None and self.calibration is None:
            cure = "name tasks of the experts by --calibration TASKS.yaml, or --calibration self for language models"
            raise UsageError(f"method {wanting}", "needs calibration data", cure)
        return self

    @model_validator(mode="after")
    def _vocabularies_are_averaged(self) -> Recipe:
        skip = self.missing_tokens == "skip"
        if self.vocabulary != "refuse" and self.embeddings == "rule" and skip:
            raise ValueError("vocabulary: rows that some experts lack can only be averaged; use embeddings average")
        if self.vocabulary == "assets" and skip:
            raise ValueError("vocabulary: with assets no row may be missing; set missing_tokens to base or mean")
        if self.vocabulary == "base" and self.assets != "base" and skip:
            what = "vocabulary: with base the rows are of the base's tokens, not of those of assets"
            raise ValueError(f"{what}; leave assets out, or set missing_tokens to base or mean")
        if self.vocabulary == "refuse" and not skip:
            raise ValueError("missing_tokens goes with a vocabulary; set vocabulary to base, union or assets")
        if not skip and self.nonfinite != "error":
            what = "missing_tokens: an expert whose rows are lent to others cannot be skipped"
            raise ValueError(f"{what}; leave nonfinite out, or leave out the expert that is not finite")
        if self.vocabulary == "union" and self.assets != "base":
            raise ValueError("vocabulary: with union the tokenizer is the base's with more tokens; leave assets out")
        return self

    @model_validator(mode="after")
    def _an_adapter_adds_no_tokens(self) -> Recipe:
        if self.as_lora is not None and self.vocabulary != "refuse":
            raise ValueError("as_lora: an adapter holds no vocabulary; leave `vocabulary` out, or write a full model")
        return self

    @model_validator(mode="after")
    def _only_an_adapter_is_compressed(self) -> Recipe:
        if self.compress == "first" and (self.as_lora is None or self.split_qkv):
            raise ValueError("compress: `first` goes with as_lora, and not with split_qkv; leave it out")
        return self

    @model_validator(mode="after")
    def _the_paper_splits_nothing(self) -> Recipe:
        if self.split_qkv and self.policy == "paper":
            raise ValueError("split_qkv is not what the paper did; leave it out, or use policy default")
        return self

    @model_validator(mode="after")
    def _what_is_joined_is_a_full_weight(self) -> Recipe:
        if not self.join_qkv:
            return self
        skips = self.nonfinite != "error"
        beside = {"split_qkv": self.split_qkv, "as_lora": self.as_lora is not None, "nonfinite: skip-expert": skips}
        for name, given in beside.items():
            if given:
                raise ValueError(f"join_qkv does not go with {name}; leave one of them out")
        return self

    @property
    def models(self) -> list[str]:
        """The base and then every expert, as they were named."""
        return [self.base, *(expert.model for expert in self.experts)]

    @property
    def adapters(self) -> dict[int, str]:
        """The adapters that are applied to experts, by the expert's number in `models`."""
        return {i: expert.adapter for i, expert in enumerate(self.experts, 1) if expert.adapter is not None}

    @model_validator(mode="after")
    def _a_weight_for_each(self) -> Recipe:
        for rule in self.rules:
            if rule.weights is not None and len(rule.weights) != len(self.experts):
                counts = f"{len(rule.weights)} weights for {len(self.experts)} experts"
                raise ValueError(f"rule {rule.match!r} has {counts}; give one weight each")
        return self

    @model_validator(mode="after")
    def _slices_of_these_models(self) -> Recipe:
        for part in self.slices:
            if len(part.experts) != len(self.experts):
                counts = f"{len(part.experts)} ranges for {len(self.experts)} experts"
                raise ValueError(f"a slice has {counts}; give one each, null for an expert that is no part of it")
            if part.base_from > len(self.experts):
                what = f"a slice's base_from is {part.base_from}, and there are {len(self.experts)} experts"
                raise ValueError(f"{what}; count them from 1, and name the base by 0")
        return self

    def slice_of(self, name: str) -> SliceSpec | None:
        """The slice that a tensor of the output is in, None where there are none."""
        if not self.slices:
            return None
        return self.slices[LayerStack(tuple(part.length for part in self.slices)).slice_of(name)[0]]

    def assets_number(self, labels: Sequence[str]) -> int | None:
        """The model that `assets` names: 0 for the base, i for the i-th expert, by its label or as it was named."""
        if self.assets == "base":
            return 0
        names = [*labels, *self.models[1:]]
        return names.index(self.assets) % len(labels) + 1 if self.assets in names else None

    def build_method(self) -> Method:
        return self.method.build(self.scale)


def make_recipe(content: Mapping[str, Any], where: object = "recipe") -> Recipe:
    """A validated recipe; UsageError names the first wrong key or value and the cure."""
    try:
        return Recipe.model_validate(dict(content))
    except ValidationError as failure:
        raise _explain(failure, where) from None


def load_recipe(
    path: Path,
    overrides: Mapping[str, Any],
    method: str | None = None,
    params: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    allow_pickle: bool = False,
) -> Recipe:
    """Read a recipe file. Relative folders in it are relative to the file; what is no folder may be a Hub id.

    `overrides` win over its keys, `method` over its rule, `params` over the rule's parameters and `weights` over those
    of its experts. `allow_pickle` is for models whose headers a mergekit recipe's values depend on.
    """
    content = read_yaml(path, "recipe", "`base:`, `experts:` and `method:`")
    if is_mergekit(content, path):
        if weights is not None:
            raise _decided("--weights", path)
        return _from_mergekit(content, path, overrides, method, params, allow_pickle)
    if isinstance(content.get("base"), str):
        content["base"] = relative_to(path.parent, content["base"])
    if isinstance(content.get("experts"), list):
        content["experts"] = [_locate_expert(path.parent, expert) for expert in content["experts"]]
    if isinstance(content.get("calibration"), str) and content["calibration"] != SELF:  # never on the Hub
        content["calibration"] = str(path.parent / expanded(content["calibration"]))
    rule = with_params(method or content.get("method", DEFAULT), params or {})
    content = {**content, "method": rule, **overrides}
    if isinstance(content.get("experts"), list):
        content["experts"] = with_weights(content["experts"], weights, "--weights")
    return make_recipe(content, path)


def _from_mergekit(
    content: Mapping[str, Any],
    path: Path,
    overrides: Mapping[str, Any],
    method: str | None,
    params: Mapping[str, Any] | None,
    allow_pickle: bool,
) -> Recipe:
    """A mergekit YAML decides models and rules itself: only options that leave them alone go with it."""
    decided = [key for key in ("base", "experts", "scale", "policy") if key in overrides]
    if method or params or decided:
        option = "--method" if method else "--set" if params else f"--{decided[0].removesuffix('s')}"
        raise _decided(option, path)

    own = next((key for key in content if key in Recipe.model_fields and key not in KEYS), None)
    if own is not None:  # as cures name them
        cure = "write the merge as one of those, with `base`, `experts` and `method` (docs/recipes.md)"
        raise UsageError(path, f"`{own}` is a key of acemerge's own recipes, and this is one of mergekit", cure)

    def headers(model: str) -> Mapping[str, TensorSpec]:
        path = locate(model, allow_pickle, quiet=True).path
        return open_checkpoint(path, allow_pickle, dequantize=True).tensors

    found = from_mergekit(content, path, lambda model: relative_to(path.parent, model), headers)
    return make_recipe({**found, **overrides}, path)


def _decided(option: str, path: Path) -> UsageError:
    cure = "leave it out, or change what the file says of models, methods and weights"
    return UsageError(path, f"{option} does not go with a mergekit recipe", cure)


def with_params(method: Any, params: Mapping[str, Any]) -> Any:
    """A rule with more parameters, as a table; what is no rule is left to the validation."""
    return {**as_table(method), **params} if isinstance(method, str | Mapping | Method) else method


def with_weights(experts: Sequence[Any], weights: Sequence[float] | None, where: str = "weights") -> list[Any]:
    """The experts, each a path or a table, with these weights; UsageError where their number differs."""
    if weights is None:
        return list(experts)
    if len(weights) != len(experts):
        raise UsageError(where, f"{len(weights)} weights for {len(experts)} experts", "give one weight each")
    pairs = zip(experts, weights, strict=True)
    return [{**(e if isinstance(e, dict) else {"model": e}), "weight": weight} for e, weight in pairs]


def parse_weights(text: str) -> list[float]:
    """`1,0.5` to numbers."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise UsageError("--weights", f"{text!r} are no numbers", "write for example --weights 1,0.5") from None


def parse_expert(text: str) -> Any:
    """`PATH=0.5` to an expert with its weight; a path that exists under that very name is one."""
    path, equals, weight = text.rpartition("=")
    if not equals or (parse(text) is None and files.kind(Path(text)) != "nothing"):
        return text
    try:
        return {"model": path, "weight": float(weight)}
    except ValueError:
        return text


def _locate_expert(folder: Path, expert: Any) -> Any:
    if isinstance(expert, str):
        return relative_to(folder, expert)
    if isinstance(expert, dict):
        paths = {key: expert[key] for key in ("model", "adapter") if isinstance(expert.get(key), str)}
        return expert | {key: relative_to(folder, path) for key, path in paths.items()}
    return expert


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """`["eps=2e-4", "tau=0.3"]` to parameters; values are left to the rule's own validation."""
    params = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key.strip() in ("", "name"):
            raise UsageError(f"--set {setting}", "not of the form KEY=VALUE", "write for example --set eps=2e-4")
        params[key.strip()] = value.strip()
    return params


def _explain(failure: ValidationError, where: object) -> UsageError:
    def owner(place: KeyPath) -> type[BaseModel]:
        models: dict[str, type[BaseModel]] = {"experts": ExpertSpec, "rules": TensorRule, "slices": SliceSpec}
        return models.get(str(place[0]), Recipe) if len(place) > 1 else Recipe

    return explain(failure, where, owner, "name at least one expert", "see docs/recipes.md")
