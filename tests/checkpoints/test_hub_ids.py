"""Which names are ids of the Hub, and which are paths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import PlainModel, write_checkpoint
from commands import run
from hub_server import FakeHub, put

from acemerge.checkpoints.hub import HubId, hub_id, parse_id
from acemerge.recipes.recipe import load_recipe


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubId("org/name")),
        ("Org-1/na.me_2", HubId("Org-1/na.me_2")),
        ("org/name@v1.0", HubId("org/name", "v1.0")),
        ("org/name@refs/pr/3", HubId("org/name", "refs/pr/3")),
        ("org/name:task/lr1e-05", HubId("org/name", None, "task/lr1e-05")),
        ("org/name@refs/pr/3:task", HubId("org/name", "refs/pr/3", "task")),
    ],
)
def test_ids(text: str, expected: HubId) -> None:
    assert parse_id(text) == expected
    assert str(expected) == text


NOT_IDS = (
    *("name", "/org/name", "./org/name", "../name", "~/name", "org/../name", "org/name/more", "org/name@", "org/na me"),
    *("org/name:", "org/name:/a", "org/name:a//b", "org/name:../a", "org/name:a/..", "org/name:a@v1", ":a"),
    *("org/name@a..b", "org/name@/a", "org/name\n", "org/name@v\x001", "org/na--me", "org/name.git", "orgé/name"),
    *("org/" + "n" * 300, ""),
)


@pytest.mark.parametrize("text", NOT_IDS)
def test_what_is_no_id_is_a_path(text: str) -> None:
    assert parse_id(text) is None


def test_a_folder_comes_before_an_id(plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    words = put(hub, plain)
    write_checkpoint(Path("org/base"), plain.base)
    assert hub_id("org/base") is None
    assert run(capsys, "plan", *words)[0] == 0
    assert not [line for line in hub.asked if "org/base" in line]


def test_a_recipe_keeps_ids_and_finds_folders_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    write_checkpoint(folder / "org/here", {"a": torch.ones(1)})
    recipe = folder / "recipe.yaml"
    recipe.write_text("base: org/name@v1\nexperts: [org/here, {model: org/there}, ./org/name, a/b/c]\n")
    read = load_recipe(recipe, {})
    expected = ["org/name@v1", str(folder / "org/here"), "org/there", str(folder / "org/name"), str(folder / "a/b/c")]
    assert read.models == expected
