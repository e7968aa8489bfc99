"""Row 7: links. Inputs may lead inside their folder or to the Hub's cache; outputs may not be links at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import acemerge
from acemerge.checkpoints.folder import open_checkpoint
from acemerge.output.verify import verify
from attacks import models
from attacks.harness import Must, Tally, check, clean, main

ROW = 7

# Makes a checkpoint in a folder of its own, and returns what to open.
Maker = Callable[[Path], Path]


def attack(folder: Path, count: int, seed: int) -> Tally:
    """All cases, whatever the count; the seed has nothing to choose."""
    tally = Tally()
    for make in (*_FINE, *_LEAVING):
        place = make(folder / make.__name__.strip("_"))
        pickled = "pickle" in make.__name__
        label = make.__name__.strip("_").replace("_", " ")
        clean(tally, label, partial(_read_all, place, pickled), must="refuse" if make in _LEAVING else "accept")
    good = models.write_single(folder / "good")
    for name, made, must in _OUTPUTS:
        victim = folder / f"victim of {name.strip('/').replace('/', ' ')}"
        clean(tally, f"output {name} is a link", partial(_merge_onto, good, victim, name, made), must)
    return tally


def _read_all(place: Path, allow_pickle: bool) -> None:
    checkpoint = open_checkpoint(place, allow_pickle)
    for name, spec in checkpoint.tensors.items():
        check(tuple(checkpoint.read(name).shape) == spec.shape, f"{name!r} was not read")


# --- inputs -------------------------------------------------------------------------------------------------


def _moved(folder: Path, name: str, target: Path) -> Path:
    """Put a file elsewhere and a link in its place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(folder / name, target)
    (folder / name).symlink_to(os.path.relpath(target, (folder / name).parent))
    return folder


def _outside(folder: Path) -> Path:
    return folder.parent / f"outside {folder.name}"


def _a_folder_by_a_link(folder: Path) -> Path:
    models.write_single(_outside(folder))
    folder.symlink_to(_outside(folder))
    return folder


def _a_file_elsewhere_in_the_folder(folder: Path) -> Path:
    return _moved(models.write_single(folder), models.SINGLE, folder / "weights" / "a.safetensors")


def _a_chain_within_the_folder(folder: Path) -> Path:
    _moved(models.write_single(folder), models.SINGLE, folder / "b" / "second")
    return _moved(folder, "b/second", folder / "c")


def _a_snapshot_of_the_hub_cache(folder: Path) -> Path:
    snapshot = models.write_sharded(folder / "models--a--b" / "snapshots" / "0123")
    for path in sorted(snapshot.iterdir()):
        _moved(snapshot, path.name, folder / "models--a--b" / "blobs" / f"hash of {path.name}")
    return snapshot


def _weights_outside(folder: Path) -> Path:
    return _moved(models.write_single(folder), models.SINGLE, _outside(folder) / "x")


def _weights_outside_by_a_chain(folder: Path) -> Path:
    _moved(models.write_single(folder), models.SINGLE, folder / "b" / "second")
    (folder / "b" / "second").rename(folder / "third")
    (folder / "b" / "second").symlink_to(folder / "third")
    return _moved(folder, "third", _outside(folder) / "x")


def _weights_in_a_folder_of_like_name(folder: Path) -> Path:
    return _moved(models.write_single(folder), models.SINGLE, folder.parent / f"{folder.name}2" / "x")


def _a_shard_outside(folder: Path) -> Path:
    return _moved(models.write_sharded(folder), models.shard_name(2, 2), _outside(folder) / "x")


def _an_index_outside(folder: Path) -> Path:
    return _moved(models.write_sharded(folder), models.INDEX, _outside(folder) / "x")


def _a_configuration_outside(folder: Path) -> Path:
    return _moved(models.write_single(folder), "config.json", _outside(folder) / "x")


def _a_tokenizer_outside(folder: Path) -> Path:
    (models.write_single(folder) / "tokenizer.json").write_text("{}")
    return _moved(folder, "tokenizer.json", _outside(folder) / "x")


def _a_snapshot_that_leaves_the_cache(folder: Path) -> Path:
    snapshot = models.write_single(folder / "models--a--b" / "snapshots" / "0123")
    return _moved(snapshot, models.SINGLE, folder / "models--other" / "blobs" / "x")


