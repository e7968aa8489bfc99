"""Calibrates the experts of a plan: what its rules want measured, kept on disk for the merge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from acemerge.calibration.blocks import block_moments, block_of, block_order
from acemerge.calibration.both_sides import both_second_moments
from acemerge.calibration.feed import about_data, labels_of
from acemerge.calibration.gradients import squared_gradients
from acemerge.calibration.moments import OnExamples, second_moments
from acemerge.calibration.store import Store
from acemerge.checkpoints import files
from acemerge.checkpoints.header import TensorSpec
from acemerge.engine.execute import OnProgress, Progress, merging
from acemerge.engine.work import Setting, Walk
from acemerge.linalg.device import with_host
from acemerge.methods import Calibration
from acemerge.models.quiet import quiet_transformers
from acemerge.output.identity import digest
from acemerge.planning.calibration import Assigned, calibrated_jobs
from acemerge.planning.jobs import Job, Merge, Plan
from acemerge.planning.pieces import pieces
from acemerge.shapes import Tensor
from acemerge.tasks.networks import Model, open_model
from acemerge.tasks.own_text import OwnText, write_text
from acemerge.tasks.task_file import Task


@dataclass(frozen=True)
class Calibrating:
    """The calibration of one run: its plan, each expert's tasks and the device that models run on; where it keeps what
    it measures, under names that hash what the run is, and how it goes through tensors that are to be merged.
    """

    plan: Plan
    experts: Sequence[Assigned]
    device: torch.device
    folder: Path
    identity: Mapping[str, Any]
    walk: Walk
    on_progress: OnProgress = lambda _: None

    def model(self, expert: Assigned) -> Model:
        return open_model(expert.model, self.device)

    def key(self, what: str) -> str:
        return digest({"run": self.identity, "what": what})[:32]

    def told(self, expert: Assigned, what: str) -> OnExamples:
        def on_examples(done: int, total: int) -> None:
            share, name = done / max(1, total), f"{expert.label}{what}"
            self.on_progress(Progress("calibration", name, done, total, 0, 0, share=share, unit="examples"))

        return on_examples


def data_of(plan: Plan, experts: Sequence[Assigned]) -> dict[str, Any]:
    """For every expert and task a hash of the data, and how much it is. This reads the data."""
    labelled = _wants_labels(plan)
    return {e.label: {task.name: about_data(task, labelled) for task in e.tasks} for e in experts}


def _wants_labels(plan: Plan) -> bool:
    return bool(calibrated_jobs(plan, "gradients"))


def calibrated(setting: Setting, calibrating: Calibrating) -> Setting:
    """The setting with everything measured that the plan's rules want."""
    if not calibrating.experts:
        return setting
    with quiet_transformers(), with_host(calibrating.device):
        return _calibrated(setting, calibrating)


def _calibrated(setting: Setting, calibrating: Calibrating) -> Setting:
    files.make_folder(calibrating.folder)
    store = Store(calibrating.folder)
    setting, calibrating = replace(setting, measured=store), _with_text(store, calibrating)
    for wanted in ("inputs", "gradients", "both sides"):
        tensors = _specs(calibrated_jobs(calibrating.plan, wanted))
        for i, expert in enumerate(calibrating.experts if tensors else ()):
            key = calibrating.key(f"{wanted} of {expert.label}")
            if not store.restore(key, wanted, i):
                store.write(key, wanted, i, _measured(wanted, expert, tensors, calibrating))
    if calibrated_jobs(calibrating.plan, "merged inputs"):
        _in_order(store, setting, calibrating)
    return setting


def _with_text(store: Store, calibrating: Calibrating) -> Calibrating:
    """The same; where experts are to be calibrated on text of their own, with that written. It is kept in float32, as
    all is, which holds every token's number.
    """
    experts = []
    for i, expert in enumerate(calibrating.experts):
        (task, *more) = expert.tasks
        if isinstance(task, OwnText) and not more:
            key = calibrating.key(f"text of {expert.label}")
            if not store.restore(key, "text", i):
                told = calibrating.told(expert, ", writing")
                store.write(key, "text", i, [(task.name, write_text(calibrating.model(expert), task, told))])
            text = store.of("text", task.name, [i])
            assert text is not None
            expert = replace(expert, tasks=(replace(task, written=text[0].long()),))
        experts.append(expert)
    return replace(calibrating, experts=experts)


