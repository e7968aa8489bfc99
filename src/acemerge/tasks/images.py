"""Images and their classes: a folder with one folder for each class, or two columns of a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from acemerge.checkpoints import files
from acemerge.checkpoints.folder import contained
from acemerge.checkpoints.hub import hub_id, in_words
from acemerge.errors import CheckpointError, UsageError, nearest
from acemerge.tasks.data import DataSource, as_classes, read_columns
from acemerge.tasks.networks import Inputs, Model, load

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
        lambda i: _rgb(values[i], f"{source.data}, image {i + 1}"), as_classes(classes, labels, path), names
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
        return _rgb(contained(root, str(file.relative_to(root))), file)

    return ImageSet(image, np.array([number for _, number in places]), names)


def _rgb(image: Any, where: object) -> Any:
    """A picture in RGB, decoded whole."""
    try:
        from PIL import Image
    except ImportError:
        raise UsageError("images", "Pillow is not installed", "pip install 'acemerge[eval]'") from None
    try:
        if isinstance(image, Path):
            with Image.open(image) as opened:
                return opened.convert("RGB")
        return image.convert("RGB")
    except Exception as failure:  # of whichever decoder; a bomb of pixels is refused by Pillow itself
        raise UsageError(where, f"cannot be read as an image ({in_words(failure)})", "mend or remove it") from failure


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
