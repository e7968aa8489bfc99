"""Recipe and headers to a list of jobs. Reads no tensor bytes: all that can be refused is refused here."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from acemerge.checkpoints.header import TensorSpec
from acemerge.errors import CheckpointError
from acemerge.methods import Method, check_experts
from acemerge.policy import Decision, Policy
from acemerge.recipe import Recipe
from acemerge.roles import Role, Roles
from acemerge.shapes import Tensor

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Code, libraries and allocator slack, whatever the model.
_RESIDENT = 500_000_000


class Source(Protocol):
    """A model as a plan sees it: names, shapes and types, values one tensor at a time."""

    @property
    def tensors(self) -> Mapping[str, TensorSpec]: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    def read(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Job:
    """One tensor of the output: what it is, which rule makes it and why.

    `sources[i]` is the tensor's name in the i-th expert, empty where it has none. `copies` are further
    spellings of a tied tensor, (checkpoint, name) with 0 for the base, whose bytes must agree.
    """

    spec: TensorSpec
    role: Role
    reason: str
    method: Method | None = None
    transposed: bool = False
    sources: tuple[str, ...] = ()
    must_agree: bool = False
    copies: tuple[tuple[int, str], ...] = ()

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def rule(self) -> str:
        return self.method.name if self.method else "base"


@dataclass(frozen=True)
class Head:
    """A tensor of one expert that is not merged but written beside the model."""

    spec: TensorSpec
    reason: str


@dataclass(frozen=True)
class Plan:
    """The jobs in the order of the base's tensors, and each expert's own heads."""

    recipe: Recipe
    experts: tuple[str, ...]
    jobs: tuple[Job, ...]
    heads: tuple[tuple[Head, ...], ...]
    roles_source: str
    warnings: tuple[str, ...]
    bytes_read: int

    @property
    def bytes_reread(self) -> int:
        """What rules that keep a share of the whole model read first, in two passes, for their thresholds."""
        tensors = [job.spec for job in self.jobs if job.method and job.method.needs.keep is not None]
        return 2 * sum(spec.nbytes for spec in tensors) * (1 + len(self.experts))

    @property
    def bytes_written(self) -> int:
        heads = sum(head.spec.nbytes for expert in self.heads for head in expert)
        return heads + sum(job.spec.nbytes for job in self.jobs)

    @property
    def operations(self) -> int:
        """Floating-point operations of all rules."""
        total = 0
        for job in self.jobs:
            if job.method:
                slices, rows, columns = matrix_shape(job)
                total += slices * job.method.operations(len(self.experts), rows, columns)
        return total

    @property
    def peak_memory(self) -> int:
        """Bytes for one worker: T task vectors of the largest tensor, what its rule works in, and what the process
        itself needs.
        """
        width = 8 if self.recipe.compute_dtype == "float64" else 4
        largest = 0
        for job in self.jobs:
            if job.method:
                slices, rows, columns = matrix_shape(job)
                work = job.method.needs.work.entries(len(self.experts), rows, columns)
                result = job.spec.count if slices > 1 else 0
                largest = max(largest, job.spec.count * len(self.experts) + work + result)
        return _RESIDENT + largest * width


def matrix_shape(job: Job) -> tuple[int, int, int]:
    """(slices, out, in) of the matrices that a job's rule sees."""
    shape = job.spec.shape
    if len(shape) < 2:
        return 1, 1, math.prod(shape)
    rows, columns = (shape[-1], shape[-2]) if job.transposed else (shape[-2], shape[-1])
    return math.prod(shape[:-2]), rows, columns


def make_plan(recipe: Recipe, base: Source, experts: Sequence[Source], labels: Sequence[str], roles: Roles) -> Plan:
    """Decide for every tensor of the base what the output holds.

    Raises CheckpointError where the experts do not fit the base, UsageError where the recipe does not fit the
    tensors.
    """
    planner = _Planner(recipe, base, experts, labels, roles)
    planner.check_related()
    jobs = tuple(planner.job(names[0]) for names in planner.base_names.values())
    for method in _distinct(job.method for job in jobs if job.method):
        check_experts(method, [expert.weight for expert in recipe.experts])
    heads = tuple(tuple(planner.heads(i)) for i in range(len(experts)))
    read = sum(spec.nbytes for source in (base, *experts) for spec in source.tensors.values())
    return Plan(recipe, tuple(labels), jobs, heads, roles.source, tuple(planner.warnings), read)


