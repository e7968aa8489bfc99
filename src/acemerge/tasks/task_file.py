"""TASKS.yaml: what a model is asked, checked before anything is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from acemerge.errors import UsageError, nearest
from acemerge.recipes.labels import expert_labels
from acemerge.recipes.yaml_file import KeyPath, explain, read_yaml, relative_to
from acemerge.tasks.harness_file import is_task_file

# A column by its name, or by its number in a file that has no line of names.
Column = str | Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=100)]
Count = Annotated[int, Field(ge=1)]
FILE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".txt")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Named(_Strict):
    """`expert` is the model that was fine-tuned for the task: it lends its head, and its own score is the measure."""

    name: Name
    expert: str | None = None
    head: Name | None = None

    @property
    def head_label(self) -> str:
        """The file in `heads/` that holds the task's head."""
        return self.head or (expert_labels([self.expert])[0] if self.expert else self.name)


class _Task(_Named):
    """`subset`, `split` and `revision` are those of a data set on the Hub.

    With `limit` no more than so many examples are taken, spread evenly over all.
    """

    data: str
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    limit: Count | None = None


class _Text(_Task):
    text: Column | Annotated[list[Column], Field(min_length=2, max_length=2)]
    label: Column | None = None
    pooling: Literal["mean", "cls"] | None = None
    max_length: Count | None = None
    batch_size: Count = 32

    @model_validator(mode="after")
    def _names_or_numbers(self) -> _Text:
        labelled = [] if self.label is None else [self.label]
        if len({type(column) for column in (*self.columns, *labelled)}) > 1:
            raise ValueError("columns: give all by name, or all by number where the file has no line of names")
        return self

    @property
    def columns(self) -> list[Column]:
        """The one column of text, or the two of a pair."""
        return self.text if isinstance(self.text, list) else [self.text]


class _Labelled(_Strict):
    """Classes: `labels` are their names in the order of the head's rows, `metrics` those whose mean is the score."""

    labels: Annotated[list[str], Field(min_length=2)] | None = None
    metrics: Annotated[list[Literal["accuracy", "matthews", "f1"]], Field(min_length=1)] = ["accuracy"]

    @field_validator("labels", "metrics")
    @classmethod
    def _each_once(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("every entry may stand there once")
        return value


class Classification(_Text, _Labelled):
    kind: Literal["classification"]


class Regression(_Text):
    kind: Literal["regression"]
    metrics: Annotated[list[Literal["pearson", "spearman"]], Field(min_length=1)] = ["pearson", "spearman"]


class _Seen(_Task, _Labelled):
    """Images: a folder with one folder for each class, or a data set with these two columns."""

    image: str = "image"
    label: str = "label"
    batch_size: Count = 32


class Images(_Seen):
    kind: Literal["images"]


class ZeroShot(_Seen):
    """Images against sentences about the classes, by a CLIP. `clip` lends a vision model its other half."""

    kind: Literal["zero_shot"]
    clip: str | None = None
    templates: Annotated[list[str], Field(min_length=1)] = ["a photo of a {}."]

    @field_validator("templates")
    @classmethod
    def _with_a_gap(cls, value: list[str]) -> list[str]:
        for template in value:
            if template.count("{}") != 1:
                raise ValueError("a template has one {} for the class")
        return value


class Perplexity(_Task):
    """A causal language model on running text; a window of `context` tokens moves by `stride`."""

    kind: Literal["perplexity"]
    text: Column | None = None
    context: Annotated[int, Field(ge=2)] = 1024
    stride: Count = 512
    batch_size: Count = 1

    @model_validator(mode="after")
    def _windows_touch(self) -> Perplexity:
        if self.limit is not None and self.text is None:
            raise ValueError("limit: a file of text has no examples; name the column by `text`")
        if self.stride > self.context:
            raise ValueError("stride: windows would leave tokens out; use at most `context`")
        return self


class LmEval(_Named):
    """A task of lm-evaluation-harness by its name there, or in a YAML file; `metric` and `filter` as it names them."""

    kind: Literal["lm_eval"]
    task: Annotated[str, Field(min_length=1)]
    metric: str | None = None
    filter: str | None = None
    few_shot: Annotated[int, Field(ge=0)] | None = None
    limit: Count | None = None
    max_length: Count | None = None
    batch_size: Count = 1
    chat_template: bool = False


Task = Classification | Regression | Images | ZeroShot | Perplexity  # whose examples are read here
AnyTask = Task | LmEval
KINDS: dict[str, type[BaseModel]] = {
    "classification": Classification,
    "regression": Regression,
    "images": Images,
    "zero_shot": ZeroShot,
    "perplexity": Perplexity,
    "lm_eval": LmEval,
}


class Tasks(_Strict):
    """All tasks; `resamples` and `seed` are those of the bootstrap."""

    tasks: Annotated[list[Annotated[AnyTask, Field(discriminator="kind")]], Field(min_length=1)]
    resamples: Annotated[int, Field(ge=100, le=1_000_000)] = 1000
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _names_differ(self) -> Tasks:
        names = [task.name for task in self.tasks]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"two tasks are named {twice[0]!r}")
        return self


def load_tasks(path: Path, labelled: bool = True) -> Tasks:
    """Read a task file. Relative paths in it are relative to the file; UsageError says what is wrong and the cure.

    Texts without labels are refused if `labelled`: there is nothing to score by.
    """
    content = read_yaml(path, "tasks", "`tasks:`")
    if isinstance(content.get("tasks"), list):
        content["tasks"] = [_locate(path.parent, task) for task in content["tasks"]]
    try:
        tasks = Tasks.model_validate(content)
    except ValidationError as failure:
        raise _explain(failure, path) from None
    for i, task in enumerate(tasks.tasks):
        if labelled and isinstance(task, Classification | Regression) and task.label is None:
            raise UsageError(path, f"the key 'tasks.{i}.{task.kind}.label' is missing", "add it")
    return tasks


def _locate(folder: Path, task: Any) -> Any:
    if not isinstance(task, dict):
        return task
    found = {key: relative_to(folder, task[key]) for key in ("expert", "clip") if isinstance(task.get(key), str)}
    if isinstance(task.get("data"), str):
        # `dev/a.csv` has the form of a Hub id, and is a file that may be missing.
        is_file = Path(task["data"]).suffix.lower() in FILE_SUFFIXES
        found["data"] = str(folder / task["data"]) if is_file else relative_to(folder, task["data"])
    if isinstance(task.get("task"), str) and is_task_file(task["task"]):
        found["task"] = str(folder / task["task"])
    return {**task, **found}


def _explain(failure: ValidationError, path: Path) -> UsageError:
    def owner(place: KeyPath) -> type[BaseModel]:
        return KINDS[str(place[2])] if len(place) > 2 else Tasks

    for error in failure.errors():
        if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
            place = f"{'.'.join(map(str, error['loc']))}.kind"
            if error["type"] == "union_tag_not_found":
                return UsageError(path, f"the key {place!r} is missing", f"use one of: {', '.join(KINDS)}")
            kind = str(error["input"].get("kind"))
            return UsageError(path, f"{place!r}: no such kind {kind[:60]!r}", nearest(kind, list(KINDS)))
    return explain(failure, path, owner, "list at least one", "see docs/evaluate.md")
