"""Row 8: pickles that run code, under every name that weights have: refused, and nothing of them run."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from acemerge.checkpoints.folder import open_checkpoint
from attacks import models
from attacks.harness import Tally, check, clean, in_child, main
from attacks.payloads import payloads, wrapped
from attacks.trap import watching

ROW = 8
FULL = 3_900

# Where the file is put, and what is opened then: the file itself or its folder.
_NAMES = (("pytorch_model.bin", False), ("model.pt", True), ("model.pkl", True), ("model.safetensors", False))
_NAMES_IF_ALLOWED = (("pytorch_model.bin", False), ("model.pt", True), ("model.safetensors", False))
# What a reader of weights has no use for.
_EVENTS = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.kill", "os.putenv", "os.remove",
    "os.rename", "os.symlink", "os.link", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "subprocess.Popen",
    "pty.spawn", "exec", "compile", "import", "pickle.find_class", "marshal.loads", "code.__new__",
    "function.__new__", "ctypes.dlopen", "ctypes.dlsym", "socket.__new__", "socket.connect", "socket.getaddrinfo",
    "webbrowser.open", "urllib.Request", "builtins.input", "shutil.copyfile", "shutil.rmtree", "mmap.__new__",
    "glob.glob", "tempfile.mkstemp", "sys.addaudithook", "cpython.run_command", "cpython.run_file",
)  # fmt: skip


def attack(folder: Path, count: int, seed: int) -> Tally:
    """Every payload in every form and place, whatever the count; the seed has nothing to choose."""
    return in_child(all_cases, folder, timeout=300)


def all_cases(folder: Path) -> Tally:
    tally, marker = Tally(), folder / "marker"
    _check_trap(tally, folder, marker)
    for name, program in payloads(marker).items():
        for form, content in wrapped(program):
            for allow_pickle in (False, True):
                for file, alone in _NAMES_IF_ALLOWED if allow_pickle else _NAMES:
                    place = _placed(folder, file, content, alone)
                    label = f"{name}, {form}, as {file}, {'allowed' if allow_pickle else 'not allowed'}"
                    opened = partial(open_checkpoint, place, allow_pickle)
                    clean(tally, label, trapped(opened, marker), must="refuse")
    return tally


def _placed(folder: Path, file: str, content: bytes, alone: bool) -> Path:
    place = folder / file.replace(".", "-")
    place.mkdir(exist_ok=True)
    models.overwrite(place / file, content)
    return place / file if alone else place


def _check_trap(tally: Tally, folder: Path, marker: Path) -> None:
    """A good pickle is read without a sound, and one that is loaded as a pickle makes the trap snap."""
    good = folder / "good.bin"
    torch.save({"a": torch.ones(2)}, good)
    reading = partial(_read_ones, good)
    reading()  # what is imported once, as is the encoding of a zip file's names
    "".encode("cp437")
    clean(tally, "a good pickle", trapped(reading, marker), must="accept")
    for name in ("builtins.exec", "builtins.open", "os.system"):
        program, seen = payloads(marker)[name], Tally()
        clean(seen, name, trapped(partial(pickle.loads, program), marker))
        clean(tally, f"the trap for {name}", partial(check, len(seen.broken) == 1, "is dead"), must="accept")


def _read_ones(path: Path) -> None:
    check(open_checkpoint(path, allow_pickle=True).read("a").tolist() == [1, 1], "other values than were saved")


def trapped(call: Callable[[], object], marker: Path) -> Callable[[], None]:
    """`call` with a breach for whatever it runs, writes or makes."""

    def judge(event: str, arguments: tuple[Any, ...]) -> str:
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR)
            return f"open of {path} to write" if writes else ""
        return f"{event} {str(arguments)[:80]}" if event in _EVENTS else ""

    def watched() -> None:
        try:
            with watching(judge) as seen:
                call()
        finally:
            made = marker.exists() or marker.is_symlink()
            marker.unlink(missing_ok=True)
            check(not seen and not made, f"ran {seen[:3]}" + (" and made the marker" if made else ""))

    return watched


if __name__ == "__main__":
    main(("pickles",))
