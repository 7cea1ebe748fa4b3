"""The last candles of one instrument and interval, in one array whose newest rows are always contiguous.

        rows    [ gone | begin … completed … end ) current | room … ]     float64[capacity, 8]
                        └─ at most `keep` ──────┘

Rows are appended into the room; when it is used up, the rows that are kept move to a new array. So a view of
the last n rows needs no copy, and a view that somebody still holds goes on showing what it showed: only the
candle that forms changes under it, and a row that is amended.

The memory of a mirror: rings by interval and token, and what is read from them. No Redis here.

What comes into a mirror: announced candles, the candles that form in batches, and names that moved.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pkbrokers_redis.candles.model import CANDLE_FIELDS, FLAG_NAMES, Candle
from pkbrokers_redis.client.bulk import Bulk
from pkbrokers_redis.client.positions import Fields
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.store.rows import parse_candle
from pkbrokers_redis.store.symbols import read_tokens

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.int8]

WIDTH = len(CANDLE_FIELDS)
ROOM_MIN = 8  # rows beyond `keep`: how often the rows move, against memory
ROOM_SHARE = 4  # … or a fourth of them, whichever is more


class Ring:
    """Completed rows `begin` to `end`, and the candle that forms at `end` where there is one."""

    __slots__ = (
        "begin",
        "current_at",
        "end",
        "flags",
        "has_current",
        "keep",
        "rows",
        "tail_start",
        "version",
    )

    def __init__(self, keep: int, rows: Floats | None = None, flags: Flags | None = None) -> None:
        self.keep = keep
        self.version = 0  # raised by each change
        self.has_current = False
        self.current_at = 0.0  # when `current` was last asked for, monotonic seconds
        self.tail_start = 0.0  # start of the current candle whose predecessors were looked at
        self.begin = self.end = 0
        self.rows = np.empty((0, WIDTH))
        self.flags = np.empty(0, np.int8)
        if rows is not None and len(rows):
            count = min(len(rows), keep)
            self._grow(count)
            self.rows[:count] = rows[len(rows) - count :]
            if flags is not None:
                self.flags[:count] = flags[len(rows) - count :]
            self.end = count

    def view(self, count: int, include_current: bool = False) -> Floats:
        """The last rows, at most `count`, without copying; the current one is among them if asked."""
        end = self.end + (include_current and self.has_current)
        return self.rows[max(self.begin, end - count) : end]

    def view_flags(self, count: int, include_current: bool = False) -> Flags:
        """The flags (index into FLAG_NAMES) of the rows of `view`."""
        end = self.end + (include_current and self.has_current)
        return self.flags[max(self.begin, end - count) : end]

    @property
    def last_start(self) -> float:
        """Start of the newest completed row, 0 without one."""
        return float(self.rows[self.end - 1, 0]) if self.end > self.begin else 0.0

    def put(self, row: Floats, flag: int) -> None:
        """A completed row: behind the others, over the one of the same start, or between two."""
        start = row[0]
        if start > self.last_start:
            current = self.rows[self.end].copy() if self.has_current else None
            current_flag = int(self.flags[self.end]) if self.has_current else 0
            self._make_room(2)
            self.rows[self.end], self.flags[self.end] = row, flag
            self.end += 1
            self.begin = max(self.begin, self.end - self.keep)
            self.has_current = current is not None and current[0] > start
            if current is not None and self.has_current:
                self.rows[self.end], self.flags[self.end] = current, current_flag
        else:
            place = self.begin + int(np.searchsorted(self.rows[self.begin : self.end, 0], start))
            if self.rows[place, 0] == start:
                self.rows[place], self.flags[place] = row, flag
            elif self.end - self.begin < self.keep or place > self.begin:
                self._insert(place, row, flag)
            else:
                return  # older than all that is kept
        self.version += 1

    def set_current(self, row: Floats | None, flag: int = 0) -> bool:
        """The candle that forms, None for none. True: it is another candle than before.

        One that was there and is no longer stays as a completed row, until its announcement says better.
        """
        before = float(self.rows[self.end, 0]) if self.has_current else 0.0
        start = 0.0 if row is None else float(row[0])
        if self.has_current and start != before:
            self.has_current = False
            if start > before or row is None:
                self.end += 1
                self.begin = max(self.begin, self.end - self.keep)
        if row is not None and start > self.last_start:
            if before != start or not np.array_equal(self.rows[self.end], row):
                self._make_room(1)
                self.rows[self.end], self.flags[self.end] = row, flag
                self.version += 1
            self.has_current = True
        if before != start:
            self.version += 1
        return start != self.tail_start

    def _make_room(self, rows: int) -> None:
        if self.end + rows > len(self.rows):
            self._grow(rows)

    def _grow(self, more: int) -> None:
        """Move to a new array: the old one may be looked at."""
        kept = self.rows[self.begin : self.end + self.has_current]
        kept_flags = self.flags[self.begin : self.end + self.has_current]
        size = len(kept) + more + min(max(ROOM_MIN, self.keep // ROOM_SHARE), self.keep + ROOM_MIN)
        self.rows, self.flags = np.empty((size, WIDTH)), np.zeros(size, np.int8)
        self.rows[: len(kept)], self.flags[: len(kept)] = kept, kept_flags
        self.begin, self.end = 0, self.end - self.begin

    def _insert(self, place: int, row: Floats, flag: int) -> None:
        """Between two rows: a repaired one. In a new array, too: rows must not shift under a reader."""
        place -= self.begin
        self._grow(1)
        stop = self.end + self.has_current
        self.rows[place + 1 : stop + 1] = self.rows[place:stop].copy()
        self.flags[place + 1 : stop + 1] = self.flags[place:stop].copy()
        self.rows[place], self.flags[place] = row, flag
        self.end += 1
        self.begin = max(self.begin, self.end - self.keep)


NO_ROWS: Floats = np.empty((0, WIDTH))
NO_FLAGS: Flags = np.empty(0, np.int8)
BYTES_A_ROW = WIDTH * 8


class MirrorRows:
    """Rings and names. `lock` is held while rows change: hold it to read several of one moment."""

    def __init__(self, bytes_max: int) -> None:
        self.lock = threading.RLock()
        self.rings: dict[str, dict[int, Ring]] = {}  # interval → token → ring
        self.keep: dict[str, int] = {}  # interval → rows kept of each instrument
        self.whole: set[str] = set()  # intervals of which every instrument is wanted
        self.symbols: dict[int, str] = {}
        self.tokens: dict[str | int, int] = {}  # whatever a caller calls it → token
        self._bytes_max = bytes_max
        self._bulk: tuple[Any, Bulk] | None = None

    def has(self, symbol: str | int, interval: str, count: int) -> bool:
        """Whether `count` rows of it are here, or all there are."""
        token = self.tokens.get(symbol)
        rings = self.rings.get(interval)
        return rings is not None and token in rings and self.keep.get(interval, 0) >= count

    def ring_of(self, token: int, interval: str, symbol: str = "") -> Ring | None:
        """Where a row of that instrument goes; a new ring where all instruments are wanted."""
        rings = self.rings.get(interval)
        if rings is None:
            return None
        ring = rings.get(token)
        if ring is None and interval in self.whole:
            ring = rings[token] = Ring(self.keep[interval])
            self.name(token, symbol or str(token))
        return ring

    def name(self, token: int, symbol: str) -> None:
        """The instrument goes by its symbol, also without `NSE:`, and by its token."""
        self.symbols[token] = symbol
        for name in (token, str(token), symbol, symbol.removeprefix("NSE:")):
            self.tokens.setdefault(name, token)

    def rename(self, moved: dict[int, tuple[int, str]]) -> None:
        """Symbols go to other instruments; those that had them go by their number from now on."""
        with self.lock:
            for name, token in self.tokens.items():
                if token in moved and not str(name).isdecimal():
                    self.tokens[name] = moved[token][0]
            self.symbols.update({token: str(token) for token in moved})
            for token, symbol in moved.values():
                self.name(token, symbol)

    def named(self, tokens: Iterable[int]) -> list[tuple[int, str]]:
        """`(token, symbol)` of each."""
        return [(token, self.symbols.get(token, str(token))) for token in tokens]

    def put_all(self, bulk: Bulk, keep: int) -> None:
        """New rings of `keep` rows from a bulk, instead of those that were there."""
        interval, offsets = bulk.interval, bulk.offsets.tolist()
        fresh = {
            token: Ring(keep, bulk.rows[offsets[n] : offsets[n + 1]], bulk.flags[offsets[n] : offsets[n + 1]])
            for n, token in enumerate(bulk.tokens.tolist())
        }
        with self.lock:
            for token, symbol in zip(fresh, bulk.symbols, strict=True):
                self.name(token, symbol)
            self.rings[interval] = {**self.rings.get(interval, {}), **fresh}
            self.keep[interval] = keep  # after the rows: `has` takes no lock

    def check_size(self, interval: str, fresh: set[int], keep: int) -> None:
        """Raises PkbError if rings of `keep` rows of these instruments would exceed the bound."""
        staying = sum(
            len(ring.rows)
            for name, rings in self.rings.items()
            for token, ring in rings.items()
            if name != interval or token not in fresh
        )
        wanted = (staying + len(fresh) * keep * 5 // 4) * BYTES_A_ROW
        if wanted > self._bytes_max:
            raise PkbError(
                f"a mirror of {len(fresh):,} instruments × {keep} rows of {interval} would "
                f"exceed {self._bytes_max / 2**20:,.0f} MB",
                "mirror fewer instruments, intervals or rows, or raise bytes_max",
            )

    def size_bytes(self) -> int:
        """Memory of the rows."""
        with self.lock:
            return sum(ring.rows.nbytes for rings in self.rings.values() for ring in rings.values())

    def candles(self, ring: Ring, count: int, include_current: bool) -> list[Candle]:
        """A ring's last rows as candles."""
        with self.lock:
            rows = ring.view(count, include_current).tolist()
            flags = ring.view_flags(count, include_current).tolist()
        return [_candle(row, flag) for row, flag in zip(rows, flags, strict=True)]

    def bulk(self, tokens: Sequence[int], interval: str, count: int, include_current: bool) -> Bulk:
        """The last rows of these, copied once; the last answer again if nothing has changed since."""
        with self.lock:
            rings = self.rings[interval]
            found = [rings.get(token) for token in tokens]
            state = (
                interval,
                count,
                include_current,
                tokens,
                [ring.version if ring else -1 for ring in found],
            )
            if self._bulk is not None and self._bulk[0] == state:
                return self._bulk[1]
            views = [ring.view(count, include_current) if ring else NO_ROWS for ring in found]
            flags = [ring.view_flags(count, include_current) if ring else NO_FLAGS for ring in found]
            counts = np.fromiter(map(len, views), np.int64, len(views))
            bulk = Bulk(
                interval,
                np.array(tokens, np.int64),
                [self.symbols.get(token, str(token)) for token in tokens],
                np.concatenate(([0], np.cumsum(counts))),
                np.concatenate(views or [NO_ROWS]),
                np.concatenate(flags or [NO_FLAGS]),
            )
            self._bulk = state, bulk
            return bulk


