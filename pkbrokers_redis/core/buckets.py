"""Where candles begin and end. Buckets are anchored to the session's open, as on Kite.

NSE's `60m` begin at 09:15, 10:15 … 15:15; the last one ends with the session. Starts and ends are epoch
seconds. An interval of 0 seconds is the day candle: one bucket from the first open to the last close.
"""

from __future__ import annotations

from pkbrokers_redis.core.sessions import Day, Sessions

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
