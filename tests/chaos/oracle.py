"""The rules of candles once more, naively: all acknowledged entries, sorted and grouped in plain Python.

Shares no code with the pipeline but the calendar. For full-mode and index ticks (both carry a trade time).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from pkbrokers_redis.candles.calendar import Sessions
from pkbrokers_redis.candles.model import Interval

Row = list[Any]
Rows = dict[tuple[int, str], dict[int, Row]]  # (token, interval) → start → row
Entry = dict[bytes, bytes]

DAY_MS = 86_400_000  # of UTC: a run that crosses 05:30 IST is not what this is for

TOKEN, PRICE, _QUANTITY, VOLUME, OI, DAY_OPEN, DAY_HIGH, DAY_LOW, TIME = range(9)


def acknowledged(entries: Iterable[Entry]) -> tuple[list[tuple[int, Row]], int]:
    """One shard's entries in stream order → `(received at, tick)` in order, and how many were repeats."""
    last: dict[bytes, int] = defaultdict(lambda: -1)
    ticks: list[tuple[int, Row]] = []
    repeats = 0
    for entry in entries:
        source, seq = entry[b"src"], int(entry[b"seq"])
        if seq <= last[source]:
            repeats += 1
            continue
        last[source] = seq
        ticks += [(int(entry[b"at"]), tick) for tick in json.loads(entry[b"ticks"])]
    return ticks, repeats


def candles(ticks: Iterable[tuple[int, Row]], intervals: Iterable[Interval], sessions: Sessions) -> Rows:
    """All rows of all instruments."""
    by_token: dict[int, list[tuple[int, int, Row]]] = defaultdict(list)
    for arrival, (at, tick) in enumerate(ticks):
        by_token[tick[TOKEN]].append((arrival, at, tick))
    rows: Rows = {}
    for token, of_token in by_token.items():
        schedule = sessions.schedule_of(token)
        statements = _statements(of_token)
        for interval in intervals:
            rows[token, interval.name] = _candles(statements, interval, sessions, schedule)
    return rows


def _statements(arrived: list[tuple[int, int, Row]]) -> list[tuple[int, Row]]:
    """Return the distinct ticks in order, the baseline first; earlier volume belongs to no candle."""
    _, first_at, first = arrived[0]
    seen = {_identity(first)}
    highest = first[VOLUME]
    kept = []
    for arrival, at, tick in arrived[1:]:
        volume = tick[VOLUME]
        if _identity(tick) in seen or tick[TIME] < first[TIME] // 1000 * 1000:
            continue
        if volume is not None and tick[TIME] == at and volume <= highest:
            continue  # no trade time: only a risen volume is news
        if volume is not None and tick[TIME] // DAY_MS == first[TIME] // DAY_MS and volume <= first[VOLUME]:
            continue
        highest = volume if highest is None or (volume or 0) > highest else highest
        seen.add(_identity(tick))
        kept.append((tick[TIME], tick[VOLUME] if tick[VOLUME] is not None else -1, arrival, at, tick))
    return [(first_at, first), *((at, tick) for _, _, _, at, tick in sorted(kept, key=lambda each: each[:3]))]


def _identity(tick: Row) -> tuple[Any, ...]:
    return (tick[TIME], tick[VOLUME]) if tick[VOLUME] is not None else (tick[TIME], "price", tick[PRICE])


def _candles(
    statements: list[tuple[int, Row]], interval: Interval, sessions: Sessions, schedule: int
) -> dict[int, Row]:
    rows: dict[int, Row] = {}
    first_at, before = statements[0]
    first = before
    highest = before[VOLUME]
    day_of_highest = sessions.day(schedule, before[TIME]).day_start_ms
    for _, tick in statements[1:]:
        day = sessions.day(schedule, tick[TIME])
        anchor = day.anchor_ms // 1000
        length = interval.seconds or 86_400
        start = anchor + (tick[TIME] // 1000 - anchor) // length * length if interval.seconds else anchor
        end = min(start + length, day.windows[-1][1] // 1000)
        volume = tick[VOLUME]
        if volume is not None and day.day_start_ms > day_of_highest:
            highest, day_of_highest = 0, day.day_start_ms
        row = rows.get(start)
        has_day = tick[DAY_HIGH] is not None and tick[DAY_LOW] is not None
        if row is None:
            row = rows[start] = [start, tick[PRICE], tick[PRICE], tick[PRICE], tick[PRICE], 0, None, 0]
            inside = start * 1000 < first_at < end * 1000
            traded = start * 1000 <= first[TIME] < end * 1000 and first[VOLUME] != 0
            if (inside or traded) and not (interval.seconds == 0 and has_day):
                row.append("partial")
        row[2], row[3], row[4] = max(row[2], tick[PRICE]), min(row[3], tick[PRICE]), tick[PRICE]
        if start * 1000 <= before[TIME] < end * 1000:  # a day extreme new between two of one candle
            if has_day and before[DAY_HIGH] is not None and tick[DAY_HIGH] > before[DAY_HIGH]:
                row[2] = max(row[2], tick[DAY_HIGH])
            if has_day and before[DAY_LOW] is not None and tick[DAY_LOW] < before[DAY_LOW]:
                row[3] = min(row[3], tick[DAY_LOW])
        if volume is not None:
            if interval.seconds:
                row[5] += max(0, volume - highest)
            else:
                row[5] = max(row[5], volume)
            highest = max(highest, volume)
        if interval.seconds == 0 and has_day:
            row[1] = tick[DAY_OPEN] if tick[DAY_OPEN] is not None else row[1]
            row[2], row[3] = max(row[2], tick[DAY_HIGH]), min(row[3], tick[DAY_LOW])
        if tick[OI] is not None:
            row[6] = tick[OI]
        row[7] += 1
        before = tick
    return rows
