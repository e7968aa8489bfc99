"""What the manifest says of a tensor: as a record, and as the JSON that stands there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from acemerge.errors import CheckpointError
from acemerge.methods.elementwise import Average
from acemerge.methods.stats import LayerStats
from acemerge.methods.status import Status
from acemerge.models.roles import LAYERS
from acemerge.planning.jobs import Job, Keep

AGAIN = "make the output again with --overwrite, or restore the file"
AGAIN_NOW = "make the output again with --overwrite by this version of acemerge"


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """How a tensor was made, and what its rule said of it.

    `energies` are those of the experts' updates; the experts in `skipped_experts` were left out and have none.
    `energy` and `share_lost` are there where the output is an adapter: the energy of the merged update and the share
    of it that the adapter lacks. `merged_energy` is that of the merged update, where a rule made one, `base_energy`
    that of the weight before. `infinite`: it holds infinities, the same in all models, as a mask does.
    """

    role: str
    rule: str
    reason: str
    stats: LayerStats
    energies: tuple[float, ...] | None = None
    skipped_experts: tuple[str, ...] = ()
    energy: float | None = None
    share_lost: float | None = None
    base_energy: float | None = None
    merged_energy: float | None = None
    infinite: bool = False
    seconds: float = 0.0

    @property
    def is_layer(self) -> bool:
        """Whether it is a linear layer's, or a convolution that was merged like one."""
        return self.role in LAYERS or (self.role == "convolution" and self._by_a_rule)

    @property
    def has_tokens(self) -> bool:
        """Whether it is an embedding or an output head that was merged like a layer."""
        return self.role in ("embedding", "output_head") and self._by_a_rule

    @property
    def _by_a_rule(self) -> bool:
        return self.rule not in (Average.name, Keep.rule)

    def to_json(self) -> dict[str, Any]:
        """As the manifest and the journal say it."""
        plain: dict[str, Any] = {"role": self.role, "rule": self.rule, "reason": self.reason, **self.stats.to_json()}
        if self.energies is not None:
            plain["energies"] = list(self.energies)
        if self.skipped_experts:
            plain["skipped_experts"] = list(self.skipped_experts)
        if self.energy is not None:
            plain |= {"energy": self.energy, "share_lost": self.share_lost}
        if self.base_energy is not None:
            plain["base_energy"] = self.base_energy
        if self.merged_energy is not None:
            plain["merged_energy"] = self.merged_energy
        if self.infinite:
            plain["infinite"] = True
        return {**plain, "seconds": self.seconds}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> TensorRecord:
        """What `to_json` made of it; ValueError where it is malformed."""
        own = {
            "role",
            "rule",
            "reason",
            "energies",
            "skipped_experts",
            "energy",
            "share_lost",
            "base_energy",
            "merged_energy",
            "infinite",
            "seconds",
        }
        stats = LayerStats.from_json({key: value for key, value in content.items() if key not in own})
        try:
            return TensorRecord(
                role=str(content["role"]),
                rule=str(content["rule"]),
                reason=str(content["reason"]),
                stats=stats,
                energies=tuple(map(_number, content["energies"])) if "energies" in content else None,
                skipped_experts=tuple(map(str, content.get("skipped_experts", ()))),
                energy=_number(content["energy"]) if "energy" in content else None,
                share_lost=_number(content["share_lost"]) if "share_lost" in content else None,
                base_energy=_number(content["base_energy"]) if "base_energy" in content else None,
                merged_energy=_number(content["merged_energy"]) if "merged_energy" in content else None,
                infinite=content.get("infinite") is True,
                seconds=_number(content["seconds"]),
            )
        except KeyError as missing:
            raise ValueError(f"{missing} is missing") from None
        except TypeError as failure:
            raise ValueError(str(failure)) from None


def _number(value: Any) -> float:
    return 0.0 if value is None else float(value)  # the manifest has no word for what is not finite


def about(job: Job, status: Status = Status.NO_UPDATE) -> TensorRecord:
    """What is known of any tensor before it is merged."""
    return TensorRecord(job.role.name, job.rule, job.reason, LayerStats((status,)))


def records_of(manifest: Mapping[str, Any]) -> dict[str, TensorRecord]:
    """Of every tensor of a manifest; CheckpointError names the first that is malformed."""
    return {name: _read(name, content) for name, content in manifest["tensors"].items()}


def _read(name: str, content: Mapping[str, Any]) -> TensorRecord:
    try:
        return TensorRecord.from_json(content)
    except ValueError as failure:
        raise CheckpointError(f"tensor {name!r} in acemerge.json", str(failure), AGAIN_NOW) from None


def share_lost(records: Iterable[TensorRecord]) -> float:
    """Of the energy of the whole merged update, tensors that are not in the adapter included."""
    pairs = [(record.energy or 0.0, record.share_lost or 0.0) for record in records]
    energy = sum(energy for energy, _ in pairs)
    return sum(energy * share for energy, share in pairs) / energy if energy else 0.0