class _Planner:
    def __init__(
        self, recipe: Recipe, base: Source, experts: Sequence[Source], labels: Sequence[str], roles: Roles
    ) -> None:
        self.recipe, self.base, self.experts, self.labels, self.roles = recipe, base, experts, labels, roles
        self.policy = Policy(recipe, str(base.config.get("model_type", "")), base.tensors.keys())
        self.warnings: list[str] = []
        self.base_names = self._by_identity(base)
        self.expert_names = [self._by_identity(expert) for expert in experts]
        self.kept_apart: set[str] = set()  # identities of base tensors that every expert keeps for itself
        counts = Counter(_group(identity) for identity in self.base_names)
        self.backbone = counts.most_common(1)[0][0] if counts else ""

    def check_related(self) -> None:
        matrices = {self.roles.identity[n] for n in self.base.tensors if self._is_matrix(n)} or self.base_names.keys()
        for label, expert, names in zip(self.labels, self.experts, self.expert_names, strict=True):
            ours, theirs = (source.config.get("model_type") for source in (self.base, expert))
            if ours and theirs and ours != theirs:
                what = f"is a {theirs!r} model, but the base is {ours!r}"
                raise CheckpointError(f"expert {label}", what, "merge models of one architecture")
            if not matrices & names.keys():
                cure = "check that it comes from this base and that its names have no prefix of their own"
                raise CheckpointError(f"expert {label}", "has no layer under a name of the base's", cure)

    def _is_matrix(self, name: str) -> bool:
        return self.roles.by_name[name].name in ("linear", "conv1d", "experts")

    def _by_identity(self, source: Source) -> dict[str, list[str]]:
        """The names in a source by the parameter that they stand for."""
        names: dict[str, list[str]] = {}
        for name in source.tensors:
            names.setdefault(self.roles.identity[name], []).append(name)
        return names

    def job(self, name: str) -> Job:
        spec, role = self.base.tensors[name], self.roles.by_name[name]
        decision = self.policy.decide(spec, role)
        out = replace(spec, dtype=self._output_dtype(spec))
        identity = self.roles.identity[name]
        if decision.action == "heads":
            self.kept_apart.add(identity)
        if decision.action != "merge":
            return Job(out, role, decision.reason)
        if not spec.dtype.is_floating_point:
            return self._integer_job(out, role)
        sources = tuple(names.get(identity, [""])[0] for names in self.expert_names)
        if not any(sources):
            return self._base_only(out, role)
        for label, found in zip(self.labels, sources, strict=True):
            if not found and self._is_no_parameter(role):
                return Job(out, role, "no parameter of the architecture: the base's own")
            if not found:
                raise CheckpointError(f"expert {label}", f"lacks tensor {name!r}", keep_base(name))
        shapes = [expert.tensors[found].shape for expert, found in zip(self.experts, sources, strict=True)]
        if any(shape != spec.shape for shape in shapes):
            return self._mismatched(out, role, shapes)
        self._refuse_integers(name, sources)
        return self._merge_job(out, role, decision, sources)

    def _merge_job(self, out: TensorSpec, role: Role, decision: Decision, sources: tuple[str, ...]) -> Job:
        transposed = role.transposed and self.policy.orientation == "input"
        identity = self.roles.identity[out.name]
        everywhere = [self.base_names, *self.expert_names]
        copies = [(i, other) for i, names in enumerate(everywhere) for other in names[identity][1:]]
        return Job(out, role, decision.reason, decision.method, transposed, sources, copies=tuple(copies))

    def _output_dtype(self, spec: TensorSpec) -> torch.dtype:
        if self.recipe.dtype == "auto" or not spec.dtype.is_floating_point:
            return spec.dtype
        return _DTYPES[self.recipe.dtype]

    def _is_no_parameter(self, role: Role) -> bool:
        """The architecture is known and does not have it, as a mask that an older version saved."""
        return role.origin == "name" and self.roles.from_architecture

    def _integer_job(self, out: TensorSpec, role: Role) -> Job:
        sources = tuple(out.name if out.name in expert.tensors else "" for expert in self.experts)
        for label, expert, found in zip(self.labels, self.experts, sources, strict=True):
            if found and expert.tensors[found] != self.base.tensors[out.name]:
                what = f"integer tensor {out.name!r} differs from the base's in type or shape"
                raise CheckpointError(f"expert {label}", what, keep_base(out.name))
        return Job(out, role, "an integer buffer: must agree, copied", sources=sources, must_agree=True)

    def _base_only(self, out: TensorSpec, role: Role) -> Job:
        """No expert has it: the base's own head, unless it belongs to the backbone."""
        if self._is_no_parameter(role):
            return Job(out, role, "no parameter of the architecture: the base's own")
        if self._in_backbone(out.name):
            what = f"lacks tensor {out.name!r}, as all experts do"
            raise CheckpointError(f"expert {self.labels[0]}", what, keep_base(out.name))
        return Job(out, role, "no expert has it: the base's own")

    def _in_backbone(self, name: str) -> bool:
        """Whether a tensor belongs to the body, as most tensors do, and not to a head."""
        return _group(self.roles.identity[name]) == self.backbone

    def _mismatched(self, out: TensorSpec, role: Role, shapes: list[tuple[int, ...]]) -> Job:
        """Shapes that differ: a task head if it can be one, otherwise the experts do not fit."""
        i = next(i for i, shape in enumerate(shapes) if shape != out.shape)
        found = f"tensor {out.name!r} has shape {list(shapes[i])}, but {list(out.shape)} in the base"
        if role.name in ("embedding", "output_head"):
            cure = f"bring the vocabularies to one size, or {keep_base(out.name)}"
            raise CheckpointError(f"expert {self.labels[i]}", found, cure)
        if role.name not in ("linear", "bias") or self._in_backbone(out.name):
            raise CheckpointError(f"expert {self.labels[i]}", found, "merge models of one size")
        self.kept_apart.add(self.roles.identity[out.name])
        return Job(out, role, "a task head, its shape differs: the base's, each expert's own in heads/")

    def _refuse_integers(self, name: str, sources: tuple[str, ...]) -> None:
        for label, expert, found in zip(self.labels, self.experts, sources, strict=True):
            if not expert.tensors[found].dtype.is_floating_point:
                types = f"{expert.tensors[found].dtype}, but {self.base.tensors[name].dtype} in the base"
                what = f"tensor {found!r} is {types}"
                raise CheckpointError(f"expert {label}", what, "dequantise the expert first")

    def heads(self, i: int) -> list[Head]:
        """What the i-th expert keeps for itself: task heads and tensors that the base lacks."""
        heads = []
        for name, spec in self.experts[i].tensors.items():
            identity = self.roles.identity[name]
            if identity in self.kept_apart:
                heads.append(Head(spec, "task head"))
            elif identity not in self.base_names:
                heads.append(Head(spec, "missing in the base"))
                if self._in_backbone(name):
                    self.warnings.append(f"expert {self.labels[i]}: {name} is not in the base; kept in heads/ only")
        return heads


def _distinct(methods: Iterable[Method]) -> list[Method]:
    return list({id(method): method for method in methods}.values())


def keep_base(name: str) -> str:
    """The cure that keeps the base's values of one tensor."""
    return f"add the recipe rule {{match: {name}, action: base}} to keep the base's"


def _group(name: str) -> str:
    """The first part of a tensor name: `bert` of `bert.encoder.layer.0...`, `classifier` of a head."""
    return name.split(".", 1)[0]


def expert_labels(paths: Sequence[str]) -> list[str]:
    """A short name for each expert, used for its heads' file: the folder's name, numbered where two agree."""
    folders = [path.rstrip("/").split("/")[-1] for path in paths]
    names = [re.sub(r"[^\w.-]", "-", folder, flags=re.ASCII).strip(".")[-100:] or "expert" for folder in folders]
    if len(set(names)) == len(names):
        return names
    return [f"{i}-{name}" for i, name in enumerate(names, 1)]