def _a_snapshot_of_another_revision(folder: Path) -> Path:
    snapshot = models.write_single(folder / "models--a--b" / "snapshots" / "0123")
    return _moved(snapshot, models.SINGLE, folder / "models--a--b" / "snapshots" / "4567" / "x")


def _a_link_to_nothing(folder: Path) -> Path:
    (models.write_single(folder) / models.SINGLE).unlink()
    (folder / models.SINGLE).symlink_to("nothing")
    return folder


def _a_link_to_itself(folder: Path) -> Path:
    (models.write_single(folder) / models.SINGLE).unlink()
    (folder / models.SINGLE).symlink_to(models.SINGLE)
    return folder


def _a_folder_that_is_its_own_link(folder: Path) -> Path:
    folder.symlink_to(folder)
    return folder


def _a_link_to_a_device(folder: Path) -> Path:
    (models.write_single(folder) / models.SINGLE).unlink()
    (folder / models.SINGLE).symlink_to("/dev/zero")
    return folder


def _a_pickle_outside(folder: Path) -> Path:
    folder.mkdir()
    torch.save({"layers.0.weight": torch.ones(2, 2)}, folder / "pytorch_model.bin")
    return _moved(folder, "pytorch_model.bin", _outside(folder) / "x.bin")


_FINE: tuple[Maker, ...] = (
    _a_folder_by_a_link, _a_file_elsewhere_in_the_folder, _a_chain_within_the_folder, _a_snapshot_of_the_hub_cache,
)  # fmt: skip
_LEAVING: tuple[Maker, ...] = (
    _weights_outside, _weights_outside_by_a_chain, _weights_in_a_folder_of_like_name, _a_shard_outside,
    _an_index_outside, _a_configuration_outside, _a_tokenizer_outside, _a_snapshot_that_leaves_the_cache,
    _a_snapshot_of_another_revision, _a_link_to_nothing, _a_link_to_itself, _a_folder_that_is_its_own_link,
    _a_link_to_a_device, _a_pickle_outside,
)  # fmt: skip


# --- outputs ------------------------------------------------------------------------------------------------

# A link in the output folder, what it leads to, and whether it must be refused: a link in the place of a file may
# also be replaced, as long as it is not followed.
_OUTPUTS: tuple[tuple[str, str, Must], ...] = (
    ("", "folder", "refuse"),
    ("", "nothing", "refuse"),
    ("heads", "folder", "refuse"),
    ("masks", "folder", "refuse"),
    ("heads", "nothing", "refuse"),
    (".acemerge.lock", "file", "refuse"),
    (".acemerge.lock", "nothing", "refuse"),
    ("model.safetensors", "file", "either"),
    ("model.safetensors.acemerge.partial", "file", "either"),
    ("model.safetensors.acemerge.partial", "nothing", "either"),
    ("model.safetensors.acemerge.old", "file", "either"),
    ("acemerge.json", "file", "either"),
    ("acemerge.json.acemerge.partial", "file", "either"),
    ("acemerge.json.acemerge.old", "file", "either"),
    ("config.json", "file", "either"),
    ("README.md.acemerge.partial", "folder", "either"),
)
FULL = len(_FINE) + len(_LEAVING) + len(_OUTPUTS)


def _merge_onto(good: Path, victim: Path, name: str, made: str) -> None:
    """Merge into a folder with a link to `victim` in it, which must stay as it is whatever comes of the merge."""
    out = victim.parent / f"out for {victim.name} {made}"
    victim = victim.with_name(f"{victim.name} {made}")
    link = out / name if name else out
    link.parent.mkdir(parents=True, exist_ok=True)
    if made == "folder":
        victim.mkdir()
        (victim / "precious").write_text("precious")
    elif made == "file":
        victim.write_text("precious")
    link.symlink_to(victim)
    before = _content(victim)
    try:
        acemerge.merge(good, [good], method="average", out=out, overwrite=True)
    finally:
        check(_content(victim) == before, "wrote through the link")
    links = [path.name for path in (out, *out.rglob("*")) if path.is_symlink()]
    check(not links, f"links are left: {links}")
    verify(out)


def _content(path: Path) -> dict[str, str]:
    paths = [path, *path.rglob("*")] if path.is_dir() else [path]
    return {str(p): p.read_text() if p.is_file() else "" for p in paths if p.exists()}


if __name__ == "__main__":
    main(("links",))
