"""Every example in the README runs as it stands."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from acemerge.cli import main
from builders import PlainModel

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.fixture
def shelf(plain: PlainModel, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `base`, `math`, `code` and `chat`, and `old` with pickled weights, entered."""
    _, experts = plain.save()
    (plain.root / "old").mkdir()
    torch.save(plain.base, plain.root / "old/pytorch_model.bin")
    for folder, name in zip(experts, ("math", "code", "chat"), strict=True):
        shutil.move(folder, plain.root / name)
    monkeypatch.chdir(plain.root)
    return plain.root


def test_the_shell_examples(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [line for block in blocks("shell") for line in block.splitlines() if line.startswith("acemerge")]
    assert len(commands) == 10
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main(shlex.split(command, comments=True)[1:])
        assert stop.value.code == 0, capsys.readouterr().err


def test_the_recipes(shelf: Path) -> None:
    recipes = blocks("yaml")
    assert len(recipes) == 2  # ours, and one of mergekit
    for i, recipe in enumerate(recipes):
        (shelf / "recipe.yaml").write_text(recipe)
        with pytest.raises(SystemExit) as stop:
            main(["merge", "recipe.yaml", "-o", f"merged{i}", "--quiet"])
        assert stop.value.code == 0


def test_the_python_example(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("python")
    modules = [nn.Linear(3, 2) for _ in range(3)]
    states = [{"weight": torch.randn(3, 3)} for _ in range(3)]
    names = {"base_module": modules[0], "expert1": modules[1], "expert2": modules[2]}
    names |= {"base_dict": states[0], "dict1": states[1], "dict2": states[2], "deltas": torch.randn(3, 4, 5)}
    exec(compile(code, "README.md", "exec"), names)
    assert "layers.0.up.weight ace" in capsys.readouterr().out