def _candle(row: list[float], flag: int) -> Candle:
    start, open_, high, low, close, volume, oi, ticks = row
    whole_oi = None if oi != oi else _whole(oi)
    return Candle(int(start), open_, high, low, close, _whole(volume), whole_oi, int(ticks), FLAG_NAMES[flag])


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


RINGS_A_PIPELINE = 500
TAIL_ROWS = 3  # completed while nobody looked, and not announced yet: at most the grace's worth


def apply_entries(store: CandleStore, memory: MirrorRows, entries: Sequence[Fields]) -> int:
    """Put announced rows into their rings; returns how many were ours. Odd entries are counted."""
    taken = 0
    with memory.lock:
        for fields in entries:
            try:
                token, interval = int(fields[b"token"]), fields[b"interval"].decode()
            except (KeyError, ValueError):
                store.tally.rows_refused += 1
                continue
            if interval not in memory.rings:
                continue  # most of a stream, for a mirror of few: not a row is parsed for them
            ring = memory.ring_of(token, interval, fields.get(b"symbol", b"").decode(errors="replace"))
            if ring is None:
                continue
            parsed = _parse(fields.get(b"row", b""))
            if parsed is None:
                store.tally.rows_refused += 1
                continue
            ring.put(*parsed)
            taken += 1
    return taken


