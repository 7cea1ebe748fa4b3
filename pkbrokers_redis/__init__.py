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
    "CandleAggregator": "pkbrokers_redis.consumers.aggregator",
    "InstrumentDataManager": "pkbrokers_redis.consumers.manager",
    "JSONWriter": "pkbrokers_redis.consumers.json_writer",
    "LocalCandleDatabase": "pkbrokers_redis.consumers.database",
    "CandleStore": "pkbrokers_redis.consumers.store",
    "HighPerformanceDataProvider": "pkbrokers_redis.consumers.provider",
    "KiteAuthenticator": "pkbrokers_redis.kite.authenticator",
    "KiteInstruments": "pkbrokers_redis.kite.instruments",
    "KiteTickerHistory": "pkbrokers_redis.kite.history",
    "InMemoryCandleStore": "pkbrokers_redis.consumers.memory_store",
    "KiteTokenWatcher": "pkbrokers_redis.consumers.watcher",
    "Mirror": "pkbrokers_redis.consumers.mirror",
    "PKTickBot": "pkbrokers_redis.bot.tick_bot",
    "TickProcessor": "pkbrokers_redis.consumers.tick_processor",
    "get_candle_store": "pkbrokers_redis.consumers.memory_store",
    "get_tick_processor": "pkbrokers_redis.consumers.tick_processor",
    "ZerodhaWebSocketClient": "pkbrokers_redis.compat.websocket_client",
    "ZerodhaWebSocketParser": "pkbrokers_redis.kite.parser",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)
