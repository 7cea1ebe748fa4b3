"""One shard's candles: owns the arrays, feeds the kernels, hands out what changed.

    book.take(ticks, 0, ends, dirty_max)   # rules applied, nothing written
    book.close(clock_ms, dirty_max)        # candles whose time has come
    changes = book.collect()               # rows and state as text, for one atomic commit

A book whose changes could not be committed is ahead of Redis: throw it away and load a new one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from pkbrokers_redis.candles import arrays as t
from pkbrokers_redis.candles import changeset as ch
from pkbrokers_redis.candles import closing
from pkbrokers_redis.candles import rules as c
from pkbrokers_redis.candles.calendar import Sessions
from pkbrokers_redis.candles.model import (
    AT_MS,
    LAST_PRICE,
    OI,
    TIME_MS,
    VOLUME,
    Interval,
    TickArray,
    bucket_end_s,
)

WINDOWS_START = 2  # trading windows of one day: the closing auction makes two
DAYS_START = 8
LOG_START = 4096


class Changes(NamedTuple):
    """What one collect gave: operations in order (see `core.changes`) and the text they cut from.

    `lists` are whole candle lists (instrument, interval, rows) that replace what is there, ahead of the rest.
    """

    ops: list[list[int]]
    text: bytes
    lists: Sequence[tuple[int, int, list[bytes]]] = ()


NOTHING = Changes([], b"")
_NO_STATEMENT = np.full(t.RING_WIDTH, np.nan)


class LateTick(NamedTuple):
    """A tick older than every candle in the slots; its row, if it has one, is only in Redis."""

    token: int
    interval: int
    start: int
    price: float
    quantity: float
    volume: float
    oi: float
    volume_after: float  # cumulative volume before the oldest candle in the slots then; NaN: another day
    oldest_start: int


class Book:
    """The candles of one shard. Not thread-safe; time comes in as an argument."""

    def __init__(
        self,
        intervals: Sequence[Interval],
        sessions: Sessions,
        *,
        grace_seconds: float = 2.0,
        event_clock: bool = False,
        instruments: int = 256,
        derivatives: Collection[int] = (),
        scratch: ch.Scratch | None = None,
    ) -> None:
        """`derivatives` are the tokens of stocks with futures or options: their sessions may differ."""
        self.intervals = tuple(intervals)
        self.sessions = sessions
        self.grace_ms = grace_seconds * 1000.0
        self.event_clock = event_clock
        seconds = [interval.seconds for interval in self.intervals]
        shortest = min((each for each in seconds if each), default=86_400)
        # the forming candle, the completed ones a straggler within the grace can still reach, and one
        self.slots = 2 + int(grace_seconds // shortest)
        schedules = len(sessions.schedules)
        self.tables = t.Tables(
            tokens=np.zeros(instruments, np.int64),
            table=np.zeros(_hash_size(instruments), np.int64),
            inst=np.zeros((instruments, t.INST_WIDTH)),
            ring=np.full((instruments, t.RING_MAX, t.RING_WIDTH), np.nan),
            slots=np.zeros((instruments, len(seconds), self.slots, t.SLOT_WIDTH)),
            in_current=np.zeros((instruments, len(seconds)), np.int64),
            schedule=np.zeros(instruments, np.int64),
            schedule_of_segment=np.array(
                [[sessions.schedule_of(s, with_) for s in range(256)] for with_ in (False, True)], np.int64
            ),
            derivatives=np.array(sorted(derivatives), np.int64),
            seconds=np.array(seconds, np.int64),
            day_ms=np.zeros((DAYS_START, 2), np.int64),
            anchor_s=np.zeros((DAYS_START, schedules), np.int64),
            close_s=np.zeros((DAYS_START, schedules), np.int64),
            windows=np.zeros((DAYS_START, schedules, WINDOWS_START, 2), np.int64),
            marks=np.zeros(8),
            counts=np.zeros(len(t.COUNT_NAMES), np.int64),
            dirty=np.zeros(instruments, np.int64),
            is_dirty=np.zeros(instruments, np.int64),
            evicted=np.zeros((LOG_START, ch.EVICTED_WIDTH)),
            late=np.zeros((LOG_START, t.LATE_WIDTH)),
        )
        self.tables.marks[t.NEXT_DUE] = np.inf
        self._scratch = scratch or ch.Scratch()

    # -- what is in it ---------------------------------------------------------------------------

    def __len__(self) -> int:
        return int(self.tables.marks[t.INSTRUMENTS])

    @property
    def watermark_ms(self) -> float:
        """The latest trade time taken in; 0 before any."""
        return float(self.tables.marks[t.WATERMARK])

    @property
    def next_due_ms(self) -> float:
        """When the next candle wants to be closed, epoch ms; inf if none is open."""
        return float(self.tables.marks[t.NEXT_DUE])

    @property
    def dirty(self) -> int:
        """How many instruments changed since the last collect."""
        return int(self.tables.marks[t.DIRTY_SIZE])

    @property
    def evicted(self) -> int:
        """How many candles left the slots since the last collect."""
        return int(self.tables.marks[t.EVICTED_SIZE])

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """Token of each instrument index."""
        return self.tables.tokens[: len(self)]

    def counts(self) -> dict[str, int]:
        """What became of the ticks so far, by name."""
        return dict(zip(t.COUNT_NAMES, self.tables.counts.tolist(), strict=True))

    @property
    def base(self) -> int:
        """Index of the shortest interval, of which the others are made up; -1 where there is only `day`."""
        lengths = [(each.seconds, k) for k, each in enumerate(self.intervals) if each.seconds]
        return min(lengths, default=(0, -1))[1]

    # -- ticks and time --------------------------------------------------------------------------

    def take(self, ticks: TickArray, first: int, ends: npt.NDArray[np.int64], dirty_max: int) -> int:
        """Apply ticks[first:] and return the index of the first one left over (len(ticks): none).

        `ends` are the row indices at which stream entries end. With `dirty_max` instruments changed
        it stops at the next of them, so that what is applied is always a whole number of entries.
        """
        while True:
            reason, first = c.apply(
                self.tables, ticks, first, ends, dirty_max, self.grace_ms, not self.event_clock
            )
            if reason == t.NEED_DAY:
                self._add_day(int(self._time_of(ticks[first])))
            elif reason == t.FULL:
                self._grow(2 * len(self.tables.tokens))
            elif reason == t.LOG_FULL:
                self._grow_logs()
            else:
                return first

    def _time_of(self, tick: npt.NDArray[np.float64]) -> float:
        """The time a tick counts for: its own, or the receipt's where the kernel clamps to it."""
        at = tick[AT_MS]
        if not self.event_clock and at >= t.TIME_MIN_MS and tick[TIME_MS] > at + t.FUTURE_MAX_MS:
            return float(at)
        return float(tick[TIME_MS])

    def close(self, now_ms: float, dirty_max: int) -> bool:
        """Complete and announce what is due; False when `dirty_max` left some for the next call.

        With the event clock only ticks move time on; with the wall clock, whichever is further.
        """
        clock = self.clock_ms(now_ms)
        if clock < self.next_due_ms:
            return True  # as the kernel would say, without the cost of calling it
        return bool(closing.close_due(self.tables, clock, self.grace_ms, dirty_max))

    def clock_ms(self, now_ms: float) -> float:
        """The time by which candles close."""
        return self.watermark_ms if self.event_clock else max(self.watermark_ms, now_ms)

    def collect(self) -> Changes:
        """All changes since the last collect, as text; the book counts them as written."""
        evicted = self.evicted
        if not self.dirty and not evicted:
            return NOTHING
        per_instrument = len(self.intervals) * (2 * self.slots + 1) + 2
        ops_max = self.dirty * per_instrument + 3 * evicted
        text_max = (
            self.dirty * ch.bytes_max(len(self.intervals), self.slots) + evicted * ch.ROW_BYTES_MAX + 64
        )
        scratch = self._scratch
        scratch.grow(text_max, ops_max)
        n, size = ch.collect(self.tables, scratch.text, scratch.ops)
        return Changes(scratch.ops[:n].tolist(), scratch.text[:size].tobytes())

    def late_ticks(self) -> Iterator[LateTick]:
        """Hand out (once) the ticks that were older than every slot."""
        b = self.tables
        n = int(b.marks[t.LATE_SIZE])
        if not n:
            return
        b.marks[t.LATE_SIZE] = 0
        for record in b.late[:n].copy():
            i, k, tick = int(record[0]), int(record[1]), record[2:]
            time_ms = int(tick[TIME_MS])
            day = self.sessions.day(int(b.schedule[i]), time_ms)
            length = self.intervals[k].seconds
            anchor = day.anchor_ms // 1000
            start = anchor + (time_ms // 1000 - anchor) // length * length if length else anchor
            yield LateTick(
                int(b.tokens[i]), k, start,
                float(tick[LAST_PRICE]), float(tick[2]), float(tick[VOLUME]), float(tick[OI]),
                float(record[-1]), int(record[-2]),
            )  # fmt: skip

    def odd_ticks(self, ticks: TickArray) -> dict[str, list[float]]:
        """The first tick of a batch of each odd kind, by the name of its count: evidence for a log line."""
        found: dict[str, list[float]] = {}
        for tick in ticks:
            if c.is_bad(tick):
                found.setdefault("bad", tick.tolist())
            elif self._time_of(tick) != tick[TIME_MS]:
                found.setdefault("future_clamped", tick.tolist())
        return found

    # -- instruments -----------------------------------------------------------------------------

    def index(self, token: int) -> int:
        """The index of an instrument, added if it is new."""
        while (i := int(t.add(self.tables, token))) < 0:
            self._grow(2 * len(self.tables.tokens))
        return i

    def forget(self, token: int) -> None:
        """Drop what we know of an instrument: its next tick is a first sight again."""
        i = self.index(token)
        b = self.tables
        b.inst[i] = 0.0
        b.slots[i] = 0.0
        b.in_current[i] = 0

    def restore(self, token: int, hot: bytes, marks: bytes | None, current: Mapping[str, bytes]) -> None:
        """Put an instrument back as the last commit left it.

        `hot` and `marks` are its fields of `P:{S}:state`, `current` its hash. Raises ValueError when
        they do not fit together.
        """
        try:
            self._restore(token, msgspec.json.decode(hot), _decode_marks(marks), current)
        except (msgspec.DecodeError, LookupError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"state of instrument {token} is not readable: {error}") from None

    def _restore(
        self, token: int, hot: list[Any], marks: list[tuple[int, list[Any]]], current: Mapping[str, bytes]
    ) -> None:
        i = self.index(token)
        b = self.tables
        numbers = [np.nan if cell is None else float(cell) for cell in hot]
        for width in (t.GAP_FROM, t.OUTSIDE_TIME):  # of versions that knew no repairs, or no `outside`
            if len(numbers) % t.RING_WIDTH == width % t.RING_WIDTH:
                numbers[width:width] = [0.0] * (t.RING_SIZE - width)
        size = (len(numbers) - t.RING_SIZE) // t.RING_WIDTH
        b.inst[i, : t.RING_SIZE] = numbers[: t.RING_SIZE]
        b.inst[i, t.RING_SIZE] = size
        ring = np.array(numbers[t.RING_SIZE : t.RING_SIZE + size * t.RING_WIDTH]).reshape(size, t.RING_WIDTH)
        for j in range(1, size):
            ring[j, : t.R_PRICE] = ring[0, : t.R_PRICE] - ring[j, : t.R_PRICE]
            same = np.isnan(ring[j])
            same[: t.R_PRICE] = False
            ring[j, same] = ring[j - 1, same]
        b.ring[i, :size] = ring
        filled = dict.fromkeys(range(len(self.intervals)), 0)
        for k, mark in marks:
            s = filled[k]
            filled[k] = s + 1
            row = current.get(self.intervals[k].name)
            self._restore_slot(i, k, s, mark, row, ring[0] if size else _NO_STATEMENT)

    def _restore_slot(
        self, i: int, k: int, s: int, mark: list[Any], row: bytes | None, newest: npt.NDArray[np.float64]
    ) -> None:
        b = self.tables
        slot = b.slots[i, k, s]
        start, base, flag, open_after, open_volume_after, *rest = [
            np.nan if cell is None else float(cell) for cell in mark
        ]
        day = self.sessions.day(int(b.schedule[i]), int(start) * 1000)
        zero = 0.0 if np.isnan(base) else base
        slot[:] = 0.0
        slot[t.START], slot[t.DAY] = start, day.day_start_ms // 1000
        slot[t.END] = bucket_end_s(day, self.intervals[k].seconds, int(start))
        slot[t.BASE], slot[t.FLAG] = base, flag
        slot[t.OPEN_TIME], slot[t.OPEN_VOLUME] = start * 1000 + open_after, zero + open_volume_after
        if rest:
            slot[t.COMPLETE], slot[t.LISTED] = 1.0, 1.0
            (
                slot[t.REV], slot[t.OPEN], slot[t.HIGH], slot[t.LOW], slot[t.CLOSE],
                slot[t.TOP], slot[t.S_OI], slot[t.TICKS], close_after, close_volume_after,
            ) = rest  # fmt: skip
            slot[t.CLOSE_TIME], slot[t.CLOSE_VOLUME] = start * 1000 + close_after, zero + close_volume_after
        else:
            if row is None:
                raise ValueError(f"its {self.intervals[k].name} candle of {int(start)} is not in `current`")
            cells = msgspec.json.decode(row)
            slot[t.REV] = t.UNANNOUNCED
            slot[t.OPEN : t.CLOSE + 1] = cells[1:5]
            slot[t.TOP] = base + cells[5]
            slot[t.S_OI] = np.nan if cells[6] is None else cells[6]
            slot[t.TICKS] = cells[7]
            slot[t.CLOSE_TIME] = -np.inf if np.isnan(newest[t.R_TIME]) else newest[t.R_TIME]
            slot[t.CLOSE_VOLUME] = -1.0 if np.isnan(newest[t.R_VOLUME]) else newest[t.R_VOLUME]
            b.in_current[i, k] = 1
        if slot[t.REV] < 0:
            b.marks[t.NEXT_DUE] = min(b.marks[t.NEXT_DUE], slot[t.END] * 1000 + self.grace_ms)

    # -- room ------------------------------------------------------------------------------------

    def shift_slots(self, i: int, k: int) -> None:
        """Make room at slot 0, as a newer candle's first tick does; the oldest leaves to the log."""
        b = self.tables
        if b.slots[i, k, -1, t.START]:
            n = int(b.marks[t.EVICTED_SIZE])
            if n >= len(b.evicted):
                self._grow_logs()
                b = self.tables
            b.evicted[n, 0], b.evicted[n, 1], b.evicted[n, 2:] = i, k, b.slots[i, k, -1]
            b.marks[t.EVICTED_SIZE] = n + 1
        b.slots[i, k, 1:] = b.slots[i, k, :-1].copy()
        b.slots[i, k, 0] = 0.0

    def _add_day(self, time_ms: int) -> None:
        b = self.tables
        d = int(b.marks[t.DAYS])
        if d == len(b.day_ms):
            self.tables = b = b._replace(
                **{
                    name: _doubled(getattr(b, name), 2 * d)
                    for name in ("day_ms", "anchor_s", "close_s", "windows")
                }
            )
        days = [self.sessions.day(schedule, time_ms) for schedule in range(len(self.sessions.schedules))]
        more = max(len(day.windows) for day in days) - b.windows.shape[2]
        if more > 0:
            self.tables = b = b._replace(windows=np.pad(b.windows, ((0, 0), (0, 0), (0, more), (0, 0))))
        for schedule, day in enumerate(days):
            b.day_ms[d] = day.day_start_ms, day.day_end_ms
            b.anchor_s[d, schedule] = day.anchor_ms // 1000
            b.close_s[d, schedule] = (day.windows[-1][1] if day.windows else day.day_end_ms) // 1000
            for w, window in enumerate(day.windows):
                b.windows[d, schedule, w] = window
        b.marks[t.DAYS] = d + 1

    def _grow(self, size: int) -> None:
        b = self.tables
        names = ("tokens", "inst", "ring", "slots", "in_current", "schedule", "dirty", "is_dirty")
        self.tables = b = b._replace(
            **{name: _doubled(getattr(b, name), size) for name in names},
            table=np.zeros(_hash_size(size), np.int64),
        )
        for i in range(len(self)):
            b.table[-1 - t.find(b, int(b.tokens[i]))] = i + 1

    def _grow_logs(self) -> None:
        b = self.tables
        self.tables = b._replace(
            evicted=_doubled(b.evicted, 2 * len(b.evicted)), late=_doubled(b.late, 2 * len(b.late))
        )


def _decode_marks(marks: bytes | None) -> list[tuple[int, list[Any]]]:
    if not marks:
        return []
    return [(int(k), mark) for k, mark in msgspec.json.decode(b"[" + marks + b"]")]


def _hash_size(instruments: int) -> int:
    return 1 << (2 * instruments - 1).bit_length()  # at most half full


def _doubled(array: Any, size: int) -> Any:
    grown = np.zeros((size, *array.shape[1:]), array.dtype)
    grown[: len(array)] = array
    return grown
