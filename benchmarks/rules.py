"""Time rule against rule on synthetic task vectors of real layer shapes, and print the tables as Markdown.

    .venv/bin/python benchmarks/rules.py --against naive                  # ace and the formula as printed
    .venv/bin/python benchmarks/rules.py --against fusionbench            # tsv_m, iso_c, wudi
    .venv/bin/python benchmarks/rules.py --against mergekit               # average, task_arithmetic, ties
    .venv/bin/python benchmarks/rules.py --against ace --models vit-l     # our own rules: beside our ace
    .venv/bin/python benchmarks/rules.py --against ace --models vit-l --rules kron --set products=bfloat16
    .venv/bin/python benchmarks/rules.py --against none --models vit-b    # every rule of acemerge by itself

`--against fusionbench` and `--against mergekit` need `.peers`: run benchmarks/setup_peers.sh once.

Each side of a comparison is a process of its own, both on the same number of threads, and the two take turns, so
noise of the machine hits both. Times are the best of the repeats after a warm-up; memory is the peak that the
warm-up added to what the inputs take. `floor` is the time that the rule's operations take at the rates of a general and
of a symmetric float32 product measured in the same process, before and after, and LAPACK for its eigen-decompositions
(benchmarks/floors.py). `difference` is the distance of the two merged updates from each other,
relative to the other side's; beside ace, another rule, it is no error. `~` marks a time extrapolated from a few of
many equal steps. Where another process took more than a twentieth of the processors during a run, `status` says so:
such a row is to be measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tables
import yaml
from shapes import DEFAULT, Case, Model, chosen_models, fits_quick
from tables import Row
from turns import Limits, compare

OURS = "ours"


@dataclass(frozen=True)
class Pair:
    """How to make a rule and its rival compute the same thing."""

    against: str
    params: dict[str, Any]
    weights: bool = False
    branches: tuple[bool, ...] = (False,)  # heterogeneous?


PAIRS = {
    "ace": Pair("naive", {}, branches=(False, True)),
    "ace_auto": Pair("ace", {}),
    "anchored": Pair("ace", {}),
    "kron": Pair("ace", {}),
    "kron_auto": Pair("ace", {}),
    "tsv_m": Pair("fusionbench", {}),
    "iso_c": Pair("fusionbench", {}),
    "wudi": Pair("fusionbench", {}),
    "average": Pair("mergekit", {}),
    "task_arithmetic": Pair("mergekit", {"scale": 1.0}, weights=True),
    "ties": Pair("mergekit", {"trim": "tensor", "keep": 0.2}, weights=True),
}


def main() -> None:
    arguments = parse_arguments()
    models = chosen_models(arguments.models)
    comparisons = list(chosen_pairs(arguments.against, arguments.rules))
    if not comparisons:
        raise SystemExit(f"none of {', '.join(arguments.rules)} has a rival called {arguments.against}")
    about = tables.context(arguments.against, arguments.threads)
    print(tables.heading(about), flush=True)
    rows: list[Row] = []
    for rule, pair in comparisons:
        for row in measured_rows(rule, pair, models, arguments):
            print(tables.line(row, arguments.against), flush=True)
            rows.append(row)
            if arguments.json:
                write_json(arguments.json, about, rows)
    print(tables.means(rows))
    print(tables.totals(models, rows))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", default=list(DEFAULT), help="comma-separated, see benchmarks/shapes.py", type=names)
    parser.add_argument(
        "--rules", default=[], help="comma-separated; all that have such a rival by default", type=names
    )
    parser.add_argument("--set", default=[], action="append", type=setting, help="NAME=VALUE, a parameter of our rules")
    parser.add_argument("--against", default="naive", choices=["naive", "fusionbench", "mergekit", "ace", "none"])
    parser.add_argument("--quick", action="store_true", help="leave out the larger layers, repeat less")
    parser.add_argument("--json", type=Path, help="write the measurements there, after every row")
    parser.add_argument("--repeats", type=int, default=3, help="at least so many runs of what takes under 20 s")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=900.0, help="seconds after which one run is given up")
    return parser.parse_args()


def names(text: str) -> list[str]:
    return text.split(",")


def setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, yaml.safe_load(value)


def chosen_pairs(against: str, rules: list[str]) -> Iterator[tuple[str, Pair]]:
    """The rules to time and how; without a rival, any rule of acemerge."""
    if against != "none":
        yield from ((r, p) for r, p in PAIRS.items() if p.against == against and (not rules or r in rules))
        return
    for rule in rules or all_rules():
        pair = PAIRS.get(rule, Pair("none", {}))
        yield rule, replace(pair, against="none", params={}, weights=False)


def all_rules() -> list[str]:
    import acemerge
    from acemerge.methods import make

    return [name for name in acemerge.METHODS if make(name, {}).needs.calibration is None]


def measured_rows(rule: str, pair: Pair, models: dict[str, Model], arguments: argparse.Namespace) -> Iterator[Row]:
    """One row per distinct layer shape and branch."""
    for (experts, rows, columns), layers in distinct_shapes(models.values(), arguments.quick).items():
        for hetero in pair.branches:
            params = {**pair.params, "tau": -1.0 if hetero else 1e9} if rule == "ace" else pair.params
            case = Case(rule, experts, rows, columns, hetero, params, pair.weights)
            sides = {} if pair.against == "none" else {pair.against: case}
            if pair.against == "ace":  # the same task vectors by another rule: only the times compare
                sides["ace"] = replace(case, rule="ace", params={"tau": 1e9})
            case = sides[OURS] = replace(case, params={**case.params, **dict(arguments.set)})
            started = time.perf_counter()
            limits = Limits(arguments.limit, arguments.repeats, 0.5 if arguments.quick else 2.0)
            measured, difference = compare(sides, arguments.threads, limits)
            print(f"{rule} {experts} x {rows} x {columns}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
            branch = ("heterogeneous" if hetero else "homogeneous") if rule == "ace" else ""
            yield Row(case, layers, branch, measured.get(pair.against), measured[OURS], difference)


def distinct_shapes(models: Iterable[Model], quick: bool) -> dict[tuple[int, int, int], str]:
    """Every (experts, out, in) once, with the names of the layers that have it."""
    found: dict[tuple[int, int, int], list[str]] = {}
    for model in models:
        for layer in model.layers:
            if not (quick and not fits_quick(model.experts, layer)):
                same = found.setdefault((model.experts, layer.rows, layer.columns), [])
                same.append(f"{model.title} {layer.name}")
    return {shape: "; ".join(same) for shape, same in found.items()}


def write_json(path: Path, about: dict[str, Any], rows: list[Row]) -> None:
    found = {**about, "arguments": sys.argv[1:], "rows": [asdict(row) | row.numbers() for row in rows]}
    path.write_text(json.dumps(without_nan(found), indent=1, allow_nan=False) + "\n")


def without_nan(value: Any) -> Any:
    """The same with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
