"""The files that an analysis leaves: JSON, a row for each layer, a page of tables, pictures."""

from __future__ import annotations

import json
from pathlib import Path

from acemerge.checkpoints import files
from acemerge.errors import UsageError
from acemerge.inspection.analysis import Analysis
from acemerge.inspection.analysis_pictures import pictures
from acemerge.inspection.analysis_tables import as_csv, as_json, markdown
from acemerge.output.manifest import versions
from acemerge.output.writer import write_file

JSON, ROWS, PAGE = "analysis.json", "layers.csv", "analysis.md"


def check_free(out: Path, overwrite: bool) -> None:
    """UsageError where an earlier analysis would be replaced unasked."""
    if not overwrite and files.kind(out / JSON) != "nothing":
        raise UsageError(out, "holds an analysis", "choose another folder or add --overwrite")


def write_analysis(analysis: Analysis, out: Path) -> list[str]:
    """Write the files, the JSON last; the return says which, and why there are no pictures where there are none."""
    contents = {ROWS: as_csv(analysis).encode(), PAGE: markdown(analysis).encode()}
    missing = []
    try:
        contents |= pictures(analysis)
    except UsageError as failure:  # it is no reason to lose the numbers
        missing = [f"no pictures: {failure.what}; {failure.cure}"]
    content = as_json(analysis) | {"versions": versions()}
    contents[JSON] = json.dumps(content, allow_nan=False).encode() + b"\n"
    for name, data in contents.items():
        write_file(out / name, data)
    return [*missing, f"{out}: {', '.join(sorted(contents))}"]
