"""End to end: acemerge's command line and mergekit's, process against process on the same synthetic checkpoints.

    .venv/bin/python benchmarks/engine.py --layout llama-3.2-3b --models FOLDER --rules average,task_arithmetic,ties,ace
    .venv/bin/python benchmarks/engine.py --layout moe-3600,moe-14400 --models FOLDER --rules average,ties,ace

Makes the checkpoints that FOLDER lacks (benchmarks/checkpoints.py) and keeps an output of each tool there for a time.
mergekit needs `.peers`: run benchmarks/setup_peers.sh once. It is told to compute in float32 and round once, as we do;
`mergekit-bf16` computes in bfloat16, as it does untold. Where it has a rule, both apply it to every tensor, `ties`
with its share taken tensor by tensor; other rules go by our default policy. mergekit's linear reads no base. acemerge
also hashes what it reads and writes and waits until its output is on disk; `sync s` is what others take to get there.

`s` is from start to exit, imports included. Anonymous memory is what a process took for itself; RSS counts also pages
of mapped input files, which the system may take back. Bytes are those of the disk. `products` is the share of the time
that the rule's matrix products take at the rate of a float32 product; `others` the share of the processors that other
processes took. Outputs are compared entry by entry: the share that differs, and by how many steps of bfloat16 at most,
at the larger of the two values and at the largest of the inputs. `undecided` is the share that differs because `ties`
leaves it open: an |D_t| equals the smallest one kept, of which mergekit keeps some and acemerge all, or the kept ones
sum to zero and elect no sign. The steps are of the other entries.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoints import LAYOUTS, Difference, compare, weight_files, write_all
from measure import product_rate
from peers import MERGEKIT
from rules import PAIRS, names, without_nan
from tables import context, fixed, seconds

from acemerge.methods import make

OURS = Path(sys.executable).parent / "acemerge"
THEIRS = Path(__file__).parent.parent / ".peers" / "bin" / "mergekit-yaml"
HEAD = (
    *("layout", "rule", "tool", "s", "times ours", "CPU s", "sync s", "peak anonymous MB", "peak RSS MB", "read GB"),
    *("written GB", "products", "others", "differ", "undecided", "most steps", "most steps of inputs"),
)


def command_of(tool: str, rule: str, models: dict[str, Path], work: Path, arguments: argparse.Namespace) -> list[str]:
    """Write a tool's recipe and say how to run it; the output goes to the folder `tool` in `work`."""
    base, *experts = (str(folder.resolve()) for folder in models.values())
    file, out = work / f"{tool}.yaml", str(work / tool)
    recipe: dict[str, Any]
    if tool == "acemerge":
        method = {"name": rule, **(PAIRS[rule].params if rule in MERGEKIT else {})}
        # mergekit knows no policy: where it has the rule, every tensor gets it.
        rules = [{"match": "*", "method": method}] if rule in MERGEKIT else []
        recipe = {"method": method, "base": base, "experts": experts, "rules": rules}
        command = [str(OURS), "merge", str(file), "-o", out, "--quiet", "--workers", str(arguments.workers)]
    else:
        name, parameters = MERGEKIT[rule]
        recipe = {"merge_method": name, "parameters": parameters, "models": [{"model": model} for model in experts]}
        if name != "linear":  # which takes no base, and computes in float32 by itself
            recipe["base_model"] = base
            recipe |= {"dtype": "float32", "out_dtype": "bfloat16"} if tool == "mergekit" else {}
        options = ["--lazy-unpickle", "--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
        options += ["--num-threads", str(arguments.threads), *shlex.split(arguments.mergekit_options)]
        command = [str(THEIRS), str(file), out, *options]
    file.write_text(json.dumps(recipe, indent=1) + "\n")  # JSON is YAML
    return command


@dataclass
class Run:
    """One process from start to exit."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    sync_seconds: float = 0.0
    peak_anonymous: int = 0
    peak_rss: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    others: float = 0.0
    error: str = ""

    def look(self, pid: int) -> None:
        """Note the memory of a process and its descendants; one that has just ended has none."""
        anonymous = resident = 0
        for process in _descendants(pid):
            with contextlib.suppress(OSError):
                lines = [line.split() for line in Path(f"/proc/{process}/status").read_text().splitlines()]
                memory = {line[0]: int(line[1]) * 1024 for line in lines if line[-1] == "kB"}
                anonymous += memory.get("RssAnon:", 0) + memory.get("RssShmem:", 0)
                resident += memory.get("VmRSS:", 0)
                # Not wait4's ru_maxrss: it counts what this very process had when it started the other.
                self.peak_rss = max(self.peak_rss, memory.get("VmHWM:", 0))
        self.peak_anonymous, self.peak_rss = max(self.peak_anonymous, anonymous), max(self.peak_rss, resident)

    def finish(self, pid: int) -> int:
        """Take the accounts of a process that has ended, let go of it and return its exit code."""
        counts = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        self.bytes_read, self.bytes_written = int(counts["read_bytes"]), int(counts["write_bytes"])
        _, status, usage = os.wait4(pid, 0)
        self.cpu_seconds = usage.ru_utime + usage.ru_stime
        return os.waitstatus_to_exitcode(status)


def run(command: list[str], threads: int, timeout: float) -> Run:
    """Start a command and watch it until it ends, or end it after `timeout` seconds."""
    count, found, killed = str(threads), Run(), False
    env = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log:
        started, before = time.perf_counter(), busy()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
        ended = os.pidfd_open(process.pid)
        try:
            while not select.select([ended], [], [], 0.05)[0]:  # seconds between two looks
                found.look(process.pid)
                if not killed and time.perf_counter() - started > timeout:
                    killed = True
                    os.killpg(process.pid, signal.SIGKILL)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        found.seconds = time.perf_counter() - started
        os.close(ended)
        process.returncode = found.finish(process.pid)
        others = busy() - before - found.cpu_seconds
        found.others = max(0.0, others / found.seconds / (os.cpu_count() or 1))
        log.seek(0)
        words = (log.read().decode(errors="replace").strip().splitlines() or [""])[-1][:160]
    failure = f"exit code {process.returncode}: {words}" if process.returncode else ""
    found.error = f"> {timeout:.0f}" if killed else failure
    return found


def busy() -> float:
    """Processor seconds spent so far by everything on this machine."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _descendants(pid: int) -> list[int]:
    found = [pid]
    for process in found:
        with contextlib.suppress(OSError):
            for children in Path(f"/proc/{process}/task").glob("*/children"):
                found += map(int, children.read_text().split())
    return found


def prepare_cache(files: Iterable[Path], warm: bool) -> None:
    """Bring files into the page cache, or write them out and throw them out of it."""
    for file in files:
        with file.open("rb", buffering=0) as stream:
            if not warm:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while warm and stream.read(1 << 22):
                pass


@dataclass
class Row:
    """One rule by one tool on one layout."""

    layout: str
    rule: str
    tool: str
    runs: list[Run] = field(default_factory=list)
    slower: float = math.nan  # than acemerge
    products: float = math.nan
    difference: Difference | None = None

    @property
    def best(self) -> Run:
        return min(self.runs, key=lambda run: (not run.error, run.seconds))  # one that failed speaks for all

    def cells(self) -> list[str]:
        best, found, compared = self.best, self.difference, [""] * 4
        if found:
            shares = (f"{count / found.entries:.2e}" for count in (found.differing, found.undecided))
            compared = [*shares, f"{found.most_steps:.3g}", f"{found.most_input_steps:.3g}"]
        return [
            *(self.layout, self.rule, self.tool, best.error or seconds(best.seconds), fixed(self.slower)),
            *(seconds(best.cpu_seconds), seconds(best.sync_seconds)),
            *(fixed(size / 1e6, 0) for size in (best.peak_anonymous, best.peak_rss)),
            *(fixed(size / 1e9, 3) for size in (best.bytes_read, best.bytes_written)),
            *(f"{self.products:.0%}" if self.products == self.products else "", f"{best.others:.0%}", *compared),
        ]


def measured(layout: str, rule: str, models: dict[str, Path], rate: float, arguments: argparse.Namespace) -> list[Row]:
    """All tools with one rule, turn by turn; their outputs are compared and removed."""
    rivals = [tool for tool in arguments.against if tool != "none" and rule in MERGEKIT]
    rows = [Row(layout, rule, tool) for tool in ("acemerge", *rivals)]
    with tempfile.TemporaryDirectory(prefix="engine-", dir=arguments.models) as folder:
        work = Path(folder)
        for row in [row for _ in range(arguments.repeat) for row in rows]:
            if row.runs and row.best.error:
                continue
            shutil.rmtree(work / row.tool, ignore_errors=True)
            command = command_of(row.tool, rule, models, work, arguments)
            prepare_cache((file for model in models.values() for file in weight_files(model)), arguments.warm)
            row.runs.append(run(command, arguments.threads, arguments.timeout))
            started = time.perf_counter()
            prepare_cache(weight_files(work / row.tool), warm=False)  # to be in nobody's way
            row.runs[-1].sync_seconds = time.perf_counter() - started
        ours = rows[0]
        if not ours.best.error:
            records = json.loads((work / ours.tool / "acemerge.json").read_text())["tensors"]
            flop = matrix_operations(records, rule, LAYOUTS[layout]().shapes, len(models) - 1)
            ours.products = flop / rate / 1e9 / ours.best.seconds if flop else math.nan
            for row in (row for row in rows[1:] if not row.best.error):
                row.slower = row.best.seconds / ours.best.seconds
                row.difference = compare(work / ours.tool, work / row.tool, list(models.values()), records)
    return rows


def matrix_operations(records: dict[str, Any], name: str, shapes: dict[str, tuple[int, ...]], experts: int) -> int:
    """What a rule that works on matrices must compute, by the manifest's word on every tensor."""
    total = 0
    for tensor, record in records.items():
        if record["rule"] == name:
            # The homogeneous branch of ace refines nothing.
            method = make(name, {"ablation": "E3"} if record.get("branch") == "homogeneous" else {})
            total += int(method.operations(experts, *shapes[tensor])) if method.needs.matrix else 0
    return total


def growth(rows: list[Row]) -> str:
    """Seconds of all layouts side by side, and the last over the first."""
    layouts = list(dict.fromkeys(row.layout for row in rows))
    lines = [["rule", "tool", *layouts, "ratio"], ["---", "---", *["--:"] * (len(layouts) + 1)]]
    for rule, tool in dict.fromkeys((row.rule, row.tool) for row in rows):
        found = [row.best for row in rows if (row.rule, row.tool) == (rule, tool)]
        ratio = math.nan if any(run.error for run in found) else found[-1].seconds / found[0].seconds
        lines.append([rule, tool, *(run.error or seconds(run.seconds) for run in found), fixed(ratio)])
    return "\n" + "\n".join(map(_line, lines)) if len(layouts) > 1 else ""


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--layout", default=["llama-3.2-3b/8"], type=names, help="comma-separated")
    parser.add_argument("--models", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--rules", default=list(MERGEKIT), type=names, help="comma-separated, of acemerge")
    parser.add_argument("--against", default=["mergekit"], type=names, help="mergekit, mergekit-bf16 or none")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each; the best counts")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=1, help="acemerge's option")
    parser.add_argument("--mergekit-options", default="", help="further options, as --async-write")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds after which a run is given up")
    parser.add_argument("--warm", action="store_true", help="inputs in the page cache; by default they are not")
    parser.add_argument("--json", type=Path, help="write the measurements there, after every rule")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    warm_up = [[sys.executable, "-c", "import acemerge.cli.app; from transformers import LlamaForCausalLM"]]
    for start in warm_up + ([[str(THEIRS), "--help"]] if arguments.against != ["none"] else []):
        if error := run(start, arguments.threads, arguments.timeout).error:
            raise SystemExit(f"{start[0]}: {error}; see benchmarks/setup_peers.sh")
    about = context(",".join(arguments.against), arguments.threads)
    about |= {"cores": os.cpu_count(), "gflops": 0.0}
    print(f"`{shlex.join(['benchmarks/engine.py', *sys.argv[1:]])}`: {about['cpu']}, {about['cores']} cores,", end=" ")
    print(f"{about['threads']} threads, torch {about['torch']}\n\n{_line(HEAD)}")
    print(_line(["---"] * 3 + ["--:"] * (len(HEAD) - 3)), flush=True)
    rows: list[Row] = []
    for layout in arguments.layout:
        models = write_all(arguments.models, layout)
        for rule in arguments.rules:
            about["gflops"] = max(about["gflops"], product_rate())  # the best, for others may be at work
            new = measured(layout, rule, models, about["gflops"], arguments)
            print(*(_line(row.cells()) for row in new), sep="\n", flush=True)
            rows += new
            if arguments.json:
                found = {**about, "arguments": sys.argv[1:], "rows": [asdict(row) for row in rows]}
                arguments.json.write_text(json.dumps(without_nan(found), indent=1, allow_nan=False) + "\n")
    print(growth(rows))


if __name__ == "__main__":
    main()
