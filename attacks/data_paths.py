"""Row 26: paths and addresses among the data of a task and in cards: none is opened, none is asked.

Columns that the file's own metadata calls images or sounds are what `datasets` would follow.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from acemerge.output.origin import origin_of
from acemerge.tasks.data import DataSource, as_texts, read_columns
from acemerge.tasks.images import open_images
from attacks.harness import Must, Tally, check, clean, main
from attacks.trap import confined

ROW = 26
_PATHS = (
    "{bait}", "../bait.png", "file://{bait}", "/etc/passwd", "~/.netrc", "http://127.0.0.1:9/a.png",
    "https://localhost/a.png", "hf://datasets/org/name/a.png", "s3://bucket/a.png", "zip://a.png::{bait}",
    "zip://a.png::http://127.0.0.1:9/a.zip", "ftp://127.0.0.1/a", "\\\\server\\share\\a.png",
    "/dev/zero", "/proc/self/environ",
)  # fmt: skip
Case = tuple[str, Callable[[Path, str], Callable[[], object]], Must]


def attack(folder: Path, count: int, seed: int) -> Tally:
    """Every path in every place, or `count` of them."""
    tally = Tally()
    (folder / "bait.png").write_bytes(b"not to be opened")
    _texts(folder, "text")()  # imports what is imported once
    cases = [(path, *place) for place in _places() for path in _PATHS]
    for i, (path, label, make, must) in enumerate(random.Random(seed).sample(cases, min(count, len(cases)))):
        home = folder / f"case {i}"
        home.mkdir()
        call = make(home, path.format(bait=folder / "bait.png"))
        clean(tally, f"{path} in {label}", confined(home, call), must)
    return tally


def _places() -> Iterator[Case]:
    yield "a parquet's images", _with_images, "refuse"
    yield "a parquet's images without metadata", partial(_with_images, about=False), "refuse"
    yield "a parquet's images in lists", _with_lists, "refuse"
    yield "a parquet's sounds", partial(_texts, kind="Audio"), "refuse"
    yield "a parquet's texts, called images", partial(_texts, kind="Image"), "accept"
    yield "a parquet's texts", _texts, "accept"
    yield "a JSONL's images", _lines, "refuse"
    yield "a CSV's images", _commas, "refuse"
    yield "a card's licence", _card, "accept"


def _write(path: Path, columns: dict[str, Any], kind: str | None) -> Path:
    """A parquet whose metadata has `datasets` take its first column for files of this kind."""
    table = pyarrow.table(columns)
    if kind:
        features = {
            name: {"_type": kind} if i == 0 else {"_type": "Value", "dtype": "int64"} for i, name in enumerate(columns)
        }
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, path)
    return path


def _with_images(home: Path, path: str, about: bool = True) -> Callable[[], object]:
    columns = {"image": [{"bytes": None, "path": path}], "label": [0]}
    return partial(_see, _write(home / "a.parquet", columns, "Image" if about else None))


def _with_lists(home: Path, path: str) -> Callable[[], object]:
    columns = {"image": [[{"bytes": None, "path": path}]], "label": [0]}
    return partial(_see, _write(home / "a.parquet", columns, None))


def _lines(home: Path, path: str) -> Callable[[], object]:
    (home / "a.jsonl").write_text(json.dumps({"image": {"bytes": None, "path": path}, "label": 0}) + "\n")
    return partial(_see, home / "a.jsonl")


def _commas(home: Path, path: str) -> Callable[[], object]:
    (home / "a.csv").write_text(f"image,label\n{path},0\n")
    return partial(_see, home / "a.csv")


def _see(data: Path) -> None:
    open_images(DataSource(str(data)), "image", "label", None).image(0)


def _texts(home: Path, path: str, kind: str | None = None) -> Callable[[], object]:
    value: Any = {"bytes": None, "path": path} if kind == "Audio" else path
    return partial(_read_texts, _write(home / "a.parquet", {"text": [value], "label": [0]}, kind), path)


def _read_texts(data: Path, path: str) -> None:
    texts, _ = read_columns(DataSource(str(data)), ("text", "label"))
    check(as_texts(texts, data) == [path], f"came out as {list(texts)}")


def _card(home: Path, path: str) -> Callable[[], object]:
    (home / "README.md").write_text(f"---\nlicense: mit\nlicense_link: {json.dumps(path)}\n---\n![x]({path})\n")
    return partial(_license, home)


def _license(home: Path) -> None:
    check(origin_of(str(home), home).license == "mit", "the licence was not read")


FULL = len(list(_places())) * len(_PATHS)

if __name__ == "__main__":
    main(("data_paths",))
