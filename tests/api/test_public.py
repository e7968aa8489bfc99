"""What `import acemerge` gives: names, a version, types, a signature with all options; rules of other packages."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from builders import PlainModel
from commands import failed, run

import acemerge
from acemerge.cli.options import Options
from acemerge.engine.merge_options import MergeOptions
from acemerge.engine.run_options import RunOptions
from acemerge.errors import UsageError
from acemerge.methods import DEFAULT, METHODS, rule_name
from acemerge.recipes.recipe import Recipe, make_recipe
from acemerge.recipes.tables import MethodSpec


def test_names_and_version() -> None:
    assert set(acemerge.__all__) <= set(dir(acemerge))
    assert acemerge.__version__ == importlib.metadata.version("acemerge")
    assert all(getattr(acemerge, name) is not None for name in dir(acemerge))
    assert (Path(acemerge.__file__).parent / "py.typed").is_file()


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, acemerge; dir(acemerge); acemerge.__version__; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_the_signature_of_merge_has_every_option() -> None:
    given = {"base", "experts", "method"}
    run_fields = {field.name for field in dataclasses.fields(RunOptions)}
    assert get_type_hints(MergeOptions).keys() == (Recipe.model_fields.keys() - given) | run_fields | {
        "weights",
        "on_progress",
    }


def test_the_default_is_the_rule_that_is_recommended() -> None:
    in_python = [acemerge.merge, acemerge.merge_state_dicts, acemerge.merge_models]
    in_python += [acemerge.merge_deltas, acemerge.merge_factors]
    assert {inspect.signature(function).parameters["method"].default for function in in_python} == {DEFAULT}
    asked = Options(base="b", expert=["e"]).asked_recipe()
    assert asked.method == make_recipe({"base": "b", "experts": ["e"]}).method == MethodSpec(name="auto")
    assert rule_name(DEFAULT) == "kron_auto"


def test_a_misspelt_option_is_answered_with_the_nearest_one(plain: PlainModel) -> None:
    """Whose it is: the function's, or the rule's."""
    for wrong, right in (("polcy", "policy"), ("overwrit", "overwrite"), ("weigths", "weights"), ("sed", "seed")):
        with pytest.raises(UsageError, match=f"option {wrong!r}: there is none of that name; did you mean `{right}`"):
            acemerge.merge("base", ["e1"], "ace", **{wrong: 1})  # type: ignore[call-overload]
    for name in ("weigths", "report_", "rulez"):
        with pytest.raises(UsageError, match=f"option {name!r}: there is none of that name; did you mean"):
            acemerge.merge_state_dicts(plain.base, plain.tuned, "ace", **{name: 1})  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="method 'ace': no parameter 'epz'; did you mean `eps`"):
        acemerge.merge_state_dicts(plain.base, plain.tuned, "ace", epz=1)


def test_a_report_is_five_lines(plain: PlainModel) -> None:
    base, experts = plain.save()
    report = acemerge.merge(base, experts, out=plain.root / "out")
    lines = repr(report).splitlines()
    assert len(lines) == 5
    assert lines[0] == f"MergeReport of {plain.root / 'out'}"
    assert lines[2] == "  tensors: 6 (3 by average, 2 by kron_auto, 1 by base)"
    assert lines[4] == "  warnings: none"


# --- rules of other packages ---------------------------------------------------------------------------------

PACKAGE = '''
from dataclasses import dataclass
from typing import ClassVar

import acemerge
from acemerge.methods.base import Scale


@dataclass(frozen=True)
class Half:
    """Half of the mean."""

    name: ClassVar[str] = "half"
    source: ClassVar[str] = "a package"
    needs: ClassVar[acemerge.Needs] = acemerge.Needs()
    scale: Scale = 1.0

    def merge(self, deltas, layer):
        return acemerge.LayerResult(self.scale * deltas.mean(0) / 2, {"status": "ok"})

    def operations(self, experts, rows, columns):
        return experts * rows * columns
'''


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Installed packages: one with a rule, others whose rules do not load."""
    site = tmp_path / "site"
    rules = {
        "half": "halves:Half",
        "broken": "no_such_module:Rule",
        "strange": "halves:PACKAGE",
        "wrong": "halves:Half",
    }
    (site / "halves-1.0.dist-info").mkdir(parents=True)
    (site / "halves-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: halves\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in rules.items()]
    (site / "halves-1.0.dist-info/entry_points.txt").write_text("\n".join(["[acemerge.methods]", *lines, ""]))
    (site / "halves.py").write_text(f"{PACKAGE}\nPACKAGE = 1\n")
    monkeypatch.syspath_prepend(site)
    before = dict(METHODS)
    yield site
    METHODS.clear()
    METHODS.update(before)
    sys.modules.pop("halves", None)


def test_a_rule_of_another_package_is_one_of_ours(
    packages: Path, plain: PlainModel, capsys: pytest.CaptureFixture[str]
) -> None:
    deltas = torch.randn(2, 4, 3)
    torch.testing.assert_close(acemerge.merge_deltas(deltas, "half").delta, deltas.mean(0) / 2)
    base, experts = plain.save()
    words = ["merge", "--base", base, "--expert", experts[0], "--method", "half", "--set", "scale=2"]
    assert run(capsys, *words, "-o", plain.root / "out", "--quiet") == (0, "", "")
    code, printed, _ = run(capsys, "methods", "half")
    assert (code, "Half of the mean." in printed) == (0, True)


def test_all_are_listed_and_one_that_fails_is_a_line(packages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, errors = run(capsys, "methods")
    assert code == 0
    assert re.search(r"Of other packages\n  half +Half of the mean\.\n", printed)
    assert len(errors.splitlines()) == 3
    assert "warning: method 'broken': package halves 1.0 does not load it (ModuleNotFoundError" in errors
    assert "half" in acemerge.METHODS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "broken",
            r"method 'broken': package halves 1\.0 does not load it \(ModuleNotFoundError: .*\); mend it or remove",
        ),
        ("strange", r"method 'strange': package halves 1\.0 .*\(TypeError: int is no rule\)"),
        ("wrong", r"method 'wrong': package halves 1\.0 .*\(TypeError: its rule is named 'half'\)"),
        ("hlaf", "method 'hlaf': no such rule; did you mean `half`"),
    ],
)
def test_one_that_fails_is_one_line(
    name: str, message: str, packages: Path, plain: PlainModel, capsys: pytest.CaptureFixture[str]
) -> None:
    base, experts = plain.save()
    failed(run(capsys, "plan", "--base", base, "--expert", experts[0], "--method", name), 2, message)
    with pytest.raises(UsageError, match=message):
        acemerge.merge_deltas(torch.ones(2, 3, 3), name)
