"""The examples of README.md and docs/: found, and run as a reader would run them, one page after the other.

Every block of code is one of these, or its page fails:

    sh, shell   commands; also what is indented. What `PROGRAMS` knows is run, or as much of it as can be.
    python      run, all of a page in one module
    text        what the block before it prints, letter by letter but for seconds
    yaml        a recipe, which is merged, the tasks of an evaluation, which are read, or a job of Kubernetes, whose
                commands are parsed

A block that cannot be run has the reason in a comment before it, `<!-- not run: REASON -->`. Its commands are then
parsed by their own parsers, its Python is compiled, its recipe read.
"""

from __future__ import annotations

import argparse
import io
import re
import runpy
import shlex
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from markdown_it import MarkdownIt

from acemerge.cli.app import app, main
from acemerge.recipes.recipe import load_recipe
from acemerge.tasks.task_file import load_tasks

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Commands that no example runs, whatever page it is on, and why.
UNRUN = {"demo": "trains for minutes", "reproduce": "fetches models from the Hub", "ui": "serves until it is stopped"}
_SECONDS = re.compile(r"\d+\.\d s$", re.MULTILINE)  # of a command: a clock's
_MARK = re.compile(r"<!-- not run:(.*)-->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code; `reason` says why it is not run, where it is not."""

    where: str
    language: str
    text: str
    reason: str | None = None


class BadExampleError(AssertionError):
    """An example that does not do what its page says."""


def blocks(text: str, page: str = "page") -> list[Block]:
    """All blocks of code in their order; what is indented is a command where its first line reads like one."""
    found, reason = [], None
    for token in MarkdownIt().parse(text):
        if token.type == "html_block" and (mark := _MARK.search(token.content)):
            reason = mark[1].strip()
            if not reason:
                raise BadExampleError(f"{page}: a mark without a reason")
            continue
        if token.type in ("fence", "code_block"):
            line = (token.map or [0])[0] + 1
            language = token.info.strip() or "no language" if token.type == "fence" else _indented(token.content)
            found.append(Block(f"{page}:{line}", language, token.content, reason))
        reason = None
    return found


def _indented(text: str) -> str:
    return "sh" if text.split()[0] in PROGRAMS else "formula"


def run_page(blocks: list[Block], names: dict[str, Any]) -> None:
    """Run the blocks of one page in the current folder; `names` are there for its Python."""
    module, printed = types.ModuleType("example"), ""
    module.__dict__.update(names)
    sys.modules["example"] = module  # where a dataclass looks for its annotations
    for block in blocks:
        if block.language not in LANGUAGES:
            raise BadExampleError(f"{block.where}: nobody knows how to try a block of {block.language!r}")
        try:
            printed = LANGUAGES[block.language](block, module, printed)
        except (Exception, SystemExit) as failure:
            cure = "mend the example, or say before it why it cannot run: <!-- not run: REASON -->"
            raise BadExampleError(f"{block.where}: {type(failure).__name__}: {failure}; {cure}") from failure


# --- languages: each takes a block, the page's module and what was printed before, and gives what is printed ------


def _shell(block: Block, module: types.ModuleType, printed: str) -> str:
    out = io.StringIO()
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] not in PROGRAMS:
            raise BadExampleError(f"nobody knows how to try {words[0]!r}")
        if words:
            try:
                with redirect_stdout(out):
                    PROGRAMS[words[0]](words, block.reason is None)
            except BaseException:
                print(out.getvalue())
                raise
    return out.getvalue()


def _python(block: Block, module: types.ModuleType, printed: str) -> str:
    code, out = compile(block.text, block.where, "exec"), io.StringIO()
    if block.reason is None:
        with redirect_stdout(out):
            exec(code, module.__dict__)
    return out.getvalue()


def _text(block: Block, module: types.ModuleType, printed: str) -> str:
    if _SECONDS.sub("", block.text) != _SECONDS.sub("", printed):
        raise BadExampleError(f"the block before it prints {printed!r}")
    return ""


