"""`fill=True`: a flat candle in every empty interval of the session. Redis holds none; they are made on read.

A flat candle has the last close as its prices, volume 0, ticks 0 and the last open interest.
"""

from __future__ import annotations

from pkbrokers_redis.candles.calendar import Sessions
from pkbrokers_redis.candles.model import Candle, bucket_end_s, bucket_starts

CLOSED_DAYS_MAX = 10  # the longest run of days without trading that a look-back crosses
DAY_SECONDS = 86_400
SPARE_FACTOR = 4  # how much longer than the missing rows the look-back is: nights and lunch breaks


def fill_gaps(
    candles: list[Candle],
    sessions: Sessions,
    schedule: int,
    interval_seconds: int,
    count: int,
    now_s: int | None,
) -> list[Candle]:
    """Return the last `count` candles, with a flat one in every empty interval between them.

    Args:
        candles: Candles of one instrument, oldest first.
        sessions: The trading hours.
        schedule: The instrument's schedule in `sessions`.
        interval_seconds: The interval's length; 0 is the day.
        count: At most so many candles.
        now_s: The time less the grace, epoch seconds: intervals of the last candle's day that have ended
            since are filled too. None fills only between candles.
    """
    if not candles or count < 1:
        return []
    starts_after = _ended_since(candles[-1], sessions, schedule, interval_seconds, now_s)[-count:]
    filled = [_flat(start, candles[-1]) for start in reversed(starts_after)]
    for later, candle in zip([*candles[1:], None][::-1], candles[::-1], strict=True):
        if later is not None and later.start - candle.start > max(interval_seconds, 1):
            # Far enough back for the missing rows, not through months of a share that rarely trades.
            missing_seconds = (count - len(filled)) * (interval_seconds or DAY_SECONDS)
            span = missing_seconds * SPARE_FACTOR + CLOSED_DAYS_MAX * DAY_SECONDS
            first = max(candle.start + 1, later.start - span)
            starts = bucket_starts(sessions, schedule, interval_seconds, first, later.start - 1)
            filled += [_flat(start, candle) for start in starts[::-1]]
        filled.append(candle)
        if len(filled) >= count:
            break
    return filled[:count][::-1]


def _ended_since(
    last: Candle, sessions: Sessions, schedule: int, interval_seconds: int, now_s: int | None
) -> list[int]:
    """Return the starts of the intervals after `last`, on its day, that have ended."""
    day = sessions.day(schedule, last.start * 1000)
    if now_s is None or not last.start < now_s < day.day_end_ms // 1000 or not interval_seconds:
        return []
    starts = bucket_starts(sessions, schedule, interval_seconds, last.start + 1, now_s)
    return [start for start in starts if bucket_end_s(day, interval_seconds, start) <= now_s]


def _flat(start: int, before: Candle) -> Candle:
    close = before.close
    return Candle(start, close, close, close, close, 0, before.oi, 0)
