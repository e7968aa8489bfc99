"""Sections of the README on the site: written once, shown where a reader of the site looks for them.

A paragraph of a page that is nothing but a link to a section of the README becomes that section. Any other link to a
section leads to the page that shows it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping

README = "README.md"
_LONE = re.compile(rf"^\[[^\]\n]+\]\((?:\.\./)+{README}#([\w-]+)\)$", re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)


class BrokenLinkError(Exception):
    """A link that leads to nothing on the site."""


def anchor(heading: str) -> str:
    """The name that GitHub and the site give to a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def sections(text: str) -> dict[str, str]:
    """The body of every section by its anchor, deeper sections in it."""
    bare = _FENCE.sub(lambda fence: re.sub(r"[^\n]", "x", fence[0]), text)  # a comment in a block is no heading
    found = [(len(match[1]), match[2], match.start(), match.end()) for match in _HEADING.finditer(bare)]
    bodies = {}
    for i, (level, title, _, end) in enumerate(found):
        after = next((start for deep, _, start, _ in found[i + 1 :] if deep <= level), len(text))
        bodies[anchor(title)] = text[end:after].strip()
    return bodies


def homes(pages: Mapping[str, str]) -> dict[str, str]:
    """Which page, by its path under docs/, shows which section of the README."""
    return {name: path for path, text in pages.items() for name in _LONE.findall(text)}


def with_readme(path: str, text: str, readme: str, home: Mapping[str, str]) -> str:
    """The page `path` with the sections that it shows in their places, and all its links to the README mended."""
    bodies = sections(readme)

    def body(match: re.Match[str]) -> str:
        if match[1] not in bodies:
            raise BrokenLinkError(f"docs/{path}: README.md has no section #{match[1]}")
        return _LINK.sub(lambda link: _from_readme(link[0], path, home), bodies[match[1]])

    return _LINK.sub(lambda link: _to_readme(link[0], path, home), _LONE.sub(body, text))


def _to_readme(target: str, path: str, home: Mapping[str, str]) -> str:
    file, _, name = target.partition("#")
    if not file.startswith("../") or posixpath.basename(file) != README:
        return target
    return _section(name, path, home)


def _from_readme(target: str, path: str, home: Mapping[str, str]) -> str:
    """A link of the README as the page `path` must write it."""
    if target.startswith("#"):
        return _section(target[1:], path, home)
    if target.startswith("docs/"):
        return posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(path) or ".")
    return target


def _section(name: str, path: str, home: Mapping[str, str]) -> str:
    if name not in home:
        raise BrokenLinkError(f"docs/{path}: no page of the site shows README.md#{name}; link to a page of docs/")
    return posixpath.relpath(home[name], posixpath.dirname(path) or ".")
