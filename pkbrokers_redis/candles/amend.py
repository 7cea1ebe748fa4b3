"""Changes of candles that no tick in time makes: late ticks, outages, and rows of Kite's history.

Late ticks (rule 6): a tick older than every candle in memory amends its row in the list. Its row's
numbers are enough: cumulative volume at its end = that before a later candle - the volumes between.

Outages (rule 8): candles that overlap one get the flag `gap`. The state remembers an instrument's last
outage, so that candles which start later get it, too.

History, for one instrument and span:

    base rows   the shortest interval: history replaces a row that differs, is missing or has a flag
    volume      what a row gains, the baseline loses (sum of rows = cumulative volume - baseline); a row
                later than all known ticks raises the cumulative volume instead: the next tick counts from it
    longer      composed from their base rows; one that is still open keeps its own close; a day that Kite's
                day history gave is never composed again

This is rare work, so it is plain Python over the candles in memory and the rows in the lists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pkbrokers_redis.candles import columns as col
from pkbrokers_redis.candles.calendar import Day
from pkbrokers_redis.candles.model import (
    FLAG_BACKFILLED,
    FLAG_GAP,
    FLAG_NAMES,
    FLAG_PARTIAL,
    FLAG_WHOLE,
    NUMBER_MAX,
    TIME_MAX_MS,
    TIME_MIN_MS,
    bucket_end_s,
    bucket_start_s,
)
from pkbrokers_redis.candles.rows import (
    CLOSE,
    HIGH,
    LOW,
    OI,
    OPEN,
    START,
    TICKS,
    VOLUME,
    CandleList,
    CandleLists,
    Row,
    complete_newest,
    find_candle,
    flag_for,
    flag_name,
    insert_open_candle,
    number,
    parse_row,
    recent_rows,
    row_of,
    row_text,
    write_candle,
)
from pkbrokers_redis.candles.rules import absorb_off_session
from pkbrokers_redis.candles.state import LateTick, ShardState, find, touch


class Amended(NamedTuple):
    """A changed row: its start, its new text, and whether the list had no row of that start."""

    start: int
    text: bytes
    is_new: bool = False


def amend_rows(
    rows: list[bytes], tick: LateTick, is_day: bool, *, keep: int, flag: str = ""
) -> list[Amended]:
    """Return the rows of a candle list (oldest first, as text) that a late tick changes.

    The volume that a row gains, the next rows lose. Texts that are no candle rows are skipped, and a tick
    older than a full list of `keep` rows changes nothing. `flag` is for a row that is new.
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
        gained = max(0.0, tick.volume - tick.volume_after)  # the candles in memory have lost it already
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
        row[CLOSE] = tick.price  # no tick of this candle has a higher volume
        if not math.isnan(tick.oi):
            row[OI] = tick.oi
    if tick.volume - tick.quantity <= volume_start:
        row[OPEN] = tick.price  # nothing had traded in this candle before this trade
    if row == before:
        return False
    row[TICKS] = int(number(row[TICKS])) + 1
    return True


LONGEST_MS = 12 * 3_600_000  # PKB_INTERVALS knows none longer, but for the day


class Outage(NamedTuple):
    """The feed of these instruments delivered nothing in [from_ms, to_ms), epoch milliseconds."""

    tokens: Sequence[int]
    from_ms: float
    to_ms: float


class ListIndex(NamedTuple):
    """A candle list: the indices of its instrument and its interval."""

    i: int
    k: int


def lists_in_reach(state: ShardState, outage: Outage) -> Iterator[ListIndex]:
    """Yield the lists that hold candles of the outage which are not in memory any more.

    Mostly there are none: an outage is reported at once, and memory holds the newest candles.
    """
    for i in _known(state, outage):
        for k, interval in enumerate(state.intervals):
            oldest = state.arrays.candles[i, k, -1, col.START]
            if interval.seconds and oldest and oldest * 1000 > outage.from_ms:
                yield ListIndex(i, k)


