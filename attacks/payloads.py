"""Pickles that run something when they are loaded as pickles are: each would make a marker file, or worse.

`wrapped` gives the forms in which they come: bare, in the archive of torch.save, and in those of older releases.
"""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class _Call:
    """Pickles as a call of `function`, found by its name, with `arguments`."""

    module: str
    name: str
    arguments: tuple[Any, ...]

    def written(self, protocol: int = 2) -> bytes:
        return _header(protocol) + self.body(protocol) + b"."

    def body(self, protocol: int = 2) -> bytes:
        words = b"".join(_value(argument, protocol) for argument in self.arguments)
        return _found(self.module, self.name, protocol) + b"(" + words + b"tR"


def _header(protocol: int) -> bytes:
    return b"\x80" + bytes([protocol]) if protocol >= 2 else b""


def _found(module: str, name: str, protocol: int = 2) -> bytes:
    """The function of this name on the stack."""
    if protocol >= 4:
        return _value(module, protocol) + _value(name, protocol) + b"\x93"
    return f"c{module}\n{name}\n".encode()


def _value(value: Any, protocol: int = 2) -> bytes:
    """A plain value on the stack; a call within a call gives its result."""
    if isinstance(value, _Call):
        return value.body(protocol)
    if isinstance(value, str) and protocol >= 2:
        text = value.encode()
        return b"X" + struct.pack("<I", len(text)) + text
    if isinstance(value, tuple):
        return b"(" + b"".join(_value(item, protocol) for item in value) + b"t"
    return pickle.dumps(value, protocol=min(protocol, 2))[2 if protocol >= 2 else 0 : -1]


def payloads(marker: Path) -> dict[str, bytes]:
    """Pickle programs by name; each that can make a file makes `marker`."""
    touch, code = f"touch '{marker}'", f"open({str(marker)!r}, 'w').close()"
    opened = _Call("builtins", "open", (str(marker), "w"))
    calls = {**_direct(marker, touch, code, opened), **_by_libraries(marker, code, opened)}
    programs = {name: call.written() for name, call in calls.items()}
    for protocol in (0, 4):
        programs[f"os.system, protocol {protocol}"] = calls["os.system"].written(protocol)
    return programs | _tricks(opened, touch)


def _direct(marker: Path, touch: str, code: str, opened: _Call) -> dict[str, _Call]:
    """Calls of the system and of the interpreter."""
    return {
        "os.system": _Call("os", "system", (touch,)),
        "posix.system": _Call("posix", "system", (touch,)),
        "os.popen": _Call("os", "popen", (touch,)),
        "os.execv": _Call("os", "execv", ("/bin/sh", ("sh", "-c", touch))),
        "os.posix_spawn": _Call("os", "posix_spawn", ("/bin/sh", ("sh", "-c", touch), {})),
        "subprocess.Popen": _Call("subprocess", "Popen", (("touch", str(marker)),)),
        "subprocess.check_output": _Call("subprocess", "check_output", (("touch", str(marker)),)),
        "pty.spawn": _Call("pty", "spawn", (("touch", str(marker)),)),
        "builtins.exec": _Call("builtins", "exec", (code,)),
        "builtins.eval": _Call("builtins", "eval", (code,)),
        "builtins.open": opened,
        "builtins.compile": _Call("builtins", "exec", (_Call("builtins", "compile", (code, "x", "exec")),)),
        "a call in a call": _Call("builtins", "print", (_Call("builtins", "list", ((opened,),)),)),
    }  # fmt: skip


def _by_libraries(marker: Path, code: str, opened: _Call) -> dict[str, _Call]:
    """Calls of what a library offers."""
    script = marker.with_name("script.py")
    script.write_text(code)
    return {
        "pickle.loads": _Call("pickle", "loads", (opened.written(),)),
        "importlib": _Call("importlib", "import_module", ("antigravity",)),
        "runpy": _Call("runpy", "run_path", (str(script),)),
        "webbrowser": _Call("webbrowser", "open", ("http://127.0.0.1:9/",)),
        "urllib": _Call("urllib.request", "urlopen", ("http://127.0.0.1:9/",)),
        "socket": _Call("socket", "create_connection", (("127.0.0.1", 9),)),
        "timeit": _Call("timeit", "timeit", (code,)),
        "cProfile": _Call("cProfile", "run", (code,)),
        "code": _Call("code", "interact", ("",)),
        "ctypes": _Call("ctypes", "CDLL", ("libc.so.6",)),
        "shutil.copy": _Call("shutil", "copy", (str(script), str(marker))),
        "pathlib": _Call("pathlib", "Path", (str(marker),)),
        "os.symlink": _Call("os", "symlink", (str(script), str(marker))),
        "functools": _Call("functools", "reduce", (_Call("operator", "methodcaller", ("write", "x")), ((opened,),))),
        "numpy": _Call("numpy.testing._private.utils", "runstring", (code, {})),
        "numpy.load": _Call("numpy", "load", (str(script), None, True)),
        "numpy array": _Call("numpy.core.multiarray", "_reconstruct", (_Call("builtins", "type", ("a",)), (0,), b"b")),
        "torch.load": _Call("torch", "load", (str(script),)),
        "torch.jit": _Call("torch.jit", "load", (str(script),)),
        "torch.hub": _Call("torch.hub", "load", (str(marker.parent), "x")),
        "torch storage": _Call("torch.storage", "_load_from_bytes", (opened.written(),)),
        "torch inductor": _Call("torch._inductor.codecache", "_worker_compile", (code,)),
        "torch bottleneck": _Call("torch.utils.bottleneck.__main__", "run_autograd_prof", (code, {})),
        "torch config": _Call("torch.utils._config_module", "ConfigModule.load_config", (opened.written(),)),
        "a tensor's type": _Call("torch._tensor", "_rebuild_from_type_v2", (opened, opened, (), {})),
        "a memory bomb": _Call("builtins", "bytearray", (1 << 36,)),
    }  # fmt: skip


