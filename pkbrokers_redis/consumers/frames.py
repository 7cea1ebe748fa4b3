"""Candle rows → the frames and dicts that PKBrokers' users know.

frame   index `datetime` (Asia/Kolkata), columns open high low close (float64), volume (int64)
dict    timestamp last_tick_time open high low close volume oi tick_count is_complete
"""

from __future__ import annotations

import importlib
from functools import cache, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pkbrokers_redis.core.model import CANDLE_FIELDS, Candle

try:
    # Public since pandas 3: 8 µs a frame where the constructor takes 60.
    _api: Any = importlib.import_module("pandas.api.internals")
except ImportError:  # pandas 2
    _api = None

Floats = npt.NDArray[np.float64]

COLUMNS = ("open", "high", "low", "close", "volume")
EMPTY_COLUMNS = ("timestamp", *COLUMNS)  # of a frame without rows, as upstream has it
NANOSECONDS = 1_000_000_000
INDEXES_MAX = 512  # a few KB each

NO_ROWS: Floats = np.empty((0, len(CANDLE_FIELDS)))

_OPEN, _VOLUME = CANDLE_FIELDS.index("open"), CANDLE_FIELDS.index("volume")
_KOLKATA = pd.DatetimeTZDtype("ns", "Asia/Kolkata")
_PRICES_AT, _VOLUME_AT = np.arange(4), np.array([4])


@cache
def _columns() -> pd.Index[str]:
    return pd.Index(COLUMNS)


@lru_cache(maxsize=INDEXES_MAX)
def _index(starts: bytes) -> pd.DatetimeIndex:
    """The index of these starts (float64, epoch seconds). Most instruments share one; none ever changes."""
    stamps: Any = np.frombuffer(starts, np.float64).astype(np.int64) * NANOSECONDS
    return pd.DatetimeIndex(stamps, dtype=_KOLKATA, name="datetime")


def ohlcv_frame(rows: Floats) -> pd.DataFrame:
    """float64[n, 8] → the frame above, its own copy; without rows an empty one with upstream's columns.

    `volume` keeps its fractions where a market trades them.
    """
    if not len(rows):
        return pd.DataFrame(columns=list(EMPTY_COLUMNS))
    index = _index(rows[:, 0].tobytes())
    cells = rows[:, _OPEN : _VOLUME + 1].T.copy()
    volumes: Any = cells[4:].astype(np.int64)
    if not np.array_equal(volumes, cells[4:]):
        volumes = cells[4:]
    if _api is None:
        prices = dict(zip(COLUMNS, cells[:4], strict=False))
        return pd.DataFrame({**prices, "volume": volumes[0]}, index=index)
    blocks = [(cells[:4], _PRICES_AT), (volumes, _VOLUME_AT)]
    frame: pd.DataFrame = _api.create_dataframe_from_blocks(blocks, index, _columns())
    return frame


def candle_dict(candle: Candle, is_complete: bool, last_tick_time: int = 0) -> dict[str, Any]:
    """A candle as upstream's `Candle.to_dict()`. `last_tick_time` is 0 where it is not known."""
    return {
        "timestamp": candle.start,
        "last_tick_time": last_tick_time,
        "open": candle.open,
        "high": candle.high,
        "low": candle.low,
        "close": candle.close,
        "volume": candle.volume,
        "oi": candle.oi or 0,
        "tick_count": candle.ticks,
        "is_complete": is_complete,
    }
