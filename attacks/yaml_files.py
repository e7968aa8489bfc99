"""Row 27: hostile YAML, of others in a model's card and of users in recipes and task files.

A card that cannot be read has no licence, and costs nothing else; a recipe or a task file gets one clean line. Each
case may take a second and 200 MB.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from acemerge.output.origin import origin_of
from acemerge.recipes.recipe import load_recipe
from acemerge.tasks.task_file import load_tasks
from attacks.harness import Meter, Must, Tally, check, clean, main

ROW = 27
SECONDS, NBYTES = 1.0, 200_000_000


def _laughs(levels: int, width: int) -> str:
    """Lists of lists of one list: `width ** levels` of the first."""
    lines = ["&a0 [lol, lol]"] + [f"&a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return f"[{', '.join(lines)}]"


def _merges(levels: int) -> str:
    tables = ["&m0 {a: 1}"] + [f"&m{i} {{<<: [*m{i - 1}, *m{i - 1}], k{i}: 1}}" for i in range(1, levels)]
    return f"[{', '.join(tables)}]"


# Values that are no text, number or table of any use, as they stand behind a key.
_VALUES = {
    "a date that is none": "2024-13-45", "a date": "2024-12-24", "a time": "2001-12-14t21:59:43.10-05:00",
    "a boolean that is none": "!!bool maybe", "an integer that is none": '!!int ""',
    "an integer of words": "!!int one", "a float that is none": "!!float x",
    "a date by its tag": "!!timestamp 2024-13-45", "bytes": "!!binary 'a'", "a set": "!!set {a, b}",
    "pairs": "!!pairs [a: 1]", "an order": "!!omap [a: 1]", "code": "!!python/object/apply:os.system [id]",
    "a name in Python": "!!python/name:os.system ''", "a tag of its own": "!mine {a: 1}",
    "a tag by address": "!<tag:a,2000:b> c", "6,000 digits": "9" * 6000,
    "6,000 hexadecimal digits": "0x" + "f" * 6000, "6,000 binary digits": "0b" + "1" * 6000,
    "digits by colons": "1" + ":59" * 3000, "digits by lines": "1" + "_" * 6000,
    "a float of 6,000 digits": "0." + "1" * 6000, "1e999999": "1.0e+999999", "infinity": ".inf", "no number": ".nan",
    "nine levels of nine": _laughs(9, 9), "two levels of three hundred": _laughs(2, 300),
    "forty levels of two": _laughs(40, 2), "an alias to itself": "&a [*a]", "an alias to nothing": "*nothing",
    "a table of itself": "&a {a: *a}", "merge keys": _merges(30), "a merge key": "{<<: {a: 1}}",
    "a value key": "{=: 1}", "100,000 levels": "[" * 100_000, "100,000 tables": "{a: " * 100_000,
    "100,000 entries": f"[{'a, ' * 100_000}]", "100,000 keys": f"{{{', '.join(f'k{i}: 1' for i in range(100_000))}}}",
    "a key that is a list": "{[a]: b}", "a key that is a table": "{{a: b}: c}", "a key twice": "{a: 1, a: 2}",
    "a word of half a megabyte": "x" * (1 << 19), "an anchor of half a megabyte": "&" + "x" * (1 << 19) + " a",
    "NUL": '"\\0"', "an escape to nowhere": '"\\ud800"', "a line break": '"a\\nb"', "colours": '"\\e[31m"',
    "half a quote": '"a', "half a list": "[a", "a tab": "\t- a", "a directive": "a\n%YAML 9.9\n---\nb",
    "a second document": "a\n---\nb", "a comment": "# a", "nothing": "",
    "comments of half a megabyte": "a\n" + "# \n" * (1 << 17), "spaces": " " * (1 << 19) + "a",
}  # fmt: skip
_RECIPE = "base: a\nexperts: [b]\nmethod: average\n"
_TASK = "kind: classification\n    name: a\n    data: d.tsv\n    text: s\n    label: y\n"
Case = tuple[str, Callable[[], object], Must]


def attack(folder: Path, count: int, seed: int) -> Tally:
    """Every value in every place, or `count` of them."""
    tally = Tally()
    (folder / "good.yaml").write_text(_RECIPE)
    clean(tally, "a good recipe", partial(load_recipe, folder / "good.yaml", {}), must="accept")
    cases = list(_cases(folder))
    for label, call, must in random.Random(seed).sample(cases, min(count, len(cases))):
        clean(tally, label, call, must, Meter(SECONDS, NBYTES))
    return tally


def _cases(folder: Path) -> Iterator[Case]:
    for i, (name, value) in enumerate(_VALUES.items()):
        yield (
            f"{name} in a card",
            partial(_card, folder / f"card {i}", f"license: mit\ndate: {value}\n", None),
            "accept",
        )
        yield f"{name} for a licence", partial(_card, folder / f"licence {i}", f"license: {value}\n", False), "accept"
        for key in ("base", "scale", "method", "experts", "seed"):
            lines = [line for line in _RECIPE.splitlines() if not line.startswith(f"{key}:")]
            text = "\n".join([f"{key}: {value}", *lines, ""])
            yield f"{name} for {key}", partial(_recipe, folder / f"{key} {i}.yaml", text), "either"
        text = f"tasks:\n  - {_TASK}    limit: {value}\n"
        yield f"{name} in a task", partial(_tasks, folder / f"task {i}.yaml", text), "either"
    for i, name in enumerate(("9" * 6000, "2024-13-45", "!!bool maybe", '!!int ""', _laughs(9, 9), "[" * 100_000)):
        yield f"{name[:12]} alone as a recipe", partial(_recipe, folder / f"alone {i}.yaml", name), "refuse"


def _card(folder: Path, metadata: str, whole: bool | None) -> None:
    """The licence is read where the card can be, and is never anything but text."""
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\n{metadata}---\n# A model\n")
    found = origin_of(str(folder), folder).license
    check(found in (None, "mit") if whole is None else isinstance(found, str | None), f"the licence is {found!r}")


def _recipe(path: Path, text: str) -> None:
    path.write_text(text)
    load_recipe(path, {}).model_dump_json()  # as it goes to the manifest


def _tasks(path: Path, text: str) -> None:
    path.write_text(text)
    load_tasks(path).model_dump_json()


FULL = len(list(_cases(Path())))

if __name__ == "__main__":
    main(("yaml_files",))
