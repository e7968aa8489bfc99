"""Images of letters: the characters of one script, drawn from matplotlib's own fonts, turned, stretched and noisy."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

SIDE = 28
_DRAWN = 48
_FONTS = ("Sans", "Sans-Bold", "Sans-Oblique", "Serif", "Serif-Bold", "SansMono", "Serif-Italic", "SansMono-Oblique")
SCRIPTS = {
    "latin": (0x41, 0x7B),
    "greek": (0x391, 0x3CA),
    "cyrillic": (0x410, 0x450),
    "armenian": (0x531, 0x588),
    "georgian": (0x10D0, 0x10F6),
    "hebrew": (0x5D0, 0x5EB),
    "arabic": (0x621, 0x64B),
    "lao": (0xE81, 0xEB0),
}
# What the base sees: signs that are in no script above.
SIGNS = {
    "accented": (0xC0, 0x180),
    "phonetic": (0x250, 0x2B0),
    "arrows": (0x2190, 0x2200),
}


@dataclass(frozen=True)
class Letters:
    """Drawn characters (N, 48, 48) in 0..1 and their classes (N,); one image for each font that has the character."""

    images: Tensor
    classes: Tensor

    @property
    def count(self) -> int:
        return int(self.classes.max()) + 1


@functools.cache
def letters(*ranges: tuple[int, int]) -> Letters:
    folder = Path(matplotlib.get_data_path()) / "fonts/ttf"
    files = [folder / f"DejaVu{name}.ttf" for name in _FONTS]
    known = [set(TTFont(file).getBestCmap()) for file in files]
    fonts = [ImageFont.truetype(str(file), 34) for file in files]
    codes = [
        code for first, last in ranges for code in range(first, last) if code in known[0] and chr(code).isprintable()
    ]
    images, classes = [], []
    for number, code in enumerate(codes):
        for font, has in zip(fonts, known, strict=True):
            if code in has:
                images.append(_draw(chr(code), font))
                classes.append(number)
    return Letters(torch.stack(images), torch.tensor(classes))


def _draw(text: str, font: ImageFont.FreeTypeFont) -> Tensor:
    image = Image.new("L", (_DRAWN, _DRAWN))
    left, top, right, bottom = font.getbbox(text)
    place = ((_DRAWN - left - right) / 2, (_DRAWN - top - bottom) / 2)
    ImageDraw.Draw(image).text(place, text, fill=255, font=font)
    return torch.tensor(list(image.tobytes()), dtype=torch.float32).view(_DRAWN, _DRAWN) / 255


def batch(of: Letters, count: int, generator: torch.Generator, side: int = SIDE) -> tuple[Tensor, Tensor]:
    """(count, 1, side, side) and classes: characters by chance, each turned, sheared, moved, faded and under noise."""
    rows = torch.randint(len(of.images), (count,), generator=generator)
    draw = torch.randn(count, 7, generator=generator)
    turn = torch.eye(2).repeat(count, 1, 1) * (1.15 + 0.08 * draw[:, 0, None, None])
    turn[:, 0, 1] += 0.12 * draw[:, 1]
    turn[:, 1, 0] += 0.12 * draw[:, 2]
    theta = torch.cat([turn, 0.06 * draw[:, 3:5, None]], 2)
    grid = nn.functional.affine_grid(theta, [count, 1, side, side], align_corners=False)
    seen = nn.functional.grid_sample(of.images[rows, None], grid, align_corners=False)
    fade = (1 + 0.3 * draw[:, 5]).clamp(0.3, 1.5).view(-1, 1, 1, 1)
    noise = torch.randn(seen.shape, generator=generator)
    return seen * fade + 0.1 * noise, of.classes[rows]
