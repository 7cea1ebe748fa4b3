"""An outage of the feed, as candles show it: those that overlap it are marked `gap` (rule 8).

The book remembers an instrument's last outage, so that candles which only begin later are marked too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from pkbrokers_redis.candles import arrays as t
from pkbrokers_redis.candles.candle_list import RowList, flag_name
from pkbrokers_redis.candles.model import FLAG_BACKFILLED, FLAG_GAP, FLAG_NAMES, FLAG_WHOLE, bucket_end_s
from pkbrokers_redis.candles.state import Book

LONGEST_MS = 12 * 3_600_000  # PKB_INTERVALS knows none longer, but for the day


class Outage(NamedTuple):
    """No sign of life of these instruments' feed in [from_ms, to_ms)."""

    tokens: Sequence[int]
    from_ms: float
    to_ms: float


class Place(NamedTuple):
    """A candle list: instrument and interval, as indices of the book."""

    i: int
    k: int


def lists_in_reach(book: Book, outage: Outage) -> Iterator[Place]:
    """The lists that hold candles of the outage which are in no slot any more. Mostly none: a notice comes at
    once, and the slots hold the newest candles."""
    for i in _known(book, outage):
        for k, interval in enumerate(book.intervals):
            oldest = book.tables.slots[i, k, -1, t.START]
            if interval.seconds and oldest and oldest * 1000 > outage.from_ms:
                yield Place(i, k)


def mark_outage(book: Book, outage: Outage) -> int:
    """Remember the outage and mark the candles in the slots. Returns how many got the mark."""
    marked = 0
    for i in _known(book, outage):
        _remember(book, i, outage)
        has_day_fields = bool(book.tables.inst[i, t.RING_SIZE]) and (
            book.tables.ring[i, 0, t.R_HIGH] == book.tables.ring[i, 0, t.R_HIGH]
        )
        for k, interval in enumerate(book.intervals):
            if interval.seconds == 0 and has_day_fields:
                continue  # rule 7: its fields come with every packet
            for slot in book.tables.slots[i, k]:
                start, end = int(slot[t.START]), int(slot[t.END])
                if start and _is_hit(book, i, k, int(slot[t.FLAG]), start, end, outage):
                    slot[t.FLAG], slot[t.DIRTY] = FLAG_GAP, 1.0
                    marked += 1
        t.touch(book.tables, i, 2)
    return marked


def mark_lists(book: Book, outage: Outage, lists: Mapping[Place, RowList]) -> int:
    """Mark rows that are in no slot, in their lists. Returns how many got the mark."""
    marked = 0
    for place, rows in lists.items():
        i, k = place
        seconds = book.intervals[k].seconds
        schedule = int(book.tables.schedule[i])
        in_slots = {int(start) for start in book.tables.slots[i, k, :, t.START]}
        from_s = int((outage.from_ms - LONGEST_MS) // 1000)
        for start, row in rows.between(from_s, int(outage.to_ms // 1000) + 1).items():
            end = bucket_end_s(book.sessions.day(schedule, start * 1000), seconds, start)
            flag = FLAG_NAMES.index(flag_name(row)) if flag_name(row) in FLAG_NAMES else FLAG_WHOLE
            if start not in in_slots and _is_hit(book, i, k, flag, start, end, outage):
                rows.put([*row[:8], FLAG_NAMES[FLAG_GAP]])
                marked += 1
    return marked


def _known(book: Book, outage: Outage) -> Iterator[int]:
    """Indices of the outage's instruments that we have seen; others have no candle to mark."""
    for token in outage.tokens:
        i = int(t.find(book.tables, token))
        if i >= 0:
            yield i


def _remember(book: Book, i: int, outage: Outage) -> None:
    inst = book.tables.inst[i]
    from_ms, to_ms = float(outage.from_ms), float(outage.to_ms)
    if inst[t.ANSWERED_FROM] <= from_ms and to_ms <= inst[t.ANSWERED_TO]:
        return  # history has answered for it already
    if from_ms <= inst[t.GAP_TO] and inst[t.GAP_FROM] <= to_ms:
        inst[t.GAP_FROM], inst[t.GAP_TO] = min(inst[t.GAP_FROM], from_ms), max(inst[t.GAP_TO], to_ms)
    elif to_ms > inst[t.GAP_TO]:
        inst[t.GAP_FROM], inst[t.GAP_TO] = from_ms, to_ms


def _is_hit(book: Book, i: int, k: int, flag: int, start: int, end: int, outage: Outage) -> bool:
    """Whether a candle gets the mark: it overlaps the outage, and nothing says more than `gap` would."""
    first_ms, last_ms = max(start * 1000.0, outage.from_ms), min(end * 1000.0, outage.to_ms)
    if first_ms >= last_ms or flag not in (FLAG_WHOLE, FLAG_BACKFILLED):
        return False
    if flag == FLAG_BACKFILLED and k == book.base:
        return False  # history gave the whole of it
    inst = book.tables.inst[i]
    return not (inst[t.ANSWERED_FROM] <= first_ms and last_ms <= inst[t.ANSWERED_TO])
