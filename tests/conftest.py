"""What all tests run under: one thread each, shapes checked at run time, and a fake Hub for who asks for one."""

import os
from collections.abc import Iterator

os.environ.setdefault("GOMP_SPINCOUNT", "50000")  # as the command line has it; before torch is imported
for library in ("OMP", "MKL", "OPENBLAS"):  # pytest-xdist fills the processors; for child processes, too
    os.environ[f"{library}_NUM_THREADS"] = "1"

from shape_check import check_shapes  # noqa: E402

check_shapes()  # before acemerge is imported

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

pytest.register_assert_rewrite("every_rule")  # whose assertions tell what they compared, as those of a test

import torch  # noqa: E402
from builders import PlainModel  # noqa: E402
from google_store import google  # noqa: E402, F401
from hub_server import FakeHub  # noqa: E402
from hypothesis import settings  # noqa: E402
from stores import memory, s3, s3_server  # noqa: E402, F401

settings.register_profile("test", max_examples=8, deadline=None, derandomize=True)
settings.register_profile("torture", max_examples=100, deadline=None)
settings.load_profile("test")


_LONGEST = ("test_attacks.py", "test_memory.py", "test_ray.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes go first, so that no process is left with one of them when the others have done."""
    items.sort(key=lambda item: item.path.name not in _LONGEST)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is taken from the user's own cache, nor left there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For what torch does with several."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def plain(tmp_path: Path) -> PlainModel:
    """A base and three experts without any architecture: tensors in folders."""
    return PlainModel(tmp_path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """An empty Hub and an empty cache. huggingface_hub reads its environment when it is imported: set it there."""
    from huggingface_hub import constants

    from acemerge.checkpoints import objects

    objects.forget_stores()
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
