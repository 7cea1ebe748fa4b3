"""Upstream's import paths: `import pkbrokers.kite.inMemoryCandleStore` finds the classes of this package.

A finder in front of all others creates the modules of MODULES. Their names are imported on first use. An
installed `pkbrokers` package still provides every module that MODULES does not list.
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

SHIM_FOLDER = Path(__file__).parent / "shim"  # holds a package `pkbrokers` that imports this one

_TYPES = "pkbrokers_redis.compat.upstream_types"
_STORE = "pkbrokers_redis.compat.candle_store"
_PROCESSOR = "pkbrokers_redis.compat.tick_processor"
_WEBSOCKET = "pkbrokers_redis.compat.websocket"


def _from(module: str, *names: str) -> dict[str, str]:
    return {name: f"{module}:{name}" for name in names}


_TICKS = _from(_TYPES, "Tick", "DepthEntry")
_INDICES = {"NIFTY_50": f"{_TYPES}:NIFTY_50_LIST", "BSE_SENSEX": f"{_TYPES}:BSE_SENSEX_LIST"}
_BATCHES = {**_from(_TYPES, "OPTIMAL_TOKEN_BATCH_SIZE"), **_INDICES}

# Upstream's module → its names → `module:attribute` here.
MODULES: dict[str, dict[str, str]] = {
    "pkbrokers": _from(_TYPES, "Imports"),
    "pkbrokers.kite": _from(_TYPES, "VERSION"),
    "pkbrokers.bot": {},
    "pkbrokers.kite.inMemoryCandleStore": {
        **_from(_STORE, "InMemoryCandleStore", "get_candle_store"),
        **_from(_TYPES, "Candle", "InstrumentCandles", "KOLKATA_TZ", "SUPPORTED_INTERVALS", "MAX_CANDLES"),
        **_from(_TYPES, "MAX_DAILY_ROWS", "MARKET_OPEN_HOUR", "MARKET_OPEN_MINUTE"),
        **_from(_TYPES, "MARKET_CLOSE_HOUR", "MARKET_CLOSE_MINUTE"),
    },
    "pkbrokers.kite.tickProcessor": {
        **_from(_TYPES, "KOLKATA_TZ"),
        **_from(_PROCESSOR, "TickProcessor", "get_tick_processor"),
        **_from("pkbrokers_redis", "HighPerformanceDataProvider"),
    },
    "pkbrokers.kite.candleAggregator": _from("pkbrokers_redis", "CandleAggregator"),
    "pkbrokers.kite.localCandleDatabase": {
        **_from("pkbrokers_redis", "LocalCandleDatabase"),
        **_from(_TYPES, "MAX_DAILY_ROWS"),
    },
    "pkbrokers.kite.datamanager": _from("pkbrokers_redis", "InstrumentDataManager"),
    "pkbrokers.kite.kiteTokenWatcher": {
        **_from("pkbrokers_redis", "KiteTokenWatcher"),
        "JSONFileWriter": "pkbrokers_redis:JSONWriter",
        "IST": f"{_TYPES}:KOLKATA_TZ",
        **_BATCHES,
    },
    "pkbrokers.kite.instruments": {
        **_from("pkbrokers_redis", "KiteInstruments"),
        **_from("pkbrokers_redis.kite.instruments", "Instrument"),
        **_from(_TYPES, "NIFTY_50", "BSE_SENSEX"),
    },
    "pkbrokers.kite.instrumentHistory": _from(
        "pkbrokers_redis.kite.history", "Historical_Interval", "KiteTickerHistory"
    ),
    "pkbrokers.kite.authenticator": _from("pkbrokers_redis", "KiteAuthenticator"),
    "pkbrokers.kite.ticks": _TICKS,
    "pkbrokers.kite.zerodhaWebSocketClient": {
        **_from(_WEBSOCKET, "ZerodhaWebSocketClient"),
        **_BATCHES,
        **_TICKS,
    },
    "pkbrokers.kite.zerodhaWebSocketParser": {
        **_from(_WEBSOCKET, "ZerodhaWebSocketParser"),
        **_INDICES,
        **_TICKS,
    },
    "pkbrokers.bot.tickbot": {**_from("pkbrokers_redis", "PKTickBot"), **_from(_TYPES, "KOLKATA_TZ")},
}


class CompatLoader(Loader):
    """Create a module of MODULES."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return an empty module that knows its names."""
        module = CompatModule(spec.name, f"{spec.name}, provided by pkbrokers-redis.")
        module.__all__ = sorted(MODULES[spec.name])
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: names are imported on first use."""


class CompatModule(ModuleType):
    """A module that imports each of its names on first use."""

    __all__: list[str]

    def __getattr__(self, name: str) -> Any:
        target = MODULES[self.__name__].get(name)
        if target is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        module, _, attribute = target.partition(":")
        value = getattr(importlib.import_module(module), attribute)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *MODULES[self.__name__]})


class CompatFinder(MetaPathFinder):
    """Find the modules of MODULES, and no other module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's spec; None leaves it to the next finder."""
        if fullname not in MODULES:
            return None
        is_package = any(name.startswith(f"{fullname}.") for name in MODULES)
        spec = ModuleSpec(fullname, CompatLoader(), origin="pkbrokers-redis", is_package=is_package)
        if is_package:
            spec.submodule_search_locations = _installed_folders(fullname, path)
        return spec


def install() -> None:
    """Provide upstream's imports from now on; a second call does nothing.

    Warn about modules of an installed PKBrokers that were imported earlier: code that holds them keeps them.
    """
    if any(isinstance(finder, CompatFinder) for finder in sys.meta_path):
        return
    early = [
        name for name in MODULES if name in sys.modules and not isinstance(sys.modules[name], CompatModule)
    ]
    imported = [name for name in early if hasattr(sys.modules[name], "__file__") and name.count(".") > 1]
    if imported:
        warnings.warn(
            f"{', '.join(imported)} had been imported before pkbrokers_redis.compat; import it first",
            stacklevel=3,
        )
    sys.meta_path.insert(0, CompatFinder())
    for name in early:
        del sys.modules[name]
        parent, _, child = name.rpartition(".")
        if parent in sys.modules and hasattr(sys.modules[parent], child):
            delattr(sys.modules[parent], child)


def _installed_folders(fullname: str, path: Sequence[str] | None) -> list[str]:
    """Return where an installed package of that name has its modules; [] if there is none."""
    folders = [folder for folder in (path or sys.path) if folder != str(SHIM_FOLDER)]
    try:
        spec = PathFinder.find_spec(fullname, folders)
    except (ImportError, ValueError):
        return []
    return list(spec.submodule_search_locations or ()) if spec is not None else []
