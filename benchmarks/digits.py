"""Every data-free rule at its defaults on the demo's six vision experts, all together or in groups.

    acemerge demo -o digits                              # trains a base and its experts, in about a minute
    .venv/bin/python benchmarks/digits.py digits
    .venv/bin/python benchmarks/digits.py digits --groups 2      # each of the 15 pairs, merged by itself
    .venv/bin/python benchmarks/digits.py digits --eight         # with two more experts, trained if need be
    .venv/bin/python benchmarks/digits.py digits --fused         # query, key and value joined to one weight before
    .venv/bin/python benchmarks/digits.py digits --roles         # kron_auto's constants changed in one kind of layer

597 held-out images a task, each with its expert's own head. `of experts` is the mean over the tasks of accuracy / the
expert's own, with `--groups` over all tasks of all groups. `emr`, whose result is a model for each task, is left out.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from text8.fitting import rules_for

import acemerge
from acemerge.demo import DIGIT, TASKS, Digits, DigitTask, accuracy, load_digits, make_expert, with_head
from acemerge.models.quiet import quiet_transformers

_FURTHER = (
    DigitTask("transposed", lambda x: x.transpose(1, 2), lambda y: y),
    DigitTask("third", lambda x: x, lambda y: (y % 3 == 0).long(), 2),  # whether a multiple of three
)
_PROJECTIONS = ("query", "key", "value")
_ROLES = {
    "attention": "*attention*.weight",
    "MLP up": "*intermediate*.weight",
    "MLP down": "*layer.?.output.dense.weight",
}
_CONSTANTS = {"lam": (0.3, 3.0), "scale": (0.8, 1.2)}  # `keep` is all in layers of this width
Run = tuple[str, str, dict[str, Any]]  # what it is called, the rule, and more of the recipe


@quiet_transformers()
def main() -> None:
    parser = argparse.ArgumentParser(prog="digits", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="of `acemerge demo -o FOLDER`")
    parser.add_argument("--rules", help="comma-separated; every data-free one when not given")
    parser.add_argument("--groups", type=int, metavar="N", help="merge every group of N tasks; all when not given")
    parser.add_argument("--eight", action="store_true", help="with two further experts")
    parser.add_argument("--roles", action="store_true", help="kron_auto, its constants changed for one role at a time")
    parser.add_argument("--fused", action="store_true", help="merge query, key and value as one weight")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder, data = arguments.folder, load_digits()
    tasks = (*TASKS, *further(folder, data)) if arguments.eight else TASKS

    def scores(body: Path, asked: Sequence[DigitTask]) -> list[float]:
        heads = [expert_of(folder, task) / "model.safetensors" for task in asked]
        return [accuracy(with_head(body, head, task), task, data) for task, head in zip(asked, heads, strict=True)]

    def merged(rule: str, asked: Sequence[DigitTask], options: dict[str, Any]) -> list[float]:
        with tempfile.TemporaryDirectory() as temporary:
            base, experts, out = folder / "base", [expert_of(folder, task) for task in asked], Path(temporary) / "out"
            if arguments.fused:
                base, *experts = (fused(one, Path(temporary)) for one in (base, *experts))
            acemerge.merge(base, experts, rule, out, quiet=True, **options)
            return scores(split(out, folder / "base") if arguments.fused else out, asked)

    alone = {task.name: scores(expert_of(folder, task), [task])[0] for task in tasks}
    found = rules_for(arguments.groups or len(tasks))
    data_free = [rule for rule, needs in found.items() if not needs.masks and needs.calibration is None]
    rules = arguments.rules.split(",") if arguments.rules else data_free
    runs: list[Run] = by_role() if arguments.roles else [(rule, rule, {}) for rule in rules]
    if arguments.groups:
        groups = list(itertools.combinations(tasks, arguments.groups))
        print(f"| {len(groups)} groups of {arguments.groups} | of experts | worst group |\n|---|--:|--:|")
        print(summary("base", [(group, scores(folder / "base", group)) for group in groups], alone))
        for name, rule, options in runs:
            print(summary(name, [(group, merged(rule, group, options)) for group in groups], alone), flush=True)
        return
    print(f"| | {' | '.join(task.name for task in tasks)} | mean | of experts |\n|---|{'--:|' * (len(tasks) + 2)}")
    print(line("each expert, alone", list(alone.values()), alone))
    print(line("base", scores(folder / "base", tasks), alone))
    for name, rule, options in runs:
        print(line(name, merged(rule, tasks, options), alone), flush=True)


def by_role() -> list[Run]:
    """kron_auto at its defaults, and with one constant changed for the layers of one role."""
    runs: list[Run] = [("kron_auto", "kron_auto", {})]
    for role, pattern in _ROLES.items():
        for constant, values in _CONSTANTS.items():
            for value in values:
                rules = [{"match": pattern, "method": {"name": "kron_auto", constant: value}}]
                runs.append((f"{constant}={value} in {role}", "kron_auto", {"rules": rules}))
    return runs


def further(folder: Path, data: Digits) -> tuple[DigitTask, ...]:
    """Two tasks beyond the demo's, whose experts are trained as the demo's where they are not there yet."""
    for seed, task in enumerate(_FURTHER, len(TASKS) + 1):
        if not expert_of(folder, task).exists():
            base = with_head(folder / "base", folder / "base" / "model.safetensors", DIGIT)
            make_expert(base, task, data, seed).save_pretrained(expert_of(folder, task))
    return _FURTHER


def expert_of(folder: Path, task: DigitTask) -> Path:
    return folder / "experts" / task.name


def fused(model: Path, root: Path) -> Path:
    """The model with `qkv` in the place of `query`, `key` and `value`, its head aside."""
    weights = {
        name: value for name, value in load_file(model / "model.safetensors").items() if "classifier" not in name
    }
    queries = [name for name in weights if "query" in name]
    if not queries:
        raise SystemExit(f"{model}: no tensor is called `query`, so that there is nothing to join")
    for name in queries:
        three = [weights.pop(name.replace("query", part)) for part in _PROJECTIONS]
        weights[name.replace("query", "qkv")] = torch.cat(three)
    out = root / model.name
    out.mkdir()
    save_file(weights, out / "model.safetensors")
    return out


def split(model: Path, base: Path) -> Path:
    """The inverse, in place, with the base's configuration."""
    file = model / "model.safetensors"
    weights = load_file(file)
    for name in [name for name in weights if "qkv" in name]:
        for part, value in zip(_PROJECTIONS, weights.pop(name).chunk(3), strict=True):
            weights[name.replace("qkv", part)] = value.contiguous()
    save_file(weights, file, metadata={"format": "pt"})
    shutil.copy(base / "config.json", model)
    return model


def of_experts(scores: Sequence[float], best: Sequence[float]) -> float:
    return sum(score / own for score, own in zip(scores, best, strict=True)) / len(scores)


def line(name: str, scores: Sequence[float], alone: dict[str, float]) -> str:
    """A row of percentages, for all tasks."""
    cells = [*scores, sum(scores) / len(scores), of_experts(scores, [*alone.values()])]
    return f"| {name} | {' | '.join(f'{100 * cell:.1f}' for cell in cells)} |"


def summary(name: str, groups: Sequence[tuple[Sequence[DigitTask], Sequence[float]]], alone: dict[str, float]) -> str:
    found = [of_experts(scores, [alone[task.name] for task in tasks]) for tasks, scores in groups]
    return f"| {name} | {100 * sum(found) / len(found):.1f} | {100 * min(found):.1f} |"


if __name__ == "__main__":
    main()
