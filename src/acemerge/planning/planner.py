"""Recipe and headers to a plan. Reads no tensor bytes: all that can be refused is refused here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from acemerge.checkpoints.assets import component_weights
from acemerge.checkpoints.float8 import plain
from acemerge.checkpoints.header import FLOAT8, TensorSpec
from acemerge.errors import CheckpointError, Cure, UsageError
from acemerge.methods import Method, check_experts, check_weights
from acemerge.models.projections import fused_projections
from acemerge.models.roles import LAYERS, Role, Roles
from acemerge.models.vocabulary import Tokens
from acemerge.planning.adapter_fit import fit
from acemerge.planning.jobs import OUTPUT_DTYPES, ByRule, Head, Job, Keep, Merge, ModelHeader, Plan, is_whole
from acemerge.planning.joined import with_joined
from acemerge.planning.policy import Decision, Policy
from acemerge.planning.surprises import of_heads, of_recipe
from acemerge.planning.vocabularies import VocabularyOf, VocabularyPlanner, by_token
from acemerge.recipes.recipe import Recipe

_NO_PARAMETER = "no parameter of the architecture: the base's own"
_COUNTER = "num_batches_tracked"  # of a batch norm: it says how long, not what was learnt
_COUNTED = f"batch norms: their running statistics are averaged, of {_COUNTER} the largest is kept"
_ROUNDED = (
    "weights in fp8 are rounded by up to a sixteenth: their differences hold that beside what was tuned; "
    "merge unquantised checkpoints where there are any"
)
_BY_TOKEN = Cure(
    "match the vocabularies by token with --vocabulary base or union",
    "save the models with their tokenizers, and merge the folders with --vocabulary base or union",
)
UNQUANTISED = "merge the checkpoint that it was quantised from"


def make_plan(
    recipe: Recipe,
    base: ModelHeader,
    experts: Sequence[ModelHeader],
    labels: Sequence[str],
    roles: Roles,
    tokens: Sequence[Tokens | None] = (),
) -> Plan:
    """Decide for every tensor of the base what the output holds. `tokens` are the models' own, the base's first.

    Raises CheckpointError where the experts do not fit the base, UsageError where the recipe does not fit the
    tensors.
    """
    planner = _Planner(recipe, base, experts, labels, roles)
    planner.check_related()
    adapters = {label: expert.adapter for label, expert in zip(labels, experts, strict=True) if expert.adapter}
    bare = [label for label, expert in zip(labels, experts, strict=True) if not is_whole(expert)]
    if bare and recipe.vocabulary != "refuse":
        what = f"expert {bare[0]} is an adapter, whose tokens are not told"
        raise UsageError(f"vocabulary {recipe.vocabulary}", what, "merge it into its base with peft first")
    planner.vocabulary = VocabularyPlanner(recipe, [base, *experts], labels, roles).match(tokens, planner.warnings)
    jobs = tuple(planner.sized(planner.job(names[0])) for names in planner.base_names.values())
    if recipe.join_qkv:
        jobs = with_joined(jobs)
    if any(isinstance(job, Keep) and job.largest and any(job.sources) for job in jobs):
        planner.warnings.append(_COUNTED)
    heads = tuple(tuple(planner.heads(i)) for i in range(len(experts)))
    named = {"base": base} | {f"expert {label}": expert for label, expert in zip(labels, experts, strict=True)}
    dequantized = {who: model.float8 for who, model in named.items() if model.float8}
    if dequantized:
        planner.warnings.append(_ROUNDED)
    planner.warnings += of_recipe(recipe, base.tensors.keys())
    if recipe.policy == "default":
        planner.warnings += of_heads([job for job in jobs if not isinstance(job, Keep)], roles)
    plan = Plan(recipe, tuple(labels), jobs, heads, roles.source, tuple(planner.warnings), adapters, dequantized)
    for job in _distinct(plan.ruled):
        check_weights(job.method, job.weights)
        check_experts(job.method, job.own_weights)
    return plan


class _Planner:
    def __init__(
        self, recipe: Recipe, base: ModelHeader, experts: Sequence[ModelHeader], labels: Sequence[str], roles: Roles
    ) -> None:
        self.recipe, self.base, self.experts, self.labels, self.roles = recipe, base, experts, labels, roles
        self.policy = Policy(recipe, str(base.config.get("model_type", "")), base.tensors.keys())
        self.base_names = roles.group(base.tensors)
        self.fitted = [fit(e, label, base, self.base_names, roles) for e, label in zip(experts, labels, strict=True)]
        self.warnings = [warning for fitted in self.fitted for warning in fitted.warnings]
        self.expert_names = [roles.group(_own_tensors(expert)) for expert in experts]
        self.kept_apart: set[str] = set()  # identities of base tensors that every expert keeps for itself
        counts = Counter(_group(identity) for identity in self.base_names)
        self.vocabulary: VocabularyOf | None = None
        self.backbone = counts.most_common(1)[0][0] if counts else ""

    def check_related(self) -> None:
        matrices = {
            self.roles.identity[n] for n in self.base.tensors if self.roles.by_name[n].name in LAYERS
        } or self.base_names.keys()
        for label, expert, names in zip(self.labels, self.experts, self.expert_names, strict=True):
            ours, theirs = (source.config.get("model_type") for source in (self.base, expert))
            if ours and theirs and ours != theirs and not expert.absent:
                what = f"is a {theirs!r} model, but the base is {ours!r}"
                raise CheckpointError(f"expert {label}", what, "merge models of one architecture")
            is_no_part = bool(self.recipe.slices) and not names
            if is_whole(expert) and not matrices & names.keys() and not is_no_part:
                cure = "check that it comes from this base and that its names have no prefix of their own"
                raise CheckpointError(f"expert {label}", "has no layer under a name of the base's", cure)

    def sized(self, job: Job) -> Job:
        """The job with the bytes that it reads and the type that it is computed in."""
        specs = [(self.base, *self.experts)[i].tensors[name] for i, name in job.of_its_shape]
        nbytes = sum(spec.nbytes for spec in specs)
        for update in (update for update in job.updates if update) if isinstance(job, Merge) else ():
            specs += update.factors
            nbytes += sum(factor.nbytes for factor in update.factors) // update.sharers
        wide = self.recipe.compute_dtype == "float64" or any(spec.dtype == torch.float64 for spec in specs)
        dtype = torch.float64 if wide else torch.float32
        widens = any(spec.dtype in FLOAT8.values() for spec in specs)
        return replace(job, bytes_in=nbytes, compute_dtype=dtype, widens=widens)

    def job(self, name: str) -> Job:
        spec, role = self.base.tensors[name], self.roles.by_name[name]
        decision = self.policy.decide(spec, role)
        out = replace(spec, dtype=self._output_dtype(spec))
        identity = self.roles.identity[name]
        if decision.action == "heads":
            self._keep_apart(out)
        if self.vocabulary and identity in self.vocabulary.tensors:
            for label, fitted in zip(self.labels, self.fitted, strict=True):
                if identity in fitted.updates:
                    what = f"its adapter changes {name!r}, whose rows are matched by token"
                    raise CheckpointError(f"expert {label}", what, "merge the adapter into its model with peft first")
            return by_token(out, role, decision, self.vocabulary, identity, self._weights(decision), self._absent(name))
        if decision.method is None:
            return Keep(out, role, decision.reason)
        if not spec.dtype.is_floating_point:
            return self._integer_job(out, role)
        sources = tuple(names.get(identity, [""])[0] for names in self.expert_names)
        updates = tuple(fitted.updates.get(identity) for fitted in self.fitted)
        absent = self._absent(name)
        lacking = [
            self.labels[i]
            for i, found in enumerate(sources)
            if not found and is_whole(self.experts[i]) and i not in absent
        ]
        if not any(sources) and not any(updates):
            return self._base_only(out, role, lacking)
        if lacking and self._is_no_parameter(role):
            return Keep(out, role, _NO_PARAMETER)
        if lacking:
            raise self._lacks(lacking[0], name, "")
        for label, expert, found in zip(self.labels, self.experts, sources, strict=True):
            if found and expert.tensors[found].shape != spec.shape:
                return self._mismatched(out, role, label, expert.tensors[found].shape)
        self._refuse_integers(name, sources)
        job = self._merge_job(out, role, decision, decision.method, sources)
        if absent:
            without = ", ".join(self.labels[i] for i in sorted(absent))
            job = replace(job, absent=absent, reason=f"{job.reason}, without {without}")
        return replace(job, updates=updates if any(updates) else ())

    def _absent(self, name: str) -> frozenset[int]:
        """The experts that have no say in a tensor: it is in no part or slice of the base that is theirs."""
        identity, part = self.roles.identity[name], self.recipe.slice_of(name)
        outside = [part is not None and part.experts[i] is None for i in range(len(self.experts))]
        return frozenset(i for i, expert in enumerate(self.experts) if outside[i] or identity in expert.absent)

    def _merge_job(
        self, out: TensorSpec, role: Role, decision: Decision, method: Method, sources: tuple[str, ...]
    ) -> Merge:
        identity = self.roles.identity[out.name]
        everywhere = [self.base_names, *self.expert_names]
        copies = [(i, other) for i, names in enumerate(everywhere) for other in names.get(identity, [])[1:]]
        # Whether an expert is skipped is only known when all of its tensor was seen.
        entrywise = method.needs.entrywise and self.recipe.nonfinite == "error"
        groups = 0 if entrywise else decision.groups
        turned = role.transposed and self.policy.orientation == "input"
        job = Merge(
            out,
            role,
            decision.reason,
            sources,
            tuple(copies),
            method=method,
            weights=self._weights(decision),
            transposed=turned and (role.name != "convolution" or groups > 0),
            pool=decision.pool,
            groups=groups,
            entrywise=entrywise,
        )
        return self._by_projection(job)

    def _weights(self, decision: Decision) -> tuple[float, ...]:
        return decision.weights or tuple(expert.weight for expert in self.recipe.experts)

    def _by_projection(self, job: Merge) -> Merge:
        """The job with its fused projections apart, where the recipe asks for it and the rule sees a matrix."""
        if not self.recipe.split_qkv or not job.method.needs.matrix or len(job.spec.shape) != 2:
            return job
        fused = fused_projections(job.name, job.matrices[1], self.base.config)
        return job if fused is None else replace(job, fused=fused, reason=f"{job.reason}, q, k and v apart")

    def _keep_apart(self, out: TensorSpec) -> None:
        """Leave a tensor to each expert; one that has only an update of it has nothing to be written beside."""
        identity = self.roles.identity[out.name]
        for label, fitted in zip(self.labels, self.fitted, strict=True):
            if identity in fitted.updates:
                what = f"tensor {out.name!r} is kept apart for each expert, but its adapter has factors for it only"
                raise CheckpointError(f"expert {label}", what, "merge the adapter into its model with peft first")
        self.kept_apart.add(identity)

    def _output_dtype(self, spec: TensorSpec) -> torch.dtype:
        if self.recipe.dtype == "auto" or not spec.dtype.is_floating_point:
            return plain(spec, self.base.config).dtype
        return OUTPUT_DTYPES[self.recipe.dtype]

    def _is_no_parameter(self, role: Role) -> bool:
        """The architecture is known and does not have it, as a mask that an older version saved."""
        return role.origin == "name" and self.roles.from_architecture

    def _integer_job(self, out: TensorSpec, role: Role) -> Keep:
        sources = tuple(out.name if out.name in expert.tensors else "" for expert in self.experts)
        for label, expert, found in zip(self.labels, self.experts, sources, strict=True):
            if found and expert.tensors[found] != self.base.tensors[out.name]:
                what = f"integer tensor {out.name!r} differs from the base's in type or shape"
                raise CheckpointError(f"expert {label}", what, keep_apart(out.name))
        if out.name.endswith(_COUNTER):
            return Keep(out, role, "a counter of steps: the largest", sources, largest=True)
        return Keep(out, role, "an integer buffer: must agree, copied", sources)

    def _base_only(self, out: TensorSpec, role: Role, lacking: Sequence[str]) -> Keep:
        """No expert has it: the base's own head, unless it belongs to the backbone. Adapters and parts may lack it."""
        if not lacking:
            what = "no expert has this part" if self._absent(out.name) else "no adapter changes it"
            return Keep(out, role, f"{what}: the base's own")
        if self._is_no_parameter(role):
            return Keep(out, role, _NO_PARAMETER)
        if self._in_backbone(out.name):
            raise self._lacks(lacking[0], out.name, ", as all experts do")
        return Keep(out, role, "no expert has it: the base's own")

    def _lacks(self, label: str, name: str, more: str) -> CheckpointError:
        """The error of an expert without a tensor. No cure throws away values that an expert has."""
        of = self.experts[self.labels.index(label)]
        other = [n for n in _own_tensors(of) if self.roles.identity[n] not in self.base_names and self._in_backbone(n)]
        wrapped = next((n for n in other if ".base_layer." in n or ".lora_" in n), "")
        if wrapped:
            more += f" and has {wrapped!r}: it was saved with an adapter in it"
            cure: str | Cure = "merge that into it with peft (merge_and_unload) and save it again"
        elif other:
            more += f" and has {other[0]!r}, which the base lacks"
            cure = "save both with save_pretrained of one version of transformers, so that their names agree"
        else:
            cure = keep_base(name) if more else keep_apart(name, "fetch the expert again, or ")
        return CheckpointError(f"expert {label}", f"lacks tensor {name!r}{more}", cure)

    def _in_backbone(self, name: str) -> bool:
        """Whether a tensor belongs to the body, as most tensors do, and not to a head. A pipeline has no heads."""
        return ("/" in name and bool(component_weights(name.split("/")[0]))) or _group(
            self.roles.identity[name]
        ) == self.backbone

    def _mismatched(self, out: TensorSpec, role: Role, label: str, shape: tuple[int, ...]) -> Keep:
        """Shapes that differ: a task head if it can be one, otherwise the experts do not fit."""
        found = f"tensor {out.name!r} has shape {list(shape)}, but {list(out.shape)} in the base"
        if role.name in ("embedding", "output_head") and shape[1:] == out.shape[1:]:
            cure: str | Cure = _BY_TOKEN
            if not is_whole(self.experts[self.labels.index(label)]):
                cure = "merge it with peft into the base whose tokens it was trained with, and name that model"
            raise CheckpointError(f"expert {label}", found, cure)
        if role.name not in ("linear", "bias") or self._in_backbone(out.name):
            raise CheckpointError(f"expert {label}", found, "merge models of one size")
        self._keep_apart(out)
        return Keep(out, role, "a task head, its shape differs: the base's, each expert's own in heads/")

    def _refuse_integers(self, name: str, sources: tuple[str, ...]) -> None:
        for label, expert, found in zip(self.labels, self.experts, sources, strict=True):
            if found and not expert.tensors[found].dtype.is_floating_point:
                types = f"{expert.tensors[found].dtype}, but {self.base.tensors[name].dtype} in the base"
                what = f"tensor {found!r} is {types}"
                raise CheckpointError(f"expert {label}", what, UNQUANTISED)

    def heads(self, i: int) -> list[Head]:
        """What the i-th expert keeps for itself: task heads and tensors that the base lacks."""
        heads = []
        for name in _own_tensors(self.experts[i]):
            stored = self.experts[i].tensors[name]
            spec = plain(stored, self.experts[i].config)
            identity = self.roles.identity[name]
            if identity in self.kept_apart:
                heads.append(Head(spec, "task head"))
            elif identity not in self.base_names:
                heads.append(Head(spec, "missing in the base"))
                if self._in_backbone(name):
                    what = f"{name} is not in the base: no part of the merged model, an output has it in heads/"
                    self.warnings.append(f"expert {self.labels[i]}: {what}")
        return heads


