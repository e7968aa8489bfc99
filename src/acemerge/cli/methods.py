"""`acemerge methods`: the rules, or one of them in detail."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated

import typer

from acemerge.cli.command import command
from acemerge.cli.options import Options
from acemerge.cli.text import say, stdout, table
from acemerge.errors import UsageError, nearest

if TYPE_CHECKING:
    from rich.console import Console


@command(
    "methods",
    group="Merge",
    takes=(),
    examples=("acemerge methods", "acemerge methods auto"),
    page="recipes.md",
)
def methods(
    asked: Options,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="one rule, in detail")] = None,
) -> None:
    """List the rules, or show one with its parameters, defaults and source."""
    if name is None:
        show_all(stdout())
    else:
        show_one(stdout(), name)


def show_all(console: Console) -> None:
    from acemerge.methods import METHODS
    from acemerge.methods.about import parameters, summary

    rows = [
        (rule.name, ", ".join(f"{p.name}={p.default}" for p in parameters(rule)), summary(rule), rule.source)
        for rule in METHODS.values()
    ]
    table(console, ("rule", "parameters", "what it does", "source"), rows)


def show_one(console: Console, name: str) -> None:
    """What a rule says of itself, and its parameters."""
    from acemerge.methods import METHODS, rule_name
    from acemerge.methods.about import parameters

    name = rule_name(name)
    if name not in METHODS:
        raise UsageError(f"method {name!r}", "no such rule", nearest(name, list(METHODS)))
    rule = METHODS[name]
    say(console, f"{rule.name}\n\n{inspect.getdoc(rule)}\n")
    table(console, ("parameter", "default", "meaning"), [(p.name, p.default, p.meaning) for p in parameters(rule)])
