"""A Redis-backed distributed tick cache for Zerodha Kite.

from pkbrokers_redis import CandleStore
CandleStore().get_candles("INFY", "5m", count=50)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pkbrokers_redis.consumers.store import CandleStore as CandleStore

__version__ = "0.1.0"

# Public name → module, imported on first use: a reader must not pay for the parts it does not touch.
_EXPORTS = {
    "CandleStore": "pkbrokers_redis.consumers.store",
    "ZerodhaWebSocketClient": "pkbrokers_redis.kite.socket",
    "ZerodhaWebSocketParser": "pkbrokers_redis.kite.parser",
}

__all__ = ["CandleStore", "ZerodhaWebSocketClient", "ZerodhaWebSocketParser"]


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)
