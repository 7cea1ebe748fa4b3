"""The candles of one shard in memory: its arrays, and how to find an instrument or a day in them.

    apply_ticks(state, ticks, 0, ends, dirty_max)   # the rules (`rules.py`); nothing is written
    close_candles(state, now_ms, dirty_max)         # close the candles whose time has passed
    changes = state.collect()                       # rows and state as text, for one atomic commit

When a commit fails, the state in memory is ahead of Redis: discard it and restore a new one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from pkbrokers_redis.candles import codec
from pkbrokers_redis.candles import columns as col
from pkbrokers_redis.candles.calendar import Sessions
from pkbrokers_redis.candles.codec import NO_CHANGES, Changes
from pkbrokers_redis.candles.compiled import compiled_inlined
from pkbrokers_redis.candles.model import (
    LAST_PRICE,
    LAST_QUANTITY,
    OI,
    TIME_MS,
    VOLUME,
    Interval,
    bucket_end_s,
    bucket_start_s,
)

WINDOWS_START = 2  # trading windows of one day: the closing auction makes two
DAYS_START = 8
LOG_START = 4096
_NO_TICK = np.full(col.TICK_STATE_WIDTH, np.nan)


Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class ShardArrays(NamedTuple):
    """All arrays of one shard; allocated and grown by `ShardState`.

    N instruments, I intervals, S recent candles of each, D calendar days, C schedules, W windows a day.
    """

    tokens: Ints  # [N]
    table: Ints  # [M] open-addressed hash table of tokens: instrument index + 1, 0 is free
    inst: Floats  # [N, INST_WIDTH] what is known of each instrument
    window: Floats  # [N, WINDOW_MAX, TICK_STATE_WIDTH] its recent ticks, newest first
    candles: Floats  # [N, I, S, CANDLE_WIDTH] its recent candles, newest first; the first may be open
    in_current: Ints  # [N, I] 1 where Redis holds the interval in `P:{S}:current:<token>`
    schedule: Ints  # [N] index into the calendar's schedules
    schedule_of_segment: Ints  # [256]
    special: Ints  # tokens with other schedules than their segment's, ascending
    special_schedule: Ints  # … and these
    seconds: Ints  # [I] length of each interval, 0 for the day
    day_ms: Ints  # [D, 2] local midnight to the next one
    anchor_s: Ints  # [D, C] first open: where the buckets begin
    close_s: Ints  # [D, C] last close
    windows: Ints  # [D, C, W, 2] open and close in ms; 0 0 where there is none
    scalars: Floats  # see col.WATERMARK …
    counts: Ints  # see col.C_TICKS …
    dirty: Ints  # [N] instruments changed since the last collect, in order
    is_dirty: Ints  # [N] 1 the instrument changed, 2 also the stored state of its candles
    evicted: Floats  # [E, EVICTED_WIDTH] candles that left `candles` since the last collect
    late: Floats  # [L, LATE_TICK_WIDTH] ticks older than all candles; START and VOL_START of the oldest then


@compiled_inlined
def touch(shard: ShardArrays, i: int, level: int) -> None:
    """Mark an instrument as changed."""
    if shard.is_dirty[i] == 0:
        n = int(shard.scalars[col.DIRTY_SIZE])
        shard.dirty[n] = i
        shard.scalars[col.DIRTY_SIZE] = n + 1
    if shard.is_dirty[i] < level:
        shard.is_dirty[i] = level


@compiled_inlined
def find(shard: ShardArrays, token: int) -> int:
    """The instrument's index, or -1 - (its free place in the hash table)."""
    mask = shard.table.size - 1
    place = (token ^ (token >> 8)) & mask
    while True:
        i = int(shard.table[place]) - 1
        if i < 0:
            return -1 - place
        if shard.tokens[i] == token:
            return i
        place = (place + 1) & mask


