"""Upstream's import paths, answered by us: `import pkbrokers.kite.inMemoryCandleStore` finds our classes.

A finder in front of all others makes the modules of `table`, whose names are imported when they are asked
for. A `pkbrokers` package that is installed keeps all the modules that the table does not have.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from pkbrokers_redis.compat.table import MODULES

SHIM_FOLDER = Path(__file__).parent / "shim"  # holds a package `pkbrokers` that imports this one


class CompatLoader(Loader):
    """Makes a module of the table."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = CompatModule(spec.name, f"{spec.name}, answered by pkbrokers-redis.")
        module.__all__ = sorted(MODULES[spec.name])
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing runs: names come when they are asked for."""


class CompatModule(ModuleType):
    """A module whose names are ours, imported on first use."""

    __all__: list[str]

    def __getattr__(self, name: str) -> Any:
        target = MODULES[self.__name__].get(name)
        if target is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        where, _, attribute = target.partition(":")
        value = getattr(importlib.import_module(where), attribute)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *MODULES[self.__name__]})


class CompatFinder(MetaPathFinder):
    """Finds the modules of the table, and nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in MODULES:
            return None
        is_package = any(name.startswith(f"{fullname}.") for name in MODULES)
        spec = ModuleSpec(fullname, CompatLoader(), origin="pkbrokers-redis", is_package=is_package)
        if is_package:
            spec.submodule_search_locations = _installed(fullname, path)
        return spec


def install() -> None:
    """Answer upstream's imports from now on. Doing it twice is doing it once.

    Warns of modules of an installed PKBrokers that were imported before: whoever has them keeps them.
    """
    if any(isinstance(finder, CompatFinder) for finder in sys.meta_path):
        return
    early = [name for name in MODULES if name in sys.modules and not _is_ours(sys.modules[name])]
    modules = [name for name in early if hasattr(sys.modules[name], "__file__") and name.count(".") > 1]
    if modules:
        warnings.warn(
            f"{', '.join(modules)} had been imported before pkbrokers_redis.compat; import it first",
            stacklevel=3,
        )
    sys.meta_path.insert(0, CompatFinder())
    for name in early:
        del sys.modules[name]
        parent, _, child = name.rpartition(".")
        if parent in sys.modules and hasattr(sys.modules[parent], child):
            delattr(sys.modules[parent], child)


def _is_ours(module: ModuleType) -> bool:
    return isinstance(module, CompatModule)


def _installed(fullname: str, path: Sequence[str] | None) -> list[str]:
    """Where an installed package of that name has its modules; [] without one. Our own shim is none."""
    folder = str(SHIM_FOLDER)
    try:
        spec = PathFinder.find_spec(fullname, [place for place in (path or sys.path) if place != folder])
    except (ImportError, ValueError):
        return []
    return list(spec.submodule_search_locations or ()) if spec is not None else []
