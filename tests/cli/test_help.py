"""Help, versions and usage errors: at once, whole sentences, examples that the parser takes."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import typer
from commands import failed, run
from examples import PROGRAMS, ROOT

from acemerge.cli.app import COMMANDS, app
from acemerge.cli.command import Command, grouped
from acemerge.cli.options import GROUPS, Options
from acemerge.engine.run_options import RunOptions
from acemerge.recipes.recipe import Recipe
from acemerge.reproduction.pack import PACKS

HEAVY = ("torch", "numpy", "safetensors", "transformers", "yaml", "rich")
each = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)


def test_help_imports_nothing_heavy() -> None:
    words = [sys.executable, "-X", "importtime", "-m", "acemerge", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    loaded = {line.rsplit("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "typer" in loaded
    assert not loaded & set(HEAVY)


def test_nor_does_help_of_a_command_nor_a_usage_error() -> None:
    """All in one process, each as `acemerge WORDS` would be."""
    asked = [[command.name, "-h"] for command in COMMANDS]
    asked += [["--version"], ["murge"], ["merge", "--bse", "x"], ["plan", "--scale", "big"], ["verify"], ["plan"]]
    asked += [
        ["merge", "--base", "x", "--expert", "y"],
        ["compare", "--tasks", "t"],
        ["extract-lora", "m", "--rank", "2"],
    ]
    code = f"""
import sys
from acemerge.cli.app import main
for words in {asked}:
    try:
        main(words)
    except SystemExit:
        print("heavy", *(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = [line for line in done.stderr.splitlines() if not line.startswith("acemerge: error: ")]
    assert said == ["heavy"] * len(asked)


def test_completion_imports_nothing_heavy() -> None:
    environment = {"_ACEMERGE_COMPLETE": "complete_bash", "COMP_WORDS": "acemerge ver", "COMP_CWORD": "1"}
    words = [sys.executable, "-X", "importtime", "-m", "acemerge"]
    path = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment | path)
    assert done.stdout.split() == ["verify"]
    assert not {line.rsplit("|")[-1].strip() for line in done.stderr.splitlines()} & set(HEAVY)


@each
def test_help_is_whole(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, errors = run(capsys, command.name, "--help")
    assert (code, errors) == (0, "")
    assert run(capsys, command.name, "-h")[1] == printed
    words, parsed = " ".join(printed.split()), typer.main.get_command(app).commands[command.name]
    rows = [row for rows in grouped(parsed, typer.Context(parsed)).values() for row in rows]
    assert all(" ".join(text.split()) in words for text in (command.help, *(help for _, help in rows)))
    assert all(line in printed for example in command.examples for line in example.splitlines())
    assert max(map(len, printed.splitlines())) <= 100
    assert f"More: docs/{command.page}" in printed
    assert (ROOT / "docs" / command.page).is_file()
    assert command.help in " ".join(run(capsys, "--help")[1].split())


@each
def test_examples_are_understood(command: Command) -> None:
    assert len(command.examples) == 2
    for example in command.examples:
        first, *_ = example.replace("\\\n", " ").split("&&")
        PROGRAMS["acemerge"](shlex.split(first), False)


def test_every_option_has_a_group() -> None:
    found: Any = typer.main.get_command(app)
    for command in found.commands.values():
        assert set(grouped(command, typer.Context(command))) <= {"Arguments", *GROUPS}


def test_a_usage_error_names_the_command_whose_help_helps(capsys: pytest.CaptureFixture[str]) -> None:
    failed(run(capsys, "merge", "--bse", "x"), 2, "No such option: --bse.*; see acemerge merge --help$")
    failed(run(capsys, "murge"), 2, "No such command 'murge'.*; see acemerge --help$")


def test_the_packs_of_reproduce_are_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert "|".join(PACKS) in run(capsys, "reproduce", "-h")[1]


def test_options_are_those_of_recipes_and_runs() -> None:
    """What is repeated, so that help need not import it, agrees."""
    defaults = {field.name: field.default for field in dataclasses.fields(Options)}
    assert {field.name for field in dataclasses.fields(RunOptions)} <= defaults.keys()
    hints, run_fields = get_type_hints(Options), {field.name: field.default for field in dataclasses.fields(RunOptions)}
    for name, default in run_fields.items():
        assert defaults[name] in (default, None), name
    for name in defaults.keys() & Recipe.model_fields.keys():
        assert _choices(hints[name]) == _choices(Recipe.model_fields[name].annotation), name


def _choices(hint: Any) -> tuple[Any, ...]:
    parts = (hint, *get_args(hint))
    return next((get_args(part) for part in parts if get_origin(part) is Literal), ())
