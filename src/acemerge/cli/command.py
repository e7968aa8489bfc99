"""What a command is made of: its function, the options that it takes, and its help with examples."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from acemerge.checkpoints.named import output_path
from acemerge.cli.log import events_on_stderr
from acemerge.cli.options import GROUPS, Options

HelpRecords = dict[str, list[tuple[str, str]]]


@dataclass(frozen=True)
class Command:
    """A command as it is registered. `run` has the signature that its options are parsed by; `page` is its page of
    the documentation, under docs/.
    """

    name: str
    run: Callable[..., None]
    help: str
    group: str
    examples: tuple[str, ...]
    page: str

    def add_to(self, app: typer.Typer) -> None:
        lines = ["Examples:", *(f"  {line}" for example in self.examples for line in example.split("\n"))]
        epilog = "\n".join([*lines, "", f"More: docs/{self.page}"])
        register = app.command(self.name, cls=GroupedCommand, help=self.help, epilog=epilog, rich_help_panel=self.group)
        register(self.run)


def command(
    name: str,
    *,
    group: str,
    takes: Sequence[str],
    examples: tuple[str, ...],
    page: str,
    helps: Mapping[str, str] | None = None,
    to_stores: bool = False,
) -> Callable[[Callable[..., None]], Command]:
    """Makes a command of a function. It is called with the `Options` that it takes, and with parameters of its own.

    `helps` are words of the command's own for options that are shared. With `to_stores`, the output may be an address.
    """

    def made_of(function: Callable[..., None]) -> Command:
        _, *own = inspect.signature(function, eval_str=True).parameters.values()
        shared = list(_shared([*takes, "debug"], helps or {}, to_stores))

        def run(**given: Any) -> None:
            asked = Options(**{parameter.name: given.pop(parameter.name) for parameter in shared})
            if "recipe" in takes:
                asked.check_models()
            with events_on_stderr() if asked.logs else contextlib.nullcontext():
                function(asked, **given)

        parameters = [*(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own), *shared]
        vars(run)["__signature__"] = inspect.Signature(parameters)
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return Command(name, run, inspect.getdoc(function) or "", group, examples, page)

    return made_of


def _shared(names: Sequence[str], helps: Mapping[str, str], to_stores: bool) -> Iterator[inspect.Parameter]:
    """The parameters that stand for fields of `Options`."""
    hints, fields = get_type_hints(Options, include_extras=True), {f.name: f for f in dataclasses.fields(Options)}
    for name in names:
        kind, declared = get_args(hints[name])
        if name in helps:
            declared = copy.copy(declared)
            declared.help = helps[name]
        if name == "out" and to_stores:
            declared = copy.copy(declared)
            declared.parser = output_path
        yield inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=fields[name].default, annotation=Annotated[kind, declared]
        )


class GroupedCommand(TyperCommand):
    """A command whose help has its options in groups, and its examples as they are written."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write(grouped(self, ctx), formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        formatter.write(f"\n{self.epilog}\n")


class GroupedCommands(TyperGroup):
    """All commands in their groups, each with its whole sentence."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        records: HelpRecords = {}
        for name, found in self.commands.items():
            records.setdefault(getattr(found, "rich_help_panel", None) or "", []).append((name, found.help or ""))
        _write({**records, "Options": [r for rows in grouped(self, ctx).values() for r in rows]}, formatter)


def grouped(found: Any, ctx: Any) -> HelpRecords:
    """A command's arguments and options with their help, by group."""
    records: HelpRecords = {"Arguments": [], **{group: [] for group in GROUPS}}
    for parameter in found.get_params(ctx):
        if (record := parameter.get_help_record(ctx)) is not None:
            is_argument = parameter.param_type_name == "argument"
            records["Arguments" if is_argument else parameter.rich_help_panel or GROUPS[-1]].append(record)
    return {group: rows for group, rows in records.items() if rows}


def _write(records: HelpRecords, formatter: Any) -> None:
    for title, rows in records.items():
        with formatter.section(title):
            formatter.write_dl(rows)
