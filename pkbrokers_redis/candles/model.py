"""The shapes that all packages share: tick batches, candles, segments, intervals and their buckets.

A batch of ticks is one `float64[n, 10]` array, one row a tick, NaN where a packet has no such field.
A float64 holds every number of Kite's exactly (tokens and volumes are 32 bits, times 41).

Intervals are one table: adding `2h` is one row in `DEFAULT_INTERVALS`. Buckets are anchored to the session's
open, as on Kite: NSE's `60m` start at 09:15, 10:15 … 15:15, and the last one ends with the session. Times are
epoch seconds. An interval of 0 seconds is the day candle: one bucket from first open to last close.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pkbrokers_redis.candles.calendar import Day, Sessions
from pkbrokers_redis.errors import SettingsError, UnknownInterval

TickArray = npt.NDArray[np.float64]

# Columns of a tick batch; the first nine are the tick row of the streams, in its order.
TOKEN, LAST_PRICE, LAST_QUANTITY, VOLUME, OI, DAY_OPEN, DAY_HIGH, DAY_LOW, TIME_MS, AT_MS = range(10)
TICK_FIELDS = (
    "token",
    "last_price",
    "last_quantity",
    "volume",
    "oi",
    "day_open",
    "day_high",
    "day_low",
    "time_ms",
)
TICK_WIDTH = 9
BATCH_WIDTH = 10

TOKEN_MAX = 2**32 - 1
TIME_MIN_MS = 631_152_000_000  # 1990: a smaller trade time is no time
TIME_MAX_MS = 4_102_444_800_000  # 2100
NUMBER_MAX = 1e12  # more than any price, quantity or volume of Kite's 32-bit fields
FUTURE_MAX_MS = 60_000  # a trade time later than its receipt by more is a clock jump: use the receive time

SEGMENTS = {
    1: "NSE",
    2: "NFO",
    3: "CDS",
    4: "BSE",
    5: "BFO",
    6: "BCD",
    7: "MCX",
    8: "MCXSX",
    9: "INDICES",
}
SEGMENT_INDICES = 9

CANDLE_FIELDS = ("start", "open", "high", "low", "close", "volume", "oi", "ticks")

# The ninth element of a row that is not a whole candle. Arrays hold its index in FLAG_NAMES.
FLAG_NAMES = ("", "partial", "gap", "backfilled")
FLAG_WHOLE, FLAG_PARTIAL, FLAG_GAP, FLAG_BACKFILLED = range(len(FLAG_NAMES))


class Candle(NamedTuple):
    """One candle as it stands in Redis: `[start, open, high, low, close, volume, oi, ticks(, flag)]`.

    `start` is epoch seconds, prices are rupees, `ticks` counts the ticks that changed it. `flag` is
    "" for a whole candle, else "partial", "gap" or "backfilled".
    """

    start: int
    open: float
    high: float
    low: float
    close: float
    volume: float
    oi: float | None
    ticks: int
    flag: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return self._asdict()


@dataclass(frozen=True, slots=True)
class Interval:
    """One candle interval. `seconds` 0 means one candle a session; `keep` completed rows are kept."""

    name: str
    seconds: int
    keep: int


DAY = "day"

DEFAULT_INTERVALS: tuple[Interval, ...] = (
    Interval("1m", 60, 390),
    Interval("2m", 120, 195),
    Interval("3m", 180, 130),
    Interval("4m", 240, 98),
    Interval("5m", 300, 78),
    Interval("10m", 600, 39),
    Interval("15m", 900, 26),
    Interval("30m", 1800, 13),
    Interval("60m", 3600, 7),
    Interval(DAY, 0, 365),
)

ALIASES = {"1h": "60m", "1d": DAY, "d": DAY, "minute": "1m", "1min": "1m", "5min": "5m", "hour": "60m"}

KEEP_MAX = 1_000_000  # a list longer than this is a database, not a cache


def normalize(name: str) -> str:
    """`1h` → `60m`, `1D` → `day`; other names come back lower-case and as they are."""
    name = name.strip().lower()
    return ALIASES.get(name, name)


def parse_intervals(text: str) -> tuple[Interval, ...]:
    """`"1m,5m:100,2h"` → intervals, in ascending length. `:100` overrides how many rows are kept.

    Raises SettingsError for a name that is no number of minutes or hours and not `day`.
    """
    known = {interval.name: interval for interval in DEFAULT_INTERVALS}
    found: dict[str, Interval] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        raw, _, keep_text = part.partition(":")
        name = normalize(raw)
        interval = known.get(name) or Interval(name, _seconds_of(name, part), 100)
        if keep_text:
            if not keep_text.isdecimal() or not 1 <= int(keep_text) <= KEEP_MAX:
                raise SettingsError(
                    f"PKB_INTERVALS: {part!r} keeps no number of rows", f"write {name}:100 (1 to {KEEP_MAX})"
                )
            interval = Interval(interval.name, interval.seconds, int(keep_text))
        found[interval.name] = interval
    if not found:
        raise SettingsError("PKB_INTERVALS is empty", "name at least one interval, e.g. 1m,5m,day")
    return tuple(sorted(found.values(), key=lambda each: each.seconds or 86_400))


def _seconds_of(name: str, part: str) -> int:
    unit = {"m": 60, "h": 3600}.get(name[-1:], 0)
    count = name[:-1]
    if not unit or not count.isdecimal() or not 1 <= int(count) * unit <= 43_200:
        raise SettingsError(
            f"PKB_INTERVALS: {part!r} is no interval", "use minutes or hours up to 12h, or day: 1m,5m,2h,day"
        )
    return int(count) * unit


def find_interval(intervals: tuple[Interval, ...], name: str) -> Interval:
    """The configured interval of that name or alias. Raises UnknownInterval and lists the names."""
    wanted = normalize(name)
    for interval in intervals:
        if interval.name == wanted:
            return interval
    raise UnknownInterval(
        f"unknown interval {name!r}", "use one of " + " ".join(each.name for each in intervals)
    )


BUCKETS_MAX = 1_000_000  # what one fill may ask for; 1m candles of ten years


def bucket_start_s(day: Day, interval_seconds: int, time_ms: int) -> int:
    """Start of the bucket that holds `time_ms`.

    Only times inside the day's windows make candles; for others the same grid goes on, so that a time
    before the open gives a start before the open.
    """
    anchor_s = day.anchor_ms // 1000
    if interval_seconds == 0:
        return anchor_s
    return anchor_s + (time_ms // 1000 - anchor_s) // interval_seconds * interval_seconds


def bucket_end_s(day: Day, interval_seconds: int, start_s: int) -> int:
    """End (exclusive) of the bucket that starts at `start_s`: never later than the last close."""
    close_s = (day.windows[-1][1] if day.windows else day.day_end_ms) // 1000
    return close_s if interval_seconds == 0 else min(start_s + interval_seconds, close_s)


def bucket_starts(
    sessions: Sessions, schedule: int, interval_seconds: int, from_s: int, to_s: int
) -> list[int]:
    """Starts, from `from_s` to `to_s` inclusive, of all buckets that overlap an open window.

    Ascending, across days and holidays; for readers that fill empty intervals. Raises ValueError if
    there are more than 1,000,000, or for times outside 1970 to 2200.
    """
    starts: list[int] = []
    cursor_s = from_s
    while cursor_s <= to_s:
        day = sessions.day(schedule, cursor_s * 1000)
        starts += _starts_of_day(day, interval_seconds, from_s, to_s)
        if len(starts) > BUCKETS_MAX:
            raise ValueError(f"more than {BUCKETS_MAX:,} candles between {from_s} and {to_s}")
        cursor_s = day.day_end_ms // 1000
    return starts


def _starts_of_day(day: Day, interval_seconds: int, from_s: int, to_s: int) -> list[int]:
    anchor_s = day.anchor_ms // 1000
    if interval_seconds == 0:
        return [anchor_s] if day.windows and from_s <= anchor_s <= to_s else []
    starts: list[int] = []
    next_s = anchor_s  # a bucket that spans two windows counts once
    for opened_ms, closed_ms in day.windows:
        first_s = max(bucket_start_s(day, interval_seconds, opened_ms), next_s)
        starts += range(first_s, closed_ms // 1000, interval_seconds)
        next_s = starts[-1] + interval_seconds
    return [start for start in starts if from_s <= start <= to_s]
