"""Shapes are checked at run time in every test: the hook must come before acemerge is imported."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "50000")  # as the command line has it; before torch is imported

from jaxtyping import install_import_hook

FAMILIES = (
    "ace",
    "actmat",
    "election",
    "elementwise",
    "masks",
    "mergekit_sum",
    "mergekit_variants",
    "sparse",
    "spectral",
    "sphere",
    "svc",
    "wudi",
)
install_import_hook(["acemerge.linalg", *(f"acemerge.methods.{name}" for name in FAMILIES)], "beartype.beartype")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

from builders import PlainModel  # noqa: E402

torch.set_num_threads(2)


@pytest.fixture
def plain(tmp_path: Path) -> PlainModel:
    """A base and three experts without any architecture: tensors in folders."""
    return PlainModel(tmp_path)
