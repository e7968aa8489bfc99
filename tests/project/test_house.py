"""The house: every module has a floor, imports lead downward only, and the picture shows what stands."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from examples import ROOT
from house import EXCEPTIONS, FLOORS, PICTURE, floor_of, picture

SOURCE = ROOT / "src/acemerge"


def name_of(file: Path) -> str:
    """A module's name below `acemerge`: `engine.opening`, `engine` for a package's own file, `__init__`."""
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts if len(parts) == 1 or parts[-1] != "__init__" else parts[:-1])


MODULES = {name_of(file): file for file in SOURCE.rglob("*.py")}


def room_of(module: str) -> str:
    return module.split(".")[0]


def imported(code: str, importer: str, modules: object = MODULES) -> Iterator[str]:
    """The modules of ours that some code imports, wherever the statement stands."""
    assert isinstance(modules, dict)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{importer}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, _, inner = name.partition(".")
            if package != "acemerge":
                continue
            while inner and inner not in modules:
                inner = inner.rpartition(".")[0]
            yield inner or "__init__"


def climbing(code: str, importer: str, modules: object = MODULES) -> list[tuple[str, str]]:
    """The imports that lead to another room that does not lie below."""
    found = [(importer, target) for target in imported(code, importer, modules) if room_of(target) != room_of(importer)]
    return [(a, b) for a, b in found if (floor_of(room_of(a)) or 0) <= (floor_of(room_of(b)) or 99)]


def test_every_module_has_a_floor_and_every_room_a_module() -> None:
    assert {room_of(module) for module in MODULES} == {room for floor in FLOORS for room in floor.rooms}


def test_imports_lead_downward_only() -> None:
    found = {edge for module, file in MODULES.items() for edge in climbing(file.read_text(), module)}
    assert found == EXCEPTIONS.keys()


@pytest.mark.parametrize(
    "code",
    [
        "from acemerge.api import merge",
        "from acemerge import api",
        "import acemerge.api",
        "def late():\n    from acemerge.api import merge",
        "from acemerge import merge",  # of the package itself, which is further up
        "from acemerge.output.card import model_card",
        "from acemerge.models.roles import Roles",  # beside it
        "from acemerge.attic import dust",  # which has no floor
    ],
)
def test_an_import_that_climbs_is_seen(code: str) -> None:
    assert climbing(code, "methods.new", MODULES | {"attic": Path()})
    assert not climbing("from acemerge.linalg.gram import energies\nimport torch", "methods.new")


def test_few_modules_stay_outside_the_rooms() -> None:
    outside = {module for module in MODULES if (SOURCE / f"{module}.py").is_file() and "." not in module}
    assert len(outside - {"__init__", "__main__", "api", "errors", "shapes"}) <= 3


def test_opening_models_loads_nothing_from_above() -> None:
    code = "import sys, acemerge.engine.opening; print(*{m.split('.')[1] for m in sys.modules if m[:9] == 'acemerge.'})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    above = {room for floor in FLOORS for room in floor.rooms if (floor_of(room) or 0) > (floor_of("engine") or 0)}
    assert not above & set(loaded)


def test_the_picture_is_drawn_from_the_table() -> None:
    assert PICTURE.read_text() == picture(), "draw it anew: python docs/hooks/house.py"
