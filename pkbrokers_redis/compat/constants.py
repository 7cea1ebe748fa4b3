"""Upstream's module constants, from our own tables."""

from __future__ import annotations

from importlib.util import find_spec
from zoneinfo import ZoneInfo

from pkbrokers_redis import __version__
from pkbrokers_redis.core.intervals import DAY, DEFAULT_INTERVALS

VERSION = f"{__version__}+redis"
Imports = {"kiteconnect": find_spec("kiteconnect") is not None}
KOLKATA_TZ = ZoneInfo("Asia/Kolkata")

_ALIASES = {"1h": "60m", "1d": DAY}
DAY_SECONDS = 86_400

SUPPORTED_INTERVALS = {each.name: each.seconds or DAY_SECONDS for each in DEFAULT_INTERVALS}
SUPPORTED_INTERVALS |= {alias: SUPPORTED_INTERVALS[name] for alias, name in _ALIASES.items()}
MAX_CANDLES = {each.name: each.keep for each in DEFAULT_INTERVALS}
MAX_CANDLES |= {alias: MAX_CANDLES[name] for alias, name in _ALIASES.items()}
