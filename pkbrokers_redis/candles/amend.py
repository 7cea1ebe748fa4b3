"""What history has to say about candles: rows replaced, longer intervals made up again, sums kept.

    base rows    the shortest interval: history's row stands where ours differs, is missing or is marked
    volume       what a row gains, the baseline gives (Σ rows = seen − baseline); a row later than all that we
                 have seen raises `seen` instead, so that the next tick counts on from there
    longer       made up from the base rows they hold; the one that still forms keeps its own close

Rare, so it is plain Python over the book's slots and over the rows as they stand in the lists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pkbrokers_redis.candles import arrays as t
from pkbrokers_redis.candles.calendar import Day
from pkbrokers_redis.candles.candle_list import (
    CLOSE,
    HIGH,
    LOW,
    OI,
    OPEN,
    START,
    TICKS,
    VOLUME,
    Lists,
    Row,
    flag_name,
)
from pkbrokers_redis.candles.candle_list import number as n_
from pkbrokers_redis.candles.model import (
    FLAG_BACKFILLED,
    FLAG_GAP,
    FLAG_NAMES,
    FLAG_PARTIAL,
    bucket_end_s,
    bucket_start_s,
)
from pkbrokers_redis.candles.off_session import settle_outside
from pkbrokers_redis.candles.open_rows import (
    close_newest,
    find_slot,
    flag_for,
    open_slot,
    row_of,
    slot_rows,
    write_slot,
)
from pkbrokers_redis.candles.state import Book

BACKFILLED, GAP, PARTIAL = FLAG_NAMES[FLAG_BACKFILLED], FLAG_NAMES[FLAG_GAP], FLAG_NAMES[FLAG_PARTIAL]
TIME_MIN_S, TIME_MAX_S = t.TIME_MIN_MS // 1000, t.TIME_MAX_MS // 1000


class HistoryRows(NamedTuple):
    """What history answered for one instrument and interval in [from_s, to_s): Kite's rows, oldest first."""

    token: int
    interval: int  # index into the book's intervals
    from_s: int
    to_s: int
    rows: list[Row]  # [start, open, high, low, close, volume, oi]


@dataclass
class Mended:
    """What became of it."""

    rows: int = 0  # changed, of all intervals
    forming: int = 0  # history's rows of candles that are not over: passed over
    odd: int = 0  # history's rows that are none


def apply_history(book: Book, history: HistoryRows, lists: Lists, now_ms: float) -> Mended:
    """Take history's rows into an instrument's candles, in its slots and in `lists` (interval index → rows).

    `lists` must hold the history's interval, and all others too where that is the book's base. What changed
    in the slots is the book's next collect; the lists know themselves what changed in them.
    """
    return _Mending(book, history, lists, book.clock_ms(now_ms) - book.grace_ms).run()


