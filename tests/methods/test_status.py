"""What is said of a tensor: a closed list of statuses, one record of numbers, and both as the manifest spells them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import pytest
import torch
from builders import PlainModel

import acemerge
from acemerge.inspection.advice import of_statuses
from acemerge.methods.base import Layer, LayerResult, Needs
from acemerge.methods.stats import LayerStats, of_projections, of_slices
from acemerge.methods.status import Status, of_all, read_statuses, spelled
from acemerge.output.manifest import load_manifest, to_bytes
from acemerge.output.records import TensorRecord, records_of
from acemerge.shapes import Tensor

# --- statuses ----------------------------------------------------------------------------------------------------


def test_the_phrases_are_those_of_every_manifest() -> None:
    """They are a contract: tools look for them."""
    assert [status.value for status in Status] == [
        "ok", "kept", "no update", "float64", "refined", "pseudo-inverse", "not converged", "full updates formed",
        "one expert", "interpolated straight", "experts cancel", "averaged, a side above 20,000",
        "averaged, not seen in calibration", "by tsv_m, not seen in calibration", "partly on the host",
    ]  # fmt: skip


@pytest.mark.parametrize("status", Status)
def test_every_status_has_a_sentence_that_goes_on_from_a_count(status: Status) -> None:
    assert len(status.sentence.split()) >= 3
    assert status.sentence[0].islower()
    assert not (status.sentence + status.cure).endswith(".")
    said = of_statuses([(status,), (Status.OK,), (Status.KEPT,), (status,)])
    usual = status in (Status.OK, Status.KEPT)
    assert [(advice.what, advice.cure) for advice in said] == (
        [] if usual else [(f"2 tensors: {status.sentence}", status.cure)]
    )


def test_what_only_a_part_of_a_tensor_has_is_said_as_that() -> None:
    mixed = (Status.OK, Status.PSEUDO_INVERSE)
    assert [advice.what for advice in of_statuses([mixed])] == [
        "1 tensor, in part: singular, solved by the pseudo-inverse"
    ]
    formed = (Status.FLOAT64, Status.FULL_UPDATES)
    assert [advice.what.partition(":")[0] for advice in of_statuses([formed])] == ["1 tensor", "1 tensor"]


def test_several_are_read_back_whatever_commas_they_hold() -> None:
    for count in (1, 2):
        for statuses in itertools.permutations(Status, count):
            assert read_statuses(spelled(statuses)) == statuses
    for text in ("", "fine", "ok,", "ok, fine", "averaged"):
        with pytest.raises(ValueError, match="is no status; there are 'ok', "):
            read_statuses(text)


def test_of_parts_the_order_is_of_no_matter() -> None:
    parts = [(Status.OK,), (Status.PSEUDO_INVERSE,), (Status.OK,), (Status.FLOAT64,)]
    assert {spelled(of_all(order)) for order in itertools.permutations(parts)} == {"float64, ok, pseudo-inverse"}


# --- numbers -----------------------------------------------------------------------------------------------------

FULL = LayerStats(
    (Status.FLOAT64, Status.FULL_UPDATES), gamma=0.5, branch="heterogeneous", eps=1e-5, log_energy_variance=2.0,
    shrinkage=(0.5, 0.25), condition=9.0, rank=3, refined=2, float64_spectra=1, steps=4, residual=0.25, last_step=0.5,
    relative_step=0.5, agreement=1.0, cosine=-0.5, share=0.125, t=0.5, weights=(0.5, 0.5), kept=0.75,
    thresholds=(1.0,), own_l1=(2.0, 1.0), masked_l1=(3.0, 1.0), shared_input_side=True, side="output", energy_lost=0.0,
    own={"dropped": [1, "two"]},
)  # fmt: skip
RECORD = TensorRecord(
    "linear", "ace", "weight of a linear layer", FULL, (1.0, 2.0), ("e3",), 3.0, 0.5, 2.0, 7.0, True, 0.125
)


def in_manifest(record: TensorRecord) -> TensorRecord:
    """Written to a manifest and read from it."""
    return records_of(json.loads(to_bytes({"tensors": {"W": record.to_json()}})))["W"]


def test_every_number_goes_to_the_manifest_and_back() -> None:
    assert all(getattr(FULL, each.name) not in (None, ()) or each.name in ("slices", "projections")
               for each in fields(FULL))  # fmt: skip
    for of_parts in (of_slices, of_projections):
        several = of_parts([FULL, LayerStats(rank=1)])
        for stats in (FULL, several, LayerStats()):
            record = replace(RECORD, stats=stats)
            assert in_manifest(record) == record
    assert in_manifest(TensorRecord("bias", "base", "kept", LayerStats())).energies is None


def test_the_keys_of_the_manifest_are_those_of_before() -> None:
    assert RECORD.to_json().keys() == {
        "role", "rule", "reason", "status", "gamma", "branch", "eps", "heterogeneity", "shrinkage", "condition", "rank",
        "refined", "float64_spectra", "steps", "residual", "last_step", "relative_step", "agreement", "cosine", "share",
        "t", "weights", "kept", "thresholds", "own_l1", "masked_l1", "shared_input_side", "side", "energy_lost",
        "dropped", "energies", "skipped_experts", "energy", "share_lost", "base_energy", "merged_energy", "infinite",
        "seconds",
    }  # fmt: skip
    assert RECORD.to_json()["status"] == "float64, full updates formed"


def test_what_is_undefined_is_null_and_what_is_not_finite_is_no_number() -> None:
    alone = acemerge.merge_deltas(torch.ones(1, 3, 2), "ace").stats
    assert alone.to_json()["gamma"] is None
    assert acemerge.merge_deltas(torch.ones(1, 3, 2), "ace_auto").stats["heterogeneity"] is None
    found = in_manifest(replace(RECORD, stats=replace(alone, condition=float("inf")))).stats
    assert found.gamma is None
    assert found.largest(lambda part: part.condition) is None
    assert found.keys() == alone.keys()


def test_as_a_mapping_it_is_what_the_manifest_says() -> None:
    assert dict(FULL) == FULL.to_json() == FULL
    assert FULL["status"] == "float64, full updates formed"
    assert "gamma" not in LayerStats()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": "fine"}, "'fine' is no status"),
        ({"status": None}, "'status' is missing"),
        ({"gamma": "<script>"}, "'gamma': '<script>' is no number"),
        ({"thresholds": "12"}, "'thresholds': '12' is no list"),
        ({"branch": "both"}, "'branch': 'both' is none of"),
        ({"slices": 3}, "'slices' is no list of tables"),
        ({"energies": ["a"]}, "could not convert"),
        ({"seconds": []}, "float"),
    ],
)
def test_a_malformed_manifest_is_refused_by_the_tensor(change: dict[str, Any], message: str) -> None:
    with pytest.raises(acemerge.CheckpointError, match="tensor 'W' in acemerge.json: .*" + message):
        records_of({"tensors": {"W": RECORD.to_json() | change}})


# --- rules that are not the library's own ------------------------------------------------------------------------


@dataclass(frozen=True)
class Sum:
    """The sum; it says what it is told to say."""

    name: ClassVar[str] = "spoken_sum"
    source: ClassVar[str] = "a test"
    needs: ClassVar[Needs] = Needs()
    said: ClassVar[Mapping[str, Any]] = {"status": "ok", "rank": 2, "dropped": 1}

    scale: float = 1.0

    def merge(self, deltas: Tensor, layer: Layer) -> LayerResult:
        return LayerResult(self.scale * deltas.sum(0), self.said)  # type: ignore[arg-type]

    def operations(self, experts: int, rows: int, columns: int) -> int:
        return experts * rows * columns


@pytest.fixture
def spoken_sum() -> Iterator[str]:
    yield acemerge.register(Sum).name
    del acemerge.METHODS["spoken_sum"]


def test_a_rule_may_give_a_plain_mapping(spoken_sum: str, plain: PlainModel) -> None:
    base, experts = plain.save()
    acemerge.merge(base, experts, spoken_sum, plain.root / "out")
    manifest = load_manifest(plain.root / "out")
    said = manifest["tensors"]["layers.0.up.weight"]
    assert (said["status"], said["rank"], said["dropped"]) == ("ok", 2, 1)
    stats = records_of(manifest)["layers.0.up.weight"].stats
    assert (stats.statuses, stats.rank, stats.own) == ((Status.OK,), 2, {"dropped": 1})


@pytest.mark.parametrize(
    ("said", "message"), [({}, "'status' is missing"), ({"status": "trimmed"}, "'trimmed' is no status")]
)
def test_a_status_of_its_own_is_refused_in_words(
    spoken_sum: str, said: Mapping[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sum, "said", said)
    with pytest.raises(acemerge.UsageError, match=f"the stats of a rule's result: {message}.*; give a LayerStats"):
        acemerge.merge_deltas(torch.ones(2, 3), spoken_sum)


def test_a_key_of_its_own_is_not_one_of_the_manifests() -> None:
    with pytest.raises(acemerge.UsageError, match="'rank' is no key of a rule's own"):
        LayerStats(own={"rank": 3})
