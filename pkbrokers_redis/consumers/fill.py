"""`fill=True`: empty intervals as flat rows. Redis holds none of them; they are made on reading.

A flat row stands at the last close with volume 0 and ticks 0 and the last open interest.
"""

from __future__ import annotations

from pkbrokers_redis.core.buckets import bucket_end_s, bucket_starts
from pkbrokers_redis.core.model import Candle
from pkbrokers_redis.core.sessions import Sessions

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
