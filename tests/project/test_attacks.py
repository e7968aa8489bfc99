"""Every attack at a reduced count, and that the attacks themselves can tell a breach."""

from __future__ import annotations

import os
import pickle
import random
import re
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from PIL import Image

import attacks
from acemerge.checkpoints import config, files, folder, header, weight_files
from acemerge.checkpoints.patterns import Pattern
from acemerge.cli import text as cli_text
from acemerge.engine import one_layer
from acemerge.errors import AcemergeError, CheckpointError
from acemerge.recipes import yaml_file
from acemerge.tasks import images as task_images
from attacks import (
    bombs,
    data_paths,
    harness,
    headers,
    images,
    layout,
    links,
    models,
    mutate,
    names,
    oversize,
    patterns,
    payloads,
    pickles,
    shards,
    shown,
    trap,
    truncation,
    weights,
    yaml_files,
)
from attacks.harness import Meter, Tally, check, clean, in_child

# Cases in a test run; the others have a few.
COUNTS = {"headers": 100, "oversize": 20, "layout": 200, "truncation": 100, "shards": 72, "pickles": 200, "bombs": 6}
COUNTS |= {"changes": 4, "kills": 24, "os_faults": 20, "races": 5, "same_bytes": 1, "bit_flips": 300, "interrupts": 4}
COUNTS |= {"images": 81, "data_paths": 60, "yaml_files": 200, "limits": 9, "patterns": 12, "weights": 30, "sizes": 60}
COUNTS |= {"store_addresses": 40}
FEW = 2


def _name(module: ModuleType) -> str:
    return module.__name__.removeprefix("attacks.")


def _every_attack() -> list[Any]:
    """Those on real servers take up to half a minute a case; tests of Ray and of stores have their kinds of faults."""
    slow = ("ray_faults", "store_faults", "store_changes", "store_uploads")
    return [
        pytest.param(module, id=_name(module), marks=[pytest.mark.torture] if _name(module) in slow else [])
        for module in attacks.modules()
    ]


@pytest.mark.parametrize("module", _every_attack())
def test_an_attack_breaks_nothing(module: ModuleType, tmp_path: Path) -> None:
    count = min(COUNTS.get(_name(module), FEW), module.FULL)
    tally = module.attack(tmp_path, count, 0)
    assert tally.broken == []
    assert tally.tried == tally.refused + tally.valid
    assert tally.tried >= count
    if module.ROW < 10 or module.ROW in (
        25,
        26,
        27,
    ):  # bad input: some of it must be refused, and what is good accepted
        assert tally.refused > 0
        assert tally.valid > 0


def test_every_row_of_bad_input_is_attacked() -> None:
    assert {module.ROW for module in attacks.modules()} >= {
        *range(1, 11),
        18,
        19,
        20,
        *range(22, 28),
        *range(29, 32),
        *range(35, 38),
    }
    assert all(module.FULL >= FEW for module in attacks.modules())


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        harness.main(("layout",), ["--count", "50", "--seed", "3"])
    assert caught.value.code == 0
    heading, rule, line = capsys.readouterr().out.splitlines()
    assert heading == "| row | attack | tried | refused cleanly | valid | broken | seconds |"
    assert set(rule) == {"|", "-"}
    assert line.startswith("| 3 | layout | 51 | 50 | 1 | 0 |")


# --- the harness counts a breach -----------------------------------------------------------------------------


def _raise(error: BaseException) -> None:
    raise error


REFUSAL = CheckpointError("a", "b", "c")


class _TwoLinesError(AcemergeError):
    def __str__(self) -> str:
        return "a\nb"


