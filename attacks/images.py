"""Row 25: what lies in an image folder. Only named raster formats are decoded, from bytes, of so many pixels.

Nothing is run, nothing outside the folder is opened, nothing is waited for.
"""

from __future__ import annotations

import functools
import io
import os
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from acemerge.tasks.data import DataSource
from acemerge.tasks.images import open_images
from attacks.harness import Meter, Must, Tally, check, clean, main
from attacks.trap import confined

ROW = 25
SECONDS, NBYTES = 5.0, 600_000_000
_SIZE = (9, 7)

# Its name in the folder, what puts it there, and what must come of it.
Case = tuple[str, Callable[[Path], object], Must]


def attack(folder: Path, count: int, seed: int) -> Tally:
    """All cases, or `count` of them."""
    tally, cases = Tally(), list(_cases())
    _put(folder / "first", "a.png", _saved("PNG"))
    clean(tally, "an ordinary picture", partial(_decode, folder / "first", "accept"), must="accept")
    for i, (name, make, must) in enumerate(random.Random(seed).sample(cases, min(count, len(cases)))):
        place = folder / f"case {i}"
        _put(place, name, make)
        call = confined(place, partial(_decode, place, must))
        clean(tally, f"{getattr(make, 'label', '')} as {name}", call, must, Meter(SECONDS, NBYTES))
    return tally


def _put(place: Path, name: str, make: Callable[[Path], object]) -> None:
    (place / "cat").mkdir(parents=True)
    _saved("PNG")(place / "cat" / "0.png")
    make(place / "cat" / name)


def _decode(place: Path, must: Must) -> None:
    found = open_images(DataSource(str(place)), "image", "label", None)
    check(found.classes.tolist() == [0] * len(found.classes), "other classes came out")
    for i in range(len(found.classes)):
        image = found.image(i)
        if must == "accept":
            check((image.mode, image.size) == ("RGB", _SIZE), f"came out as {image}")


class _Bytes:
    """Writes a file, of content that is made only then if need be."""

    def __init__(self, label: str, content: bytes | Callable[[], bytes]) -> None:
        self.label, self._content = label, content

    def __call__(self, path: Path) -> None:
        path.write_bytes(self._content if isinstance(self._content, bytes) else self._content())


def _saved(kind: str, mode: str = "RGB", size: tuple[int, int] = _SIZE) -> _Bytes:
    out = io.BytesIO()
    Image.effect_noise(size, 50).convert(mode).save(out, kind)
    return _Bytes(f"{kind} {mode}", out.getvalue())


def _cases() -> Iterator[Case]:
    for kind, modes in _RASTER.items():
        for mode in modes:
            yield f"a.{kind.lower()}" if kind != "GIF" else "a.png", _saved(kind, mode), "accept"
    for i, kind in enumerate(_RASTER):  # the content decides, not the name
        yield ("a.png", "a.jpg", "a.bmp")[i % 3], _saved(kind), "accept"
    for kind in _OTHER:
        yield "a.png", _saved(kind), "refuse"
    for name, text in _TEXTS.items():
        yield "a.png", _Bytes(name, text), "refuse"
    whole = {kind: io.BytesIO() for kind in ("PNG", "JPEG", "WEBP")}
    for kind, out in whole.items():
        Image.effect_noise((64, 64), 50).convert("RGB").save(out, kind)
        for share in (0.1, 0.5, 0.9):
            content = out.getvalue()[: int(share * len(out.getvalue()))]
            yield "a.jpg", _Bytes(f"{share:.0%} of a {kind}", content), "refuse"
    for name, make in _BOMBS.items():
        yield "a.png", _Bytes(name, make), "refuse"
    for name, special in _SPECIAL.items():
        special.label = name  # type: ignore[attr-defined]
        yield "a.png", special, "refuse"


_RASTER = {
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"), "JPEG": ("RGB", "L", "CMYK"), "WEBP": ("RGB", "RGBA"),
    "BMP": ("RGB", "L", "1"), "PPM": ("RGB", "L", "1"), "TIFF": ("RGB", "RGBA", "L", "CMYK", "F"), "GIF": ("P", "L"),
}  # fmt: skip
_OTHER = ("EPS", "PDF", "ICO", "ICNS", "PCX", "SGI", "TGA", "DDS", "IM", "SPIDER", "JPEG2000")
_DRAWN = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 7\n(marker) (w) file closefile\nshowpage\n%%EOF\n"
_TEXTS = {
    "PostScript": _DRAWN,
    "PostScript behind a header of DOS": b"\xc5\xd0\xd3\xc6" + struct.pack("<IIIIIIH", 32, len(_DRAWN), 0, 0, 0, 0, 0)
    + bytes(2) + _DRAWN,
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "SVG with an entity": b'<!DOCTYPE s [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>',
    "MVG": b"push graphic-context\nimage over 0,0 0,0 \'https://127.0.0.1/x\'\n",
    "HTML": b"<html><script>alert(1)</script></html>",
    "a program": b"\x7fELF" + bytes(60),
    "a script": b"#!/bin/sh\ntouch marker\n",
    "a pickle": b"cos\nsystem\n(S'touch marker'\ntR.",
    "WMF": b"\xd7\xcd\xc6\x9a\x00\x00" + bytes(40),
    "FITS": b"SIMPLE  =                    T".ljust(2880),
    "an address": b"http://127.0.0.1/a.png",
    "nothing": b"",
    "one byte": b"\x89",
}  # fmt: skip


def _png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in (head, *chunks, (b"IEND", b"")))


@functools.cache
def _zeros() -> bytes:
    """256 MB of them, packed."""
    return zlib.compress(bytes(1 << 28))


def _packed(chunk: bytes) -> bytes:
    """A small picture behind a chunk of 256 MB."""
    return _png(*_SIZE, (chunk, b"a\0\0" + _zeros()), (b"IDAT", zlib.compress(b"\0")))


def _tiff() -> bytes:
    out = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(out, "TIFF", compression="group4")
    return out.getvalue()


# Small files of enormous pictures; to pack them takes seconds, so each is made where it is used.
_BOMBS: dict[str, Callable[[], bytes]] = {
    "a PNG of 3.6e9 pixels": lambda: _png(60_000, 60_000, (b"IDAT", _zeros())),
    "a PNG of 80 million pixels": lambda: _png(10_000, 8_000, (b"IDAT", _zeros())),
    "a PNG with a text of 256 MB": partial(_packed, b"zTXt"),
    "a PNG with a profile of 256 MB": partial(_packed, b"iCCP"),
    "a GIF of 4e9 pixels": lambda: b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6)
    + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x4c\x01\x00;",
    "a BMP of 3.6e9 pixels": lambda: b"BM"
    + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
    "a PPM of 1e10 pixels": lambda: b"P6 100000 100000 255\n" + bytes(100),
    "a TIFF of 9e8 pixels": _tiff,
}  # fmt: skip


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _outside(path: Path) -> None:
    _saved("PNG")(path.parents[2] / f"outside {path.parents[1].name}.png")
    path.symlink_to(path.parents[2] / f"outside {path.parents[1].name}.png")


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _folder(path: Path) -> None:
    path.mkdir()


def _hollow(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 31)


_SPECIAL: dict[str, Callable[[Path], object]] = {
    "a FIFO": _fifo, "a link to a device": _device, "a link to a picture outside": _outside, "a link to itself": _loop,
    "a folder": _folder, "a hollow file of 2 GB": _hollow,
}  # fmt: skip
FULL = len(list(_cases()))

if __name__ == "__main__":
    main(("images",))
