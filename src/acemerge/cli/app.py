"""The command line: every command registered, and every failure made one line and an exit code."""

from __future__ import annotations

import contextlib
import re
import sys
import traceback
from itertools import pairwise
from typing import Annotated, Any, NoReturn

import typer

from acemerge.cli import log
from acemerge.cli.analyse import analyse
from acemerge.cli.command import GroupedCommands
from acemerge.cli.compare import compare
from acemerge.cli.convert import convert
from acemerge.cli.demo import demo
from acemerge.cli.evaluate import evaluate
from acemerge.cli.extract_lora import extract_lora
from acemerge.cli.inspect import inspect
from acemerge.cli.interrupts import TERMINATED, interrupts_kept, is_interrupt
from acemerge.cli.merge import merge
from acemerge.cli.methods import methods
from acemerge.cli.plan import plan
from acemerge.cli.report import report
from acemerge.cli.reproduce import reproduce
from acemerge.cli.ui import ui
from acemerge.cli.verify import verify
from acemerge.errors import AcemergeError, addressed, printable, shortage_of

COMMANDS = (
    merge, plan, inspect, methods,
    verify, report, evaluate, compare, analyse,
    convert, extract_lora,
    ui, demo, reproduce,
)  # fmt: skip

app = typer.Typer(
    name="acemerge",
    cls=GroupedCommands,
    help="Merge fine-tuned models into one, without data.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for _command in COMMANDS:
    _command.add_to(app)


def _print_version(asked: bool) -> None:
    if asked:
        import acemerge

        typer.echo(f"acemerge {acemerge.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="print the version")
    ] = False,
) -> None:
    pass


def terminated(*_: object) -> NoReturn:
    """The handler of SIGTERM. An exception of its own: typer makes another exit code of a KeyboardInterrupt."""
    raise SystemExit(TERMINATED)


_OPTION, _COMMAND = re.compile(r"(?<![\w-])--[a-z][a-z-]*"), re.compile(r"\bacemerge ([a-z-]+)")

# What is told of in words of its own; anything else is a defect of ours.
_TOLD = (AcemergeError, typer.TyperException, typer.Abort, OSError, KeyboardInterrupt, SystemExit)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line; every failure is one line on stderr and an exit code."""
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        with interrupts_kept():
            code = app(arguments, standalone_mode=False, prog_name="acemerge")
        if code == 130:  # typer's own answer to an interrupt says nothing
            raise KeyboardInterrupt
    except (Exception, KeyboardInterrupt, SystemExit) as failure:
        if isinstance(failure, SystemExit) and not is_interrupt(failure):
            raise
        told = shortage_of(failure) or failure
        if "--debug" in arguments:
            if not isinstance(told, _TOLD):
                raise
            traceback.print_exc()
        line, code = _line_of(told)
        if isinstance(told, AcemergeError):
            line += _not_taken(told.cure, arguments)
        line = printable(line)
        with contextlib.suppress(OSError):  # nobody may be there to read it, nor room for it where it goes
            _say(line, code, arguments)
    sys.exit(code if isinstance(code, int) else 0)


def _say(text: str, code: int, arguments: list[str]) -> None:
    if "--log-format=json" in arguments or ("--log-format", "json") in pairwise(arguments):
        sys.stderr.write(log.line("error", "error", text, {"exit_code": code}) + "\n")
    else:
        sys.stderr.write(f"acemerge: error: {text}\n")
    sys.stderr.flush()


def _not_taken(cure: str, arguments: list[str]) -> str:
    """Which commands take the options that a cure names, where the one that was run does not."""
    takes = {
        name: {option for parameter in found.params for option in parameter.opts}
        for name, found in typer.main.get_group(app).commands.items()
    }
    run = [word for word in arguments if word in takes][:1]
    own = {option for name in (*run, *_COMMAND.findall(cure)) for option in takes.get(name, ())}
    notes = []
    for option in dict.fromkeys(_OPTION.findall(cure)):
        others = [name for name in takes if option in takes[name]]
        if option not in own and others:
            notes.append(f" ({option} is an option of acemerge {', '.join(others)})")
    return "".join(notes)


def _line_of(failure: BaseException) -> tuple[str, int]:
    """WHERE: WHAT; CURE, and the exit code."""
    if isinstance(failure, AcemergeError):
        return str(failure), failure.exit_code
    if isinstance(failure, typer.TyperException):
        message = " ".join(failure.format_message().split()).rstrip(".")
        context: Any = getattr(failure, "ctx", None)  # of those that a command's parser raises
        return f"command line: {message}; see {context.command_path if context else 'acemerge'} --help", 2
    if isinstance(failure, OSError) and failure.filename is not None:
        return f"{addressed(failure.filename)}: {failure.strerror}; choose another folder, or give access to it", 5
    # What reads and writes models has errors of its own: this is the terminal.
    if isinstance(failure, OSError) and failure.strerror:
        return f"standard output: {failure.strerror}; what was said to be written is written", 5
    if isinstance(failure, SystemExit | KeyboardInterrupt | typer.Abort):
        what, code = ("terminated", 143) if isinstance(failure, SystemExit) else ("interrupted", 130)
        return f"{what}: nothing unfinished was published; run it again, a merge with --resume to go on", code
    what = " ".join(f"{type(failure).__name__}: {failure}".split())[:300]  # a defect of ours, and how to see more
    return f"internal: {what}; run again with --debug and report it", 1
