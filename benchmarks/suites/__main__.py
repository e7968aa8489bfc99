"""suites: models of several kinds, experts of them, and every rule that needs no data, offline.

    .venv/bin/python benchmarks/suites                                  # the suites for choosing, every rule
    .venv/bin/python benchmarks/suites scripts language --rules auto,average,tsv_m
    .venv/bin/python benchmarks/suites --purpose confirming --rules auto,average,tsv_m,iso_c
    .venv/bin/python benchmarks/suites scripts --rules kron_auto:scale=0.8,ace:eps=1e-2

Everything is trained here, once, and kept in the cache (`--cache`, else the user's cache folder). `points` are 100 for
the experts: of accuracies the mean of accuracy / the expert's own, of language models the mean share that is kept of
the probability of a byte. `95 %`: where they lie on other draws of the held-out examples. `regret`: points behind the
suite's best rule.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1] / "text8"))  # for its packages

from catalogue import SUITES
from suite import Prepared, Suite, draws, points

import acemerge
from acemerge.methods import make

Rule = tuple[str, dict[str, Any]]


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    table: dict[str, dict[str, float]] = {}
    for suite in chosen(arguments):
        table[suite.name] = run(suite, arguments)
        if arguments.json:
            arguments.json.write_text(json.dumps({"torch": torch.__version__, "points": table}, indent=1) + "\n")
    print(summary(table))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="suites", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("suites", nargs="*", help=", ".join(suite.name for suite in SUITES))
    parser.add_argument("--purpose", choices=("choosing", "confirming"), default="choosing", help="where none is named")
    parser.add_argument(
        "--rules", help="comma-separated, as tsv_m or ace:eps=1e-2:tau=0.1; every data-free one if none"
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "acemerge/suites"
    parser.add_argument("--cache", type=Path, default=cache)
    parser.add_argument("--json", type=Path, help="write the points there, after every suite")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    unknown = set(arguments.suites) - {suite.name for suite in SUITES}
    if unknown:
        parser.error(f"no suite is called {', '.join(sorted(unknown))}")
    return arguments


def chosen(arguments: argparse.Namespace) -> Sequence[Suite]:
    if arguments.suites:
        return [suite for suite in SUITES if suite.name in arguments.suites]
    return [suite for suite in SUITES if suite.purpose == arguments.purpose]


def run(suite: Suite, arguments: argparse.Namespace) -> dict[str, float]:
    """The points of the base and of every rule."""
    prepared = suite.prepare(arguments.cache)
    experts = list(prepared.experts.values())
    print(f"\n**{suite.name}** ({suite.purpose}): {suite.about}\n\n| | {' | '.join(prepared.alone)} | points | 95 % |")
    print(f"|---|{'--:|' * (len(prepared.alone) + 2)}")
    found = {"base": line("base", prepared, prepared.base)}
    for name, (rule, params) in rules(arguments.rules, len(experts)).items():
        started = time.perf_counter()
        merged = acemerge.merge_models(prepared.base, experts, rule, **params)
        found[name] = line(name, prepared, merged, time.perf_counter() - started)
    return found


def line(name: str, prepared: Prepared, model: torch.nn.Module, seconds: float | None = None) -> float:
    """Print a model's row and give its points."""
    outcome = prepared.outcome(model)
    found = points(outcome, prepared.alone, prepared.likelihood)
    drawn = draws(outcome, prepared.alone, prepared.likelihood)
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    factor = 1 if prepared.likelihood else 100
    cells = [
        f"{factor * float(value.double().mean()):.{3 if prepared.likelihood else 1}f}" for value in outcome.values()
    ]
    spent = "" if seconds is None else f" ({seconds:.1f} s)"
    print(f"| {name}{spent} | {' | '.join(cells)} | {found:.1f} | {low:.1f} to {high:.1f} |", flush=True)
    return found


def rules(asked: str | None, experts: int) -> Mapping[str, Rule]:
    if asked:
        return {name: parsed(name) for name in asked.split(",")}
    known = {name: make(name, {}).needs for name in acemerge.METHODS if not name.startswith("mergekit_")}
    return {
        name: (name, {})
        for name, needs in known.items()
        if not needs.masks and needs.calibration is None and (needs.most_experts or experts) >= experts
    }


def parsed(text: str) -> Rule:
    """`ace:eps=1e-2` as a rule's name and its parameters."""
    from acemerge.recipes.recipe import parse_settings

    name, *settings = text.split(":")
    return name, parse_settings(settings)


def summary(table: Mapping[str, Mapping[str, float]]) -> str:
    """Every rule's points on every suite, its mean and its largest regret; the least mean first."""
    names = [name for name in next(iter(table.values())) if all(name in points for points in table.values())]
    best = {suite: max(points[name] for name in names) for suite, points in table.items()}
    rows = []
    for name in names:
        regrets = [best[suite] - points[name] for suite, points in table.items()]
        cells = [f"{points[name]:.1f}" for points in table.values()]
        mean, worst = sum(regrets) / len(regrets), max(regrets)
        rows.append((mean, f"| {name} | {' | '.join(cells)} | {mean:.1f} | {worst:.1f} |"))
    head = f"\n| | {' | '.join(table)} | mean regret | worst |\n|---|{'--:|' * (len(table) + 2)}\n"
    return head + "\n".join(text for _, text in sorted(rows))


if __name__ == "__main__":
    main()
