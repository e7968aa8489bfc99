"""Shapes are checked at run time in every test: the hook must come before acemerge is imported."""

import os
from collections.abc import Iterator

os.environ.setdefault("GOMP_SPINCOUNT", "50000")  # as the command line has it; before torch is imported

from jaxtyping import install_import_hook

FAMILIES = (
    "ace",
    "ace_auto",
    "actmat",
    "anchored",
    "calibrated",
    "election",
    "elementwise",
    "factors",
    "fusion",
    "kron",
    "kron_auto",
    "lora",
)
FAMILIES += (
    "masks",
    "mergekit_sum",
    "mergekit_overlap",
    "mergekit_variants",
    "sparse",
    "spectral",
    "sphere",
    "svc",
    "wudi",
)
install_import_hook(
    ["acemerge.inspection.statistics", "acemerge.linalg", *(f"acemerge.methods.{name}" for name in FAMILIES)],
    "beartype.beartype",
)

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

from builders import PlainModel  # noqa: E402
from hub_server import FakeHub  # noqa: E402

torch.set_num_threads(2)


@pytest.fixture
def plain(tmp_path: Path) -> PlainModel:
    """A base and three experts without any architecture: tensors in folders."""
    return PlainModel(tmp_path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """An empty Hub and an empty cache. huggingface_hub reads its environment when it is imported: set it there."""
    from huggingface_hub import constants

    server = FakeHub()
    settings = {
        "ENDPOINT": server.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    yield server
    server.close()
