"""What the site is beside the files of docs/: pages that are made of the code, and checks of the whole.

MkDocs calls these functions by their names while it builds; see `hooks` in mkdocs.yml.
"""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from command_page import command_page
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from readme_parts import README, BrokenLinkError, homes, with_readme
from rule_pages import INDEX, rule_pages

OTHERS = "More"  # the section of pages that mkdocs.yml does not name
_readme = {"text": "", "homes": {}}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made, and give every page its place in the navigation."""
    rules = rule_pages()
    for path, text in (rules | command_page()).items():
        files.append(File.generated(config, path, content=text))
    pages = {file.src_uri: file.content_string for file in files.documentation_pages()}
    _readme["text"] = Path(config.config_file_path).with_name(README).read_text()
    _readme["homes"] = homes(pages)
    config.nav = complete(config.nav, list(rules), [path for path in pages if path not in rules])
    return files


def complete(nav: list[Any], rules: list[str], pages: list[str]) -> list[Any]:
    """The navigation with the rules in the place of their list, and what it does not name at its end."""
    filled = [{title: rules if entry == INDEX else entry for title, entry in item.items()} for item in nav]
    named = set(_paths(filled))
    rest = sorted(path for path in pages if path not in named)
    return [*filled, {OTHERS: rest}] if rest else filled


def _paths(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [path for entry in entries for path in _paths(entry)]


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Put the README's sections into their pages."""
    try:
        return with_readme(page.file.src_uri, markdown, _readme["text"], _readme["homes"])
    except BrokenLinkError as failure:
        raise PluginError(str(failure)) from None


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Nothing on a page may come from another host: neither scripts, nor styles, nor pictures."""
    found = Loads()
    found.feed(output)
    if found.foreign:
        raise PluginError(f"{page.file.src_uri}: loads {', '.join(found.foreign)}; the site must do without")
    return output


class Loads(HTMLParser):
    """Collects in `foreign` what a page makes the browser fetch from other hosts."""

    def __init__(self) -> None:
        super().__init__()
        self.foreign: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        fetched = given.get("href", "") if tag in ("link", "use", "image") else given.get("src", "")
        inside = tag == "link" and given.get("rel") in ("canonical", "prev", "next")
        if fetched.startswith(("http:", "https:", "//")) and not inside:
            self.foreign.append(fetched)
