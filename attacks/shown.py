"""Row 37: names of folders, experts and tensors that are code, markup or orders to a terminal, in all that shows them.

Wherever they turn up they are text: on a terminal and in a pipe, in cards, reports, the pages of an analysis and those
in a browser. What shows a harmless name has the same tags, blocks and scripts, and no terminal is sent an order.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import io
import os
import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
import yaml
from markdown_it import MarkdownIt
from safetensors.torch import save_file

from acemerge.cli import text as cli_text
from acemerge.cli.app import main as command_line
from acemerge.engine.opening import open_recipe
from acemerge.engine.run_options import RunOptions
from acemerge.errors import printable
from acemerge.inspection.analysis import analyse
from acemerge.inspection.analysis_tables import as_csv, markdown
from acemerge.recipes.recipe import make_recipe
from acemerge.report.write import write_report
from acemerge.ui import steps, view
from acemerge.ui.choice import Choice
from acemerge.ui.folders import Folders
from acemerge.ui.runner import State
from attacks.harness import Tally, check, clean, main

ROW = 37
_SCRIPT = "<script>document.title='owned'</script>"
NAMES = (
    # --- HTML and scripts
    _SCRIPT, "</script><script>alert(1)<!--", "<img src=x onerror=alert(1)>", "<svg onload=alert(1)>",
    "'><script>alert(1)<", '"><img src=x onerror=alert(1)>', '" onmouseover="alert(1)', "' autofocus onfocus='x",
    "<iframe src=javascript:alert(1)>", "</title><script>alert(1)<", "</textarea><b>", "</style><b>", "]]><b>", "<!--",
    "<plaintext>", "&lt;b&gt;", "&#60;b&#62;", "&", "<a href=javascript:alert(1)>x", "<math><mi x=alert(1)>",
    # --- Markdown and templates
    "[x](javascript:alert(1))", "![x](http:a.b)", "`<b>`", "``` <b>", "~~~", "**a** _b_ ~~c~~", "| a | b |", "a|<b>|c",
    "# a", "- a", "[^1]", "$x^2$", "{{7*7}}", "{% raw %}", "${alert(2)}", "<%= 1 %>", "#{1}", "{0.__class__}", "%n%s",
    # --- a terminal's orders, and what changes a line
    "\x1b[31mred", "\x1b[2J", "\x1b]0;title\x07", "\x1b]8;;http:a\x1b\\x", "\x1b]52;c;aWQ=\x07", "\x1bc", "\x9b31m",
    "\x90q\x9c", "\x07", "\x08\x08\x08", "a\rb", "a\nacemerge: error: x", "a\x0bb\x0cc", "\x7f", "\x0e\x0f", "\x01",
    "\u202egpj.a", "\u2066a\u2069", "\u200b", "a\u2028b", "\u00ad", "\ue000", "\udcff", "\udc80<b>",
    # --- rich's and matplotlib's markup, YAML, Python, a shell, a spreadsheet
    "[red]x[-red]", "[link=http:a]x", ":warning:", "\\[b]", "a: b", "- {a: b}", "&a *a", "!!python x", "---", "null",
    '"); import os; os.system("id") #', "'''", '"""', "\\N{DIGIT ONE}", "$(id)", "`id`", "; id", "-rf", "--help",
    "=1+1", "@x", "+1", "=HYPERLINK(1)", "x" * 200,
)  # fmt: skip
FULL = len(NAMES)
_HARMLESS = "harmless"
# What rich sends a terminal that shows no colours: bold and plain, the cursor, a line drawn again.
_DRAWING = re.compile(r"\x1b\[(0|1|2|\?25[lh]|2K|1A)?[mhlKA]?|\r")
_ORDER = re.compile(r"\x1b\[[0-9;?]*[@-~]|[^\n]", re.DOTALL)
_MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable("table")
_FORMULA = ("=", "+", "-", "@", "\t")
Skeleton = list[Any]  # of what is shown: all but the text


def attack(folder: Path, count: int, seed: int) -> Tally:
    """All names, or `count` of them, each in every place."""
    tally = Tally()
    with _plain_terminal(folder):
        harmless = {place: show() for place, show in _Shelf(folder / "first", _HARMLESS).places().items()}
        for i, name in enumerate(random.Random(seed).sample(NAMES, min(count, len(NAMES)))):
            for place, show in _Shelf(folder / f"{i}", name).places().items():
                call = partial(_compare, show, harmless[place])
                clean(tally, f"{place}, {name[:60]!r}", call, must="accept")
    return tally