@compiled_inlined
def add(shard: ShardArrays, token: int) -> int:
    """The instrument's index, new or known; -1 when the tables are full."""
    i = find(shard, token)
    if i >= 0:
        return i
    place = -1 - i
    i = int(shard.scalars[col.INSTRUMENTS])
    if i >= shard.tokens.size:
        return -1
    shard.scalars[col.INSTRUMENTS] = i + 1
    shard.table[place] = i + 1
    shard.tokens[i] = token
    nearest = np.searchsorted(shard.special, token)
    if nearest < shard.special.size and shard.special[nearest] == token:
        shard.schedule[i] = shard.special_schedule[nearest]
    else:
        shard.schedule[i] = shard.schedule_of_segment[token & 0xFF]
    return i


@compiled_inlined
def find_day(shard: ShardArrays, time_ms: float) -> int:
    """Index of the calendar day that holds the time, or -1. Neighbouring ticks share a day."""
    d = int(shard.scalars[col.LAST_DAY])
    if shard.day_ms[d, 0] <= time_ms < shard.day_ms[d, 1]:
        return d
    for d in range(int(shard.scalars[col.DAYS])):
        if shard.day_ms[d, 0] <= time_ms < shard.day_ms[d, 1]:
            shard.scalars[col.LAST_DAY] = d
            return d
    return -1


class LateTick(NamedTuple):
    """A tick older than every candle in memory; its row, if there is one, is only in Redis."""

    token: int
    interval: int
    start: int
    price: float
    quantity: float
    volume: float
    oi: float
    volume_after: float  # cumulative volume before the oldest candle in memory; NaN: of another day
    oldest_start: int


