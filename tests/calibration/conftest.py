"""What the tests of calibration share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from calibrated_family import EXPERTS, TEXTS
from task_builders import save_family, sentences, write_tasks, write_tsv


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RoBERTa classifiers, and tasks.yaml with some texts for each; tone has no labels."""
    root = save_family(tmp_path_factory.mktemp("family"), EXPERTS)
    write_tsv(root / "topic.tsv", {"s": TEXTS, "y": [i % 3 for i in range(len(TEXTS))]})
    write_tsv(root / "tone.tsv", {"s": sentences(6, seed=2)})
    topic = {"kind": "classification", "name": "topic", "data": "topic.tsv", "text": "s", "label": "y", "batch_size": 4}
    tone = {"kind": "classification", "name": "mood", "data": "tone.tsv", "text": "s", "expert": "tone"}
    write_tasks(root, topic, tone)
    return root


@pytest.fixture
def family(made: Path, tmp_path: Path) -> Path:
    """The same in a folder of its own."""
    return shutil.copytree(made, tmp_path / "family")