def refresh_currents(store: CandleStore, memory: MirrorRows, wanted: Sequence[tuple[int, str]]) -> None:
    """Ask Redis for the current candle of each (token, interval), and what was completed before a new one.

    Raises redis-py's errors.
    """
    for first in range(0, len(wanted), RINGS_A_PIPELINE):
        some = wanted[first : first + RINGS_A_PIPELINE]
        keys = store.keys
        pipe = store.client.pipeline(transaction=False)
        for token, interval in some:
            pipe.hget(keys.current(token), interval)
        replies = pipe.execute(raise_on_error=False)
        now = time.monotonic()
        rolled: list[tuple[int, str]] = []
        with memory.lock:
            for (token, interval), reply in zip(some, replies, strict=True):
                ring = memory.ring_of(token, interval)
                if ring is None:
                    continue
                if isinstance(reply, Exception):
                    if "WRONGTYPE" not in str(reply):
                        raise reply
                    store.tally.rows_refused += 1
                    reply = None
                row, flag = (_parse(reply) or (None, 0)) if reply else (None, 0)
                ring.current_at = now
                if ring.set_current(row, flag):
                    ring.tail_start = 0.0 if row is None else float(row[0])
                    rolled.append((token, interval))
        if rolled:
            _fetch_tails(store, memory, rolled)


