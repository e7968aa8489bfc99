"""What Ray and an object store cost beside one process and a folder, and how a merge scales over nodes.

    npm install --prefix FOLDER s3rver
    .venv/bin/python benchmarks/cluster.py overhead --models FOLDER --layout llama-3.2-3b/4 --rules average,ace
    .venv/bin/python benchmarks/cluster.py sizes
    .venv/bin/python benchmarks/cluster.py scaling --threads 16 --store 2,10,50

`overhead` runs whole commands, turn by turn: one process with two threads; a driver of a Ray cluster that runs
already, of two nodes of one thread each on this machine; and one process with two threads whose models and output are
in an S3 API on this machine (s3rver, a process of its own, whose processor time is a column: it takes part in the two
cores, as no real store does). Its first row merges next to nothing: what is fixed. `load` is that of the system
before the row's runs: on a machine with other work only runs side by side say anything.

`sizes` and `scaling` plan merges of real layouts, from headers alone: the files are sparse. `scaling` then goes through
the plan's parts as a cluster would, in their order, each node with room for one at a time. A part reads its tensors
while it computes; all nodes share the store's throughput. What a tensor takes is measured by ace on this machine at an
eighth of the widths, random task vectors, one thread; scaled by operations, and by threads as if they were all of use,
which flatters nodes of many threads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoints import LAYOUTS, Layout, Shape, _header, _nbytes, _shards, attention, mlp, write_all

import acemerge
from acemerge.engine.opening import Opened, open_recipe
from acemerge.engine.run_options import RunOptions
from acemerge.methods import make
from acemerge.planning.costs import operations, resident
from acemerge.planning.estimate import Rates, measure_rates, piece_seconds
from acemerge.planning.jobs import Job
from acemerge.planning.parts import spread
from acemerge.planning.pieces import Piece
from acemerge.recipes.recipe import make_recipe

ROOT = Path(__file__).parents[1]
EXPERTS, SCALED = 5, 8
BUCKET = "models"
# Width, MLP, keys and values, vocabulary, blocks.
SIZES = {
    "Llama-3.1-8B": (4096, 14336, 1024, 128256, 32),
    "Llama-3.1-70B": (8192, 28672, 1024, 128256, 80),
    "Llama-3.1-405B": (16384, 53248, 1024, 128256, 126),
}


# --- Ray beside one process --------------------------------------------------------------------------------------


def overhead(arguments: argparse.Namespace) -> None:
    sys.path.insert(0, str(ROOT))
    from attacks.ray_cluster import cluster_of

    rules = arguments.rules.split(",")
    wanted = [("nothing", "average", _tiny(arguments.models / "tiny"))]
    wanted += [(arguments.layout, rule, [*write_all(arguments.models, arguments.layout).values()]) for rule in rules]
    head = (
        "layout",
        "rule",
        "GB read",
        "one process s",
        "Ray s",
        "S3 s",
        "Ray / one",
        "S3 / one",
        "server CPU s",
        "load",
    )
    print(f"| {' | '.join(head)} |\n|---|---|{'--:|' * (len(head) - 2)}")
    with cluster_of(2) as cluster, s3_server(arguments.models) as server:
        for name, rule, folders in wanted:
            print(_row(name, rule, folders, cluster.address, server, arguments), flush=True)


@dataclass(frozen=True)
class Server:
    """An S3 API in a process of its own, and what a command finds it by."""

    process: subprocess.Popen[bytes]
    environment: dict[str, str]

    def client(self) -> Any:
        import boto3

        known = {key: self.environment[key.upper()] for key in ("aws_access_key_id", "aws_secret_access_key")}
        return boto3.client("s3", endpoint_url=self.environment["AWS_ENDPOINT_URL"], region_name="us-east-1", **known)

    def put(self, folder: Path) -> str:
        """The address of a folder's copy in the store."""
        client = self.client()
        prefix = f"{folder.parent.name}/{folder.name}"
        for file in filter(Path.is_file, folder.rglob("*")):
            client.upload_file(str(file), BUCKET, f"{prefix}/{file.relative_to(folder)}")
        return f"s3://{BUCKET}/{prefix}"

    def processor_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = folder / "store"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()
    program = folder / "node_modules" / "s3rver" / "bin" / "s3rver.js"
    if not program.exists():
        sys.exit(f"npm install --prefix {folder} s3rver")
    words = ["node", program, "-d", data, "-a", "127.0.0.1", "-p", port, "--silent", "--no-vhost-buckets"]
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL)
    names = {"AWS_ACCESS_KEY_ID": "S3RVER", "AWS_SECRET_ACCESS_KEY": "S3RVER", "AWS_REGION": "us-east-1"}
    server = Server(process, {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ALLOW_HTTP": "true", **names})
    try:
        for _ in range(100):
            time.sleep(0.2)
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
        server.client().create_bucket(Bucket=BUCKET)
        yield server
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(data)


def _row(
    name: str, rule: str, folders: Sequence[Path], address: str, server: Server, arguments: argparse.Namespace
) -> str:
    load = os.getloadavg()[0]
    nbytes = sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors"))
    size = max(nbytes // len(folders) // 6, 1 << 16)  # six files or so
    out = arguments.models / "out"
    words = ["--method", rule, "--quiet", "--max-shard-size", f"{size}B", "--force"]
    here, there = (_models(models) for models in (folders, [server.put(folder) for folder in folders]))
    commands = {
        "one": ([*here, "-o", out, *words], {"OMP_NUM_THREADS": "2"}),
        "ray": ([*here, "-o", out, *words, "--ray", address], {"OMP_NUM_THREADS": "1"}),
        "s3": (
            [*there, "-o", f"s3://{BUCKET}/out", *words, "--overwrite"],
            {"OMP_NUM_THREADS": "2", **server.environment},
        ),
    }
    found: dict[str, list[float]] = {how: [] for how in commands}
    served: list[float] = []
    for _ in range(arguments.repeats):
        for how, (line, environment) in commands.items():
            before, started = server.processor_seconds(), time.perf_counter()
            command = [sys.executable, "-m", "acemerge", "merge", *map(str, line)]
            subprocess.run(command, check=True, env={**os.environ, **environment})
            found[how].append(time.perf_counter() - started)
            if how == "s3":
                served.append(server.processor_seconds() - before)
            else:
                shutil.rmtree(out)
    one, ray, s3 = (statistics.median(found[how]) for how in found)
    cells = (name, rule, f"{nbytes / 1e9:.2f}", f"{one:.1f}", f"{ray:.1f}", f"{s3:.1f}", f"{ray / one:.2f}")
    cells += (f"{s3 / one:.2f}", f"{statistics.median(served):.1f}", f"{load:.0f}")
    return f"| {' | '.join(cells)} |"


def _models(names: Sequence[Path | str]) -> list[Path | str]:
    return ["--base", names[0], *(word for name in names[1:] for word in ("--expert", name))]


def _tiny(folder: Path) -> list[Path]:
    from attacks.merging import make_models

    shutil.rmtree(folder, ignore_errors=True)
    base, experts = make_models(folder)
    return [base, experts[1]]


# --- plans of real layouts -----------------------------------------------------------------------------------------


def layout_of(name: str) -> Layout:
    width, wide, narrow, words, blocks = SIZES[name]
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (words, width)}
    for i in range(blocks):
        block = {**attention(width, width, narrow), **mlp("mlp", width, wide)}
        block |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (width,))
        shapes |= {f"model.layers.{i}.{key}.weight": shape for key, shape in block.items()}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (words, width)}
    return Layout({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, shapes)


def planned(name: str, folder: Path, max_shard: int) -> Opened:
    """The plan of ace on a base and five experts that have headers and no values."""
    layout, models = layout_of(name), ["base", *(f"expert-{i}" for i in range(1, EXPERTS + 1))]
    for model in models:
        (folder / model).mkdir(parents=True)
        (folder / model / "config.json").write_text(json.dumps(layout.config))
        files = _shards(layout.shapes)
        for file, shapes in files.items():
            header = _header(shapes)
            with (folder / model / file).open("wb") as target:
                target.write(header)
                target.truncate(len(header) + sum(map(_nbytes, shapes.values())))
        weight_map = {key: file for file, shapes in files.items() for key in shapes}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / model / "model.safetensors.index.json").write_text(json.dumps(index))
    paths = [str(folder / model) for model in models]
    recipe = make_recipe({"base": paths[0], "experts": paths[1:], "method": "ace"})
    return open_recipe(recipe, None, RunOptions(max_shard_size=max_shard))


