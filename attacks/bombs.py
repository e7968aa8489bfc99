"""Row 9: archives that grow, files of a gigabyte, and configurations that name code: refused unread, or harmless.

Every case may take 100 MB. A model's own code lies beside its configuration and would leave a marker.
"""

from __future__ import annotations

import io
import json
import random
import runpy
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import acemerge
from acemerge.checkpoints.folder import open_checkpoint
from acemerge.models.roles import find_roles
from attacks import models
from attacks.harness import Meter, Must, Tally, check, clean, in_child, main
from attacks.headers import LLAMA

ROW = 9
NBYTES, SECONDS = 100_000_000, 5.0
GIGABYTE = 1 << 30
_CODE = "open({marker!r}, 'w').close()\nclass Evil:\n    pass\n"
_MODULES = ("modeling_evil", "configuration_evil", "tokenization_evil", "custom_generate")

Case = tuple[str, Callable[[], object], Must]


def attack(folder: Path, count: int, seed: int) -> Tally:
    """All cases, or `count` of them."""
    return in_child(some_cases, folder, count, seed, timeout=300)


def some_cases(folder: Path, count: int, seed: int) -> Tally:
    tally = Tally()
    good = models.write_single(folder / "good", config=LLAMA)
    for config in (LLAMA, {**LLAMA, "architectures": ["BertForMaskedLM"], "model_type": "bert"}):
        find_roles(config, {})  # what is imported once is no cost of a bad file
    merged = partial(acemerge.merge, good, [good], method="average", out=folder / "merged")
    clean(tally, "a merge of good models", merged, must="accept")
    clean(tally, "the trap", partial(_check_trap, folder / "trap"), must="accept")
    cases = [*_archives(folder), *_hollow_files(folder), *_remote_code(folder, good)]
    for label, call, must in random.Random(seed).sample(cases, min(count, len(cases))):
        clean(tally, label, call, must, Meter(SECONDS, NBYTES))
    return tally


# --- archives -----------------------------------------------------------------------------------------------


def _archives(folder: Path) -> Iterator[Case]:
    for i, (label, make) in enumerate(_ARCHIVES.items()):
        path = folder / f"{i}.bin"
        path.write_bytes(make())
        yield label, partial(open_checkpoint, path, True), "refuse"
    for size in (GIGABYTE, 1 << 40):
        hollow = folder / f"hollow {size}.bin"
        hollow.write_bytes(_saved())
        _stretch(hollow, size)
        yield f"an archive in a hollow file of {size:,} bytes", partial(open_checkpoint, hollow, True), "refuse"


def _stretch(path: Path, size: int) -> None:
    """Let a file end at `size` bytes without filling it."""
    with open(path, "r+b") as file:
        file.truncate(size)


def _saved() -> bytes:
    out = io.BytesIO()
    torch.save({"a": torch.ones(4), "b": torch.ones(4)}, out)
    return out.getvalue()


def _with_zeros(name: str, size: int, compression: int) -> bytes:
    """The archive with one record of that many zeros, compressed to next to nothing."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_saved())) as old, zipfile.ZipFile(out, "w", compression, compresslevel=1) as new:
        for record in old.namelist():
            if not record.endswith(name):
                new.writestr(record, old.read(record))
        with new.open(f"archive/{name}", "w", force_zip64=True) as stream:
            for _ in range(size >> 20):
                stream.write(bytes(1 << 20))
    return out.getvalue()


def _patched(record: str, changes: dict[int, int], local: bool = False) -> bytes:
    """The archive with 4-byte fields of a record's entry changed: 20, 24 the sizes, 42 its place."""
    data = bytearray(_saved())
    name = record.encode()
    start = data.index(name) - 30 if local else data.rindex(name) - 46
    for field, value in changes.items():
        struct.pack_into("<I", data, start + field, value)
    return bytes(data)


def _many_records() -> bytes:
    """A directory of three hundred thousand entries, all for one record."""
    data = _saved()
    at = data.rindex(b"archive/data/0") - 46
    entry = data[at : data.index(b"PK\x01\x02", at + 4)]
    end = bytearray(data[data.rindex(b"PK\x05\x06") :])
    start = data.index(b"PK\x01\x02")
    directory = entry * 300_000
    struct.pack_into("<HHII", end, 8, 0xFFFF, 0xFFFF, len(directory), start)
    return data[:start] + directory + bytes(end)


def _long_directory() -> bytes:
    """An end that claims a directory of 64 MB, which is there."""
    data = _saved()
    end = bytearray(data[data.rindex(b"PK\x05\x06") :])
    struct.pack_into("<II", end, 12, 1 << 26, 0)
    return b"PK\x03\x04" + bytes((1 << 26) - 4) + bytes(end)


