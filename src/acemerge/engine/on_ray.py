"""Parts as tasks of a Ray cluster.

Ray places processes and says which it lost. Weights pass neither through the driver nor through Ray's object store:
a task reads and writes the file system that all machines share, or the store.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from acemerge.engine import remote
from acemerge.engine.execute import Progress
from acemerge.engine.executor import OnPart
from acemerge.engine.opening import Opened
from acemerge.engine.ray_connection import connected, head_answers, last_line
from acemerge.engine.run_options import RunOptions
from acemerge.errors import AcemergeError, ResourceError, UsageError
from acemerge.output.identity import difference
from acemerge.output.parts import listed
from acemerge.planning.costs import peak_memory, resident
from acemerge.planning.parts import Part, parse_part

log = logging.getLogger(__name__)

_RETRIES = 2  # of a part whose process was lost, or that found no memory
_WORKER = 150_000_000  # bytes of Ray's own in a process
_LOOKED = 180.0  # for a node to say what it is: it may have to load torch from a slow disk
_POLLED = 0.25
_STOPPED = 10.0  # for tasks that were cancelled, before they are killed
_LOOKED_FOR = 10.0  # seconds between two looks at the nodes
_LONELY = 300.0  # without a node that could take a part
_HEADLESS = 20.0  # without a head: Ray ends this process after 60
_OF_MACHINES = ("device", "accelerator", "threads", "processor")


@contextlib.contextmanager
def on_ray(opened: Opened, out: Path, options: RunOptions) -> Iterator[OnRay]:
    """The cluster that the options name, as an executor."""
    assert options.ray is not None
    with connected(options.ray) as ray:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        device = options.device
        if device == "auto":
            device = "cuda" if any(node["Resources"].get("GPU") for node in nodes) else "cpu"
        own = replace(options, ray=None, device=device, resume=True, push=None, report=False, quiet=True)
        need = Need(torch.get_num_threads(), resident(opened.plan) + _WORKER + opened.budget, device == "cuda")
        cluster = OnRay(ray, options.ray, opened, out, own, need)
        if cluster.slots == 0:
            what = f"none of its nodes, {len(nodes)}, has room for a task: {need}"
            raise UsageError(f"--ray {options.ray}", what, cure_of(need, nodes, peak_memory(opened.plan)))
        yield cluster


@dataclass(frozen=True)
class Need:
    """What a task asks of its node."""

    threads: int
    memory: int
    gpu: bool

    def __str__(self) -> str:
        cpus = f"{self.threads} CPU{'s' * (self.threads > 1)}"
        return f"{cpus}, {self.memory / 1e9:.1f} GB of memory{' and a GPU' if self.gpu else ''}"

    def room(self, node: Mapping[str, Any]) -> int:
        """How many tasks the node has room for."""
        has = node["Resources"]
        rooms = [has.get("CPU", 0) // self.threads, has.get("memory", 0) // self.memory]
        return int(min([*rooms, has.get("GPU", 0)] if self.gpu else rooms))


@dataclass(frozen=True)
class OnRay:
    """Parts as tasks. A part whose process was lost goes on elsewhere, twice at most."""

    ray: Any
    address: str
    opened: Opened
    out: Path
    options: RunOptions
    need: Need

    @property
    def slots(self) -> int:
        return sum(map(self.need.room, self._nodes()))

    def _nodes(self) -> list[Mapping[str, Any]]:
        """The nodes that can take a task."""
        return [node for node in self.ray.nodes() if node["Alive"] and self.need.room(node)]

    def _order(self, part: Part | None) -> remote.Order:
        options = replace(self.options, shard=part)
        return remote.order_of(self.opened.plan.recipe, self.out, options, self.need.threads)

    def machines(self, out: Path, about: Mapping[str, Any]) -> Mapping[str, Any]:
        order, nodes = self._order(None), self._nodes()
        looking = [self._on(node["NodeID"], remote.look).remote(order, out) for node in nodes]
        found: dict[str, Mapping[str, Any]] = {}
        told: list[str] = []
        for node, ref in zip(nodes, looking, strict=True):
            name = self._name(node)
            try:
                answer = self.ray.get(ref, timeout=_LOOKED)
            except self.ray.exceptions.RayError as failure:
                if self._is_alive(node):  # else it was lost just now: the others do its work
                    told.append(f"node {name} gives no answer: {last_line(failure)}")
                continue
            if isinstance(answer, remote.Failure):
                told.append(f"node {name}: {answer.where}: {answer.what}")
            else:
                found[name] = answer
        if not (found or told):
            what = f"no node with room for a task is left: {self.need}"
            raise ResourceError(f"--ray {self.address}", what, "add nodes, then run again")
        first = next(iter(found.values()), {})
        run = {key: value for key, value in about.items() if key not in _OF_MACHINES}
        run |= {key: first[key] for key in _OF_MACHINES if key in first}
        for name, known in found.items():
            differs = difference(known, run, verbs=("is", "and not"))
            told += [f"on node {name} {differs}"] if differs else []
        if told:
            cure = "give the cluster machines of one type, with the same versions, that see the same files"
            raise UsageError(f"--ray {self.address}", f"its nodes do not go together: {listed(told)}", cure)
        return run

    def _is_alive(self, node: Mapping[str, Any]) -> bool:
        return any(other["NodeID"] == node["NodeID"] and other["Alive"] for other in self.ray.nodes())

    def _name(self, node: Mapping[str, Any]) -> str:
        """Its address; where several nodes have that, with the beginning of its number."""
        address = str(node["NodeManagerAddress"])
        alike = sum(other["NodeManagerAddress"] == address for other in self.ray.nodes())
        return address if alike == 1 else f"{address} ({node['NodeID'][:8]})"

    def _on(self, node: str, function: Any) -> Any:
        """A task for a node, whatever else is at work there."""
        # A process that has looked at a GPU holds memory of it until it ends.
        gpu = {"num_gpus": 0.01, "max_calls": 1} if self.need.gpu else {}
        where = self._at(node, soft=False)
        return self.ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=where, **gpu)

    def _at(self, node: str, soft: bool) -> Any:
        return self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=soft)

    def compute(self, parts: Sequence[Part], told: OnPart) -> Generator[Part, None, None]:
        board = self._board()
        lost: Counter[Part] = Counter()
        at_work = {self._submit(part, board, False): part for part in parts}
        seen = time.monotonic()
        try:
            while at_work:
                done, _ = self.ray.wait(list(at_work), timeout=_POLLED)
                self._tell(board, told, set(at_work.values()))
                for ref in done:
                    part = at_work.pop(ref)
                    failure = self._failure(ref, part)
                    if failure is None:
                        yield part
                        continue
                    if not isinstance(failure, ResourceError):
                        raise failure
                    if lost[part] == _RETRIES:
                        what = f"was lost {_RETRIES + 1} times, the last time because {failure.what}"
                        raise ResourceError(failure.where, what, "see why, then go on with --resume")
                    lost[part] += 1
                    log.warning("%s was lost: %s", failure.where, failure.what, extra=_fields(part, lost[part]))
                    self._wait_for_head()  # a task that is handed in without one is never begun
                    at_work[self._submit(part, board, True)] = part
                seen = self._still_there(seen)
        finally:
            self._stop(list(at_work))
            self.ray.kill(board)

    def _submit(self, part: Part, board: Any, again: bool) -> Any:
        need = self.need
        task = self.ray.remote(remote.compute).options(
            num_cpus=need.threads,
            memory=need.memory,
            num_gpus=int(need.gpu),
            scheduling_strategy="SPREAD",
            max_retries=0,  # Ray would retry without end what lacks memory
        )
        return task.remote(self._order(part), board, again)

    def _board(self) -> Any:
        """Beside the driver; where that is no node, anywhere, and again where it was lost."""
        here = self._at(self.ray.get_runtime_context().get_node_id(), soft=True)
        actor = self.ray.remote(remote.Board)
        return actor.options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()

    def _tell(self, board: Any, told: OnPart, parts: set[Part]) -> None:
        with contextlib.suppress(self.ray.exceptions.RayError):  # the board is lost for a while
            latest = self.ray.get(board.read.remote(), timeout=1)
            for name, now in latest.items():
                if parse_part(name) in parts:
                    told(parse_part(name), Progress(**now))

    def _failure(self, ref: Any, part: Part) -> AcemergeError | None:
        """Why a task that has ended did not do its part; None where it did. ResourceError is for what was lost."""
        try:
            found = self.ray.get(ref)
        except self.ray.exceptions.RayTaskError:  # a defect of ours
            raise
        except self.ray.exceptions.RayError as failure:
            return ResourceError(f"part {part}", _reason(failure), "go on with --resume")
        return None if found is None else found.error(f"part {part}")

    def _still_there(self, seen: float) -> float:
        """When last there was a node that can take a task; ResourceError where that is too long ago."""
        now = time.monotonic()
        if now - seen < _LOOKED_FOR:
            return seen
        self._wait_for_head()
        if self._nodes():
            return now
        if now - seen > _LONELY:
            what = f"no node with room for a task is left: {self.need}"
            raise ResourceError(f"--ray {self.address}", what, "add nodes, then go on with --resume")
        return seen

    def _wait_for_head(self) -> None:
        """ResourceError where it does not answer for long."""
        missed = time.monotonic()
        while not head_answers(self.ray):
            if time.monotonic() - missed > _HEADLESS:
                what = f"the cluster's head has not answered for {_HEADLESS:.0f} seconds"
                raise ResourceError(f"--ray {self.address}", what, "begin it again, then go on with --resume")
            time.sleep(1)

    def _stop(self, tasks: list[Any]) -> None:
        """End what is at work: asked to first, so that its notes are whole, then killed."""
        with contextlib.suppress(self.ray.exceptions.RayError):
            for force in (False, True):
                for ref in tasks:
                    self.ray.cancel(ref, force=force)
                if tasks:
                    _, tasks = self.ray.wait(tasks, num_returns=len(tasks), timeout=_STOPPED)


def cure_of(need: Need, nodes: Sequence[Mapping[str, Any]], least: int) -> str:
    """What would make room for a task, which takes no less than `least` bytes with Ray's own: what no node has."""
    cpus, memory, gpus = (max(node["Resources"].get(key, 0) for node in nodes) for key in ("CPU", "memory", "GPU"))
    asked = []
    if need.gpu and not gpus:
        asked.append("use --device cpu")
    if 1 <= cpus < need.threads:
        asked.append(f"set OMP_NUM_THREADS={int(cpus)}")
    if least + _WORKER <= memory < need.memory:
        asked.append(f"give --max-memory {int(memory) - _WORKER}")
    short = cpus < 1 or memory < least + _WORKER
    return f"{' and '.join(asked)}, or add nodes" if asked and not short else "add nodes that have as much"


def _fields(part: Part, times: int) -> dict[str, Any]:
    return {"event": "lost", "fields": {"part": str(part), "times": times}}


def _reason(failure: Exception) -> str:
    """Of what Ray says of a process that is gone, what it comes to."""
    reasons = {
        "OutOfMemoryError": "its node had no memory left",
        "NodeDiedError": "its node is gone",
        "TaskCancelledError": "it was cancelled",
    }
    return reasons.get(type(failure).__name__, f"its process ended ({type(failure).__name__})")