def sizes(arguments: argparse.Namespace) -> None:
    head = ("model", "GB read", "GB written", "files of 5 GB", "GB of memory a task", "PFLOP", "core hours")
    print(f"| {' | '.join(head)} |\n|---|{'--:|' * (len(head) - 1)}")
    measured = Measured.here()
    for name in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            opened = planned(name, Path(folder), 5_000_000_000)
        plan = opened.plan
        hours = sum(measured.seconds(job) for job in plan.jobs) / 3600
        figures = (plan.bytes_read / 1e9, plan.bytes_written / 1e9, len(opened.layout.every))
        more = ((resident(plan) + opened.budget) / 1e9, operations(plan) / 1e15, hours)
        print(f"| {name} | {' | '.join(f'{figure:,.0f}' for figure in (*figures, *more))} |")


# --- scaling -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Seconds of one thread for ace on matrices of an eighth of the widths, by the operations that they are."""

    per_operation: dict[tuple[int, int], float]
    rates: Rates

    @staticmethod
    def here() -> Measured:
        torch.set_num_threads(1)
        rule, found = make("ace", {}), {}
        width, wide, narrow, *_ = (size // SCALED for size in SIZES["Llama-3.1-70B"])
        for rows, columns in ((width, width), (narrow, width), (wide, width), (width, wide)):
            deltas = 0.02 * torch.randn(EXPERTS, rows, columns, generator=torch.Generator().manual_seed(0))
            calls = []
            for _ in range(3):
                started = time.process_time()  # of one thread: not what others took of the machine
                acemerge.merge_deltas(deltas, "ace")
                calls.append(time.process_time() - started)
            shape = (rows * SCALED, columns * SCALED)
            found[shape] = min(calls) / rule.operations(EXPERTS, rows, columns)
            print(f"{rows} x {columns}: {found[shape] * 1e12:.0f} s a TFLOP", file=sys.stderr)
        return Measured(found, measure_rates(torch.device("cpu")))

    def seconds(self, job: Job) -> float:
        """Of one thread: the measured rate of the shape that is most like it."""
        seconds = piece_seconds(Piece(job), EXPERTS, self.rates)
        if job.rule != "ace":
            return seconds
        _, rows, columns = job.matrices  # type: ignore[union-attr]
        ratio = min(self.per_operation, key=lambda shape: abs(shape[0] / shape[1] - rows / columns))
        return job.method.operations(EXPERTS, rows, columns) * self.per_operation[ratio]  # type: ignore[union-attr]


@dataclass
class Task:
    computing: float  # seconds that are left
    reading: float  # bytes that are left


def tasks(opened: Opened, of: int, threads: int, measured: Measured) -> list[Task]:
    """The parts in their order; each is to read its tensors."""
    jobs, layout = {job.name: job for job in opened.plan.jobs}, opened.layout
    numbers = layout.spread_over(of)
    found = [Task(0.0, 0.0) for _ in range(of)]
    assert sorted(set(spread([1.0] * of, of))) == sorted(set(numbers))
    for (_, specs), number in zip(layout.every, numbers, strict=True):
        own = [jobs[spec.name] for spec in specs]
        found[number - 1].computing += sum(measured.seconds(job) for job in own) / threads
        found[number - 1].reading += sum(Piece(job).bytes_in for job in own)
    return found


def simulated(waiting: list[Task], nodes: int, store: float, network: float) -> Iterator[float]:
    """The seconds between two events: until a part has all that it reads, has computed all, or both."""
    queue, at_work = list(waiting), []
    while queue or at_work:
        while queue and len(at_work) < nodes:
            first = queue.pop(0)
            at_work.append(Task(first.computing, first.reading))
        reading = [task for task in at_work if task.reading > 0]
        rate = min(network, store / max(1, len(reading)))
        left = [task.reading / rate for task in reading] + [task.computing for task in at_work if task.computing > 0]
        step = min(left)
        for task in at_work:
            task.computing = max(0.0, task.computing - step)
            task.reading = max(0.0, task.reading - step * rate) if task in reading else 0.0
            task.reading = 0.0 if task.reading < 1 else task.reading
        at_work = [task for task in at_work if task.computing > 1e-9 or task.reading > 0]
        yield step


def scaling(arguments: argparse.Namespace) -> None:
    measured = Measured.here()
    with tempfile.TemporaryDirectory() as folder:
        opened = planned("Llama-3.1-70B", Path(folder), arguments.max_shard_size)
    stores = [float(text) * 1e9 for text in arguments.store.split(",")]
    print(f"{len(opened.layout.every)} files, nodes of {arguments.threads} threads\n")
    head = [f"{store / 1e9:g} GB/s" for store in stores]
    print(f"| nodes | {' | '.join(f'minutes at {text} | bound by' for text in head)} |")
    print(f"|--:|{'--:|---|' * len(stores)}")
    for nodes in (1, 2, 4, 8, 16, 32, 64):
        of = min(len(opened.layout.every), 8 * nodes)
        parts = tasks(opened, of, arguments.threads, measured)
        cells: list[Any] = []
        for store in stores:
            took = sum(simulated(parts, nodes, store, arguments.network * 1e9))
            bounds = {
                "computing": sum(task.computing for task in parts) / nodes,
                "reading": sum(task.reading for task in parts) / min(store, nodes * arguments.network * 1e9),
                "the longest part": max(task.computing for task in parts),
            }
            cells += [f"{took / 60:.1f}", max(bounds, key=lambda name: bounds[name])]
        print(f"| {nodes} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    asked = commands.add_parser("overhead")
    asked.add_argument("--models", type=Path, required=True, help="a folder for models, kept for the next time")
    asked.add_argument("--layout", default="llama-3.2-3b/4", help=", ".join(LAYOUTS))
    asked.add_argument("--rules", default="average,ace")
    asked.add_argument("--repeats", type=int, default=3)
    commands.add_parser("sizes")
    asked = commands.add_parser("scaling")
    asked.add_argument("--threads", type=int, default=16, help="of a node")
    asked.add_argument("--store", default="2,10,50", help="GB/s of the store, for all nodes together")
    asked.add_argument("--network", type=float, default=3.0, help="GB/s of a node")
    asked.add_argument("--max-shard-size", type=int, default=1_000_000_000)
    arguments = parser.parse_args()
    {"overhead": overhead, "sizes": sizes, "scaling": scaling}[arguments.command](arguments)


if __name__ == "__main__":
    main()
