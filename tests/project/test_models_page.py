"""The page of the types of models: every one that is tried has a row, and a row is what trying gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import FAMILIES
from model_types import PUBLISHED, try_out

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
ROWS = {
    cells[0]: tuple(cells[1:])
    for line in PAGE.read_text().splitlines()
    if line.startswith("| ") and len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 5
}


def test_every_type_that_is_tried_has_a_row() -> None:
    assert ROWS.keys() - {"architecture"} == PUBLISHED.keys() | {name for name, _, _ in FAMILIES.values()}
    assert all(row[0] == "yes" for name, row in ROWS.items() if name in PUBLISHED)


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "MixtralForCausalLM", "ViTForImageClassification"])
def test_a_row_is_what_trying_gives(architecture: str, tmp_path: Path) -> None:
    assert tuple(try_out(architecture, tmp_path)) == ROWS[architecture]