@contextlib.contextmanager
def _plain_terminal(folder: Path) -> Iterator[None]:
    """Work in `folder`, before a terminal without colours that is wide enough."""
    before, environment = os.getcwd(), dict(os.environ)
    os.environ |= {"NO_COLOR": "1", "TERM": "xterm", "COLUMNS": "2000"}
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(environment)
        _forget_consoles()


def _compare(show: Callable[[], Skeleton], harmless: Skeleton) -> None:
    found = show()
    if not found:
        return  # where all there is to find was looked for
    unlike = next((pair for pair in zip(found, harmless, strict=False) if pair[0] != pair[1]), None)
    check(found == harmless, f"shows {unlike or (len(found), len(harmless))!r}"[:280])


class _Shelf:
    """A base and two experts in folders of this name, with a tensor of it where it may be one."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.folder = name, folder / name
        self.base, *self.experts = (self.folder / f"{i}{name}" for i in range(3))
        allowed = name.isprintable() and "\\" not in name
        self.tensor = f"{name if allowed else _HARMLESS}.weight"
        generator = torch.Generator().manual_seed(0)
        values = {n: torch.randn(12, 8, generator=generator) for n in (self.tensor, "layers.0.up.weight")}
        for i, path in enumerate((self.base, *self.experts)):
            path.mkdir(parents=True)
            moved = {n: v + 0.1 * i * torch.randn(12, 8, generator=generator) for n, v in values.items()}
            save_file(moved, "new.safetensors", metadata={"format": "pt"})  # which takes no path that is no text
            os.replace("new.safetensors", path / "model.safetensors")
        self.written = self.folder if self._is_text else folder  # an output's name must be text
        self.out = self.written / "out"

    def places(self) -> dict[str, Callable[[], Skeleton]]:
        return {
            "a pipe": self.pipe, "a terminal": self.terminal, "an error": self.errors, "a card": self.card,
            "a report": self.report, "an analysis": self.analysis, "the page": self.page,
        }  # fmt: skip

    @property
    def _is_text(self) -> bool:
        return self.name == self.name.encode(errors="ignore").decode()

    @property
    def _models(self) -> list[str]:
        return ["--base", str(self.base), *(word for e in self.experts for word in ("--expert", str(e)))]

    def pipe(self) -> Skeleton:
        """Every command that speaks of models, its lines read by another program."""
        said = ""
        for words in (
            ["plan", *self._models, "--all"],
            ["inspect", *self._models],
            ["merge", *self._models, "-o", str(self.out)],
            ["verify", str(self.out)],
            ["convert", str(self.base), str(self.written / "converted")],
            ["extract-lora", str(self.experts[0]), "--base", str(self.base), "--rank", "2", "-o",
             str(self.written / "lora")],
        ):  # fmt: skip
            said += _run(words, io.StringIO(), 0)
        check(said.replace("\n", "").isprintable(), "is no text")
        long = len(self.name) >= 100  # takes several lines of a table, and loses its beginning in a plan
        check(printable(str(self.out)) in said and self.tensor[-100:] in said, "does not show the name")
        return [] if long else [said.count("\n")]

    def terminal(self) -> Skeleton:
        for words in (["inspect", *self._models], ["merge", *self._models, "-o", str(self.out), "--overwrite"]):
            said = _run(words, _Screen(), 0)
            orders = {found for found in _ORDER.findall(said) if not found.isprintable()}
            check(not (strange := [o for o in orders if not _DRAWING.fullmatch(o)]), f"is sent {strange}")
        return []

    def errors(self) -> Skeleton:
        """One line each, of a folder that is not there and of an option that there is not."""
        for words, code in (
            (["plan", *self._models, "--expert", str(self.folder / f"no{self.name}")], 3),
            (["verify", str(self.base)], 3),
            *(() if self._is_text else [(["convert", str(self.base), str(self.folder / "y")], 2)]),
            (["merge", *self._models, f"--x{self.name}"], 2),
            (["merge", *self._models, "-o", str(self.out), "--set", f"{self.name}=1"], 2),
            (["merge", *self._models, "-o", str(self.out), "--method", f"x{self.name}"], 2),
        ):
            said = _run(words, io.StringIO(), code)
            check(said.startswith("acemerge: error: ") and said.endswith("\n"), f"is {said!r}")
            check(said[:-1].isprintable(), f"is {said!r}")
        return []

    def card(self) -> Skeleton:
        text = (self.out / "README.md").read_text("utf-8")
        check(text.replace("\n", "").isprintable(), "is no text")
        _, front, body = text.split("---\n", 2)
        return [sorted(yaml.safe_load(front)), *_markdown(body)]

    def report(self) -> Skeleton:
        page = _Page(write_report(self.out).read_text("utf-8"))
        check(self.tensor in page.text, "does not show the tensor")
        return page.tags

    def analysis(self) -> Skeleton:
        """The page and the rows of `acemerge analyse`."""
        opened = open_recipe(self._recipe(), None, RunOptions())
        found = analyse(opened, 1)
        rows = list(csv.reader(io.StringIO(as_csv(found))))
        check(not [row for row in rows if row[0].startswith(_FORMULA)], "has a formula")
        check(any(row[0].endswith(self.tensor) for row in rows), "does not show the tensor")
        return [*map(len, rows), *_markdown(markdown(found))]

    def page(self) -> Skeleton:
        """All that the browser's page shows of a listing, a look, a plan and a merge."""
        folders, progress = Folders([self.folder.parent]), lambda _: None
        listing = folders.find()
        names = [found.name for found in listing.found]
        parts = [view.listing(listing), view.roots(folders.roots), *names]
        "".join(parts).encode()  # as the browser is sent it
        wanted = [self.base, *self.experts]
        if not {folders.name(path) for path in wanted} <= set(names):
            check(not self._is_text, f"{self.name!r} cannot be picked")
            check(printable(self.name) in listing.passed_over[0], "is not said to be passed over")
            return []
        choice = Choice(folders.name(wanted[0]), [folders.name(path) for path in wanted[1:]])
        choice.yaml(folders).encode()
        seen = steps.inspect(choice, folders)(progress)
        plan = steps.plan(choice, folders)(progress)
        merged = steps.merge(choice, folders, str(self.out), True, False)(progress)
        states = [State(1, "inspect", "done", result=seen), State(1, "plan", "done", result=plan)]
        states += [State(1, "merge", "done", result=merged), State(1, "merge", "failed", error=f"{self.name}: no; x")]
        parts = [*parts[:2], *map(view.state, states)]
        "".join(parts).encode()
        return [tag for part in parts for tag in _Page(part).tags]

    def _recipe(self) -> Any:
        content = {"base": str(self.base), "experts": [str(path) for path in self.experts], "method": "ace"}
        return make_recipe(content)


