"""Every data-free rule at its defaults on the demo's six vision experts.

    acemerge demo -o digits                              # trains a base and its experts, in about a minute
    .venv/bin/python benchmarks/digits.py digits

597 held-out images a task, each with its expert's own head. `of experts` is the mean over the tasks of accuracy / the
expert's own. `emr`, whose result is a model for each task, is left out.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import acemerge
from acemerge.demo import TASKS, accuracy, load_digits, scores_of, with_head
from acemerge.evaluation.models import quiet_transformers
from acemerge.methods import make


def main() -> None:
    parser = argparse.ArgumentParser(prog="digits", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="of `acemerge demo -o FOLDER`")
    parser.add_argument("--rules", help="comma-separated; every data-free one when not given")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quiet_transformers()
    folder, data = arguments.folder, load_digits()
    experts = [folder / "experts" / task.name for task in TASKS]
    heads = [expert / "model.safetensors" for expert in experts]
    alone = [
        accuracy(with_head(expert, head, task), task, data)
        for expert, head, task in zip(experts, heads, TASKS, strict=True)
    ]
    print(f"| | {' | '.join(task.name for task in TASKS)} | mean | of experts |\n|---|{'--:|' * (len(TASKS) + 2)}")
    print(line("each expert, alone", alone, alone))
    print(line("base", scores_of(folder / "base", folder, data), alone))
    for rule in arguments.rules.split(",") if arguments.rules else data_free(len(TASKS)):
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary) / "out"
            acemerge.merge(folder / "base", experts, rule, out, quiet=True)
            print(line(rule, scores_of(out, folder, data), alone), flush=True)


def data_free(experts: int) -> list[str]:
    """What takes so many and gives one model; mergekit's own variants are left out."""
    known = {name: make(name, {}).needs for name in acemerge.METHODS if not name.startswith("mergekit_")}
    return [
        name
        for name, needs in known.items()
        if not needs.masks and needs.calibration is None and (needs.most_experts or experts) >= experts
    ]


def line(name: str, scores: Sequence[float], experts: Sequence[float]) -> str:
    """A row of percentages."""
    of_experts = sum(score / best for score, best in zip(scores, experts, strict=True)) / len(scores)
    cells = [*scores, sum(scores) / len(scores), of_experts]
    return f"| {name} | {' | '.join(f'{100 * cell:.1f}' for cell in cells)} |"


if __name__ == "__main__":
    main()
