"""A LoRA adapter out of a full fine-tune: the best factors of each linear layer's task vector."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from acemerge.checkpoints.header import TensorSpec
from acemerge.checkpoints.journal import Done
from acemerge.checkpoints.lora import ADAPTER_CONFIG, ADAPTER_MODEL, PREFIX
from acemerge.checkpoints.output import OutputFolder, output_folder
from acemerge.checkpoints.reader import Reader, check_unchanged
from acemerge.checkpoints.writer import FileSum, TensorFiles
from acemerge.compute import task_vectors
from acemerge.errors import CheckpointError, NumericalError, UsageError
from acemerge.finite import is_finite
from acemerge.jobs import Job, pieces
from acemerge.linalg.gram import energies
from acemerge.linalg.spectral import leading_singular
from acemerge.opening import Opened, RunOptions, open_recipe
from acemerge.pipeline import Pipeline
from acemerge.recipe import make_recipe
from acemerge.relatedness import check_related
from acemerge.report.manifest import build_manifest, to_bytes
from acemerge.run import walker
from acemerge.shapes import Float, Tensor
from acemerge.work import Loaded, Place, Setting, Work

# The matrices of a mixture's experts lie apart on disk and fused in memory, where no adapter of a layer reaches them.
_FUSED_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Extracted:
    """What became of one tensor's task vector: its energy, and that of what the adapter lacks of it."""

    name: str
    energy: float
    lost: float
    in_adapter: bool

    @property
    def share_lost(self) -> float:
        return self.lost / self.energy if self.energy else 0.0


@dataclass(frozen=True)
class ExtractReport:
    """The layers in the adapter, then the other tensors that changed; `left_out` are those that the base lacks."""

    out: Path
    tensors: tuple[Extracted, ...]
    left_out: tuple[str, ...]

    @property
    def share_lost(self) -> float:
        """Of the energy of the whole difference, the tensors outside the adapter included."""
        energy = sum(tensor.energy for tensor in self.tensors)
        return sum(tensor.lost for tensor in self.tensors) / energy if energy else 0.0


def extract_lora(
    model: str | Path, base: str | Path, rank: int, out: str | Path, options: RunOptions | None = None
) -> ExtractReport:
    """Write an adapter for `base` with, for each linear layer, the best `B A` of this rank for `D = W - W0`.

    `B = U sqrt(s)` and `A = sqrt(s) V^T` of the leading singular triplets (Eckart and Young), in float32 with
    alpha = r, so that the factor on `B A` is 1. What else changed (embeddings, norms, biases, heads) is not in the
    adapter: its energy counts as lost. Raises AcemergeError as a merge does.
    """
    if rank < 1:
        raise UsageError("--rank", f"{rank} is not a rank", "use 1 or more")
    options, out, started = options or RunOptions(), Path(out), time.perf_counter()
    content = {"base": str(base), "experts": [str(model)], "method": "tsv_m", "embeddings": "rule"}
    opened = open_recipe(make_recipe(content, "extract-lora"), out, options)
    if opened.plan.adapters:
        raise CheckpointError(model, "is an adapter already", "name a full model")
    if not options.force:
        check_related(opened.plan, opened.base, opened.experts)
    modules = {job.name: module for job in opened.plan.jobs if (module := _module(job, opened))}
    if not modules:
        raise CheckpointError(model, "has no linear layer that an adapter could change", "name a full model")
    with output_folder(out, options.overwrite) as output:
        output.begin(Done({})).close()
        found, hashes = _write(opened, modules, rank, output)
        output.write_bytes(ADAPTER_CONFIG, _configuration(opened, list(modules.values()), rank))
        for checkpoint, sums in zip(opened.checkpoints, hashes, strict=True):
            check_unchanged(checkpoint, sums)
        report = ExtractReport(out, found, tuple(head.spec.name for head in opened.plan.heads[0]))
        inputs = [
            (origin, {path.name: FileSum(h.sha256, h.nbytes) for path, h in sums.items()})
            for origin, sums in zip(opened.origins, hashes, strict=True)
        ]
        manifest = build_manifest(opened.plan, {}, inputs, output.written, round(time.perf_counter() - started, 3))
        output.publish(to_bytes(manifest | _about(report, modules, rank)))
    return report


def _module(job: Job, opened: Opened) -> str:
    """The module's name in the model where an adapter can change this tensor, else empty."""
    parameter = opened.roles.identity[job.name]
    tied = opened.roles.by_name.get(parameter, job.role).name == "embedding"
    linear = (
        job.method is not None and job.role.name in ("linear", "conv1d", "output_head") and len(job.spec.shape) == 2
    )
    if not linear or tied or not parameter.endswith(".weight") or _FUSED_EXPERT.search(job.name):
        return ""
    return parameter.removesuffix(".weight")


