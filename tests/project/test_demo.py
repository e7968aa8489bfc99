"""The demo, shortened: the same path with fewer epochs."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from acemerge import demo
from acemerge.errors import UsageError
from acemerge.output.verify import verify


def test_the_demo_trains_merges_and_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = demo.train
    monkeypatch.setattr(demo, "train", lambda *args, epochs, **kw: real(*args, epochs=max(1, epochs // 25), **kw))
    monkeypatch.setattr(demo, "RULES", demo.RULES[:1] + demo.RULES[2:3])
    printed = io.StringIO()
    demo.run_demo(tmp_path / "demo", Console(file=printed, width=160))
    text = printed.getvalue()
    assert all(task.name in text for task in demo.TASKS)
    assert all(row in text for row in ("each expert, alone", "base", "average", "ace"))
    manifest = verify(tmp_path / "demo" / "merged-ace")
    assert set(manifest["heads"]) == {task.name for task in demo.TASKS}
    assert manifest["roles"] == "the architecture ViTForImageClassification"


def test_the_demo_leaves_a_strange_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("keep")
    with pytest.raises(UsageError, match="is not empty"):
        demo.run_demo(tmp_path, Console(file=io.StringIO()))