@pytest.mark.parametrize(
    ("call", "options", "outcome"),
    [
        (lambda: _raise(REFUSAL), {}, "refused"),
        (lambda: _raise(REFUSAL), {"must": "refuse"}, "refused"),
        (lambda: _raise(REFUSAL), {"must": "accept"}, "broken"),
        (lambda: None, {}, "valid"),
        (lambda: None, {"must": "accept"}, "valid"),
        (lambda: None, {"must": "refuse"}, "broken"),
        (lambda: _raise(KeyError("a")), {}, "broken"),
        (lambda: _raise(KeyError("a")), {"must": "refuse"}, "broken"),
        (lambda: _raise(SystemExit(3)), {}, "broken"),
        (lambda: _raise(MemoryError()), {}, "broken"),
        (lambda: _raise(_TwoLinesError("a", "b", "c")), {}, "broken"),
        (lambda: check(False, "wrong"), {}, "broken"),
        (lambda: bytearray(b"x") * 50_000_000, {"meter": Meter(9, 20_000_000)}, "broken"),
        (lambda: bytearray(b"x") * 5_000_000, {"meter": Meter(9, 20_000_000)}, "valid"),
        (lambda: sum(range(3_000_000)), {"meter": Meter(0.001, 1 << 40)}, "broken"),
    ],
)
def test_an_outcome_is_counted(call: Callable[[], object], options: dict[str, Any], outcome: str) -> None:
    tally = Tally()
    clean(tally, "a case", call, **options)
    counted = {"refused": tally.refused, "valid": tally.valid, "broken": len(tally.broken)}
    assert counted == {"refused": 0, "valid": 0, "broken": 0, outcome: 1}
    assert tally.tried == 1


@pytest.mark.parametrize(
    ("limit", "call"), [("LIMIT_WAITED", lambda: time.sleep(0.1)), ("LIMIT_SECONDS", lambda: sum(range(30_000_000)))]
)
def test_what_takes_too_long_is_a_breach(
    limit: str, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, limit, 0.05)
    tally = Tally()
    clean(tally, "a case", call)
    assert len(tally.broken) == 1


def die() -> Tally:
    os.kill(os.getpid(), signal.SIGSEGV)
    return Tally()


def hang() -> Tally:
    time.sleep(60)
    return Tally()


def fail() -> Tally:
    raise KeyError("a")


@pytest.mark.parametrize(("call", "message"), [(die, "SIGSEGV"), (hang, "no answer"), (fail, "KeyError")])
def test_a_child_that_gives_no_tally_is_a_breach(call: Callable[[], Tally], message: str) -> None:
    (breach,) = in_child(call, timeout=60 if call is not hang else 1).broken
    assert message in breach


# --- every attack finds the breach that it looks for ---------------------------------------------------------

Breach = Callable[[pytest.MonkeyPatch], None]


def _anything_goes(module: ModuleType, name: str, answer: Any = None) -> Breach:
    """A check that is no longer made."""
    return lambda monkeypatch: monkeypatch.setattr(module, name, lambda *_: answer)


def _all_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "check_name", lambda *_: None)


def _links_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (config, folder, weight_files):
        monkeypatch.setattr(module, "contained", lambda root, name: (root / name).resolve())


def _any_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight map may name any file, and it is read."""
    monkeypatch.setattr(weight_files, "_check_index", lambda *_: None)
    monkeypatch.setattr(folder, "weight_files", lambda root, names, kind: [root / "../bait.safetensors"])


def _index_after_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are read before the index is held against them."""
    checked = weight_files._check_index

    def late(root: Path, places: Any, kind: Any) -> None:
        for info in places.values():
            info.file.read_bytes()
            descriptor = files.open_for_reading(info.file)
            files.read_into(descriptor, [memoryview(bytearray(info.spec.nbytes))], info.offset, info.file)
            files.close(descriptor)
        checked(root, places, kind)

    monkeypatch.setattr(weight_files, "_check_index", late)


def _unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "MAX_PARTS", 1 << 60)
    monkeypatch.setattr(config, "MAX_PARTS", 1 << 60)
    monkeypatch.setattr(weight_files, "MAX_PARTS", 1 << 60)


def _not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that stands twice is taken as Python takes it."""
    monkeypatch.setattr(header, "Counter", None)


def _any_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_images, "_FORMATS", None)


def _images_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_images, "contained", lambda root, name: (root / name).resolve())


def _paths_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` does with a value of a column of images."""
    monkeypatch.setattr(task_images, "_of_value", lambda value, _: Image.open(value["path"]))


def _constructed(monkeypatch: pytest.MonkeyPatch) -> None:
    """YAML as PyYAML makes objects of it."""
    monkeypatch.setattr(yaml_file, "parse_yaml", yaml.safe_load)
    monkeypatch.setattr(yaml_files, "_VALUES", {"a boolean that is none": "!!bool maybe"})