def _factor_specs(job: Job, module: str, rank: int) -> tuple[TensorSpec, TensorSpec]:
    _, rows, columns = job.matrices
    A = TensorSpec(f"{PREFIX}{module}.lora_A.weight", torch.float32, (rank, columns))
    return A, TensorSpec(f"{PREFIX}{module}.lora_B.weight", torch.float32, (rows, rank))


def _write(
    opened: Opened, modules: Mapping[str, str], rank: int, output: OutputFolder
) -> tuple[tuple[Extracted, ...], Any]:
    """Write the factors layer by layer; what became of each tensor, and the inputs' hashes."""
    layers = [job for job in opened.plan.jobs if job.name in modules]
    others = [job for job in opened.plan.jobs if job.name not in modules and job.method]
    specs = [spec for job in layers for spec in _factor_specs(job, modules[job.name], rank)]
    with opened.pipeline(1, hashing=True) as (pipeline, _):
        found = []
        with TensorFiles(output.path, {ADAPTER_MODEL: specs}, {}) as written:
            for name, A, B, energy, lost in _stream(pipeline, layers, _extracting(opened.setting, rank)):
                found.append(Extracted(name, energy, lost, in_adapter=True))
                for factor in (A, B):
                    written.write(ADAPTER_MODEL, factor)
                    written.end_of_tensor([ADAPTER_MODEL])
            output.written |= written.finished
        for name, energy in _stream(pipeline, others, _measuring(opened.setting)):
            found.append(Extracted(name, energy, energy, in_adapter=False))
        return tuple(found), pipeline.of_readers(Reader.hashes)


def _stream(pipeline: Pipeline, jobs: list[Job], work: Work[list[Any]]) -> Any:
    """What `work` makes of each tensor, whole, in order."""
    walk = walker(pipeline, "extract", lambda _: None)
    for results in walk((piece for job in jobs for piece in pieces(job, split=False)), work):
        yield from results


def _extracting(setting: Setting, rank: int) -> Work[list[Any]]:
    def work(loaded: Loaded, place: Place) -> list[Any]:
        made = []
        for piece, values in loaded:
            with place.space((2, *piece.shape), piece.job.compute_dtype) as space:
                W0 = space[1].copy_(values.take((0, piece.job.name)))
                D = task_vectors(piece, values, setting, W0, space[:1])[0][0]
                made.append((piece.job.name, *factors(D.mT if piece.job.transposed else D, rank, piece.job.name)))
        return made

    return work


def _measuring(setting: Setting) -> Work[list[Any]]:
    def work(loaded: Loaded, place: Place) -> list[Any]:
        made = []
        for piece, values in loaded:
            with place.space((2, *piece.shape), piece.job.compute_dtype) as space:
                W0 = space[1].copy_(values.take((0, piece.job.name)))
                made.append((piece.job.name, task_vectors(piece, values, setting, W0, space[:1])[1].item()))
        return made

    return work


def factors(
    D: Float[Tensor, "out in"], rank: int, name: str = "D"
) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"], float, float]:
    """The factors A and B of the best `B A` of this rank, float32 and filled up with zeros, the energy of D, and that
    of `D - B A`.
    """
    energy = energies(D[None]).item()
    A, B = torch.zeros(rank, D.shape[1]), torch.zeros(D.shape[0], rank)
    if energy == 0:
        return A, B, 0.0, 0.0
    found = leading_singular(D, min(rank, *D.shape))
    root = found.s[: found.rank].sqrt()
    A[: found.rank], B[:, : found.rank] = (found.V * root).T, found.U * root
    if not (is_finite(A) and is_finite(B)):
        raise NumericalError(f"tensor {name!r}", "its factors are not finite in float32", "check the model's values")
    rest = D.double() - B.to(D.device).double() @ A.to(D.device).double()
    return A, B, energy, rest.square().sum().item()


def _configuration(opened: Opened, modules: list[str], rank: int) -> bytes:
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": opened.plan.recipe.base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(job.role.transposed for job in opened.plan.jobs),
        "init_lora_weights": True,
        "target_modules": modules,
    }
    return json.dumps(config, indent=2).encode() + b"\n"


def _about(report: ExtractReport, modules: Mapping[str, str], rank: int) -> dict[str, Any]:
    """What of the manifest is an adapter's own."""
    stored = [f"{PREFIX}{module}.lora_{side}.weight" for module in modules.values() for side in "AB"]
    return {
        "recipe": {"extract": "lora", "rank": rank},
        "tensors": {name: {"rule": "svd", "status": "ok"} for name in stored},
        "heads": {},
        "left_out": list(report.left_out),
        "layers": {
            t.name: {"energy": t.energy, "share_lost": t.share_lost, "in_adapter": t.in_adapter} for t in report.tensors
        },
        "share_lost": report.share_lost,
    }
