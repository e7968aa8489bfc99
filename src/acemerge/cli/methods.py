"""`acemerge methods`: the rules, or one of them in detail."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from acemerge.cli.command import command
from acemerge.cli.options import Options
from acemerge.cli.text import print_json, say, stderr, stdout, table

if TYPE_CHECKING:
    from rich.console import Console

    from acemerge.methods import Method


@command(
    "methods",
    group="Merge",
    takes=("as_json",),
    examples=("acemerge methods", "acemerge methods auto"),
    page="recipes.md",
)
def methods(
    asked: Options,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="one rule, in detail")] = None,
) -> None:
    """List the rules, or show one with its parameters, defaults and source."""
    from acemerge.methods import METHODS, load_installed, rule_class

    if name is None:
        for failure in load_installed():
            say(stderr(), f"warning: {failure}")
        if asked.as_json:
            print_json({"rules": [as_table(rule) for rule in METHODS.values()]})
        else:
            show_all(stdout())
        return
    rule = rule_class(name)
    if asked.as_json:
        print_json(as_table(rule))
    else:
        show_one(stdout(), rule)


def as_table(rule: type[Method]) -> dict[str, Any]:
    """What a rule says of itself, as JSON."""
    from acemerge.methods import METHODS, make, rule_name
    from acemerge.methods.about import families, parameters

    return {
        "name": rule.name,
        "family": next(family for family, rules in families(METHODS).items() if rule in rules),
        "recommended": rule.name == rule_name("auto"),
        "source": rule.source,
        "description": inspect.getdoc(rule),
        "needs_data": make(rule.name, {}).needs.calibration is not None,
        "parameters": [dataclasses.asdict(parameter) for parameter in parameters(rule)],
    }


def show_all(console: Console) -> None:
    """A line for each rule, by family; the recommended one has a star."""
    from acemerge.methods import METHODS, rule_name
    from acemerge.methods.about import families, line

    width = max(map(len, METHODS))
    for family, rules in families(METHODS).items():
        say(console, family)
        for rule in rules:
            star = "*" if rule.name == rule_name("auto") else " "
            say(console, f"{star} {rule.name:{width}}  {line(rule)}")
        say(console, "")
    say(console, "* recommended: the default, also by the name auto")
    say(console, "`acemerge methods NAME` has a rule's formula, its parameters and its source.")


def show_one(console: Console, rule: type[Method]) -> None:
    """What a rule says of itself, and its parameters."""
    from acemerge.methods.about import parameters

    say(console, f"{rule.name}\n")
    for part in (inspect.getdoc(rule) or "").split("\n\n"):
        is_formula = part.startswith("    ")
        say(console, f"{part if is_formula else ' '.join(part.split())}\n", wrap=not is_formula)
    table(console, ("parameter", "default", "meaning"), [(p.name, p.default, p.meaning) for p in parameters(rule)])