def _yaml(block: Block, module: types.ModuleType, printed: str) -> str:
    content = yaml.safe_load(block.text)
    if content.get("kind") == "RayJob":
        _acemerge(shlex.split(content["spec"]["entrypoint"]), False)
        return ""
    if "apiVersion" in content:
        for container in content["spec"]["template"]["spec"]["containers"]:
            _acemerge(shlex.split(container["command"][-1]), False)
        return ""
    if "tasks" in content:
        asked = Path("page-tasks.yaml")  # the page's commands have tasks of their own, whose data is there
        asked.write_text(block.text)
        load_tasks(asked, labelled=False)  # calibration wants no labels
        return ""
    recipe = Path("mergekit.yml" if "merge_method" in content else "recipe.yaml")
    recipe.write_text(block.text)
    load_recipe(recipe, {})
    if block.reason is None:
        _acemerge(["acemerge", "merge", str(recipe), "-o", f"of-{block.where.replace('/', '-')}", "--quiet"], True)
    return ""


def _formula(block: Block, module: types.ModuleType, printed: str) -> str:
    return printed  # mathematics, between what was printed and the next block


LANGUAGES: dict[str, Callable[[Block, types.ModuleType, str], str]] = {
    **dict.fromkeys(("sh", "shell"), _shell),
    "python": _python,
    "text": _text,
    "yaml": _yaml,
    "formula": _formula,
}


# --- programs: each takes a command's words, and whether to run it or only to look at it ---------------------------


def _acemerge(words: list[str], run: bool) -> None:
    """Run in this process; or parsed, by the very parser."""
    if run and words[1] not in UNRUN:
        with pytest.raises(SystemExit) as stop:
            main(words[1:])
        if stop.value.code:
            raise BadExampleError(f"{shlex.join(words)}: exit code {stop.value.code}, see what it printed")
        return
    group: Any = typer.main.get_command(app)
    context = group.make_context("acemerge", words[1:])
    name, command, rest = group.resolve_command(context, words[1:])
    command.make_context(name, rest, parent=context)


def _make(words: list[str], run: bool) -> None:
    """A target takes minutes, and installs: is it there?"""
    subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)


def _pip(words: list[str], run: bool) -> None:
    """Nothing is installed: ours are asked for by extras that exist."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert words[1] == "install"
    for wanted in words[2:]:
        extras = re.fullmatch(r"(?:acemerge|\.)\[([\w,-]+)\]", wanted)
        for extra in extras[1].split(",") if extras else ():
            if not re.search(rf"^{extra} = \[", pyproject, re.MULTILINE):
                raise BadExampleError(f"there is no extra {extra!r}")


class _ParsedError(Exception):
    """The script has understood its arguments."""


def _interpreter(words: list[str], run: bool) -> None:
    """Benchmarks and attacks take minutes to hours: started, and stopped when their arguments are parsed."""
    if words[1:3] == ["-m", "acemerge.integrations.mergekit"]:
        return  # it is mergekit's own command, which must be installed; tests/recipes/test_mergekit.py runs it there
    arguments = words[2:] if words[1] == "-m" else words[1:]
    script = ROOT / (arguments[0].replace(".", "/") if words[1] == "-m" else arguments[0])
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, *given: Any) -> None:
        parse(parser, *given)
        raise _ParsedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        patch.setattr(sys, "argv", arguments)
        patch.setattr(sys, "path", [str(script if script.is_dir() else script.parent), *sys.path])
        patch.setattr(sys, "modules", sys.modules.copy())  # forget the script's neighbours, which have plain names
        with pytest.raises(_ParsedError):
            runpy.run_path(str(script), run_name="__main__")


def _ray(words: list[str], run: bool) -> None:
    """It starts what stays: parsed, by Ray's own parser."""
    from ray.scripts.scripts import cli

    name, command, rest = cli.resolve_command(cli.make_context("ray", words[1:]), words[1:])
    command.make_context(name, rest)


def _script(words: list[str], run: bool) -> None:
    """It installs other tools: is it there, and is it a script?"""
    subprocess.run(["bash", "-n", ROOT / words[0]], check=True, capture_output=True)


PROGRAMS: dict[str, Callable[[list[str], bool], None]] = {
    "acemerge": _acemerge,
    "make": _make,
    "pip": _pip,
    "ray": _ray,
    "python": _interpreter,
    ".venv/bin/python": _interpreter,
    "benchmarks/setup_peers.sh": _script,
}


def languages(pages: list[Path]) -> Iterator[tuple[str, str]]:
    """Where every block is, and what it is."""
    for page in pages:
        for block in blocks(page.read_text(), str(page.relative_to(ROOT))):
            yield block.where, block.language
