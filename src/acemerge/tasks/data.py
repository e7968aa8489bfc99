"""Examples from files and data sets, as columns of values. Nothing that is read is ever run."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from acemerge.checkpoints import files
from acemerge.checkpoints.hub import hub_id, in_words
from acemerge.checkpoints.links import contained
from acemerge.errors import AcemergeError, CheckpointError, UsageError, nearest
from acemerge.tasks import hub_data
from acemerge.tasks.task_file import FILE_SUFFIXES, Column

_MAX_FILE = 2 << 30
_NAMED = 3  # files of a folder, of any number
Row = Mapping[Column, Any]


@dataclass(frozen=True)
class DataSource:
    """A file, or a data set by its Hub id or folder, with what `datasets` needs to know of it.

    With `limit` no more than so many of its examples, spread evenly over all.
    """

    data: str
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    limit: int | None = None

    def chosen(self, count: int) -> Sequence[int]:
        """The examples that are taken, of so many: test sets may be sorted by class."""
        if self.limit is None or self.limit >= count:
            return range(count)
        return [i * count // self.limit for i in range(self.limit)]


def read_columns(source: DataSource, wanted: Sequence[Column]) -> list[Sequence[Any]]:
    """The wanted columns, in that order. UsageError names the file, the row or the column that is wrong."""
    path = Path(source.data)
    read = _READERS.get(path.suffix.lower())
    if read is None:
        return _from_datasets(source, wanted)
    rows = list(read(path, wanted))
    if not rows:
        raise UsageError(path, "has no examples", "name a file with rows")
    columns: list[Sequence[Any]] = []
    for column in wanted:
        if not any(column in row for row in rows):
            raise UsageError(path, f"has no column {column!r}", nearest(str(column), list(map(str, rows[0]))))
        for i, row in enumerate(rows, 1):
            if row.get(column) is None:
                raise UsageError(path, f"example {i} has nothing in column {column!r}", "mend the row")
        columns.append([rows[i][column] for i in source.chosen(len(rows))])
    return columns


def read_text(path: Path) -> str:
    try:
        return files.read_small(path, _MAX_FILE).decode("utf-8-sig")
    except CheckpointError as failure:
        raise UsageError(path, failure.what, "name a file with the task's data") from None
    except UnicodeDecodeError:
        raise UsageError(path, "is not UTF-8", "save it as UTF-8") from None


def _delimited(delimiter: str, quoting: Literal[0, 3]) -> Callable[[Path, Sequence[Column]], Iterator[Row]]:
    def read(path: Path, wanted: Sequence[Column]) -> Iterator[Row]:
        text = read_text(path)
        csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))  # it is the whole process's
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
        try:
            # Columns by number: a file without a line of names, as GLUE's CoLA.
            names = None if all(isinstance(column, int) for column in wanted) else next(lines, [])
            for cells in lines:
                if cells:
                    yield dict(zip(names if names is not None else range(len(cells)), cells, strict=False))
        except csv.Error as failure:
            raise UsageError(path, f"line {lines.line_num}: {failure}", "mend the line") from None

    return read


def _json_lines(path: Path, wanted: Sequence[Column]) -> Iterator[Row]:
    for i, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UsageError(path, f"line {i} is no JSON object", "mend the line")
        yield row


# GLUE's TSV files hold bare quotation marks.
_READERS: dict[str, Callable[[Path, Sequence[Column]], Iterator[Row]]] = {
    ".csv": _delimited(",", csv.QUOTE_MINIMAL),
    ".tsv": _delimited("\t", csv.QUOTE_NONE),
    ".jsonl": _json_lines,
}


def _from_datasets(source: DataSource, wanted: Sequence[Column]) -> list[Sequence[Any]]:
    """Columns of a data set on the Hub, or of parquet files here; loading scripts are never run.

    They are taken as they are stored: `datasets` would open whatever path or address a value names, where the file's
    own metadata calls its column one of images or sounds.
    """
    table = _load_table(source)
    for column in wanted:
        if column not in table.column_names:
            raise UsageError(source.data, f"has no column {column!r}", nearest(str(column), list(table.column_names)))
    if not len(table):
        cure = "name a file with rows" if source.split is None else "name another split"
        raise UsageError(source.data, "has no examples", cure)
    if source.limit is not None:
        table = table.take(list(source.chosen(len(table))))
    return [_Stored(table[column]) for column in wanted]


class _Stored(Sequence[Any]):
    """The values of an Arrow column, each made when it is asked for: pictures need not be there all at once."""

    def __init__(self, column: Any) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, i: Any) -> Any:
        found = self._column[i]
        return found.to_pylist() if isinstance(i, slice) else found.as_py()


def _load_table(source: DataSource) -> Any:
    """As an Arrow table."""
    path, there = Path(source.data), files.kind(Path(source.data))
    wanted = None if path.suffix.lower() in FILE_SUFFIXES else hub_id(source.data)
    if wanted is not None and wanted.folder is not None:
        raise UsageError(source.data, "a data set has no folders to choose from", "name its `subset:`")
    if wanted is None and there == "nothing":
        raise UsageError(path, "no such file or folder", "name the task's data, or a data set on the Hub as org/name")
    if there == "file" and path.suffix.lower() != ".parquet":
        cure = f"use {', '.join(_READERS)} or .parquet, or leave `text:` out for perplexity on plain text"
        raise UsageError(path, "is of no kind that is read", cure)
    datasets = _library()
    if wanted is not None and source.split is None:
        raise UsageError(source.data, "its split is not named", "add for example `split: validation`")
    try:
        if wanted is not None:
            assert source.split is not None
            pinned = replace(wanted, revision=source.revision or wanted.revision)
            return hub_data.load(datasets, pinned, source.subset, source.split)
        import pyarrow
        from pyarrow import parquet

        parts = [parquet.ParquetFile(file).read() for file in _parquet_files(path, source.split)]
        return pyarrow.concat_tables(parts, promote_options="default").replace_schema_metadata(None)
    except AcemergeError:
        raise
    except Exception as failure:  # of whichever of its many parts could not read it
        cure = "mend the file" if wanted is None else "check its name, and `subset:` and `split:`"
        raise UsageError(source.data, f"cannot be read ({in_words(failure)})", cure) from failure


def _parquet_files(path: Path, split: str | None) -> list[str]:
    """The file, or those of the folder in the order of their names; with a split `SPLIT-*.parquet`, as on the Hub."""
    root = files.resolve(path)
    if files.kind(root) != "folder":
        return [_regular(root)]
    found = [name for name in files.list_folder(root) if name.endswith(".parquet")]
    if not found:
        cure = f"name one of its files, {', '.join(_READERS)} or .parquet; images go without `split:`"
        raise UsageError(path, "is a folder without parquet files", cure)
    names = [name for name in found if split is None or name.startswith(f"{split}-")]
    if not names:
        cure = f"it has {', '.join(found[:_NAMED])}: name the split of those, or leave `split:` out"
        raise UsageError(path, f"holds no {split}-*.parquet files", cure)
    return [_regular(contained(root, name)) for name in names]


def _regular(path: Path) -> str:
    """The path of an ordinary file: a FIFO or a device would be waited for without an end."""
    files.close(files.open_for_reading(path))
    return str(path)


def _library() -> Any:
    """`datasets` from version 4, which has no loading scripts any more."""
    try:
        import datasets
    except ImportError:
        what = "datasets is not installed, which reads parquet files and the Hub"
        raise UsageError("data", what, "pip install 'acemerge[eval]', or use CSV, TSV or JSONL") from None
    if int(datasets.__version__.split(".")[0]) < 4:
        raise UsageError("data", f"datasets {datasets.__version__} may run scripts", "pip install 'datasets>=4'")
    datasets.disable_progress_bars()
    return datasets


def as_texts(values: Sequence[Any], where: object) -> list[str]:
    for i, value in enumerate(values, 1):
        if not isinstance(value, str):
            raise UsageError(where, f"example {i}: {str(value)[:40]!r} is no text", "name the column that holds text")
    return list(values)


def as_classes(
    values: Sequence[Any], labels: Sequence[str] | None, where: object, known: Sequence[str] | None = None
) -> npt.NDArray[np.int64]:
    """Class numbers from 0: the place of each value in `labels`, or the value itself where it is a number. Without
    labels, those of the head's own that are `known` are taken if they are the values.
    """
    names = known if labels is None else labels
    places = {label: i for i, label in enumerate(names or ())}
    others = [i for i, value in enumerate(values) if str(value) not in places]
    if not others:
        return np.array([places[str(value)] for value in values])
    numbers = [_number(value) for value in values]
    if None in numbers:
        i = numbers.index(None)
        i = others[0] if str(values[i]) in places else i  # what has a name is not what is wrong
        cure = "list the classes in `labels:`, in the head's order"
        if labels is not None:
            cure = f"complete `labels:`, or mend the data: {nearest(str(values[i]), list(labels))}"
        raise UsageError(where, f"example {i + 1}: {str(values[i])[:40]!r} is no class", cure)
    for i, number in enumerate(numbers, 1):
        if number is not None and number < 0:
            raise UsageError(where, f"example {i} has the label {number}", "a hidden label: use a split that has them")
    return np.array(numbers)


def _number(value: Any) -> int | None:
    """A whole number from a value, where it is one."""
    try:
        number = int(value)
    except (TypeError, ValueError):
        return None
    return None if isinstance(value, float) and value != number else number


def as_numbers(values: Sequence[Any], where: object) -> npt.NDArray[np.float64]:
    """Targets of a regression, finite."""
    numbers = []
    for i, value in enumerate(values, 1):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if not np.isfinite(number):
            raise UsageError(where, f"example {i}: {str(value)[:40]!r} is no number", "name the column of the targets")
        numbers.append(number)
    return np.array(numbers)
