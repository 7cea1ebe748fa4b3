"""Upstream's modules and what their names are here. A name more is a row, a module more a key.

Values are `module:attribute` of ours, imported when somebody asks for the name. What is not in this table
comes from an installed PKBrokers, where there is one.
"""

from __future__ import annotations

_STORE = "pkbrokers_redis.compat.candle_store"
_VIEWS = "pkbrokers_redis.compat.instrument_views"
_PROCESSOR = "pkbrokers_redis.compat.tick_processor"
_CONSTANTS = "pkbrokers_redis.compat.constants"

_INDICES = {
    "NIFTY_50": f"{_CONSTANTS}:NIFTY_50_LIST",
    "BSE_SENSEX": f"{_CONSTANTS}:BSE_SENSEX_LIST",
}
_BATCHES = {"OPTIMAL_TOKEN_BATCH_SIZE": f"{_CONSTANTS}:OPTIMAL_TOKEN_BATCH_SIZE", **_INDICES}
_HOURS = ("MARKET_OPEN_HOUR", "MARKET_OPEN_MINUTE", "MARKET_CLOSE_HOUR", "MARKET_CLOSE_MINUTE")

_TICKS = {
    "Tick": "pkbrokers_redis.compat.websocket:Tick",
    "DepthEntry": "pkbrokers_redis.compat.websocket:DepthEntry",
}

MODULES: dict[str, dict[str, str]] = {
    "pkbrokers": {"Imports": f"{_CONSTANTS}:Imports"},
    "pkbrokers.kite": {"VERSION": f"{_CONSTANTS}:VERSION"},
    "pkbrokers.bot": {},
    "pkbrokers.kite.inMemoryCandleStore": {
        "InMemoryCandleStore": f"{_STORE}:InMemoryCandleStore",
        "get_candle_store": f"{_STORE}:get_candle_store",
        "Candle": f"{_VIEWS}:Candle",
        "InstrumentCandles": f"{_VIEWS}:InstrumentCandles",
        "KOLKATA_TZ": f"{_CONSTANTS}:KOLKATA_TZ",
        "SUPPORTED_INTERVALS": f"{_CONSTANTS}:SUPPORTED_INTERVALS",
        "MAX_CANDLES": f"{_CONSTANTS}:MAX_CANDLES",
        "MAX_DAILY_ROWS": f"{_STORE}:MAX_DAILY_ROWS",
        **{name: f"{_CONSTANTS}:{name}" for name in _HOURS},
    },
    "pkbrokers.kite.tickProcessor": {
        "KOLKATA_TZ": f"{_CONSTANTS}:KOLKATA_TZ",
        "TickProcessor": f"{_PROCESSOR}:TickProcessor",
        "get_tick_processor": f"{_PROCESSOR}:get_tick_processor",
        "HighPerformanceDataProvider": "pkbrokers_redis.compat.data_provider:HighPerformanceDataProvider",
    },
    "pkbrokers.kite.candleAggregator": {
        "CandleAggregator": "pkbrokers_redis:CandleAggregator",
    },
    "pkbrokers.kite.localCandleDatabase": {
        "LocalCandleDatabase": "pkbrokers_redis:LocalCandleDatabase",
        "MAX_DAILY_ROWS": f"{_STORE}:MAX_DAILY_ROWS",
    },
    "pkbrokers.kite.datamanager": {
        "InstrumentDataManager": "pkbrokers_redis:InstrumentDataManager",
    },
    "pkbrokers.kite.kiteTokenWatcher": {
        "KiteTokenWatcher": "pkbrokers_redis:KiteTokenWatcher",
        "JSONFileWriter": "pkbrokers_redis:JSONWriter",
        "IST": f"{_CONSTANTS}:KOLKATA_TZ",
        **_BATCHES,
    },
    "pkbrokers.kite.instruments": {
        "KiteInstruments": "pkbrokers_redis:KiteInstruments",
        "Instrument": "pkbrokers_redis.kite.instruments:Instrument",
        "NIFTY_50": f"{_CONSTANTS}:NIFTY_50",
        "BSE_SENSEX": f"{_CONSTANTS}:BSE_SENSEX",
    },
    "pkbrokers.kite.instrumentHistory": {
        "Historical_Interval": "pkbrokers_redis.kite.history:Historical_Interval",
        "KiteTickerHistory": "pkbrokers_redis.kite.history:KiteTickerHistory",
    },
    "pkbrokers.kite.authenticator": {
        "KiteAuthenticator": "pkbrokers_redis:KiteAuthenticator",
    },
    "pkbrokers.kite.ticks": _TICKS,
    "pkbrokers.kite.zerodhaWebSocketClient": {
        "ZerodhaWebSocketClient": "pkbrokers_redis.compat.websocket:ZerodhaWebSocketClient",
        **_BATCHES,
        **_TICKS,
    },
    "pkbrokers.kite.zerodhaWebSocketParser": {
        "ZerodhaWebSocketParser": "pkbrokers_redis.compat.websocket:ZerodhaWebSocketParser",
        **_INDICES,
        **_TICKS,
    },
    "pkbrokers.bot.tickbot": {
        "PKTickBot": "pkbrokers_redis:PKTickBot",
        "KOLKATA_TZ": f"{_CONSTANTS}:KOLKATA_TZ",
    },
}
