"""The picture of a model card: each expert's share of the update, layer by layer, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

_COLOURS = ("#4c78a8", "#f58518", "#e45756", "#72b7b2", "#54a24b", "#eeca3b", "#b279a2", "#ff9da6", "#9d755d")
_WIDTH, _LEFT, _TALL = 640, 56, 560
_STYLE = "text{font:12px sans-serif;fill:#333}@media(prefers-color-scheme:dark){text{fill:#ddd}}"


def shares_picture(labels: Sequence[str], shares: Mapping[str, Sequence[float]]) -> str:
    """One bar a layer, from top to bottom, in the experts' colours; `shares` as of `layer_shares`."""
    step = max(4, min(18, _TALL // max(1, len(shares))))
    columns = (_WIDTH - _LEFT) // 140
    top = 20 * (-(-len(labels) // columns)) + 24
    parts = [_text(0, 14, "Share of the update's energy, by layer and expert")]
    for t, label in enumerate(labels):
        left, line = _LEFT + 140 * (t % columns), 22 + 20 * (t // columns)
        short = label if len(label) <= 18 else label[:17] + "…"
        parts += [_bar(left, line, 12, 12, t), _text(left + 17, line + 11, short)]
    for row, (layer, values) in enumerate(shares.items()):
        y, x = top + row * step, float(_LEFT)
        if step >= 12 or row % (-(-12 // step)) == 0:
            parts.append(_text(0, y + min(step, 12), layer))
        for t, share in enumerate(values):
            parts.append(_bar(x, y, share * (_WIDTH - _LEFT), step - 1, t))
            x += share * (_WIDTH - _LEFT)
    height = top + step * len(shares) + 4
    size = f'viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    return "\n".join([head, f"<style>{_STYLE}</style>", *parts, "</svg>", ""])


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x}" y="{y}">{escape(text)}</text>'


def _bar(x: float, y: float, width: float, height: float, expert: int) -> str:
    colour = _COLOURS[expert % len(_COLOURS)]
    return f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}" fill="{colour}"/>'
