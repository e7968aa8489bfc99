"""Row 30: patterns in an adapter's configuration that Python's `re` takes for ever to match, many of them, long names.

Each adapter is opened or refused in one line, within a second. Where `re` itself is done in time, the modules that get
a value of their own are those that it says.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from acemerge.checkpoints.lora import open_adapter
from attacks import models
from attacks.harness import Meter, Must, Tally, check, clean, main

ROW = 30
SECONDS, NBYTES = 1.0, 200_000_000
_ALPHA, _OWN = 2.0, 8.0  # of the configuration, and of what a pattern matches

# A label, keys of the configuration, and what must come of it.
Case = tuple[str, Mapping[str, Any], Must]


def attack(folder: Path, count: int, seed: int) -> Tally:
    """All cases, or `count` of them, over modules of ordinary names and of long ones."""
    tally, cases = Tally(), list(_cases())
    shelves = {name: _adapter(folder / name, modules) for name, modules in _MODULES.items()}
    _open(shelves["ordinary"], {})  # imports what is imported once
    for label, config, must in random.Random(seed).sample(cases, min(count, len(cases))):
        for shelf, path in shelves.items():
            where = f"{label}, {shelf} names"
            own = must if shelf == "ordinary" or must == "refuse" else "either"
            clean(tally, where, partial(_open, path, config, own == "accept"), own, Meter(SECONDS, NBYTES))
    return tally


def _adapter(folder: Path, modules: Sequence[str]) -> Path:
    """Factors of rank 1 and a head that was saved whole, without a configuration."""
    folder.mkdir(parents=True)
    tensors = {f"base_model.model.{module}.lora_A.weight": ("F32", (1, 6)) for module in modules}
    tensors |= {f"base_model.model.{module}.lora_B.weight": ("F32", (8, 1)) for module in modules}
    tensors |= {f"base_model.model.{module}.modules_to_save.weight": ("F32", (2, 2)) for module in _WHOLE}
    (folder / "adapter_model.safetensors").write_bytes(models.content(tensors))
    return folder


def _open(folder: Path, config: Mapping[str, Any], compare: bool = False) -> None:
    content = {"peft_type": "LORA", "r": 1, "lora_alpha": _ALPHA, **config}
    models.overwrite(folder / "adapter_config.json", json.dumps(content).encode())
    adapter = open_adapter(folder).adapter
    assert adapter is not None
    patterns = config.get("alpha_pattern", {})
    for name, update in adapter.updates.items() if compare else ():
        module = name.removesuffix(".weight")
        found = any(re.match(rf"(?:.*\.)?(?:{pattern})$", module) for pattern in patterns)
        check(update.scaling == (_OWN if found else _ALPHA), f"{module} has a scaling of {update.scaling}")


_PROJECTIONS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
_MODULES = {
    "ordinary": [f"model.layers.{i}.{name}" for i in range(80) for name in _PROJECTIONS],
    "long": [f"layers.{i}.{'a' * 450}" for i in range(80)],
    "nested": [f"{i}.{'a.' * 200}a" for i in range(80)],
}
_WHOLE = ("lm_head", *(f"{'b.' * 100}score{i}" for i in range(20)))
_SIXTEEN = "(" + "|".join("a" * length for length in range(1, 17)) + ")"
# `re` is done with these at once.
_PLAIN = (
    "q_proj", "layers.0.self_attn.q_proj", ".*q_proj", ".*", r"layers\.\d+\.mlp\..*", r"(q|v)_proj", "^model.*up_proj",
    r"layers\.(1|2|3)\..*", r"model\.layers\.[0-9]+\.self_attn\.[qv]_proj", "a", r".*\.[1-4]\.mlp\.(up|down)_proj",
    r"layers\.\d{2}\..*_proj", "(?:self_attn|mlp)\\.\\w+", ".*attn.*", "nothing", "layers\\.7?1\\..*", "mlp.up_proj$",
)  # fmt: skip
# And for ever at these, or at putting them together; some are refused, for what they take or what they are.
_HOSTILE = (
    _SIXTEEN * 2, _SIXTEEN * 4, _SIXTEEN * 8, f"({_SIXTEEN * 4})*b", "(a+)+b", "(a*)*b", "(a|a)*b", "(a|aa)+b",
    "((a+)+)+b", "(.*a){12}b", "(.*a){25}b", "(.*.*)*b", ".*" * 40 + "b", "(.*)" * 30 + "b", "(a?){60}a{60}b",
    "a?" * 60 + "a" * 60 + "b", "a*" * 100 + "b", "(a{0,9}){0,9}b", "((a{0,9}){0,9}){0,9}b", "(([a-z])+.)+b",
    "(" * 80 + "a" + ")*" * 80 + "b", "(" * 400 + "a" + ")" * 400, "(?:" * 90 + "a" + "|b)+" * 90, "(.|a|[ab])*b",
    r"(\w|\d)*b", r"(\w+\.)*b", r"(.*\.)*(.*\.)*(.*\.)*b", r"(\w*\.?)*b", r"^(([a-z_0-9]+)\.?)+\$", "(a|b|ab)*c",
    "(x+x+)+y", "(ab?b?)*c", "([^b]*a)*b", "(|a)*b", "(|a|)+b", "(a??)*b", "(a*?)*?b", "(a+?)+?b", ".*a.*a.*a.*a.*b",
    "|".join("a" * n for n in range(1, 40)), "|".join(f"({'a?' * n})" for n in range(1, 25)), "(a|.)*" * 20 + "b",
    "(.{1,100}){1,40}b", "(.{0,50}b?){0,50}c", ".{0,4000}b", "[a-z]{1,1000}b", "(.+.+)+=", "(a.?)*" * 30 + "b",
)  # fmt: skip
_REFUSED = (
    r"(a)\1", r"(a+)\1b", "(?=a)a", "(?!a)b", "(?<=a)b", "(?i)A", "(?x) a", r"\bq", r"(?P<n>a)(?P=n)", "(?(1)a|b)",
    "a{6000}", "(a{100}){100}", "((a{50}){50}){50}", "a{99999999999}", "a" * 1001, "a(", "[", "*a", "(?P<", "\\",
    "(" * 499 + ")" * 499, ".*" * 400 + "(", "(?>a+)b" + "\\", "a{2,1}",
)  # fmt: skip


def _cases() -> Iterator[Case]:
    for pattern in _PLAIN:
        yield f"alpha {pattern!r}", {"alpha_pattern": {pattern: _OWN}}, "accept"
    for i, pattern in enumerate(_HOSTILE):
        table = ("alpha_pattern", "rank_pattern")[i % 2]
        yield f"{table} {pattern[:60]!r}", {table: {pattern: 1}}, "either"
    for pattern in _REFUSED:
        yield f"alpha {pattern[:60]!r}", {"alpha_pattern": {pattern: 1}}, "refuse"
    named = [f"model.layers.{i}.{name}" for i in range(80) for name in _PROJECTIONS]
    yield "each module by its name", {"alpha_pattern": dict.fromkeys(named, _OWN)}, "accept"
    yield (
        "each module by its name, twice",
        {t: dict.fromkeys(named, 1) for t in ("rank_pattern", "alpha_pattern")},
        ("either"),
    )
    for i, many in enumerate(_many()):
        yield f"many patterns, {i}", {"rank_pattern": dict.fromkeys(many, 1)}, "either"
    for key in ("modules_to_save", "target_parameters"):
        for i, names in enumerate(_names()):
            yield f"{key}, {i}", {key: names}, "either"


def _many() -> Iterator[list[str]]:
    yield [f"layers.{i}.q" for i in range(99_999)]
    yield [f"x{i}.*" for i in range(50_000)]
    yield [f"(a|b{i})*c" for i in range(5000)]
    yield [f".*a.*b.*{i}" for i in range(2000)]
    yield [f"{_SIXTEEN * 4}{i}" for i in range(100)]
    yield ["a" * (i % 900 + 1) + str(i) for i in range(3000)]
    yield [f"({'|'.join(str(i + j) for j in range(100))})" for i in range(500)]
    yield [f"a{{{i}}}b" for i in range(1000)]


def _names() -> Iterator[list[str]]:
    yield [f"x{i}.y" for i in range(99_999)]
    yield ["a" * (i % 500) + f".{i}" for i in range(20_000)]
    yield [f"{'a.' * 100}{i}" for i in range(20_000)]
    yield [f"gate{i}" for i in range(99_999)]
    yield ["lm_head", "mlp.experts.gate_up_proj", "a" * 100_000, "(a+)+b"]


FULL = len(list(_cases()))

if __name__ == "__main__":
    main(("patterns",))
