"""YAML that others wrote: the values that PyYAML gives, and nothing that grows, runs or is a date."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from acemerge.checkpoints.yaml_text import MAX_NODES, YamlError, parse_yaml

SAME = """
words: [plain, 'quoted', "escaped \\n", yes it is, 1.2.3, 08]
numbers: [1, -3, +1, 0x1F, 017, 0b11, 1_000, 1.5, .5, 1., 1.5e-3, 1e-5, -.inf, !!float 1, !!int 3]
truths: [yes, No, TRUE, off, ~, null, ]
text: |
  two
  lines
folded: >-
  one
  line
? a key
: {nested: {twice: []}}
anchored: &a {x: [1, 2]}
again: *a
1: a number
"""
REFUSED = {
    "no boolean": ("a: !!bool maybe", "line 1: 'maybe' is no bool"),
    "no integer": ("a: b\nc: !!int ''", "line 2: '' is no int"),
    "6,000 digits": (f"a: {'9' * 6000}", "a number of 6,000 characters is too long"),
    "code": ("!!python/object/apply:os.system [id]", "the tag .* is not read here"),
    "merge keys": ("<<: {a: 1}", "merge keys .* are not read here"),
    "itself": ("a: &a [*a]", r"the alias \*a stands for nothing before it"),
    "a key twice": ("a: 1\na: 2", "line 2: the key 'a' stands there twice"),
    "two documents": ("a: 1\n---\nb: 2", "a second document begins"),
    "a table as a key": ("{{a: b}: c}", "a key must be a word or a number"),
    "depth": ("[" * 1000, "nested more than 64 levels deep"),
    "not closed": ("[a", "did not find expected"),
}


def test_values_are_those_of_pyyaml() -> None:
    assert parse_yaml(SAME) == yaml.safe_load(SAME)
    assert parse_yaml("# nothing") is None


@pytest.mark.parametrize(
    "pack", sorted(Path("src/acemerge/reproduction").glob("**/*.yaml")), ids=lambda path: path.stem
)
def test_our_own_files_are_read_alike(pack: Path) -> None:
    assert parse_yaml(pack.read_text()) == yaml.safe_load(pack.read_text())


@pytest.mark.parametrize("text", ["2024-12-24", "2024-13-45", "2001-12-14t21:59:43.10-05:00", "1:30"])
def test_dates_and_times_are_text(text: str) -> None:
    assert parse_yaml(f"date: {text}") == {"date": text}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    text, message = REFUSED[case]
    with pytest.raises(YamlError, match=message) as caught:
        parse_yaml(text)
    assert str(caught.value).isprintable()


def test_an_alias_counts_with_all_that_it_stands_for() -> None:
    """Up to the bound, and not one value more."""

    def repeated(count: int) -> Any:
        return parse_yaml(f"[&a [{'x, ' * 99}], {'*a, ' * count}]")

    assert repeated(200) == [["x"] * 99] * 201
    with pytest.raises(YamlError, match="200 aliases"):
        repeated(201)
    doubled = ["&a0 [x, x]", *(f"&a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))]
    for levels in (12, 13, 14, 40):
        text = f"[{', '.join(doubled[:levels])}]"
        if 4 * 2**levels - levels - 3 <= MAX_NODES:  # the values of all levels together, each with its list
            assert len(parse_yaml(text)) == levels
        else:
            with pytest.raises(YamlError, match="more than 50,000 values"):
                parse_yaml(text)
