"""An expert's own weights from a merged model and the masks that were written beside it."""

from __future__ import annotations

from pathlib import Path

from acemerge.checkpoints import files
from acemerge.checkpoints.folder import open_checkpoint, open_file
from acemerge.checkpoints.links import contained
from acemerge.errors import CheckpointError, UsageError, nearest
from acemerge.output.manifest import load_manifest
from acemerge.output.names import MASKS
from acemerge.output.packed_masks import unpack
from acemerge.output.records import TensorRecord, records_of
from acemerge.shapes import Tensor


def expert_weights(out: str | Path, base: str | Path, expert: str) -> dict[str, Tensor]:
    """One expert's own weights from a model merged by `emr`: `W_0 + lambda_t mask_t (W - W_0)`.

    `expert` is its name in the manifest, that of its file in masks/. Tensors that no mask covers are the merged
    model's. All in memory; what was masked is float32.

    Raises UsageError for an unknown expert, CheckpointError for a folder that is not as it was written.
    """
    out = Path(out)
    manifest = load_manifest(out)
    labels = [str(label) for label in manifest["experts"]]
    if expert not in labels:
        raise UsageError(f"expert {expert!r}", "is not in the manifest", nearest(expert, labels))
    merged, origin = open_checkpoint(out), open_checkpoint(Path(base), dequantize=True)
    path = contained(files.resolve(out), f"{MASKS}/{expert}.safetensors")
    if files.kind(path) == "nothing":
        raise CheckpointError(path, "there is none", f"merge by --method emr, which alone writes {MASKS}/")
    masks = open_file(path)
    records = records_of(manifest)
    factor = _rescale([records[name] for name in masks.tensors], labels, expert)
    weights = {}
    for name, spec in merged.tensors.items():
        weights[name] = merged.read(name)
        if name in masks.tensors:
            W0 = origin.read(name).float()
            weights[name] = W0 + factor * unpack(masks.read(name), spec.shape) * (weights[name].float() - W0)
    return weights


def _rescale(records: list[TensorRecord], labels: list[str], expert: str) -> float:
    """`lambda_t = sum |D_t| / sum |mask_t M|` over all masked tensors."""
    own = kept = 0.0
    for record in records:
        used = [label for label in labels if label not in record.skipped_experts]
        if expert in used and record.stats.own_l1 and record.stats.masked_l1:
            own += record.stats.own_l1[used.index(expert)]
            kept += record.stats.masked_l1[used.index(expert)]
    return own / kept if kept else 0.0