def flag_outage(state: ShardState, outage: Outage) -> int:
    """Remember the outage and flag the candles in memory. Return how many were flagged."""
    marked = 0
    for i in _known(state, outage):
        _remember(state, i, outage)
        has_day_fields = bool(state.arrays.inst[i, col.WINDOW_SIZE]) and (
            state.arrays.window[i, 0, col.TICK_DAY_HIGH] == state.arrays.window[i, 0, col.TICK_DAY_HIGH]
        )
        for k, interval in enumerate(state.intervals):
            if interval.seconds == 0 and has_day_fields:
                continue  # rule 7: its fields come with every packet
            for candle in state.arrays.candles[i, k]:
                start, end = int(candle[col.START]), int(candle[col.END])
                is_final = candle[col.COMPLETE] != 0 and candle[col.FLAG] == FLAG_BACKFILLED
                if interval.seconds == 0 and is_final:
                    continue  # Kite's own day
                if start and _is_hit(state, i, k, int(candle[col.FLAG]), start, end, outage):
                    candle[col.FLAG], candle[col.DIRTY] = FLAG_GAP, 1.0
                    marked += 1
        touch(state.arrays, i, 2)
    return marked


def flag_lists(state: ShardState, outage: Outage, lists: Mapping[ListIndex, CandleList]) -> int:
    """Flag the rows in `lists` whose candles are not in memory. Return how many were flagged."""
    marked = 0
    for place, rows in lists.items():
        i, k = place
        seconds = state.intervals[k].seconds
        schedule = int(state.arrays.schedule[i])
        recent = {int(start) for start in state.arrays.candles[i, k, :, col.START]}
        from_s = int((outage.from_ms - LONGEST_MS) // 1000)
        for start, row in rows.between(from_s, int(outage.to_ms // 1000) + 1).items():
            end = bucket_end_s(state.sessions.day(schedule, start * 1000), seconds, start)
            flag = FLAG_NAMES.index(flag_name(row)) if flag_name(row) in FLAG_NAMES else FLAG_WHOLE
            if start not in recent and _is_hit(state, i, k, flag, start, end, outage):
                rows.put([*row[:8], FLAG_NAMES[FLAG_GAP]])
                marked += 1
    return marked


def _known(state: ShardState, outage: Outage) -> Iterator[int]:
    """Yield the indices of the outage's known instruments; unknown ones have no candle."""
    for token in outage.tokens:
        i = int(find(state.arrays, token))
        if i >= 0:
            yield i


def _remember(state: ShardState, i: int, outage: Outage) -> None:
    inst = state.arrays.inst[i]
    from_ms, to_ms = float(outage.from_ms), float(outage.to_ms)
    if inst[col.BACKFILLED_FROM] <= from_ms and to_ms <= inst[col.BACKFILLED_TO]:
        return  # history has answered for it already
    if from_ms <= inst[col.GAP_TO] and inst[col.GAP_FROM] <= to_ms:
        inst[col.GAP_FROM], inst[col.GAP_TO] = min(inst[col.GAP_FROM], from_ms), max(inst[col.GAP_TO], to_ms)
    elif to_ms > inst[col.GAP_TO]:
        inst[col.GAP_FROM], inst[col.GAP_TO] = from_ms, to_ms


def _is_hit(state: ShardState, i: int, k: int, flag: int, start: int, end: int, outage: Outage) -> bool:
    """Return True if a candle overlaps the outage and has no flag that says more than `gap`."""
    first_ms, last_ms = max(start * 1000.0, outage.from_ms), min(end * 1000.0, outage.to_ms)
    if first_ms >= last_ms or flag not in (FLAG_WHOLE, FLAG_BACKFILLED):
        return False
    if flag == FLAG_BACKFILLED and k == state.base_interval:
        return False  # history gave the whole of it
    inst = state.arrays.inst[i]
    return not (inst[col.BACKFILLED_FROM] <= first_ms and last_ms <= inst[col.BACKFILLED_TO])


BACKFILLED, GAP, PARTIAL = FLAG_NAMES[FLAG_BACKFILLED], FLAG_NAMES[FLAG_GAP], FLAG_NAMES[FLAG_PARTIAL]
TIME_MIN_S, TIME_MAX_S = TIME_MIN_MS // 1000, TIME_MAX_MS // 1000


class HistoryRows(NamedTuple):
    """Kite's history of one instrument and interval in [from_s, to_s): rows, oldest first."""

    token: int
    interval: int  # index into the state's intervals
    from_s: int
    to_s: int
    rows: list[Row]  # [start, open, high, low, close, volume, oi]


@dataclass
class RepairResult:
    """What `apply_history` did with the rows."""

    rows: int = 0  # changed, of all intervals
    forming: int = 0  # history's rows of candles that are not over: passed over
    malformed: int = 0  # history's rows that are none


def apply_history(state: ShardState, history: HistoryRows, lists: CandleLists, now_ms: float) -> RepairResult:
    """Apply rows of history to an instrument's candles, in memory and in `lists` (interval index → list).

    The state has no uncommitted changes; those made here are part of its next collect. Rows of the base
    interval need the lists of all intervals, others only their own. `now_ms` is the wall clock.
    """
    return _Repair(state, history, lists, state.clock_ms(now_ms) - state.grace_ms).run()


class _Repair:
    def __init__(self, state: ShardState, history: HistoryRows, lists: CandleLists, over_ms: float) -> None:
        self.state, self.history, self.lists, self.over_ms = state, history, lists, over_ms
        self.i = state.index(history.token)
        self.inst = state.arrays.inst[self.i]
        self.schedule = int(state.arrays.schedule[self.i])
        self.is_base = history.interval == state.base_interval
        self.result = RepairResult()
        self.gained: dict[int, float] = {}  # start of a changed base row → volume more than before
        self.replaced: dict[int, Row] = {}  # start of a changed base row → what stood there
        self.unseen: dict[int, float] = {}  # … of which traded after all that we have seen
        has_ticks = self.inst[col.WINDOW_SIZE] > 0
        self.newest_tick_ms = state.arrays.window[self.i, 0, col.TICK_TIME] if has_ticks else -math.inf
        self.backfilled_to_ms = float(self.inst[col.BACKFILLED_TO])

    def run(self) -> RepairResult:
        k, h = self.history.interval, self.history
        previous = 0
        for raw in h.rows:
            row, day = self._checked(raw)
            if row is None or day is None or int(number(row[START])) <= previous:
                self.result.malformed += 1
                continue
            previous = start = int(number(row[START]))
            if not self._is_over(k, start, bucket_end_s(day, self._seconds(k), start)):
                self.result.forming += 1
                continue
            self._take(k, row, day)
        if self.is_base:
            self._note_backfilled()
            for longer, interval in enumerate(self.state.intervals):
                if longer != k and interval.seconds % self._seconds(k) == 0:
                    for start, (gained, unseen) in sorted(self._touched(longer).items()):
                        self._compose(longer, start, gained, unseen)
        touch(self.state.arrays, self.i, 2)
        return self.result

    def _seconds(self, k: int) -> int:
        return self.state.intervals[k].seconds

    def _is_over(self, k: int, start: int, end: int) -> bool:
        return end * 1000 <= self.over_ms or start < self.state.arrays.candles[self.i, k, 0, col.START]

    # -- one row of history ----------------------------------------------------------------------

    def _checked(self, raw: Row) -> tuple[Row | None, Day | None]:
        """Return the row at its bucket's start, and its day; (None, None) if it is invalid."""
        nothing = None, None
        start = raw[START] if len(raw) >= OI else None
        if not isinstance(start, int):
            return nothing
        oi = raw[OI] if len(raw) > OI else None
        if not self.history.from_s <= start < self.history.to_s or not TIME_MIN_S <= start < TIME_MAX_S:
            return nothing
        cells = raw[OPEN:OI]
        if not all(isinstance(cell, int | float) and abs(cell) <= NUMBER_MAX for cell in cells):
            return nothing  # NaN compares false, too
        if oi is not None and not (isinstance(oi, int | float) and 0 <= oi <= NUMBER_MAX):
            return nothing
        opened, high, low, close, volume = map(number, cells)
        if not (low <= min(opened, close) and max(opened, close) <= high and volume >= 0) or 0 in (high, low):
            return nothing
        day = self.state.sessions.day(self.schedule, start * 1000)
        seconds = self._seconds(self.history.interval)
        bucket = bucket_start_s(day, seconds, start * 1000)
        if seconds:
            end_ms = (start + seconds) * 1000
            inside = any(opens < end_ms and start * 1000 < closes for opens, closes in day.windows)
            if bucket != start or not inside:
                return nothing
        return [bucket, opened, high, low, close, volume, None if oi is None else number(oi)], day

    def _take(self, k: int, row: Row, day: Day) -> None:
        start = int(number(row[START]))
        s = find_candle(self.state, self.i, k, start)
        old = self.lists[k].get(start) if s < 0 else row_of(self.state.arrays.candles[self.i, k, s])
        new = [*row, old[TICKS] if old else 0, BACKFILLED]
        if old is not None:
            new[OI] = old[OI] if row[OI] is None else row[OI]
            if old[OPEN:TICKS] == new[OPEN:TICKS] and flag_name(old) not in (PARTIAL, GAP):
                return
        if not self._put(k, s, new):
            return
        if self.is_base:
            volume = round(number(row[VOLUME]) - (number(old[VOLUME]) if old else 0.0), 8)
            self.gained[start] = volume
            if old is not None:
                self.replaced[start] = old
            self._move_sums(start, volume, day.day_start_ms // 1000)

    def _put(self, k: int, s: int, row: Row) -> bool:
        """Write a row to memory or to its list. Return False if it is older than the list reaches."""
        start = int(number(row[START]))
        if s >= 0:
            write_candle(self.state, self.i, k, s, row)
        elif self.lists[k].put(row):
            complete_newest(self.state, self.i, k, start)
        else:
            return False
        self.result.rows += 1
        return True

    def _move_sums(self, start: int, volume: float, day_s: int) -> None:
        inst = self.inst
        if day_s > inst[col.DAY_S]:  # rule 2: a new trade date starts from 0
            inst[col.DAY_S] = day_s
            inst[col.CUM_VOLUME], inst[col.BASELINE] = (
                (np.nan, np.nan) if np.isnan(inst[col.CUM_VOLUME]) else (0.0, 0.0)
            )
        if day_s < inst[col.DAY_S]:
            return
        is_later = start * 1000 > self.newest_tick_ms and start * 1000 >= self.backfilled_to_ms
        if is_later and not np.isnan(inst[col.CUM_VOLUME]):
            absorb_off_session(inst, start * 1000.0, np.inf, False)
            self.unseen[start] = volume
            inst[col.CUM_VOLUME] += volume
        else:
            inst[col.BASELINE] = np.nan_to_num(inst[col.BASELINE]) - volume

    # -- what is known now -----------------------------------------------------------------------

    def _note_backfilled(self) -> None:
        """Remember the span: its late ticks are already in the candles, its outages are repaired."""
        inst, seconds = self.inst, self._seconds(self.state.base_interval)
        time_ms = int(max(self.over_ms, 0.0))
        if time_ms < TIME_MIN_MS:
            return
        day = self.state.sessions.day(self.schedule, time_ms)
        from_ms = self.history.from_s * 1000.0
        to_ms = min(self.history.to_s, bucket_start_s(day, seconds, time_ms)) * 1000.0
        if to_ms <= from_ms:
            return
        if inst[col.GAP_TO] > 0:
            if from_ms <= inst[col.GAP_FROM]:
                inst[col.GAP_FROM] = max(inst[col.GAP_FROM], to_ms)
            elif to_ms >= inst[col.GAP_TO]:
                inst[col.GAP_TO] = min(inst[col.GAP_TO], from_ms)
            if inst[col.GAP_FROM] >= inst[col.GAP_TO]:
                inst[col.GAP_FROM] = inst[col.GAP_TO] = 0.0
        if from_ms <= inst[col.BACKFILLED_TO] and inst[col.BACKFILLED_FROM] <= to_ms:
            inst[col.BACKFILLED_FROM] = min(inst[col.BACKFILLED_FROM], from_ms)
            inst[col.BACKFILLED_TO] = max(inst[col.BACKFILLED_TO], to_ms)
        elif to_ms > inst[col.BACKFILLED_TO]:
            inst[col.BACKFILLED_FROM], inst[col.BACKFILLED_TO] = from_ms, to_ms

    # -- longer intervals ------------------------------------------------------------------------

    def _touched(self, k: int) -> dict[int, tuple[float, float]]:
        """Return the candles with a changed base row, and the flagged ones in the span.

        By start: the volume their base rows gained, and how much of it was traded after all known ticks.
        """
        seconds = self._seconds(k)
        touched: dict[int, tuple[float, float]] = {}
        for start, volume in self.gained.items():
            day = self.state.sessions.day(self.schedule, start * 1000)
            bucket = bucket_start_s(day, seconds, start * 1000)
            gained, unseen = touched.get(bucket, (0.0, 0.0))
            touched[bucket] = gained + volume, unseen + self.unseen.get(start, 0.0)
        from_s = self.history.from_s - (seconds or 86_400)
        for start in self.lists[k].unrepaired(from_s + 1, self.history.to_s):
            touched.setdefault(start, (0.0, 0.0))
        for candle in self.state.arrays.candles[self.i, k]:
            start = int(candle[col.START])
            if (
                candle[col.FLAG] in (FLAG_PARTIAL, FLAG_GAP)
                and start < self.history.to_s
                and candle[col.END] > from_s
            ):
                touched.setdefault(start, (0.0, 0.0))
        return touched

    def _compose(self, k: int, start: int, gained: float, unseen: float) -> None:
        """Compose one longer candle from the base rows inside it."""
        state, base = self.state, self.state.base_interval
        day = state.sessions.day(self.schedule, start * 1000)
        end = bucket_end_s(day, self._seconds(k), start)
        s = find_candle(state, self.i, k, start)
        candle = state.arrays.candles[self.i, k, s] if s >= 0 else None
        old = self.lists[k].get(start) if candle is None else row_of(candle)
        is_day, forming = self._seconds(k) == 0, not self._is_over(k, start, end)
        if is_day:
            if old is None or not flag_name(old):
                return  # rule 7: it has the packets' own day fields
            if flag_name(old) == BACKFILLED and not forming:
                return  # Kite's own day: auctions and corrections are in it, and in no minute
        inside = self.lists[base].between(start, end)
        inside.update(recent_rows(state, self.i, base, start, end))
        parts = [inside[each] for each in sorted(inside)]
        if not parts:
            return
        covered = start >= self.lists[base].dropped_before_s
        if old is None and not covered:
            return
        answered = self.history.from_s <= start and end <= self.history.to_s and not forming
        new = [start, *_composed(parts), BACKFILLED]
        if old is not None:
            if not (covered and answered):
                self._keep_extremes(new, old, parts, covered)
            if not covered:
                new[OPEN] = old[OPEN]
            if forming or is_day or not covered:
                new[VOLUME] = round(number(old[VOLUME]) + (0.0 if is_day else gained), 8)
            new[OI] = old[OI] if new[OI] is None else new[OI]
            new[TICKS] = old[TICKS]
        flag = self._flag(parts, start, end, "" if old is None else flag_name(old), covered, answered)
        same = old is not None and old[OPEN:TICKS] == new[OPEN:TICKS]
        if (
            old is not None
            and same
            and (flag == flag_name(old) or (flag == BACKFILLED and not flag_name(old)))
        ):
            return
        new[-1] = flag
        if candle is not None:
            unseen = 0.0 if is_day else unseen  # rule 7: the day's volume comes with its packets
            write_candle(state, self.i, k, s, new, unseen_volume=unseen if forming else None)
            self.result.rows += 1
        elif forming:
            if start > state.arrays.candles[self.i, k, 0, col.START]:
                insert_open_candle(state, self.i, k, new, end, day)
                self.result.rows += 1
        else:
            self._put(k, -1, new)

    def _keep_extremes(self, new: Row, old: Row, parts: list[Row], covered: bool) -> None:
        """Keep the extremes of the old row that lie between two ticks and so are in no base row.

        An extreme that a replaced base row explains is dropped with that row: after an outage, a copy
        without a trade time counts at the time it was received.
        """
        before = [self.replaced.get(int(number(part[START])), part) for part in parts]
        if not covered or number(old[HIGH]) > max(number(row[HIGH]) for row in before):
            new[HIGH] = max(number(new[HIGH]), number(old[HIGH]))
        if not covered or number(old[LOW]) < min(number(row[LOW]) for row in before):
            new[LOW] = min(number(new[LOW]), number(old[LOW]))

    def _flag(self, parts: list[Row], start: int, end: int, old: str, covered: bool, answered: bool) -> str:
        flags = {flag_name(part) for part in parts}
        if not covered and old in (PARTIAL, GAP):
            return old
        # What history answered from its start to its end is whole, whenever watching began.
        opened = "" if answered and covered else FLAG_NAMES[flag_for(self.state, self.i, start, end)]
        return next((flag for flag in (PARTIAL, GAP) if flag in flags or flag == opened), BACKFILLED)


def _composed(parts: list[Row]) -> Row:
    """Return open, high, low, close, volume, open interest and ticks of rows in time order."""
    return [
        parts[0][OPEN],
        max(number(part[HIGH]) for part in parts),
        min(number(part[LOW]) for part in parts),
        parts[-1][CLOSE],
        round(math.fsum(number(part[VOLUME]) for part in parts), 8),
        parts[-1][OI],
        int(sum(number(part[TICKS]) for part in parts)),
    ]
