"""Rule 6 for ticks older than every candle the book still holds: amend the rows as they stand in the list.

Rare (a tick minutes late), so it is plain Python over the rows' own numbers. The rows say enough: what
a candle's volume stood at when it ended is the volume before a later candle minus the volumes between.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from pkbrokers_redis.candles.candle_list import (
    CLOSE,
    HIGH,
    LOW,
    OI,
    OPEN,
    START,
    TICKS,
    VOLUME,
    Row,
    number,
    parse_row,
    row_text,
)
from pkbrokers_redis.candles.state import LateTick


class Amended(NamedTuple):
    """One row that changed: its start, its new text, and whether the list had none of that start."""

    start: int
    text: bytes
    is_new: bool = False


def amend(rows: list[bytes], tick: LateTick, is_day: bool, *, keep: int, flag: str = "") -> list[Amended]:
    """The rows of a candle list (oldest first, as text) that one late tick changes, with their new text.

    Nothing when the tick is older than a list of `keep` rows, or changes no row. Rows of a foreign hand are
    passed over. What a row gains in volume, the next ones lose. A row that is new gets `flag` ("" for a
    whole candle).
    """
    parsed = [row for row in map(parse_row, rows) if row is not None]
    starts = [int(row[START]) for row in parsed]  # type: ignore[arg-type]
    if not starts or (tick.start < starts[0] and len(rows) >= keep):
        return []
    place = next((n for n, start in enumerate(starts) if start >= tick.start), len(starts))
    after = [n for n in range(place, len(starts)) if tick.start < starts[n] < tick.oldest_start]
    volume_end = tick.volume_after - math.fsum(number(parsed[n][VOLUME]) for n in after)
    gained = 0.0
    losers: list[Row] = []
    if not is_day and not math.isnan(tick.volume + volume_end):
        gained = max(0.0, tick.volume - tick.volume_after)  # the book has taken it out of the slots
        left = tick.volume - volume_end - gained
        for row in (parsed[n] for n in after):
            taken = round(min(left, number(row[VOLUME])), 8)
            if taken <= 0:
                break
            row[VOLUME] = round(number(row[VOLUME]) - taken, 8)
            gained, left = gained + taken, left - taken
            losers.append(row)
        gained = round(gained, 8)

    changed: list[Row] = []
    is_new = False
    if place < len(starts) and starts[place] == tick.start:
        row = parsed[place]
        if _amend_row(row, tick, gained, volume_end):
            changed.append(row)
    else:
        oi = None if math.isnan(tick.oi) else tick.oi
        p = tick.price
        is_new = True
        changed.append([tick.start, p, p, p, p, gained, oi, 1, *([flag] if flag else [])])
    changed += losers
    return [
        Amended(int(number(row[START])), row_text(row), is_new and n == 0) for n, row in enumerate(changed)
    ]


def _amend_row(row: Row, tick: LateTick, gained: float, volume_end: float) -> bool:
    before = list(row)
    volume_start = volume_end - number(row[VOLUME])
    row[HIGH] = max(number(row[HIGH]), tick.price)
    row[LOW] = min(number(row[LOW]), tick.price)
    row[VOLUME] = round(number(row[VOLUME]) + gained, 8)
    if tick.volume > volume_end:
        row[CLOSE] = tick.price  # no statement of this candle stands at a higher volume
        if not math.isnan(tick.oi):
            row[OI] = tick.oi
    if tick.volume - tick.quantity <= volume_start:
        row[OPEN] = tick.price  # nothing had traded in this candle before this trade
    if row == before:
        return False
    row[TICKS] = int(number(row[TICKS])) + 1
    return True