def _distinct(jobs: Iterable[ByRule]) -> list[ByRule]:
    """One job of each rule with each weights."""
    return list({(id(job.method), job.own_weights): job for job in jobs}.values())


def keep_base(name: str) -> Cure:
    """The cure that keeps the base's values of a tensor that no expert has."""
    return _rule(name, "base", "", " to keep the base's", " to keep the base's")


def keep_apart(name: str, before: str = "") -> Cure:
    """The cure that keeps the base's values in the output, and each expert's own beside it."""
    stays = ": the base's stays"
    return _rule(name, "heads", before, f"{stays}, each expert's own goes to heads/", stays)


def _rule(name: str, action: str, before: str, of_files: str, in_memory: str) -> Cure:
    """Of several rules that match, the first one counts."""
    rule = f"add the recipe rule {{match: {name}, action: {action}}} before any other{of_files}"
    listed = f"put {{'match': {name!r}, 'action': {action!r}}} first in `rules`{in_memory}"
    return Cure(before + rule, before + listed)


def _own_tensors(source: ModelHeader) -> list[str]:
    """What a model has whole, and not only an update of."""
    updates = source.adapter.updates if source.adapter else {}
    return [name for name in source.tensors if name not in updates or updates[name].replaces_base]


def _group(name: str) -> str:
    """The first part of a tensor name: `bert` of `bert.encoder.layer.0...`, `classifier` of a head."""
    return name.split(".", 1)[0]
