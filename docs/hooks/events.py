"""What the site is beside the files of docs/: pages that are made of the code, and checks of the whole.

MkDocs calls these functions by their names while it builds; see `hooks` in mkdocs.yml.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from command_page import command_page
from hosts import foreign
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from navigation import complete
from readme_parts import README, BrokenLinkError, homes, with_readme
from rule_pages import rule_pages


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made, and give every page its place in the navigation."""
    rules = rule_pages()
    for path, text in (rules | command_page()).items():
        files.append(File.generated(config, path, content=text))
    pages = {file.src_uri: file.content_string for file in files.documentation_pages()}
    config.extra["readme"] = Path(config.config_file_path).with_name(README).read_text()
    config.extra["homes"] = homes(pages)
    config.nav = complete(config.nav, list(rules), [path for path in pages if path not in rules])
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Put the README's sections into their pages."""
    try:
        return with_readme(page.file.src_uri, markdown, config.extra["readme"], config.extra["homes"])
    except BrokenLinkError as failure:
        raise PluginError(str(failure)) from None


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Nothing on a page may come from another host: neither scripts, nor styles, nor pictures."""
    if found := foreign(output):
        raise PluginError(f"{page.file.src_uri}: loads {', '.join(found)}; the site must do without")
    return output
