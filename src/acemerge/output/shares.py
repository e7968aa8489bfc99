"""Whose update is how large, layer by layer: from what the manifest says of each tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from acemerge.models.depth import layer_number
from acemerge.output.records import TensorRecord

Records = Mapping[str, TensorRecord]


def energies_of(record: TensorRecord, labels: Sequence[str]) -> Sequence[float] | None:
    """One for each expert; nothing where some were left out."""
    return record.energies if record.energies is not None and len(record.energies) == len(labels) else None


def total_energies(labels: Sequence[str], records: Records) -> list[float]:
    """Every expert's over all tensors."""
    rows = [row for record in records.values() if (row := energies_of(record, labels))]
    return [sum(column) for column in zip(*rows, strict=True)] if rows else [0.0] * len(labels)


def layer_shares(labels: Sequence[str], records: Records) -> dict[str, list[float]]:
    """Every expert's share of the energy of each layer; what has no layer's number is `rest`, at the end."""
    sums: dict[int | None, list[float]] = {}
    for name, record in records.items():
        energies = energies_of(record, labels)
        if energies:
            before = sums.setdefault(layer_number(name), [0.0] * len(labels))
            sums[layer_number(name)] = [a + b for a, b in zip(before, energies, strict=True)]
    ordered = sorted(sums.items(), key=lambda entry: (entry[0] is None, entry[0] or 0))
    shares = {layer: [energy / sum(row) for energy in row] for layer, row in ordered if sum(row) > 0}
    return {"rest" if layer is None else str(layer): row for layer, row in shares.items()}