class _Screen(io.StringIO):
    """What a terminal is sent."""

    def isatty(self) -> bool:
        return True


def _forget_consoles() -> None:
    cli_text.stdout.cache_clear()
    cli_text.stderr.cache_clear()


def _run(words: list[str], stream: io.StringIO, code: int) -> str:
    """What a command says on both streams; a breach where it ends otherwise."""
    _forget_consoles()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        try:
            command_line(words)
        except SystemExit as end:
            check(end.code == code, f"{words[0]} ends with {end.code}: {stream.getvalue()[-200:]!r}")
    return stream.getvalue()


class _Page(HTMLParser):
    """A page's tags with their attributes' names, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.text, self._in_script = "", False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *(name for name, _ in attributes)))
        self._in_script = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}",))
        self._in_script = False

    def handle_comment(self, data: str) -> None:
        self.tags.append(("!--",))

    def handle_data(self, data: str) -> None:
        if not self._in_script:
            self.text += data


def _markdown(text: str) -> Skeleton:
    """Blocks and spans, with the modules that its Python imports."""
    found: Skeleton = []
    for token in _MARKDOWN.parse(text):
        found += [token.type, *(child.type for child in token.children or () if child.type != "text")]
        if token.info == "python":
            found += [type(node).__name__ for node in ast.walk(ast.parse(token.content)) if isinstance(node, ast.stmt)]
    return found


if __name__ == "__main__":
    main(("shown",))
