"""Attacks on acemerge's inputs and outputs: each is run in full by `python -m attacks`, reduced by the tests."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def modules() -> list[ModuleType]:
    """Every module here that attacks, in the order of the rows of RELIABILITY.md."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.name != "__main__"]
    found = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return sorted((module for module in found if "attack" in vars(module)), key=lambda module: int(module.ROW))