_ARCHIVES: dict[str, Callable[[], bytes]] = {
    "a pickle of 256 MB in 256 kB": partial(_with_zeros, "data.pkl", 1 << 28, zipfile.ZIP_DEFLATED),
    "values of 256 MB in 256 kB": partial(_with_zeros, "data/0", 1 << 28, zipfile.ZIP_DEFLATED),
    "values of 64 MB by bzip2": partial(_with_zeros, "data/0", 1 << 26, zipfile.ZIP_BZIP2),
    "a pickle of 64 MB as it is": partial(_with_zeros, "data.pkl", 1 << 26, zipfile.ZIP_STORED),
    "a size of 4 GB": partial(_patched, "archive/data/0", {20: 0xFFFFFFFE, 24: 0xFFFFFFFE}),
    "a pickle of 4 GB": partial(_patched, "archive/data.pkl", {20: 0xFFFFFFFE, 24: 0xFFFFFFFE}),
    "a size in a field that is not there": partial(_patched, "archive/data/0", {20: 0xFFFFFFFF, 24: 0xFFFFFFFF}),
    "a size that grows": partial(_patched, "archive/data/0", {24: 1 << 30}),
    "a size that shrinks": partial(_patched, "archive/data/0", {24: 8}),
    "a smaller record than its values": partial(_patched, "archive/data/0", {20: 8, 24: 8}),
    "a record in the place of another": partial(_patched, "archive/data/1", {42: 0}),
    "a record over the next ones": partial(_patched, "archive/data/0", {20: 300, 24: 300}),
    "a record beyond the end": partial(_patched, "archive/data/1", {42: 1 << 31}),
    "300,000 entries of one record": _many_records,
    "a directory of 64 MB": _long_directory,
}


# --- files of a gigabyte ------------------------------------------------------------------------------------


def _hollow_files(folder: Path) -> Iterator[Case]:
    """A gigabyte that takes no room on the disk, under the names of small files."""
    for i, (name, write) in enumerate(_SMALL.items()):
        place = write(folder / f"gigabyte {i}")
        (place / name).touch()
        _stretch(place / name, GIGABYTE)
        pickled = name.startswith("pytorch")
        yield f"a {name} of a gigabyte", partial(open_checkpoint, place, pickled), "refuse"


def _write_pickled(folder: Path) -> Path:
    folder.mkdir()
    (folder / "pytorch_model-00001-of-00001.bin").write_bytes(_saved())
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    return folder


_SMALL: dict[str, Callable[[Path], Path]] = {
    "config.json": models.write_single,
    models.INDEX: models.write_sharded,
    models.SINGLE: models.write_single,
    "pytorch_model.bin.index.json": _write_pickled,
}


# --- code in a configuration --------------------------------------------------------------------------------


def _remote_code(folder: Path, good: Path) -> Iterator[Case]:
    """Models that bring their own code; each is merged, by the names of its tensors alone."""
    auto_map = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModel": "modeling_evil.Evil",
        "AutoModelForCausalLM": "modeling_evil.Evil",
        "AutoTokenizer": ["tokenization_evil.Evil", None],
    }
    configs: dict[str, dict[str, Any]] = {
        "a class of its own": {"architectures": ["Evil"], "model_type": "evil", "auto_map": auto_map},
        "a class of its own for a known type": {**LLAMA, "architectures": ["Evil"], "auto_map": auto_map},
        "a known class": {**LLAMA, "auto_map": auto_map},
        "with trust": {**LLAMA, "auto_map": auto_map, "trust_remote_code": True},
        "code on the Hub": {**LLAMA, "auto_map": {"AutoModelForCausalLM": "evil/model--modeling_evil.Evil"}},
        "attention from the Hub": {
            **LLAMA,
            "attn_implementation": "evil/kernel",
            "_attn_implementation": "evil/kernel",
        },
        "a part with its own code": {**LLAMA, "text_config": {**LLAMA, "auto_map": auto_map}},
        "a class by its path": {**LLAMA, "architectures": ["modeling_evil.Evil"]},
        "a class that is no model": {**LLAMA, "architectures": ["os.system"]},
        "a function of the library": {**LLAMA, "architectures": ["set_seed"]},
        "another folder": {**LLAMA, "_name_or_path": str(good), "name_or_path": str(good)},
        "generation code": {**LLAMA, "custom_generate": "custom_generate", "auto_map": auto_map},
    }
    for i, (label, config) in enumerate(configs.items()):
        place = models.write_single(folder / f"code {i}", config=config)
        _bring_code(place)
        (place / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
        yield f"a model with {label}", partial(_merge, place, folder / f"merged {i}"), "accept"


def _check_trap(folder: Path) -> None:
    """The code that must not run would leave its marker if it did."""
    place = models.write_single(folder)
    _bring_code(place)
    runpy.run_path(str(place / "modeling_evil.py"))
    check((place / "marker").exists(), "is dead")


def _bring_code(place: Path) -> None:
    for module in _MODULES:
        (place / f"{module}.py").write_text(_CODE.format(marker=str(place / "marker")))


def _merge(place: Path, out: Path) -> None:
    before = list(sys.path)
    acemerge.merge(place, [place], method="average", out=out)
    check(not (place / "marker").exists(), "ran the model's code")
    check(not any(module in sys.modules for module in _MODULES), "imported the model's code")
    check(sys.path == before, "made the model's folder a place of code")
    check(not list(out.rglob("*.py")), "copied the model's code")


FULL = 2 + len(_ARCHIVES) + 2 + len(_SMALL) + 12

if __name__ == "__main__":
    main(("bombs",))
