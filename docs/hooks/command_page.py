"""A page with every command and its options, from the command line's own parser."""

from __future__ import annotations

from typing import Any

import typer
from markdown_text import prose, row

from acemerge.cli.app import app

PATH = "command-line.md"


def command_page() -> dict[str, str]:
    """Path under docs/ -> Markdown."""
    group: Any = typer.main.get_command(app)
    lines = [
        "# Command line",
        "",
        "`acemerge COMMAND --help` says the same.",
        "",
        "## Exit codes",
        "",
        "[Exit codes](../README.md#exit-codes)",
        "",
    ]
    for name, command in group.commands.items():
        context = typer.Context(command, info_name=f"acemerge {name}")
        usage = " ".join(command.collect_usage_pieces(context))
        lines += [f"## acemerge {name}", "", command.help, "", "```text", f"acemerge {name} {usage}", "```", ""]
        lines += ["| argument or option | meaning |", "|---|---|"]
        lines += [
            row(f"`{record[0].strip()}`", prose(record[1]))
            for p in command.params
            if (record := p.get_help_record(context))
        ]
        lines += [""]
    return {PATH: "\n".join(lines)}
