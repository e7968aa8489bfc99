"""The documentation site: the pages that are made of the code; and the README, which leads to the others."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import pytest
import typer
import yaml
from command_page import command_page
from examples import PROGRAMS, ROOT, blocks
from hosts import foreign
from navigation import complete
from pydantic import Field
from rule_pages import rule_page, rule_pages

import acemerge
from acemerge.cli.app import app
from acemerge.methods import Needs, make
from acemerge.recipes.recipe import make_recipe, parse_settings

# --- a page for every rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", acemerge.METHODS)
def test_a_rule_has_a_page_whose_examples_are_right(name: str) -> None:
    rule = acemerge.METHODS[name]
    page = rule_page(rule)
    recipe, command = (block.text for block in blocks(page) if block.language in ("yaml", "sh"))
    assert make_recipe(yaml.safe_load(recipe)).build_method() == rule()
    words = command.replace("\\\n", " ").split()
    PROGRAMS["acemerge"](words, False)
    settings = [word for before, word in pairwise(words) if before == "--set"]
    assert make(name, parse_settings(settings)) == rule()
    formulas = [part for part in (inspect.getdoc(rule) or "").split("\n\n") if part.startswith("    ")]
    assert all(formula in page for formula in formulas)


def test_every_rule_is_listed() -> None:
    pages = rule_pages()
    assert list(pages) == ["rules/index.md", *(f"rules/{name}.md" for name in acemerge.METHODS)]
    assert all(f"[`{name}`]({name}.md)" in pages["rules/index.md"] for name in acemerge.METHODS)


@dataclass(frozen=True)
class Added:
    """What `a` does, if |x| < 1.

        M = a * b

    Source: arXiv
    1234.56789, not `arXiv 1234.56789`.
    """

    name: ClassVar[str] = "added"
    source: ClassVar[str] = "arXiv 1234.56789"
    needs: ClassVar[Needs] = Needs(matrix=True, most_experts=2)

    a: Annotated[float, Field(gt=0, le=1, description="how *much*")] = 0.5
    way: Annotated[Literal["x", "y"], Field(description="which way")] = "x"
    scale: Annotated[float, Field()] = 1.0


def test_a_new_rule_gets_its_page_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(acemerge.METHODS, "added", Added)
    page = rule_pages()["rules/added.md"]
    assert "\nWhat `a` does, if \\|x\\| \\< 1.\n\n    M = a * b\n\n" in page
    assert "[arXiv 1234.56789](https://arxiv.org/abs/1234.56789), not `arXiv 1234.56789`" in page
    assert "| `a` | `0.5` | above 0, 1 at most | how \\*much\\* |" in page
    assert "| `way` | `x` | `x`, `y` | which way |" in page
    assert "- At most 2 experts." in page
    assert "--method added --set a=0.5 --set way=x \\\n" in page
    assert "added.md" in rule_pages()["rules/index.md"]


# --- the command line and the public names ---------------------------------------------------------------------


def test_every_command_and_option_is_on_the_page() -> None:
    page = command_page()["command-line.md"]
    for name, command in typer.main.get_command(app).commands.items():
        part = page.split(f"## acemerge {name}\n")[1].split("\n## ")[0]
        for parameter in command.params:
            assert parameter.param_type_name == "argument" or parameter.opts[0] in part, (name, parameter.name)


def test_every_public_name_is_in_the_reference() -> None:
    shown = re.findall(r"^::: acemerge\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(acemerge.__all__)


# --- the README ------------------------------------------------------------------------------------------------


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    links = re.findall(r"\]\(([^)#]+)", text)
    assert {"docs/report.png", "docs/quick-start.md", "docs/lora.md"} <= set(links)
    assert [link for link in links if not link.startswith("https://") and not (ROOT / link).is_file()] == []


def test_the_table_of_rules_is_the_same_at_home() -> None:
    readme, home = ((ROOT / page).read_text() for page in ("README.md", "docs/index.md"))
    table = re.search(r"^\| I have .*?\n\n", readme, re.MULTILINE | re.DOTALL)
    assert table is not None
    assert table[0].replace("](docs/", "](") in home
    assert table[0].count("\n") == 2 + 5 + 1


# --- the whole -------------------------------------------------------------------------------------------------


def test_pages_that_are_not_listed_come_last_and_rules_in_their_place() -> None:
    nav = [{"Home": "index.md"}, {"Guides": ["a.md", {"B": "b.md"}]}, {"Rules": "rules/index.md"}]
    rules, pages = ["rules/index.md", "rules/ace.md"], ["index.md", "a.md", "b.md"]
    listed = [*nav[:2], {"Rules": rules}]
    assert complete(nav, rules, pages) == listed
    assert complete(nav, rules, [*pages, "new.md"]) == [*listed, {"More": ["new.md"]}]


@pytest.mark.parametrize(
    ("html", "found"),
    [
        ('<script src="https://cdn.example/x.js"></script>', ["https://cdn.example/x.js"]),
        ('<link rel="stylesheet" href="//fonts.example/a.css">', ["//fonts.example/a.css"]),
        ('<p><img src="http://example.org/a.png"></p>', ["http://example.org/a.png"]),
        ('<a href="https://arxiv.org">a link is followed by people alone</a><script src="x.js"></script>', []),
    ],
)
def test_what_comes_from_other_hosts_is_seen(html: str, found: list[str]) -> None:
    assert foreign(html) == found
