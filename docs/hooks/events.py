"""What the site is beside the files of docs/: pages that are made of the code, and checks of the whole.

MkDocs calls these functions by their names while it builds; see `hooks` in mkdocs.yml.
"""

from __future__ import annotations

from typing import Any

from command_page import command_page
from hosts import foreign
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from navigation import complete
from rule_pages import rule_pages


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made, and give every page its place in the navigation."""
    rules = rule_pages()
    for path, text in (rules | command_page()).items():
        files.append(File.generated(config, path, content=text))
    pages = [file.src_uri for file in files.documentation_pages()]
    config.nav = complete(config.nav, list(rules), [path for path in pages if path not in rules])
    return files


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Nothing on a page may come from another host: neither scripts, nor styles, nor pictures."""
    if found := foreign(output):
        raise PluginError(f"{page.file.src_uri}: loads {', '.join(found)}; the site must do without")
    return output
