"""A page with every command and its options, from the command line's own parser."""

from __future__ import annotations

from typing import Any

import typer
from markdown_text import prose, row

from acemerge.cli.app import COMMANDS, app
from acemerge.cli.command import grouped

PATH = "command-line.md"


def command_page() -> dict[str, str]:
    """Path under docs/ -> Markdown."""
    group: Any = typer.main.get_command(app)
    examples = {command.name: command.examples for command in COMMANDS}
    lines = [
        "# Command line",
        "",
        "`acemerge COMMAND --help` says the same.",
        "",
        "## Exit codes",
        "",
        "0 done, 2 usage or recipe, 3 bad or incompatible checkpoint, 4 numerical failure or no memory, 5 could not",
        "write, 130 interrupted, 143 terminated. Every error is one line: where, what, cure.",
        "",
    ]
    for name, command in group.commands.items():
        context = typer.Context(command, info_name=f"acemerge {name}")
        usage = " ".join(command.collect_usage_pieces(context))
        lines += [f"## acemerge {name}", "", command.help, "", "```text", f"acemerge {name} {usage}", "```", ""]
        for title, records in grouped(command, context).items():
            lines += [f"| {title} | meaning |", "|---|---|"]
            lines += [*(row(f"`{names.strip()}`", prose(text)) for names, text in records), ""]
        lines += ["```sh", *examples[name], "```", ""]
    return {PATH: "\n".join(lines)}
