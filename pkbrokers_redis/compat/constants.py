"""Upstream's module constants, from our own tables."""

from __future__ import annotations

from importlib.util import find_spec
from zoneinfo import ZoneInfo

from pkbrokers_redis import __version__
from pkbrokers_redis.candles.model import DAY, DEFAULT_INTERVALS

VERSION = f"{__version__}+redis"
Imports = {"kiteconnect": find_spec("kiteconnect") is not None}
KOLKATA_TZ = ZoneInfo("Asia/Kolkata")

_ALIASES = {"1h": "60m", "1d": DAY}
DAY_SECONDS = 86_400

SUPPORTED_INTERVALS = {each.name: each.seconds or DAY_SECONDS for each in DEFAULT_INTERVALS}
SUPPORTED_INTERVALS |= {alias: SUPPORTED_INTERVALS[name] for alias, name in _ALIASES.items()}
MAX_CANDLES = {each.name: each.keep for each in DEFAULT_INTERVALS}
MAX_CANDLES |= {alias: MAX_CANDLES[name] for alias, name in _ALIASES.items()}

# The cash market's continuous session, for programs that ask for it; the pipeline itself reads calendar.json.
MARKET_OPEN_HOUR, MARKET_OPEN_MINUTE = 9, 15
MARKET_CLOSE_HOUR, MARKET_CLOSE_MINUTE = 15, 30

# Instrument tokens. Upstream's `instruments` has them as numbers, its websocket modules as lists of one.
NIFTY_50, BSE_SENSEX = 256265, 265
NIFTY_50_LIST, BSE_SENSEX_LIST = [NIFTY_50], [BSE_SENSEX]
OPTIMAL_TOKEN_BATCH_SIZE = 500  # upstream's; Kite takes 3,000 a connection
