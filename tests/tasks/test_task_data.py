"""Task files and the data that they name."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pytest
from hub_server import FakeHub, Repository

from acemerge.errors import UsageError
from acemerge.tasks.data import DataSource, as_classes, as_numbers, as_texts, read_columns
from acemerge.tasks.task_file import KINDS, load_tasks

GOOD = "kind: classification, name: a, data: d.tsv, text: s, label: y"

WRONG = {
    "not a table": ("- a", "not a table"),
    "no tasks": ("tasks: []", "list at least one"),
    "unknown key": ("taks: []", "unknown key 'taks'; did you mean `tasks`"),
    "unknown key of a task": (f"tasks: [{{{GOOD}, poling: cls}}]", "did you mean `pooling`"),
    "unknown kind": ("tasks: [{name: a, kind: clasification}]", "tasks.0.kind.*did you mean `classification`"),
    "no kind": ("tasks: [{name: a}]", "'tasks.0.kind' is missing; use one of: classification"),
    "missing key": ("tasks: [{kind: images, name: a}]", "'tasks.0.images.data' is missing"),
    "unknown metric": (f"tasks: [{{{GOOD}, metrics: [acc]}}]", "metrics"),
    "metric of another kind": (f"tasks: [{{{GOOD}, metrics: [pearson]}}]", "metrics"),
    "a label twice": (f"tasks: [{{{GOOD}, labels: [x, x]}}]", "an entry stands there twice; leave one out"),
    "two of one name": (f"tasks: [{{{GOOD}}}, {{{GOOD}}}]", "two tasks are named 'a'"),
    "a name that is a path": ("tasks: [{kind: perplexity, name: ../x, data: d.txt}]", "name"),
    "a head that is a path": (f"tasks: [{{{GOOD}, head: ../x}}]", "head"),
    "names and numbers": ("tasks: [{kind: classification, name: a, data: d, text: s, label: 1}]", "all by name, or"),
    "three texts": ("tasks: [{kind: regression, name: a, data: d, text: [a, b, c], label: y}]", "text"),
    "part of a text": ("tasks: [{kind: perplexity, name: a, data: d.txt, limit: 5}]", "name the column by `text`"),
    "windows apart": ("tasks: [{kind: perplexity, name: a, data: d, context: 8, stride: 9}]", "leave tokens out"),
    "no gap": ("tasks: [{kind: zero_shot, name: a, data: d, templates: [a photo]}]", "write {} there, once"),
    "code": ("tasks: !!python/object/apply:os.system ['true']", "not valid YAML"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_task_file(case: str, tmp_path: Path) -> None:
    text, message = WRONG[case]
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        load_tasks(tmp_path / "t.yaml")
    assert caught.value.where == str(tmp_path / "t.yaml")


def test_paths_are_relative_to_the_file_and_hub_ids_stay(tmp_path: Path) -> None:
    tasks = "{kind: perplexity, name: p, data: org/data, head: h}, {kind: perplexity, name: q, data: not/there.txt}"
    (tmp_path / "t.yaml").write_text(f"tasks: [{{{GOOD}, expert: org/expert}}, {tasks}]")
    first, second, third = load_tasks(tmp_path / "t.yaml").tasks
    assert third.data == str(tmp_path / "not/there.txt")
    assert (first.data, first.expert, first.head_label) == (str(tmp_path / "d.tsv"), "org/expert", "expert")
    assert (second.data, second.head_label) == ("org/data", "h")


def test_the_documented_tasks_are_valid(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/evaluate.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "t.yaml").write_text(example)
    assert {task.kind for task in load_tasks(tmp_path / "t.yaml").tasks} == set(KINDS)


def test_a_part_of_the_examples_is_spread_over_all(tmp_path: Path) -> None:
    """Test sets may be sorted by class."""
    (tmp_path / "d.tsv").write_text("s\ty\n" + "".join(f"{i}\t{i // 4}\n" for i in range(11)))
    for limit, expected in ((3, [0, 3, 7]), (10, list(range(10))), (11, list(range(11))), (99, list(range(11)))):
        texts, classes = read_columns(DataSource(str(tmp_path / "d.tsv"), limit=limit), ("s", "y"))
        assert texts == [str(i) for i in expected]
        assert classes == [str(i // 4) for i in expected]
    pytest.importorskip("datasets").Dataset.from_dict({"y": list(range(11))}).to_parquet(tmp_path / "d.parquet")
    (values,) = read_columns(DataSource(str(tmp_path / "d.parquet"), limit=3), ("y",))
    assert list(values) == [0, 3, 7]


FILES: dict[str, tuple[str, Sequence[Any]]] = {
    "named.csv": ('s,y\n"a, b",1\n"two\nlines",0\n', ("s", "y")),
    "glue.tsv": ('s\ty\na, b\t1\n"bare\t0\n', ("s", "y")),
    "numbered.tsv": ("x\t1\ta, b\nx\t0\tplain\n", (2, 1)),
    "rows.jsonl": ('{"s": "a, b", "y": 1}\n\n{"s": "snow ☃", "y": 0}\n', ("s", "y")),
}
SECOND = {"named.csv": "two\nlines", "glue.tsv": '"bare', "numbered.tsv": "plain", "rows.jsonl": "snow ☃"}


@pytest.mark.parametrize("name", FILES)
def test_columns_of_a_file(name: str, tmp_path: Path) -> None:
    text, wanted = FILES[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    texts, labels = read_columns(DataSource(str(tmp_path / name)), wanted)
    assert list(texts) == ["a, b", SECOND[name]]
    assert as_classes(labels, None, name).tolist() == [1, 0]


BROKEN = {
    "no such column": ("a.csv", b"text,y\na,1\n", "no column 's'; use one of: text, y"),
    "short row": ("a.tsv", b"s\ty\na\t1\nb\n", "example 2 has nothing in column 'y'; mend the row"),
    "short first row": ("a.tsv", b"s\ty\na\nb\t1\n", "example 1 has nothing in column 'y'; mend the row"),
    "null": ("a.jsonl", b'{"s": null, "y": 1}\n', "example 1 has nothing in column 's'; mend the row"),
    "plain text": ("a.txt", b"a b\n", "leave `text:` out for perplexity"),
    "no parquet": ("a.parquet", b"s,y\n", "cannot be read .*; mend the file"),
    "no rows": ("a.csv", b"s,y\n", "has no examples"),
    "open quote": ("a.csv", b's,y\n"a,1\n', "line 2: unexpected end"),
    "not UTF-8": ("a.csv", b"s,y\n\xff,1\n", "is not UTF-8"),
    "not JSON": ("a.jsonl", b'{"s": "a", "y": 1}\n[1]\n', "line 2 is no JSON object"),
    "unknown kind": ("a.py", b"import os\n", "is of no kind that is read"),
    "not there": ("b.csv", None, "no such file"),
    "not there, in a folder": ("dev/b.parquet", None, "no such file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file(case: str, tmp_path: Path) -> None:
    name, content, message = BROKEN[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_columns(DataSource(str(tmp_path / name)), ["s", "y"])


def test_labels_by_name_and_number() -> None:
    assert as_classes(["no", "yes", "no"], ["no", "yes"], "x").tolist() == [0, 1, 0]
    assert as_classes(["1", "0"], ["0", "1"], "x").tolist() == [1, 0]
    assert as_classes(["2", 1, 0.0], None, "x").tolist() == [2, 1, 0]
    for values, labels, message in (
        (["no", "yess"], ["no", "yes"], "example 2: 'yess' is no class; complete `labels:`.*did you mean `yes`"),
        (["no"], None, "list the classes in `labels:`"),
        (["maybe"], ["no", "yes"], "'maybe' is no class; complete `labels:`, or mend the data: use one of: no, yes"),
        ([0.5], None, "'0.5' is no class"),
        ([0, -1], None, "example 2 has the label -1; a hidden label"),
    ):
        with pytest.raises(UsageError, match=message):
            as_classes(values, labels, "x")
    # Names that the head has are taken where they are the data's; others, as LABEL_0, help nobody.
    assert as_classes(["yes", "no"], None, "x", ["no", "yes"]).tolist() == [1, 0]
    with pytest.raises(UsageError, match="'no' is no class; list the classes in `labels:`"):
        as_classes(["no"], None, "x", ["LABEL_0", "LABEL_1"])
    with pytest.raises(UsageError, match="example 2: 'nan' is no number"):
        as_numbers(["1.5", "nan"], "x")
    with pytest.raises(UsageError, match="example 1: '3' is no text"):
        as_texts([3], "x")


def test_parquet_files_through_datasets(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"s": ["a", "b"], "y": [1, 0]})
    (tmp_path / "set").mkdir()
    table.to_parquet(tmp_path / "set" / "part.parquet")
    for path in (tmp_path / "set", tmp_path / "set" / "part.parquet"):
        texts, labels = read_columns(DataSource(str(path)), ["s", "y"])
        assert (list(texts), list(labels)) == (["a", "b"], [1, 0])
    with pytest.raises(UsageError, match="no column 'x'"):
        read_columns(DataSource(str(tmp_path / "set")), ["x"])
    with pytest.raises(UsageError, match=r"no test-\*.parquet files; it has part.parquet: name the split .* or leave"):
        read_columns(DataSource(str(tmp_path / "set"), split="test"), ["s"])
    table.select([]).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(UsageError, match="has no examples; name a file with rows"):
        read_columns(DataSource(str(tmp_path / "empty.parquet")), ["s"])
    with pytest.raises(UsageError, match="its split is not named"):
        read_columns(DataSource("org/name"), ["s"])


def test_a_data_sets_script_is_never_run(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for split in (None, "test"):
        with pytest.raises(UsageError, match="is a folder without parquet files"):
            read_columns(DataSource(str(folder), split=split), ["s"])
    assert not (tmp_path / "ran").exists()


class _Datasets(ModuleType):
    """Stands for `datasets`: one table, whose builder has files of these names; keeps what it was asked for."""

    def __init__(self, files: Sequence[str] = ("hf://datasets/org/name@c/data/test-0.parquet",)) -> None:
        super().__init__("datasets")
        self.__version__ = "4.0.0"
        self.config = SimpleNamespace(HF_HUB_OFFLINE=False, data_files={"test": list(files)})
        self.asked: list[Any] = []

    def disable_progress_bars(self) -> None:
        pass

    def load_dataset_builder(self, repo: str, subset: str | None, revision: str | None) -> Any:
        self.asked.append((repo, subset, revision, self.config.HF_HUB_OFFLINE))
        return self

    def download_and_prepare(self) -> None:
        self.asked.append("read")

    def as_dataset(self, split: str) -> Any:
        self.asked.append(split)
        return self

    def with_format(self, name: str) -> Any:
        assert name == "arrow"  # as it is stored
        return self

    def __getitem__(self, rows: slice) -> Any:
        return pyarrow.table({"s": ["a"], "y": [1]})


def _data_set(hub: FakeHub, **files: str) -> str:
    """A data set org/name with these texts in it, README for README.md; its commit."""
    names = {"README": "README.md", "yaml": ".huggingface.yaml"}
    hub.repositories["datasets/org/name"] = Repository()
    return hub.repositories["datasets/org/name"].commit(
        {"data/test-0.parquet": b""} | {names[name]: text.encode() for name, text in files.items()}
    )


CARD = "---\nlicense: mit\nconfigs:\n- config_name: default\n  {}\n---\n# A data set\n"


@pytest.mark.parametrize(
    "own",
    ["data_files: data/*.parquet", "data_files: [{split: test, path: [data/test-*, data/..x]}]", "data_dir: data"],
)
def test_a_data_set_on_the_hub_is_asked_for_by_subset_split_and_commit(
    own: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = _Datasets()
    monkeypatch.setitem(sys.modules, "datasets", module)
    commit = _data_set(hub, README=CARD.format(own))
    found = read_columns(DataSource("org/name@main", "cola", "validation"), ["y", "s"])
    assert [list(column) for column in found] == [[1], ["a"]]
    read_columns(DataSource("org/name", None, "test", commit), ["s"])
    assert module.asked == [
        *(("org/name", "cola", commit, False), "read", "validation"),
        *(("org/name", None, commit, False), "read", "test"),
    ]


ELSEWHERE = (
    "/etc/passwd",
    "../x",
    "data/../../x",
    "~/x",
    "file:///x",
    "http://127.0.0.1:9/x",
    "zip://x::/x",
    "s3://b/x",
)


@pytest.mark.parametrize("place", ["README", "yaml", "lists", "data_dir", "builder"])
@pytest.mark.parametrize("path", ELSEWHERE)
def test_a_card_leads_nowhere_else(place: str, path: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _Datasets([path] if place == "builder" else [])
    monkeypatch.setitem(sys.modules, "datasets", module)
    cards = {
        "README": {"README": "\ufeff\n" + CARD.format(f"data_files: {path!r}").replace("\n", "\r\n")},
        "yaml": {"README": "no card", "yaml": f"configs: [{{config_name: a, data_files: [{path!r}]}}]"},
        "lists": {"README": CARD.format(f"data_files: [{{split: test, path: [a, {path!r}]}}]")},
        "data_dir": {"README": CARD.format(f"data_dir: {path!r}")},
        "builder": {},
    }
    _data_set(hub, **cards[place])
    with pytest.raises(UsageError, match="which is not in its repository"):
        read_columns(DataSource("org/name", None, "test"), ["s"])
    assert "read" not in module.asked
    assert bool(module.asked) == (place == "builder")


def test_a_card_that_cannot_be_read_is_not_followed(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _Datasets()
    monkeypatch.setitem(sys.modules, "datasets", module)
    _data_set(hub, README=CARD.format("data_files: !!python/name:os.system x"))
    with pytest.raises(UsageError, match=r"README.md: cannot be read"):
        read_columns(DataSource("org/name", None, "test"), ["s"])
    assert not module.asked


def test_without_the_hub_what_was_loaded_before_is_taken(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _Datasets([])
    monkeypatch.setitem(sys.modules, "datasets", module)
    hub.refuse["datasets"] = 500
    read_columns(DataSource("org/name", None, "test"), ["s"])
    assert module.asked[0] == ("org/name", None, None, True)
    assert not module.config.HF_HUB_OFFLINE
    monkeypatch.setattr(module, "load_dataset_builder", None)
    with pytest.raises(UsageError, match=r"org/name: the Hub cannot be reached.*; try again with the network"):
        read_columns(DataSource("org/name", None, "test"), ["s"])


def test_without_or_with_an_old_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"datasets is not installed.*acemerge\[eval\]"):
        read_columns(DataSource("org/name", split="test"), ["s"])
    old = type(sys)("datasets")
    old.__version__ = "3.6.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", old)
    with pytest.raises(UsageError, match="may run scripts"):
        read_columns(DataSource("org/name", split="test"), ["s"])


def test_numbers_are_wide() -> None:
    assert as_numbers(["1", 2, 0.1], "x").dtype == np.float64
