"""A task for lm-evaluation-harness in a YAML file: data alone, checked before the harness sees it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from acemerge.errors import UsageError, nearest
from acemerge.recipes.yaml_file import read_yaml

# What the harness runs is none of these: functions, classes, other files, metrics that are fetched.
_KEYS = (
    "task", "dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split", "test_split",
    "fewshot_split", "output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "description",
    "target_delimiter", "fewshot_delimiter", "num_fewshot", "metric_list", "generation_kwargs", "metadata",
)  # fmt: skip
_OF_METRICS = ("metric", "aggregation", "higher_is_better", "ignore_case", "ignore_punctuation", "ignore_numbers")
_READERS = ("json", "csv", "parquet")
# The harness renders templates by Jinja, which is a programming language: only columns by their names are let through.
_GAP = re.compile(r"\{\{\s*\w+\s*\}\}")


def is_task_file(name: str) -> bool:
    """Whether a task is a file and no name of the harness's."""
    return name.endswith((".yaml", ".yml"))


def read_task(path: Path) -> dict[str, Any]:
    """The task of a file, its data files found relative to it. UsageError for what is not data."""
    content = read_yaml(path, "harness's task", "`task:`")
    for key in content:
        if key not in _KEYS:
            raise UsageError(path, f"the key {key!r} is not read here", nearest(key, list(_KEYS)))
    if not isinstance(content.get("task"), str):
        raise UsageError(path, "the key 'task' is missing or no name", "add it")
    _check_metrics(content.get("metric_list"), path)
    for place, text in _texts(content):
        if "{" in _GAP.sub("", text):
            what = f"{place!r} holds more than columns in {{{{ }}}}"
            raise UsageError(path, what, "templates are programs: prepare the text in the data")
    return content | {"dataset_kwargs": _located(content, path)}


def _check_metrics(metrics: Any, path: Path) -> None:
    if metrics is None:
        return
    if not isinstance(metrics, list) or not all(isinstance(metric, Mapping) for metric in metrics):
        raise UsageError(path, "'metric_list' is no list of metrics", "write `metric_list: [{metric: acc}]`")
    for key in (key for metric in metrics for key in metric):
        if key not in _OF_METRICS:
            raise UsageError(
                path, f"the key {key!r} of a metric is not read here", nearest(str(key), list(_OF_METRICS))
            )


def _texts(value: Any, place: str = "") -> list[tuple[str, str]]:
    """Every text in a value, with its place."""
    if isinstance(value, Mapping):
        return [found for key, part in value.items() for found in _texts(part, f"{place}.{key}".lstrip("."))]
    if isinstance(value, list):
        return [found for i, part in enumerate(value) for found in _texts(part, f"{place}.{i}")]
    return [(place, value)] if isinstance(value, str) else []


def _located(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What `datasets` is given: files by split, relative to the task's own, or nothing for a data set on the Hub."""
    given = content.get("dataset_kwargs") or {}
    if not isinstance(given, Mapping) or given.keys() - {"data_files"}:
        raise UsageError(path, "'dataset_kwargs' holds more than `data_files`", "leave the rest out")
    if content.get("dataset_path") not in _READERS:
        if given:
            cure = f"write `dataset_path:` as one of {', '.join(_READERS)}, or leave `data_files` out"
            raise UsageError(path, "'data_files' are of a data set on the Hub", cure)
        return {}
    splits = given.get("data_files")
    if not isinstance(splits, Mapping) or not all(isinstance(file, str) for file in splits.values()):
        raise UsageError(path, "'dataset_kwargs.data_files' is no table", "write `data_files: {test: test.jsonl}`")
    return {"data_files": {split: str(path.parent / file) for split, file in splits.items()}}
