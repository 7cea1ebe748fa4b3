"""Candle rows → the frames and dicts that PKBrokers' users know.

frame   index `datetime` (Asia/Kolkata), columns open high low close (float64), volume (int64)
dict    timestamp last_tick_time open high low close volume oi tick_count is_complete

`fill=True`: empty intervals as flat rows. Redis holds none of them; they are made on reading.

A flat row stands at the last close with volume 0 and ticks 0 and the last open interest.
"""

from __future__ import annotations

import importlib
from functools import cache, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pkbrokers_redis.candles.calendar import Sessions
from pkbrokers_redis.candles.model import CANDLE_FIELDS, Candle, bucket_end_s, bucket_starts

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


CLOSED_DAYS_MAX = 10  # the longest row of days without trading that a look-back has to cross
DAY_SECONDS = 86_400


def fill_gaps(
    candles: list[Candle],
    sessions: Sessions,
    schedule: int,
    interval_seconds: int,
    count: int,
    now_s: int | None,
) -> list[Candle]:
    """The last `count` candles with a flat one in every empty bucket between them.

    `now_s` (already less the grace; None: do not look beyond the last candle) adds the buckets that have
    ended since, on the last candle's own day. `interval_seconds` 0 is the day.
    """
    if not candles or count < 1:
        return []
    starts_after = _trailing(candles[-1], sessions, schedule, interval_seconds, now_s)[-count:]
    filled = [_flat(start, candles[-1]) for start in reversed(starts_after)]
    for later, candle in zip([*candles[1:], None][::-1], candles[::-1], strict=True):
        if later is not None and later.start - candle.start > max(interval_seconds, 1):
            # Far enough back for the rows still wanted, not through months of a share that rarely trades.
            rows_left = count - len(filled)
            span = rows_left * (interval_seconds or DAY_SECONDS) * 4 + CLOSED_DAYS_MAX * DAY_SECONDS
            first = max(candle.start + 1, later.start - span)
            starts = bucket_starts(sessions, schedule, interval_seconds, first, later.start - 1)
            filled += [_flat(start, candle) for start in starts[::-1]]
        filled.append(candle)
        if len(filled) >= count:
            break
    return filled[:count][::-1]


def _trailing(
    last: Candle, sessions: Sessions, schedule: int, interval_seconds: int, now_s: int | None
) -> list[int]:
    day = sessions.day(schedule, last.start * 1000)
    if now_s is None or not last.start < now_s < day.day_end_ms // 1000 or not interval_seconds:
        return []
    starts = bucket_starts(sessions, schedule, interval_seconds, last.start + 1, now_s)
    return [start for start in starts if bucket_end_s(day, interval_seconds, start) <= now_s]


def _flat(start: int, before: Candle) -> Candle:
    close = before.close
    return Candle(start, close, close, close, close, 0, before.oi, 0)