def _tricks(opened: _Call, touch: str) -> dict[str, bytes]:
    """Other opcodes that call or change something, and programs that hide behind a state dict."""
    command, call = _value(touch), opened.body()
    nothing = b"\x80\x02}q\x00"
    system = _Call("builtins", "getattr", (_Call("builtins", "__import__", ("os",)), "system"))
    return {
        "INST": b"(" + b"S'" + touch.replace("'", "").encode() + b"'\nios\nsystem\n.",
        "OBJ": b"\x80\x02(" + _found("os", "system") + command + b"o.",
        "NEWOBJ": b"\x80\x02" + _found("subprocess", "Popen") + b"(" + command + b"t\x81.",
        "BUILD of a state": b"\x80\x02" + _found("builtins", "set") + b")R" + call + b"b.",
        "BUILD of a table": b"\x80\x02" + _found("collections", "OrderedDict") + b")R" + call + b"b.",
        "an extension": b"\x80\x02\x82\x01.",
        "a persistent name": b"\x80\x02" + call + b"Q.",
        "a persistent storage": b"\x80\x02(" + _value("storage") + call + _value("0") + _value("cpu") + b"K\x02tQ.",
        "in a table": nothing + _value("a") + call + b"s.",
        "as a key": nothing + call + b"K\x01s.",
        "in a list": b"\x80\x02]" + call + b"a.",
        "thrown away": b"\x80\x02" + call + b"0}.",
        "before a table": b"\x80\x02" + call + b"}q\x00.",
        "in the memo": b"\x80\x02" + call + b"q\x01" + b"}h\x01K\x01s.",
        "after the end": b"\x80\x02}." + call + b".",
        "in hooks": b"\x80\x02" + _found("torch._utils", "_rebuild_parameter") + b"(N\x88" + call + b"tR.",
        "a name with a line end": b"\x80\x02cos\nsystem\n" + command + b"\x85R.",
        "a module by another name": b"\x80\x04" + _found("torch.serialization", "os.system", 4) + command + b"\x85R.",
        "getattr": b"\x80\x02" + system.body() + command + b"\x85R.",
        "hash without end": b"\x80\x02})" + b"q\x01h\x01\x86" * 60 + b"K\x01s.",
        "stack without end": b"\x80\x02" + b"}" * 3_000_000,
    }  # fmt: skip


# --- the forms in which they come ---------------------------------------------------------------------------


def wrapped(program: bytes) -> Iterator[tuple[str, bytes]]:
    """The files that carry a program."""
    yield "bare", program
    yield "archive", _archive(lambda records: {**records, "x/data.pkl": program})
    yield "archive with a second pickle", _archive(lambda records: {**records, "x/data/data.pkl": program})
    yield "archive with a later twin", _archive(lambda records: records, twin=program)
    yield "TorchScript", _archive(lambda records: {**records, "x/code/__torch__.py": b"1", "x/constants.pkl": program})
    yield "compressed", _archive(lambda records: {**records, "x/data.pkl": program}, compression=zipfile.ZIP_DEFLATED)
    yield "tar", _tar(program)
    yield "before 1.6", _legacy(program)
    yield "before an archive", program + _archive(lambda records: records)


def _archive(
    change: Callable[[Mapping[str, bytes]], Mapping[str, bytes]],
    twin: bytes | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    """What torch.save writes of one tensor, with changed records."""
    saved = io.BytesIO()
    torch.save({"a": torch.ones(2)}, saved)
    with zipfile.ZipFile(saved) as archive:
        records = {name.replace("archive", "x", 1): archive.read(name) for name in archive.namelist()}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in change(records).items():
            archive.writestr(name, content)
        if twin is not None:
            archive.writestr("x/data.pk_", twin)
    content = out.getvalue()
    return content.replace(b"x/data.pk_", b"x/data.pkl")  # zipfile itself would warn of a twin


def _tar(program: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            member = tarfile.TarInfo(name)
            member.size = len(program)
            archive.addfile(member, io.BytesIO(program))
    return out.getvalue()


def _legacy(program: bytes) -> bytes:
    """The sequence of pickles that torch.save wrote before its archive."""
    saved = io.BytesIO()
    torch.save({"a": torch.ones(2)}, saved, _use_new_zipfile_serialization=False)
    content = saved.getvalue()
    head = io.BytesIO(content)
    for _ in range(3):  # the magic number, the protocol, the system
        pickle.load(head)
    return content[: head.tell()] + program