class ShardState:
    """The candles of one shard. Not thread-safe; time is an argument.

    Example:
        >>> state = ShardState(DEFAULT_INTERVALS, load_sessions("market"))
        >>> apply_ticks(state, ticks, 0, np.array([len(ticks)]), dirty_max=1000)
        >>> changes = state.collect()
    """

    def __init__(
        self,
        intervals: Sequence[Interval],
        sessions: Sessions,
        *,
        grace_seconds: float = 2.0,
        event_clock: bool = False,
        instruments: int = 256,
        scratch: codec.Scratch | None = None,
    ) -> None:
        """Create an empty state with room for `instruments`, which grows.

        A candle is announced `grace_seconds` after its end, by trade time only with `event_clock`. States of
        one thread may share a `scratch`.
        """
        self.intervals = tuple(intervals)
        self.sessions = sessions
        self.grace_ms = grace_seconds * 1000.0
        self.event_clock = event_clock
        shortest = min((each.seconds for each in self.intervals if each.seconds), default=86_400)
        # the open candle, the completed ones that a tick within the grace can still reach, and one more
        self.depth = 2 + int(grace_seconds // shortest)
        self.arrays = self._allocate(instruments)
        self._scratch = scratch or codec.Scratch()

    def _allocate(self, instruments: int) -> ShardArrays:
        intervals, schedules = len(self.intervals), len(self.sessions.schedules)
        by_segment = [self.sessions.schedule_of(segment, has_derivatives=False) for segment in range(256)]
        special = sorted({*self.sessions.derivatives, *self.sessions.exchanges})
        arrays = ShardArrays(
            tokens=np.zeros(instruments, np.int64),
            table=np.zeros(_hash_size(instruments), np.int64),
            inst=np.zeros((instruments, col.INST_WIDTH)),
            window=np.full((instruments, col.WINDOW_MAX, col.TICK_STATE_WIDTH), np.nan),
            candles=np.zeros((instruments, intervals, self.depth, col.CANDLE_WIDTH)),
            in_current=np.zeros((instruments, intervals), np.int64),
            schedule=np.zeros(instruments, np.int64),
            schedule_of_segment=np.array(by_segment, np.int64),
            special=np.array(special, np.int64),
            special_schedule=np.array([self.sessions.schedule_of(token) for token in special], np.int64),
            seconds=np.array([interval.seconds for interval in self.intervals], np.int64),
            day_ms=np.zeros((DAYS_START, 2), np.int64),
            anchor_s=np.zeros((DAYS_START, schedules), np.int64),
            close_s=np.zeros((DAYS_START, schedules), np.int64),
            windows=np.zeros((DAYS_START, schedules, WINDOWS_START, 2), np.int64),
            scalars=np.zeros(col.SCALARS),
            counts=np.zeros(len(col.COUNT_NAMES), np.int64),
            dirty=np.zeros(instruments, np.int64),
            is_dirty=np.zeros(instruments, np.int64),
            evicted=np.zeros((LOG_START, col.EVICTED_WIDTH)),
            late=np.zeros((LOG_START, col.LATE_TICK_WIDTH)),
        )
        arrays.scalars[col.NEXT_DUE] = np.inf
        return arrays

    # -- contents --------------------------------------------------------------------------------

    def __len__(self) -> int:
        return int(self.arrays.scalars[col.INSTRUMENTS])

    @property
    def watermark_ms(self) -> float:
        """The latest trade time applied, epoch ms; 0.0 before the first."""
        return float(self.arrays.scalars[col.WATERMARK])

    @property
    def next_due_ms(self) -> float:
        """When the next candle must be closed, epoch ms; inf: none is open, 0.0: a close is not finished."""
        scalars = self.arrays.scalars
        return 0.0 if scalars[col.CLOSE_CURSOR] else float(scalars[col.NEXT_DUE])

    @property
    def dirty(self) -> int:
        """How many instruments changed since the last collect."""
        return int(self.arrays.scalars[col.DIRTY_SIZE])

    @property
    def evicted(self) -> int:
        """How many candles left memory since the last collect."""
        return int(self.arrays.scalars[col.EVICTED_SIZE])

    @property
    def tokens(self) -> Ints:
        """The token of each instrument, by its index in the arrays."""
        return self.arrays.tokens[: len(self)]

    @property
    def base_interval(self) -> int:
        """Index of the shortest interval, which the others are composed of; -1 if there is only `day`."""
        lengths = [(interval.seconds, k) for k, interval in enumerate(self.intervals) if interval.seconds]
        return min(lengths, default=(0, -1))[1]

    def counts(self) -> dict[str, int]:
        """Return how many ticks were treated in which way since the state was created, by name."""
        return dict(zip(col.COUNT_NAMES, self.arrays.counts.tolist(), strict=True))

    # -- ticks and time --------------------------------------------------------------------------

    def clock_ms(self, now_ms: float) -> float:
        """Return the time by which candles close: the watermark, or the wall clock if that is later."""
        return self.watermark_ms if self.event_clock else max(self.watermark_ms, now_ms)

    def is_due(self, now_ms: float) -> bool:
        """Return whether a candle must be closed now."""
        return self.clock_ms(now_ms) >= self.next_due_ms

    def collect(self) -> Changes:
        """Return all changes since the last collect as text; from now on they count as written."""
        if not self.dirty and not self.evicted:
            return NO_CHANGES
        return self._scratch.collect(self.arrays, self.dirty, self.evicted)

    @property
    def unheard(self) -> int:
        """How many candles carry `gap` because their feed was not heard to their end, at most."""
        return int(self.arrays.scalars[col.UNHEARD_SIZE])

    def late_ticks(self) -> Iterator[LateTick]:
        """Yield, once each, the ticks that were older than every candle in memory."""
        b = self.arrays
        n = int(b.scalars[col.LATE_SIZE])
        b.scalars[col.LATE_SIZE] = 0
        for record in b.late[:n].copy() if n else ():
            i, k, tick = int(record[0]), int(record[1]), record[2:]
            time_ms = int(tick[TIME_MS])
            day = self.sessions.day(int(b.schedule[i]), time_ms)
            price, quantity, volume, oi = tick[[LAST_PRICE, LAST_QUANTITY, VOLUME, OI]].tolist()
            start = bucket_start_s(day, self.intervals[k].seconds, time_ms)
            yield LateTick(
                int(b.tokens[i]), k, start, price, quantity, volume, oi, float(record[-1]), int(record[-2])
            )

    # -- instruments -----------------------------------------------------------------------------

    def index(self, token: int) -> int:
        """Return the index of an instrument, added if it is new."""
        while (i := int(add(self.arrays, token))) < 0:
            self.grow(2 * len(self.arrays.tokens))
        return i

    def forget(self, token: int) -> None:
        """Drop what is known of an instrument: its next tick sets a new baseline."""
        i = self.index(token)
        b = self.arrays
        b.inst[i] = 0.0
        b.candles[i] = 0.0
        b.in_current[i] = 0

    def restore(
        self, token: int, inst_text: bytes, candles_text: bytes | None, current: Mapping[str, bytes]
    ) -> None:
        """Restore an instrument as the last commit left it.

        The texts are its fields `<token>` and `<token>:candles` of `P:{S}:state`; `current` is its hash
        `P:{S}:current:<token>`. Raises ValueError if they are malformed. Call `forget` then: some of it may
        have been restored.
        """
        i = self.index(token)
        try:
            numbers = [np.nan if cell is None else float(cell) for cell in msgspec.json.decode(inst_text)]
            candles = msgspec.json.decode(b"[" + (candles_text or b"") + b"]")
            self._restore_window(i, numbers)
            ages = dict.fromkeys(range(len(self.intervals)), 0)
            for k, cells in candles:
                s = ages[int(k)]
                ages[int(k)] = s + 1
                self._restore_candle(i, int(k), s, cells, current.get(self.intervals[int(k)].name))
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
            raise ValueError(f"the state of instrument {token} cannot be read: {error}") from None

    def _restore_window(self, i: int, numbers: list[float]) -> None:
        """Restore what is known of the instrument and its recent ticks (the inverse of `_write_inst`)."""
        b = self.arrays
        size = (len(numbers) - col.WINDOW_SIZE) // col.TICK_STATE_WIDTH
        b.inst[i, : col.WINDOW_SIZE] = numbers[: col.WINDOW_SIZE]
        b.inst[i, col.WINDOW_SIZE] = size
        cells = numbers[col.WINDOW_SIZE : col.WINDOW_SIZE + size * col.TICK_STATE_WIDTH]
        window = np.array(cells).reshape(size, col.TICK_STATE_WIDTH)
        for j in range(1, size):
            window[j, : col.TICK_PRICE] = window[0, : col.TICK_PRICE] - window[j, : col.TICK_PRICE]
            same = np.isnan(window[j])
            same[: col.TICK_PRICE] = False
            window[j, same] = window[j - 1, same]
        b.window[i, :size] = window
        b.inst[i, col.RAISED_TIME] = window[0, col.TICK_TIME] if size else 0.0

    def _restore_candle(self, i: int, k: int, s: int, cells: list[Any], row: bytes | None) -> None:
        """Restore one candle: a complete one from its own cells, the open one from its row in `current`."""
        b = self.arrays
        candle = b.candles[i, k, s]
        start, vol_start, flag, open_after, open_volume_after, *rest = [
            np.nan if cell is None else float(cell) for cell in cells
        ]
        day = self.sessions.day(int(b.schedule[i]), int(start) * 1000)
        zero = 0.0 if np.isnan(vol_start) else vol_start
        candle[:] = 0.0
        candle[col.START], candle[col.DAY] = start, day.day_start_ms // 1000
        candle[col.END] = bucket_end_s(day, self.intervals[k].seconds, int(start))
        candle[col.VOL_START], candle[col.FLAG] = vol_start, flag
        candle[col.OPEN_TIME], candle[col.OPEN_VOLUME] = start * 1000 + open_after, zero + open_volume_after
        if rest:
            candle[col.COMPLETE], candle[col.LISTED] = 1.0, 1.0
            candle[col.REV], *candle[col.OPEN : col.CLOSE + 1] = rest[:5]
            candle[col.VOL_END], candle[col.OPEN_INTEREST], candle[col.TICKS] = rest[5:8]
            close_after, close_volume_after = rest[8:]
            candle[col.CLOSE_TIME] = start * 1000 + close_after
            candle[col.CLOSE_VOLUME] = zero + close_volume_after
        else:
            self._restore_open_candle(i, k, candle, row)
        if candle[col.REV] < 0:
            b.scalars[col.NEXT_DUE] = min(b.scalars[col.NEXT_DUE], candle[col.END] * 1000 + self.grace_ms)

    def _restore_open_candle(self, i: int, k: int, candle: Floats, row: bytes | None) -> None:
        if row is None:
            raise ValueError(
                f"its {self.intervals[k].name} candle of {int(candle[col.START])} is not in `current`"
            )
        b = self.arrays
        newest = b.window[i, 0] if b.inst[i, col.WINDOW_SIZE] else _NO_TICK
        cells = msgspec.json.decode(row)
        candle[col.REV] = col.UNANNOUNCED
        candle[col.OPEN : col.CLOSE + 1] = cells[1:5]
        candle[col.VOL_END] = candle[col.VOL_START] + cells[5]
        candle[col.OPEN_INTEREST] = np.nan if cells[6] is None else cells[6]
        candle[col.TICKS] = cells[7]
        time, volume = newest[col.TICK_TIME], newest[col.TICK_VOLUME]
        candle[col.CLOSE_TIME] = -np.inf if np.isnan(time) else time
        candle[col.CLOSE_VOLUME] = -1.0 if np.isnan(volume) else volume
        b.in_current[i, k] = 1

    # -- room ------------------------------------------------------------------------------------

    def shift_candles(self, i: int, k: int) -> None:
        """Make room for a newer candle, as its first tick does; the oldest one leaves to `evicted`."""
        b = self.arrays
        if b.candles[i, k, -1, col.START]:
            n = int(b.scalars[col.EVICTED_SIZE])
            if n >= len(b.evicted):
                self.grow_logs()
                b = self.arrays
            b.evicted[n, 0], b.evicted[n, 1], b.evicted[n, 2:] = i, k, b.candles[i, k, -1]
            b.scalars[col.EVICTED_SIZE] = n + 1
        b.candles[i, k, 1:] = b.candles[i, k, :-1].copy()
        b.candles[i, k, 0] = 0.0

    def add_day(self, time_ms: int) -> None:
        """Add the calendar day that holds `time_ms`, for every schedule."""
        b = self.arrays
        d = int(b.scalars[col.DAYS])
        if d == len(b.day_ms):
            names = ("day_ms", "anchor_s", "close_s", "windows")
            self.arrays = b = b._replace(**{name: _grown(getattr(b, name), 2 * d) for name in names})
        days = [self.sessions.day(schedule, time_ms) for schedule in range(len(self.sessions.schedules))]
        more = max(len(day.windows) for day in days) - b.windows.shape[2]
        if more > 0:
            self.arrays = b = b._replace(windows=np.pad(b.windows, ((0, 0), (0, 0), (0, more), (0, 0))))
        for schedule, day in enumerate(days):
            b.day_ms[d] = day.day_start_ms, day.day_end_ms
            b.anchor_s[d, schedule] = day.anchor_ms // 1000
            b.close_s[d, schedule] = bucket_end_s(day, 0, 0)
            for w, window in enumerate(day.windows):
                b.windows[d, schedule, w] = window
        b.scalars[col.DAYS] = d + 1

    def grow(self, size: int) -> None:
        b = self.arrays
        names = ("tokens", "inst", "window", "candles", "in_current", "schedule", "dirty", "is_dirty")
        self.arrays = b = b._replace(
            **{name: _grown(getattr(b, name), size) for name in names},
            table=np.zeros(_hash_size(size), np.int64),
        )
        for i in range(len(self)):
            b.table[-1 - find(b, int(b.tokens[i]))] = i + 1

    def grow_logs(self) -> None:
        b = self.arrays
        self.arrays = b._replace(
            evicted=_grown(b.evicted, 2 * len(b.evicted)), late=_grown(b.late, 2 * len(b.late))
        )


def _hash_size(instruments: int) -> int:
    return 1 << (2 * instruments - 1).bit_length()  # at most half full


def _grown(array: Any, size: int) -> Any:
    grown = np.zeros((size, *array.shape[1:]), array.dtype)
    grown[: len(array)] = array
    return grown
