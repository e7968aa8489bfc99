"""Images and their classes: a folder with one folder for each class, or two columns of a data set."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from acemerge.checkpoints import files
from acemerge.checkpoints.hub import hub_id, in_words
from acemerge.checkpoints.links import contained
from acemerge.errors import CheckpointError, UsageError, nearest
from acemerge.tasks.data import DataSource, as_classes, read_columns
from acemerge.tasks.networks import Inputs, Model, load

# Pillow's other formats include one that hands its files to another program, Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
_MAX_FILE = 256 << 20
_MAX_PIXELS = 1 << 26
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff")


@dataclass(frozen=True)
class ImageSet:
    """`image(i)` decodes one image; `classes` (N,) are numbers, `names` those of the classes where they are known."""

    image: Callable[[int], Any]
    classes: npt.NDArray[np.int64]
    names: tuple[str, ...] | None


def open_images(source: DataSource, image: str, label: str, labels: Sequence[str] | None) -> ImageSet:
    """The images of a source. Classes are numbered by `labels`, else by the sorted names of their folders."""
    path = Path(source.data)
    folders = files.kind(path) == "folder" and hub_id(source.data) is None and source.split is None
    if folders:
        return _of_folders(path, labels, source)
    values, classes = read_columns(source, [image, label])
    names = None if labels is None else tuple(labels)
    return ImageSet(
        lambda i: _of_value(values[i], f"{source.data}, image {i + 1}"), as_classes(classes, labels, path), names
    )


def _of_folders(path: Path, labels: Sequence[str] | None, source: DataSource) -> ImageSet:
    root = files.resolve(path)
    found = [name for name in files.list_folder(root) if files.kind(root / name) == "folder" and name[0] != "."]
    names = tuple(labels) if labels is not None else tuple(found)
    for name in found:
        if name not in names:
            raise UsageError(path / name, "is no class of `labels:`", nearest(name, list(names)))
    places = [
        (root / name / file, names.index(name))
        for name in found
        for file in files.list_folder(root / name)
        if file.lower().endswith(_SUFFIXES)
    ]
    if not places:
        raise UsageError(path, "holds no folders with images", "give it one folder for each class")
    places = [places[i] for i in source.chosen(len(places))]

    def image(i: int) -> Any:
        file = places[i][0]
        return _rgb(files.read_small(contained(root, str(file.relative_to(root))), _MAX_FILE), file)

    return ImageSet(image, np.array([number for _, number in places]), names)


def _of_value(value: Any, where: object) -> Any:
    """The picture whose file a value holds: its bytes, or as `datasets` stores it with a path beside them.

    A path alone is not followed, whatever it leads to.
    """
    content = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(content, bytes):
        return _rgb(content, where)
    there = "only the path of an image" if isinstance(value, dict | str) else "no image"
    raise UsageError(
        where,
        f"the column holds {there}",
        "use a folder, or parquet files with the images in them, on the Hub revision refs/convert/parquet",
    )


def _rgb(content: bytes, where: object) -> Any:
    """A picture in RGB, decoded whole, of no more than 67 million pixels."""
    try:
        from PIL import Image
    except ImportError:
        raise UsageError("images", "Pillow is not installed", "pip install 'acemerge[eval]'") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, of a bomb
            with Image.open(io.BytesIO(content), formats=_FORMATS) as opened:
                if opened.width * opened.height > _MAX_PIXELS:
                    raise ValueError(f"{opened.width} x {opened.height} are too many pixels")
                return opened.convert("RGB")
    except Exception as failure:  # of whichever decoder
        what = "of no format that is read here" if _is_unknown(failure) else in_words(failure)
        raise UsageError(where, f"cannot be read as an image ({what})", "mend or remove it") from failure


def _is_unknown(failure: Exception) -> bool:
    from PIL import UnidentifiedImageError

    return isinstance(failure, UnidentifiedImageError)


def pixels(model: Model, images: ImageSet) -> Callable[[Sequence[int]], Inputs]:
    """Batches as the model's own image processor makes them."""
    processor = load("AutoImageProcessor", model.path)

    def batch(rows: Sequence[int]) -> Inputs:
        several = [images.image(i) for i in rows]
        try:
            return {"pixel_values": processor(images=several, return_tensors="pt")["pixel_values"]}
        except Exception as failure:
            what = f"its image processor fails ({in_words(failure)})"
            raise CheckpointError(model.name, what, "check preprocessor_config.json") from failure

    return batch
