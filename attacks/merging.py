"""What attacks on a running merge share: a small model, runs in processes of their own, and what must come out."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import acemerge
from acemerge.errors import AcemergeError
from acemerge.methods import make
from attacks.harness import check

# Masks and heads beside the model; thresholds beforehand; the covariance family.
METHODS = ("emr", "ties", "ace")
_CHANGING = ("created", "seconds", "run")


def make_models(folder: Path, layers: int = 3, side: int = 8, seed: int = 0) -> tuple[Path, list[Path]]:
    """A base in two shards and two experts, one of them with a head."""
    generator = torch.Generator().manual_seed(seed)
    base = {f"layers.{i}.weight": torch.randn(side, side, generator=generator) for i in range(layers)}
    base["norm.weight"] = torch.randn(side, generator=generator)
    paths = [folder / name for name in ("base", "one", "two")]
    for i, path in enumerate(paths):
        path.mkdir(parents=True)
        tensors = {n: v + 0.1 * i * torch.randn(v.shape, generator=generator) for n, v in base.items()}
        if i == 1:
            tensors["score.weight"] = torch.ones(2, side)
        _save_sharded(path, tensors)
        (path / "config.json").write_text('{"architectures": ["Nobody"]}')
    return paths[0], paths[1:]


def _save_sharded(folder: Path, tensors: dict[str, Tensor]) -> None:
    names = sorted(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    weight_map = {}
    for i, half in enumerate(halves, 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(half, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class Case:
    """One merge to be attacked, and what an untroubled run makes of it."""

    def __init__(
        self, folder: Path, method: str, workers: int = 1, layers: int = 3, side: int = 8, shards: int | None = None
    ) -> None:
        self.base, self.experts = make_models(folder / "inputs", layers, side)
        self.folder = folder
        a_file = 4 * side * side * (layers + 1) // shards if shards else 6 * side * side  # or one matrix each
        self.options: dict[str, Any] = {"method": method, "workers": workers, "max_shard_size": f"{a_file}B"}
        self.merge(folder / "reference")
        self.expected = content(folder / "reference")

    def merge(self, out: Path, **options: Any) -> acemerge.MergeReport:
        return acemerge.merge(self.base, self.experts, out=out, **(self.options | options))

    def merge_earlier(self, out: Path) -> dict[str, bytes]:
        """Another model in `out`, which is to survive or to be replaced as a whole."""
        self.merge(out, method="average", max_shard_size="1GB")
        return snapshot(out)

    def check_output(self, out: Path) -> None:
        """The same bytes as those of the untroubled run, and nothing beside them."""
        found = content(out)
        check(found.keys() == self.expected.keys(), f"holds {sorted(found)}")
        for name, value in self.expected.items():
            check(found[name] == value, f"{name} differs")


def snapshot(folder: Path) -> dict[str, bytes]:
    """The bytes of every file but the lock, which is free when nobody holds it."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".acemerge.lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def content(folder: Path) -> dict[str, Any]:
    """The same, with the manifest's times left out."""
    found: dict[str, Any] = snapshot(folder)
    if "acemerge.json" in found:
        manifest = json.loads(found["acemerge.json"])
        found["acemerge.json"] = _without_times(manifest)
    return found


def _without_times(manifest: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in manifest.items() if key not in (*_CHANGING, "digest")}
    kept["tensors"] = {name: {**record, "seconds": 0} for name, record in manifest["tensors"].items()}
    return kept


def published(folder: Path, earlier: Mapping[str, bytes]) -> dict[str, bytes]:
    """Of a folder those files that belonged to an earlier output, as they are now."""
    found = snapshot(folder)
    return {name: found[name] for name in earlier if name in found}


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["acemerge.api", "acemerge.cli.app", "attacks.merging"])


def in_process(target: Any, *arguments: Any) -> BaseProcess:
    """Start `target` in a process of its own, forked from one that has imported everything."""
    process = CONTEXT.Process(target=_exiting, args=(target, *arguments))
    process.start()
    return process


def _exiting(target: Any, *arguments: Any) -> None:
    try:
        target(*arguments)
    except AcemergeError as error:
        raise SystemExit(error.exit_code) from None


def moments_for(rule: str, D: Tensor) -> Tensor | None:
    """What a rule with data may have measured on experts (T, out, in); None for one without data."""
    wanted = make(rule, {}).needs.calibration
    if wanted is None:
        return None
    if wanted == "gradients":
        return D.square()
    if wanted == "both sides":
        return torch.cat([(D.mT @ D).flatten(1), (D @ D.mT).flatten(1)], 1)
    return D.mT @ D
