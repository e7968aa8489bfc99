"""Row 6: names that are paths, orders or control characters, of tensors and in both places of a weight map.

Real files lie where the names lead. Nothing outside the checkpoint's folder may be opened or listed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from rich.console import Console

import acemerge
from acemerge.checkpoints.folder import open_checkpoint
from acemerge.cli import plan
from acemerge.engine.opening import open_recipe
from acemerge.engine.run_options import RunOptions
from acemerge.recipes.recipe import make_recipe
from attacks import models
from attacks.harness import Must, Tally, check, clean, main
from attacks.trap import confined

ROW = 6

# Never a tensor's name: a way up or out, or a character that ends or changes a line.
_FORBIDDEN = (
    "..", "../x", "../../etc/passwd", "a/../b", "a/..", "../bait.safetensors", "./../bait.safetensors",
    "a/../../bait.safetensors", "/etc/passwd", "/", "//", "/bait.safetensors", "\\", "..\\bait.safetensors", "a\\b",
    "C:\\x", "\\\\server\\share\\x", "\\\\?\\C:\\x", "", "\0", "a\0b", "bait.safetensors\0", "\0../bait.safetensors",
    "a\nb", "\n", "a\rb", "a\r\nb", "a\x0bb", "a\x0cb", "a\tb", "\x1b[2J", "\x1b]0;title\x07", "\x07", "\x08\x08",
    "\x7f", "\x85", "a\u2028b", "a\u2029b", "\u202egpj.a", "\u2066a", "\u200bweight", "\ufeffweight", "\u00ad",
    "\ue000", "\ud800", "\udfff.weight", "x" * 513, "x" * 100_000, "../" * 50 + "etc/passwd", "a/" * 40 + "..",
)  # fmt: skip
# Odd, and never a file of a checkpoint; as a tensor's name text like any other.
_ODD = (
    "~", "~/.bashrc", "~root/x", "$HOME/x", "${HOME}", "$(id)", "`id`", "; id", "| id", "&& id", "-rf", "--help", "*",
    "?", "[a-z]", "{a,b}", "[red]x[/red]", "[/red]", "[link=x]", "%s%n", "%2e%2e%2fx", "{0}", "{name}",
    "file:///etc/passwd", "http://a/x.safetensors", "C:x", "con", "NUL.safetensors", "a//b", "./a", "a/./b", ".",
    "...", ".hidden", "a b", " a", "a ", "é.weight", "\uff41.weight", "😀", "<script>", "</td>", "| a |", "![x](y)",
    "'", '"', "--- a", "# a", "null", "__proto__", "__class__", "__metadata__x", "sub/model.safetensors",
    "model.safetensors/", "model.bin", "MODEL.SAFETENSORS", ".safetensors.", "model.safetensors.index.json",
    "config.json", "acemerge.json", "x" * 512,
)  # fmt: skip
_PATHS_TO_BAIT = 3
FULL = 2 + 4 * (len(_FORBIDDEN) + _PATHS_TO_BAIT) + 6 * len(_ODD)


def attack(folder: Path, count: int, seed: int) -> Tally:
    """All strings in all places, whatever the count; the seed has nothing to choose."""
    tally = Tally()
    bait = folder / "bait.safetensors"
    bait.write_bytes(models.content(models.TENSORS))
    forbidden = (*_FORBIDDEN, str(bait), f"../{bait.name}", os.path.relpath(bait, folder / "a" / "b"))
    good = models.write_single(folder / "good")
    acemerge.merge(good, [good], method="average", out=folder / "first")  # imports what is imported once
    with _working_in(folder):  # where a relative name would lead from
        clean(tally, "a merge of ordinary names", lambda: _merge(good, good, folder / "second"), must="accept")
        _trap_is_alive(tally, bait, good)
        for name in forbidden:
            _as_tensor(tally, folder, name, must="refuse")
            _in_index(tally, folder, name)
        for name in _ODD:
            _as_tensor(tally, folder, name, must="accept")
            _in_index(tally, folder, name)
    return tally


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _trap_is_alive(tally: Tally, bait: Path, good: Path) -> None:
    """That a file outside is opened must be seen, or nothing that follows says anything."""
    seen = Tally()
    clean(seen, "bait", confined(good, bait.read_bytes))
    clean(tally, "the trap", partial(check, len(seen.broken) == 1, "is dead"), must="accept")


# --- the places of a name -----------------------------------------------------------------------------------


def _as_tensor(tally: Tally, folder: Path, name: str, must: Must) -> None:
    """A tensor of this name; where it may be one, it is planned, merged and shown as well."""
    place = folder / "tensor"
    models.write_single(place, {name: ("F32", (2, 2)), "layers.0.weight": ("F32", (2, 2))})
    clean(tally, f"tensor {name[:60]!r}", confined(place, partial(open_checkpoint, place)), must)
    if must == "accept":
        clean(tally, f"plan of tensor {name[:60]!r}", confined(place, partial(_plan, place)), must="accept")
        clean(tally, f"merge of tensor {name[:60]!r}", lambda: _merge(place, place, folder / "named"), must="accept")


def _plan(place: Path) -> None:
    recipe = make_recipe({"base": str(place), "experts": [str(place)], "method": "average"})
    text = io.StringIO()
    plan.show(Console(file=text, width=2000), open_recipe(recipe, None, RunOptions()).plan)
    check(bool(text.getvalue()), "no plan was shown")


def _merge(base: Path, expert: Path, out: Path) -> None:
    """Merge, and find every tensor and nothing else in the output."""
    if out.exists():
        for path in sorted(out.rglob("*"), reverse=True):
            path.unlink()
        out.rmdir()
    confined(base.parent, lambda: acemerge.merge(base, [expert], method="average", out=out))()
    check(open_checkpoint(out).tensors == open_checkpoint(base).tensors, "other tensors came out")
    left = {path.name for path in out.rglob("*")}
    check(left == {"model.safetensors", "config.json", "README.md", "acemerge.json"}, f"left {sorted(left)}")


def _in_index(tally: Tally, folder: Path, name: str) -> None:
    """The name as a shard's, and as a tensor's that no shard has."""
    place = models.write_sharded(folder / "index")
    path = place / models.INDEX
    right = json.loads(path.read_text())["weight_map"]
    first = next(iter(right))
    maps = {"file": {**right, first: name}, "only file": dict.fromkeys(right, name)}
    maps["key"] = {**right, name: right[first]}
    for kind, weight_map in maps.items():
        models.overwrite(path, json.dumps({"weight_map": weight_map}).encode())
        label = f"{kind} {name[:60]!r} of a weight map"
        clean(tally, label, confined(place, partial(open_checkpoint, place)), must="refuse")


if __name__ == "__main__":
    main(("names",))