class _Mending:
    def __init__(self, book: Book, history: HistoryRows, lists: Lists, over_ms: float) -> None:
        self.book, self.history, self.lists, self.over_ms = book, history, lists, over_ms
        self.i = book.index(history.token)
        self.inst = book.tables.inst[self.i]
        self.schedule = int(book.tables.schedule[self.i])
        self.is_base = history.interval == book.base
        self.mended = Mended()
        self.gained: dict[int, float] = {}  # start of a changed base row → volume more than before
        self.replaced: dict[int, Row] = {}  # start of a changed base row → what stood there
        self.unseen: dict[int, float] = {}  # … of which traded after all that we have seen
        statement_ms = book.tables.ring[self.i, 0, t.R_TIME] if self.inst[t.RING_SIZE] else -math.inf
        self.statement_ms = statement_ms
        self.answered_to_ms = float(self.inst[t.ANSWERED_TO])

    def run(self) -> Mended:
        k, h = self.history.interval, self.history
        previous = 0
        for raw in h.rows:
            row, day = self._checked(raw)
            if row is None or day is None or int(n_(row[START])) <= previous:
                self.mended.odd += 1
                continue
            previous = start = int(n_(row[START]))
            if not self._is_over(k, start, bucket_end_s(day, self._seconds(k), start)):
                self.mended.forming += 1
                continue
            self._take(k, row, day)
        if self.is_base:
            self._note_answered()
            for longer, interval in enumerate(self.book.intervals):
                if longer != k and interval.seconds % self._seconds(k) == 0:
                    for start, (gained, unseen) in sorted(self._touched(longer).items()):
                        self._make_up(longer, start, gained, unseen)
        t.touch(self.book.tables, self.i, 2)
        return self.mended

    def _seconds(self, k: int) -> int:
        return self.book.intervals[k].seconds

    def _is_over(self, k: int, start: int, end: int) -> bool:
        return end * 1000 <= self.over_ms or start < self.book.tables.slots[self.i, k, 0, t.START]

    # -- one row of history ----------------------------------------------------------------------

    def _checked(self, raw: Row) -> tuple[Row | None, Day | None]:
        """The row on our bucket; None when it is no candle of this instrument's sessions and of the span."""
        nothing = None, None
        start = raw[START] if len(raw) >= OI else None
        if not isinstance(start, int):
            return nothing
        oi = raw[OI] if len(raw) > OI else None
        if not self.history.from_s <= start < self.history.to_s or not TIME_MIN_S <= start < TIME_MAX_S:
            return nothing
        cells = raw[OPEN:OI]
        if not all(isinstance(cell, int | float) and abs(cell) <= t.NUMBER_MAX for cell in cells):
            return nothing  # NaN compares false, too
        if oi is not None and not (isinstance(oi, int | float) and 0 <= oi <= t.NUMBER_MAX):
            return nothing
        opened, high, low, close, volume = map(n_, cells)
        if not (low <= min(opened, close) and max(opened, close) <= high and volume >= 0) or 0 in (high, low):
            return nothing
        day = self.book.sessions.day(self.schedule, start * 1000)
        seconds = self._seconds(self.history.interval)
        bucket = bucket_start_s(day, seconds, start * 1000)
        if seconds:
            end_ms = (start + seconds) * 1000
            inside = any(opens < end_ms and start * 1000 < closes for opens, closes in day.windows)
            if bucket != start or not inside:
                return nothing
        return [bucket, opened, high, low, close, volume, None if oi is None else n_(oi)], day

    def _take(self, k: int, row: Row, day: Day) -> None:
        start = int(n_(row[START]))
        s = find_slot(self.book, self.i, k, start)
        old = self.lists[k].get(start) if s < 0 else row_of(self.book.tables.slots[self.i, k, s])
        new = [*row, old[TICKS] if old else 0, BACKFILLED]
        if old is not None:
            new[OI] = old[OI] if row[OI] is None else row[OI]
            if old[OPEN:TICKS] == new[OPEN:TICKS] and flag_name(old) not in (PARTIAL, GAP):
                return
        if not self._put(k, s, new):
            return
        if self.is_base:
            volume = round(n_(row[VOLUME]) - (n_(old[VOLUME]) if old else 0.0), 8)
            self.gained[start] = volume
            if old is not None:
                self.replaced[start] = old
            self._move_sums(start, volume, day.day_start_ms // 1000)

    def _put(self, k: int, s: int, row: Row) -> bool:
        """Into its slot, or into its list; False when the list has forgotten so old a row."""
        start = int(n_(row[START]))
        if s >= 0:
            write_slot(self.book, self.i, k, s, row)
        elif self.lists[k].put(row):
            close_newest(self.book, self.i, k, start)
        else:
            return False
        self.mended.rows += 1
        return True

    def _move_sums(self, start: int, volume: float, day_s: int) -> None:
        inst = self.inst
        if day_s > inst[t.DAY_S]:  # rule 2: a new trade date starts from 0
            inst[t.DAY_S] = day_s
            inst[t.SEEN], inst[t.BASELINE] = (np.nan, np.nan) if np.isnan(inst[t.SEEN]) else (0.0, 0.0)
        if day_s < inst[t.DAY_S]:
            return
        is_later = start * 1000 > self.statement_ms and start * 1000 >= self.answered_to_ms
        if is_later and not np.isnan(inst[t.SEEN]):
            settle_outside(inst, start * 1000.0, np.inf, False)
            self.unseen[start] = volume
            inst[t.SEEN] += volume
        else:
            inst[t.BASELINE] = np.nan_to_num(inst[t.BASELINE]) - volume

    # -- what is known now -----------------------------------------------------------------------

    def _note_answered(self) -> None:
        """Remember the span: late ticks of it are no news, and an outage inside it is mended."""
        inst, seconds = self.inst, self._seconds(self.book.base)
        time_ms = int(max(self.over_ms, 0.0))
        if time_ms < t.TIME_MIN_MS:
            return
        day = self.book.sessions.day(self.schedule, time_ms)
        from_ms = self.history.from_s * 1000.0
        to_ms = min(self.history.to_s, bucket_start_s(day, seconds, time_ms)) * 1000.0
        if to_ms <= from_ms:
            return
        if inst[t.GAP_TO] > 0:
            if from_ms <= inst[t.GAP_FROM]:
                inst[t.GAP_FROM] = max(inst[t.GAP_FROM], to_ms)
            elif to_ms >= inst[t.GAP_TO]:
                inst[t.GAP_TO] = min(inst[t.GAP_TO], from_ms)
            if inst[t.GAP_FROM] >= inst[t.GAP_TO]:
                inst[t.GAP_FROM] = inst[t.GAP_TO] = 0.0
        if from_ms <= inst[t.ANSWERED_TO] and inst[t.ANSWERED_FROM] <= to_ms:
            inst[t.ANSWERED_FROM] = min(inst[t.ANSWERED_FROM], from_ms)
            inst[t.ANSWERED_TO] = max(inst[t.ANSWERED_TO], to_ms)
        elif to_ms > inst[t.ANSWERED_TO]:
            inst[t.ANSWERED_FROM], inst[t.ANSWERED_TO] = from_ms, to_ms

    # -- longer intervals ------------------------------------------------------------------------

    def _touched(self, k: int) -> dict[int, tuple[float, float]]:
        """The candles that hold a changed base row, and the marked ones in the span: by start, the volume
        their base rows gained, and how much of it was traded after all that we have seen."""
        seconds = self._seconds(k)
        touched: dict[int, tuple[float, float]] = {}
        for start, volume in self.gained.items():
            day = self.book.sessions.day(self.schedule, start * 1000)
            bucket = bucket_start_s(day, seconds, start * 1000)
            gained, unseen = touched.get(bucket, (0.0, 0.0))
            touched[bucket] = gained + volume, unseen + self.unseen.get(start, 0.0)
        from_s = self.history.from_s - (seconds or 86_400)
        for start in self.lists[k].unrepaired(from_s + 1, self.history.to_s):
            touched.setdefault(start, (0.0, 0.0))
        for slot in self.book.tables.slots[self.i, k]:
            start = int(slot[t.START])
            if (
                slot[t.FLAG] in (FLAG_PARTIAL, FLAG_GAP)
                and start < self.history.to_s
                and slot[t.END] > from_s
            ):
                touched.setdefault(start, (0.0, 0.0))
        return touched

    def _make_up(self, k: int, start: int, gained: float, unseen: float) -> None:
        """One longer candle from the base rows inside it."""
        book, base = self.book, self.book.base
        day = book.sessions.day(self.schedule, start * 1000)
        end = bucket_end_s(day, self._seconds(k), start)
        s = find_slot(book, self.i, k, start)
        slot = book.tables.slots[self.i, k, s] if s >= 0 else None
        old = self.lists[k].get(start) if slot is None else row_of(slot)
        is_day = self._seconds(k) == 0
        if is_day and (old is None or not flag_name(old)):
            return  # rule 7: it has the packets' own day fields
        inside = self.lists[base].between(start, end)
        inside.update(slot_rows(book, self.i, base, start, end))
        parts = [inside[each] for each in sorted(inside)]
        if not parts:
            return
        covered = start >= self.lists[base].forgot_s
        if old is None and not covered:
            return
        forming = not self._is_over(k, start, end)
        new = [start, *_made_up(parts), BACKFILLED]
        if old is not None:
            answered = self.history.from_s <= start and end <= self.history.to_s and not forming
            if not (covered and answered):
                self._keep_extremes(new, old, parts, covered)
            if not covered:
                new[OPEN] = old[OPEN]
            if forming or is_day or not covered:
                new[VOLUME] = round(n_(old[VOLUME]) + (0.0 if is_day else gained), 8)
            new[OI] = old[OI] if new[OI] is None else new[OI]
            new[TICKS] = old[TICKS]
        flag = self._flag(parts, start, end, "" if old is None else flag_name(old), covered)
        same = old is not None and old[OPEN:TICKS] == new[OPEN:TICKS]
        if (
            old is not None
            and same
            and (flag == flag_name(old) or (flag == BACKFILLED and not flag_name(old)))
        ):
            return
        new[-1] = flag
        if slot is not None:
            unseen = 0.0 if is_day else unseen  # rule 7: the day's volume comes with its packets
            write_slot(book, self.i, k, s, new, forming_volume=unseen if forming else None)
            self.mended.rows += 1
        elif forming:
            if start > book.tables.slots[self.i, k, 0, t.START]:
                open_slot(book, self.i, k, new, end, day)
                self.mended.rows += 1
        else:
            self._put(k, -1, new)

    def _keep_extremes(self, new: Row, old: Row, parts: list[Row], covered: bool) -> None:
        """Our own picture may know extremes between two ticks, which are in no base row. One that a replaced
        base row explains goes with it: after an outage a copy without a trade time is put where it came."""
        before = [self.replaced.get(int(n_(part[START])), part) for part in parts]
        if not covered or n_(old[HIGH]) > max(n_(row[HIGH]) for row in before):
            new[HIGH] = max(n_(new[HIGH]), n_(old[HIGH]))
        if not covered or n_(old[LOW]) < min(n_(row[LOW]) for row in before):
            new[LOW] = min(n_(new[LOW]), n_(old[LOW]))

    def _flag(self, parts: list[Row], start: int, end: int, old: str, covered: bool) -> str:
        flags = {flag_name(part) for part in parts}
        if not covered and old in (PARTIAL, GAP):
            return old
        ours = FLAG_NAMES[flag_for(self.book, self.i, start, end)]
        return next((flag for flag in (PARTIAL, GAP) if flag in flags or flag == ours), BACKFILLED)


def _made_up(parts: list[Row]) -> Row:
    """Open, high, low, close, volume, open interest and ticks of rows in order."""
    return [
        parts[0][OPEN],
        max(n_(part[HIGH]) for part in parts),
        min(n_(part[LOW]) for part in parts),
        parts[-1][CLOSE],
        round(math.fsum(n_(part[VOLUME]) for part in parts), 8),
        parts[-1][OI],
        int(sum(n_(part[TICKS]) for part in parts)),
    ]