def moved_names(store: CandleStore, memory: MirrorRows) -> dict[int, tuple[int, str]]:
    """Mirrored token → (token, symbol): the other one that the master gives its symbol to by now.

    Raises redis-py's errors.
    """
    symbols = dict(memory.symbols)
    tokens = read_tokens(store.client, store.keys, list(symbols.values()))
    return {
        token: (tokens[symbol], symbol)
        for token, symbol in symbols.items()
        if tokens.get(symbol, token) != token
    }


def _fetch_tails(store: CandleStore, memory: MirrorRows, rolled: Sequence[tuple[int, str]]) -> None:
    """The newest completed rows of rings whose current candle is a new one: its predecessors may not be
    announced yet, and what we saw of them last was not their last tick."""
    keys = store.keys
    pipe = store.client.pipeline(transaction=False)
    for token, interval in rolled:
        pipe.lrange(keys.candles(token, interval), -TAIL_ROWS, -1)
    replies: list[Any] = pipe.execute(raise_on_error=False)
    with memory.lock:
        for (token, interval), rows in zip(rolled, replies, strict=True):
            ring = memory.ring_of(token, interval)
            if ring is None or isinstance(rows, Exception):
                continue
            for text in rows:
                parsed = _parse(text)
                if parsed is not None:
                    ring.put(*parsed)


def _parse(text: bytes) -> tuple[Floats, int] | None:
    candle = parse_candle(text)
    if candle is None:
        return None
    return np.array(candle[:8], np.float64), FLAG_NAMES.index(candle.flag)