def _unbounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patterns as `re` matches them, of these one that takes seconds."""
    monkeypatch.setattr(Pattern, "matches", lambda self, name, _: re.match(rf"(.*\.)?({self.text})$", name) is not None)
    monkeypatch.setattr(patterns, "_cases", lambda: [("hostile", {"alpha_pattern": {"(a|a)*b": 1}}, "either")])
    monkeypatch.setattr(patterns, "_MODULES", {"ordinary": [f"layers.0.{'a' * 26}"]})


def _as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal is sent what there is."""
    monkeypatch.setattr(cli_text, "printable", str)
    monkeypatch.setattr(shown, "NAMES", ("\x1b[31mred", "\x9b31m"))


def _no_weights_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_layer, "check_weights", lambda *_: None)
    monkeypatch.setattr(weights, "METHODS", {"task_arithmetic": weights.METHODS["task_arithmetic"]})


def _oversized(path: Path) -> Tally:
    tally = Tally()
    label, make = next(text for text in oversize._headers() if "1.5" in text[0])
    file = path / "x.safetensors"
    oversize.try_case(tally, oversize.Case(label, file, make, partial(folder.open_file, file)))
    return tally


BREACHES: dict[str, tuple[Breach, Callable[[Path], Tally]]] = {
    "headers, layout": (_anything_goes(header, "_check_layout"), lambda path: headers.batch(path, 0, 400, 0)),
    "headers, index": (_anything_goes(weight_files, "_check_index"), lambda path: headers.batch(path, 0, 400, 0)),
    "headers, another error": (_not_repeated, lambda path: headers.batch(path, 0, 400, 0)),
    "oversize": (_unlimited, lambda path: _oversized(path)),
    "layout": (_anything_goes(header, "_check_layout"), lambda path: layout.attack(path, 40, 0)),
    "truncation": (_anything_goes(header, "_check_layout"), lambda path: truncation.attack(path, 40, 0)),
    "shards": (_anything_goes(weight_files, "_check_index"), lambda path: shards.attack(path, 40, 0)),
    "shards, late": (_index_after_tensors, lambda path: shards.attack(path, 40, 0)),
    "names": (_all_names, lambda path: names.attack(path, 1, 0)),
    "names, a file outside": (_any_file, lambda path: names.attack(path, 1, 0)),
    "links": (_links_followed, lambda path: links.attack(path, 1, 0)),
    "images": (_any_format, lambda path: images.attack(path, images.FULL, 0)),
    "images, outside": (_images_outside, lambda path: images.attack(path, images.FULL, 0)),
    "yaml_files": (_constructed, lambda path: yaml_files.attack(path, yaml_files.FULL, 0)),
    "patterns": (_unbounded, lambda path: patterns.attack(path, patterns.FULL, 0)),
    "shown": (_as_it_is, lambda path: shown.attack(path, 2, 1)),
    "weights": (_no_weights_checked, lambda path: weights.attack(path, 60, 0)),
    "data_paths": (_paths_followed, lambda path: data_paths.attack(path, data_paths.FULL, 0)),
}


@pytest.mark.parametrize("case", BREACHES)
def test_an_attack_finds_a_check_that_is_gone(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    breach, attack = BREACHES[case]
    breach(monkeypatch)
    assert attack(tmp_path).broken


@pytest.mark.parametrize("name", ["os.system", "builtins.open", "os.symlink", "INST", "a tensor's type", "in hooks"])
def test_a_pickle_that_runs_is_found(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    program = payloads.payloads(marker)[name]
    tally = Tally()
    clean(tally, name, pickles.trapped(partial(pickle.loads, program), marker))
    assert tally.broken


def test_a_bomb_that_goes_off_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "MAX_CONFIG", 1 << 28)
    place = models.write_single(tmp_path / "model")
    os.truncate(place / "config.json", 1 << 27)
    tally = Tally()
    clean(tally, "config", partial(folder.open_checkpoint, place), "refuse", Meter(60, bombs.NBYTES))
    assert tally.broken


def test_the_trap_sees_what_it_watches_and_sleeps_after(tmp_path: Path) -> None:
    with trap.watching(lambda event, arguments: event if event == "open" else "") as seen:
        (tmp_path / "a").write_text("b")
    (tmp_path / "c").write_text("d")
    assert seen == ["open"]


def test_damage_leaves_the_list_of_hostile_values_as_it_is() -> None:
    before = repr(mutate.HOSTILE)
    rng = random.Random(0)
    for _ in range(3000):
        tree = mutate.parsed(b'{"a": [1, {"b": [2, 3]}], "c": "d"}')
        for _ in range(3):
            tree = mutate.mutate(tree, rng)
        mutate.written(tree)
    assert repr(mutate.HOSTILE) == before
