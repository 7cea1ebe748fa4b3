"""A Redis-backed distributed tick cache for Zerodha Kite.

from pkbrokers_redis import CandleStore
CandleStore().get_candles("INFY", "5m", count=50)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pkbrokers_redis.client.store import CandleStore as CandleStore

__version__ = "0.1.0"

# Public name → module, imported on first use: a reader must not pay for the parts it does not touch.
_EXPORTS = {
    "CandleAggregator": "pkbrokers_redis.files.resample",
    "InstrumentDataManager": "pkbrokers_redis.compat.data_manager",
    "JSONWriter": "pkbrokers_redis.compat.json_writer",
    "LocalCandleDatabase": "pkbrokers_redis.files.sqlite",
    "CandleStore": "pkbrokers_redis.client.store",
    "HighPerformanceDataProvider": "pkbrokers_redis.compat.data_provider",
    "KiteAuthenticator": "pkbrokers_redis.kite.auth",
    "KiteInstruments": "pkbrokers_redis.kite.instruments",
    "KiteTickerHistory": "pkbrokers_redis.kite.history",
    "InMemoryCandleStore": "pkbrokers_redis.compat.candle_store",
    "KiteTokenWatcher": "pkbrokers_redis.compat.token_watcher",
    "Mirror": "pkbrokers_redis.client.mirror",
    "PKTickBot": "pkbrokers_redis.bot.tick_bot",
    "TickProcessor": "pkbrokers_redis.compat.tick_processor",
    "get_candle_store": "pkbrokers_redis.compat.candle_store",
    "get_tick_processor": "pkbrokers_redis.compat.tick_processor",
    "ZerodhaWebSocketClient": "pkbrokers_redis.compat.websocket",
    "ZerodhaWebSocketParser": "pkbrokers_redis.compat.websocket",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)
