"""Every example in the README and in docs/ runs as it stands."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import write_checkpoint
from examples import LANGUAGES, PAGES, ROOT, BadExampleError, blocks, languages, run_page
from hub_server import TOKEN, FakeHub, Repository, contents
from mergekit_shelf import LLAMA, llama_tensors
from task_builders import save_family, sentences, write_tasks, write_tsv
from torch import nn

from acemerge import METHODS

RECIPE = "method: ace\nbase: ./base\nexperts: [./math, ./code, ./chat]\n"
MERGEKIT = "merge_method: ties\nbase_model: ./base\nparameters: {weight: 1, density: 0.5}\n"
MERGEKIT += "models: [{model: ./math}, {model: ./code}]\n"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has: a base, experts with heads, tasks, recipes, a model of pickles, two of 24 layers."""
    root = save_family(tmp_path_factory.mktemp("shelf"), {"math": 3, "code": 2, "chat": 2})
    shutil.copytree(root / "base", root / "other")
    (root / "old").mkdir()
    torch.save({"up.weight": torch.ones(2, 3)}, root / "old/pytorch_model.bin")
    for name in ("a", "b"):
        write_checkpoint(root / name, llama_tensors(layers=24), LLAMA | {"num_hidden_layers": 24})
    for task, classes in (("math", 3), ("code", 2), ("chat", 2)):
        labels = [i % classes for i in range(6)]
        write_tsv(root / f"{task}.tsv", {"s": sentences(6, seed=1), "y": labels})
    tasks = [
        {
            "kind": "classification",
            "name": task,
            "data": f"{task}.tsv",
            "text": "s",
            "label": "y",
            "expert": f"./{task}",
        }
        for task in ("math", "code", "chat")
    ]
    write_tasks(root, *tasks, resamples=100)
    shutil.copy(root / "tasks.yaml", root / "test.yaml")
    for name, text in {"recipe.yaml": RECIPE, "recipe.yml": MERGEKIT, "mergekit.yml": MERGEKIT}.items():
        (root / name).write_text(text)
    return root


@pytest.fixture
def desk(shelf: Path, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the shelf, entered, with the same models on a Hub; rules that a page registers are forgotten."""
    shutil.copytree(shelf, tmp_path / "desk")
    for name in ("base", "math"):
        hub.repositories[f"org/{name}"] = Repository()
        for branch in ("main", "v1.0"):
            hub.repositories[f"org/{name}"].commit(contents(shelf / name), branch)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path / "desk")
    rules = dict(METHODS)
    yield tmp_path / "desk"
    METHODS.clear()
    METHODS.update(rules)


def names() -> dict[str, Any]:
    """What the pages' Python supposes that its reader has."""
    modules = [nn.Linear(3, 2) for _ in range(3)]
    states = [{"weight": torch.randn(3, 3)} for _ in range(3)]
    return {
        **dict(zip(("base_module", "expert1", "expert2"), modules, strict=True)),
        **dict(zip(("base_dict", "dict1", "dict2"), states, strict=True)),
        "deltas": torch.randn(3, 4, 5),
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_example_runs(page: Path, desk: Path) -> None:
    run_page(blocks(page.read_text(), str(page.relative_to(ROOT))), names())


def test_examples_are_found_where_readers_see_them() -> None:
    found = list(languages(PAGES))
    assert {language for _, language in found} <= LANGUAGES.keys()
    assert sum(where.startswith("README.md") for where, _ in found) >= 5
    assert sum(language == "sh" for where, language in found if where.startswith("docs/benchmarks")) >= 8


# --- what would let an example escape ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ("```rust\nfn main() {}\n```", "nobody knows how to try a block of 'rust'"),
        ("```\nacemerge merge\n```", "nobody knows how to try a block of 'no language'"),
        ("```sh\ncurl http://example.org\n```", "nobody knows how to try 'curl'"),
        ("- in a list:\n\n  ```sh\n  curl x\n  ```", "nobody knows how to try 'curl'"),
        ("```sh\nacemerge merge --base ./nowhere --expert ./math -o out\n```", "exit code 3"),
        ("    acemerge verify ./nowhere", "exit code 3"),
        ("```python\nacemerge.merge\n```", "NameError"),
        ("```python\nprint(1)\n```\n\n```text\n2\n```", "prints '1"),
        ("```sh\nacemerge verify ./nowhere\n```\n\n```text\nfine\n```", "exit code 3"),
        ("```sh\nacemerge methods ace\n```\n\n```text\nfine\n```", 'prints "ace'),
        ("```yaml\nbase: ./base\nexprts: [./math]\n```", "exprts"),
        ("```yaml\ntasks: [{name: a, kind: clasification, data: a.tsv}]\n```", "clasification"),
        ("```sh\nmake nothing\n```", "CalledProcessError"),
        ("```sh\npip install 'acemerge[all]'\n```", "there is no extra 'all'"),
        ("```sh\n.venv/bin/python benchmarks/rules.py --agianst naive\n```", "SystemExit"),
        ("<!-- not run: serves -->\n\n```sh\nacemerge merge --bse ./base\n```", "No such option"),
        ("<!-- not run: long -->\n\n```python\nfor\n```", "SyntaxError"),
        ("<!-- not run: long -->\n\n```yaml\nbase: ./base\n```", "experts"),
        ("<!-- not run: -->\n\n```sh\nacemerge demo\n```", "a mark without a reason"),
        ("<!-- not run: of this one alone -->\n\n```python\n1/0\n```\n\n```python\n1/0\n```", "ZeroDivisionError"),
    ],
)
def test_a_wrong_example_fails(page: str, complaint: str, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadExampleError) as failure:
        run_page(blocks(page), {})
    assert complaint in str(failure.value)


def test_what_is_not_run_is_parsed(desk: Path) -> None:
    run_page(blocks("<!-- not run: long -->\n\n```sh\nacemerge merge --base a --expert b -o c\n```"), {})
    assert not (desk / "c").exists()