def _measured(
    wanted: Calibration, expert: Assigned, tensors: Mapping[str, TensorSpec], calibrating: Calibrating
) -> Iterator[tuple[str, Tensor]]:
    model, told = calibrating.model(expert), calibrating.told(expert, "")
    if wanted == "gradients":
        yield from squared_gradients(model, expert.tasks, tensors, told)
    elif wanted == "both sides":
        yield from both_second_moments(model, expert.tasks, tensors, told)
    else:
        for name, moment in second_moments(model, expert.tasks, tensors, told):
            yield name, moment.mean


def _in_order(store: Store, setting: Setting, calibrating: Calibrating) -> None:
    """Measure the first block, merge it, measure the next one behind it, and so on.

    What is in no block that the data enters is merged beforehand. The merge itself does all of it once more.
    """
    plan, experts = calibrating.plan, calibrating.experts
    tensors = _specs(calibrated_jobs(plan, "merged inputs"))
    order = block_order(calibrating.model(experts[0]), experts[0].tasks, tensors)
    merged = _merged([job for job in plan.jobs if block_of(job.name) not in order], setting, calibrating)
    for n, block in enumerate(order):
        for i, expert in enumerate(experts):
            key = calibrating.key(f"merged inputs of {expert.label} in {block}")
            if store.restore(key, "merged inputs", i):
                continue
            told = calibrating.told(expert, f", {block}")
            moments = block_moments(
                calibrating.model(expert), expert.tasks, tensors, block, order[n + 1 :], merged, told
            )
            store.write(key, "merged inputs", i, ((name, moment.mean) for name, moment in moments.items()))
        if n + 1 < len(order):
            merged |= _merged([job for job in plan.jobs if block_of(job.name) == block], setting, calibrating)


def _merged(jobs: Sequence[Job], setting: Setting, calibrating: Calibrating) -> dict[str, Tensor]:
    """The merged values of these jobs, as the output would store them."""
    whole = [replace(job, factors=None) if isinstance(job, Merge) else job for job in jobs]
    parts: dict[str, list[Tensor]] = {}
    for results in calibrating.walk((piece for job in whole for piece in pieces(job, job.entrywise)), merging(setting)):
        for piece, computed in results:
            parts.setdefault(piece.job.name, []).append(computed.value)
    return {name: torch.cat(values) if len(values) > 1 else values[0] for name, values in parts.items()}


def _specs(jobs: Sequence[Job]) -> dict[str, TensorSpec]:
    return {job.name: job.spec for job in jobs}


def _source(task: Task | OwnText) -> dict[str, str]:
    if isinstance(task, OwnText):
        return {"kind": task.name, "data": "written by the expert"}
    return {"kind": task.kind, "data": task.data}


def about_calibration(
    plan: Plan, experts: Sequence[Assigned], setting: Setting, identity: Mapping[str, Any]
) -> dict[str, Any]:
    """What the manifest says of it: every expert's tasks, their data, and the tensors that were not seen."""
    store = setting.measured
    if not isinstance(store, Store):
        return {}
    table, labelled = {}, _wants_labels(plan)
    for i, expert in enumerate(experts):
        found = identity["calibration"][expert.label]
        tasks = {
            task.name: {**_source(task), "labels": labels_of(task, labelled)} | found[task.name]
            for task in expert.tasks
        }
        jobs = [(job, job.method.needs.calibration) for job in calibrated_jobs(plan)]
        unseen = [job.name for job, wanted in jobs if i not in job.absent and not store.has(wanted, job.name, i)]
        table[expert.label] = {"tasks": tasks, "not seen": unseen}
    return {"calibration": table}
