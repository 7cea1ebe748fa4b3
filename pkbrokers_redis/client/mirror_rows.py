"""The rows of a mirror in memory, and how rows enter it: bulk reads, announcements, current candles."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pkbrokers_redis.candles.model import CANDLE_FIELDS, FLAG_NAMES, Candle
from pkbrokers_redis.client.bulk import Bulk, read_bulk
from pkbrokers_redis.client.follow import Fields, parse_closed
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.store.errors import is_wrong_type
from pkbrokers_redis.store.rows import parse_candle, parse_candles
from pkbrokers_redis.store.symbols import read_tokens

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.int8]
BufferKey = tuple[int, str]  # token, interval

WIDTH = len(CANDLE_FIELDS)
NO_ROWS: Floats = np.empty((0, WIDTH))
NO_FLAGS: Flags = np.empty(0, np.int8)
FLAG_CELLS = [np.array([code], np.int8) for code in range(len(FLAG_NAMES))]
ROW_BYTES = WIDTH * 8
SPARE_SHARE = 0.25  # of a buffer's rows: room behind them, so that most rows are appended without a copy
BUFFERS_PER_PIPELINE = 500
TAIL_ROWS = 3  # rows that can complete unread before they are announced: the grace's worth


class RowBuffer:
    """At most `keep` completed rows of an instrument and interval, and the candle being formed, if any.

    One thread changes it; readers need no lock, and rows that were read never change: a row is appended
    behind those that readers hold, and any other change makes new arrays. `version` rises with each change.
    `current_at` is when the current candle was last read, on the monotonic clock.
    """

    __slots__ = ("_completed", "_current", "current_at", "keep", "version")

    def __init__(self, keep: int, rows: Floats = NO_ROWS, flags: Flags | None = None) -> None:
        self.keep = keep
        self.version = 0
        self.current_at = -math.inf
        self._current: tuple[Floats, int] | None = None
        flags = np.zeros(len(rows), np.int8) if flags is None else flags
        # Rows, flags, and the range of them in use: one object, so that a reader sees one state.
        self._completed = rows, flags, max(len(rows) - keep, 0), len(rows)
        self._make_room()  # and copy: the caller's arrays may be large

    def last(self, count: int, include_current: bool = False) -> tuple[Floats, Flags]:
        """Return the last rows, at most `count`, and their flags (index into FLAG_NAMES)."""
        current = self._current if include_current else None  # before the completed rows, which it joins
        rows, flags, first, end = self._completed
        if count < 1 or current is None or (end > first and current[0][0] <= rows[end - 1, 0]):
            begin = max(first, end - max(count, 0))
            return rows[begin:end], flags[begin:end]
        row, flag = current
        begin = max(first, end - count + 1)
        return np.concatenate((rows[begin:end], row[None])), np.concatenate(
            (flags[begin:end], FLAG_CELLS[flag])
        )

    @property
    def size_bytes(self) -> int:
        """Return the memory of the rows."""
        return self._completed[0].nbytes

    def add(self, row: Floats, flag: int) -> None:
        """Append a completed row, replace the one with the same start, or insert it between two rows."""
        rows, flags, first, end = self._completed
        if first == end or row[0] > rows[end - 1, 0]:
            if end == len(rows):
                rows, flags, first, end = self._make_room()
            rows[end], flags[end] = row, flag
            self._completed = rows, flags, max(first, end + 1 - self.keep), end + 1
        else:
            index = first + int(np.searchsorted(rows[first:end, 0], row[0]))
            is_replaced = rows[index, 0] == row[0]
            if is_replaced and flags[index] == flag and _is_same(rows[index], row):
                return
            if not is_replaced and index == first and end - first >= self.keep:
                return  # older than all rows kept
            rows = np.concatenate((rows[first:index], row[None], rows[index + is_replaced : end]))
            flags = np.concatenate((flags[first:index], FLAG_CELLS[flag], flags[index + is_replaced : end]))
            self._completed = rows, flags, max(len(rows) - self.keep, 0), len(rows)
        if self._current is not None and self._current[0][0] <= row[0]:
            self._current = None  # after the row: no reader misses both
        self.version += 1

    def set_current(self, row: Floats | None, flag: int = 0) -> None:
        """Set the candle being formed; None if there is none.

        A current candle that has a successor stays as a completed row until its announcement replaces it.
        """
        before = self._current
        if before is not None:
            if row is not None and _is_same(before[0], row):
                return
            if row is None or row[0] > before[0][0]:
                self.add(*before)
        rows, _, first, end = self._completed
        is_newest = row is not None and (first == end or row[0] > rows[end - 1, 0])
        self._current = (row, flag) if row is not None and is_newest else None
        self.version += before is not None or is_newest

    def _make_room(self) -> tuple[Floats, Flags, int, int]:
        """Copy the rows in use into arrays with spare rows behind them."""
        rows, flags, first, end = self._completed
        size = end - first
        capacity = size + int(size * SPARE_SHARE) + 1
        self._completed = np.empty((capacity, WIDTH)), np.zeros(capacity, np.int8), 0, size
        self._completed[0][:size], self._completed[1][:size] = rows[first:end], flags[first:end]
        return self._completed


def _is_same(row: Floats, other: Floats) -> bool:
    return row.tobytes() == other.tobytes()  # a missing open interest is NaN, which equals nothing


class MirrorRows:
    """Row buffers and names of a store. One thread at a time changes them; any thread may read them."""

    def __init__(self, store: CandleStore, bytes_max: int) -> None:
        self.buffers: dict[str, dict[int, RowBuffer]] = {}  # interval → token → buffer
        self.keep: dict[str, int] = {}  # interval → rows kept of each instrument
        self.all_instruments: set[str] = set()  # intervals that mirror every instrument
        self.symbols: dict[int, str] = {}
        self.tokens: dict[str | int, int] = {}  # every spelling that callers use → token
        self._store = store
        self._bytes_max = bytes_max
        self._last_bulk: tuple[Any, Bulk] | None = None

    def has(self, symbol: str | int, interval: str, count: int) -> bool:
        """Return whether `count` rows of it are mirrored, or all that exist."""
        is_mirrored = self.tokens.get(symbol) in self.buffers.get(interval, ())
        return is_mirrored and self.keep.get(interval, 0) >= count

    def named(self, tokens: Iterable[int]) -> list[tuple[int, str]]:
        """Return (token, symbol) of mirrored instruments."""
        return [(token, self.symbols[token]) for token in tokens]

    @property
    def size_bytes(self) -> int:
        """Return the memory of the rows."""
        return sum(
            buffer.size_bytes for buffers in list(self.buffers.values()) for buffer in list(buffers.values())
        )

    def bulk(self, tokens: Sequence[int], interval: str, count: int, include_current: bool) -> Bulk:
        """Copy the last rows of these instruments; return the previous answer if nothing has changed."""
        buffers = [self.buffers[interval].get(token) for token in tokens]
        versions = [buffer.version if buffer else -1 for buffer in buffers]
        state = interval, count, include_current, tokens, versions
        if self._last_bulk is not None and self._last_bulk[0] == state:
            return self._last_bulk[1]
        parts = [buffer.last(count, include_current) if buffer else (NO_ROWS, NO_FLAGS) for buffer in buffers]
        bulk = Bulk(
            interval,
            np.array(tokens, np.int64),
            [self.symbols.get(token, str(token)) for token in tokens],
            np.cumsum([0, *(len(rows) for rows, _ in parts)], dtype=np.int64),
            np.concatenate([NO_ROWS, *(rows for rows, _ in parts)]),
            np.concatenate([NO_FLAGS, *(flags for _, flags in parts)]),
        )
        self._last_bulk = state, bulk
        return bulk

    def fill(self, interval: str, instruments: Iterable[tuple[int, str]], keep: int) -> None:
        """Read the last `keep` rows of each (token, symbol); they replace those of the same instruments.

        Raises PkbError if the rows would exceed the bound, and redis-py's errors; then nothing changes.
        """
        named = dict(instruments)
        self._check_size(interval, named.keys(), keep)
        bulk = read_bulk(self._store.client, self._store.keys, list(named.items()), interval, keep)
        self._store.tally.rows_refused += bulk.rows_refused
        created = {
            token: RowBuffer(keep, bulk.rows[first:end], bulk.flags[first:end])
            for token, (first, end) in zip(named, itertools.pairwise(bulk.offsets.tolist()), strict=True)
        }
        for token, symbol in named.items():
            self._add_name(token, symbol)
        self.buffers[interval] = {**self.buffers.get(interval, {}), **created}
        self.keep[interval] = keep  # after the rows: another thread may call `has`

    def _check_size(self, interval: str, tokens: Iterable[int], keep: int) -> None:
        replaced = self.buffers.get(interval, {})
        new = set(tokens)
        kept_bytes = self.size_bytes - sum(replaced[token].size_bytes for token in new if token in replaced)
        if kept_bytes + len(new) * keep * ROW_BYTES * (1 + SPARE_SHARE) > self._bytes_max:
            raise PkbError(
                f"a mirror of {len(new):,} instruments × {keep} rows of {interval} would "
                f"exceed {self._bytes_max / 2**20:,.0f} MB",
                "mirror fewer instruments, intervals or rows, or raise bytes_max",
            )

    def apply(self, entries: Iterable[Fields]) -> int:
        """Add announced rows to their buffers; return how many."""
        added = 0
        tokens = None if self.all_instruments else self.symbols.keys()
        for fields in entries:
            closed = parse_closed(fields, self._store.tally, tokens, self.buffers.keys())
            buffer = closed and self._buffer_of(closed.token, closed.interval, closed.symbol)
            if closed and buffer:
                buffer.add(*_as_row(closed.candle))
                added += 1
        return added

    def refresh(self, keys: Sequence[BufferKey]) -> None:
        """Read the current candle of each (token, interval), and the rows completed before it.

        Those rows may not be announced yet. Raises redis-py's errors.
        """
        store = self._store
        for first in range(0, len(keys), BUFFERS_PER_PIPELINE):
            chunk = keys[first : first + BUFFERS_PER_PIPELINE]
            pipe = store.client.pipeline(transaction=False)
            for token, interval in chunk:
                pipe.hget(store.keys.current(token), interval)
                pipe.lrange(store.keys.candles(token, interval), -TAIL_ROWS, -1)
            replies = pipe.execute(raise_on_error=False)
            now = time.monotonic()
            for (token, interval), current, tail in zip(chunk, replies[::2], replies[1::2], strict=True):
                error = next((reply for reply in (current, tail) if isinstance(reply, Exception)), None)
                if error is not None and not is_wrong_type(error):
                    raise error
                buffer = self._buffer_of(token, interval)
                if buffer is None:
                    continue
                for completed in parse_candles(tail) if isinstance(tail, list) else ():
                    buffer.add(*_as_row(completed))
                candle = parse_candle(current) if isinstance(current, bytes) else None
                store.tally.rows_refused += current is not None and candle is None
                row, flag = (None, 0) if candle is None else _as_row(candle)
                buffer.set_current(row, flag)
                buffer.current_at = now

    def _buffer_of(self, token: int, interval: str, symbol: str = "") -> RowBuffer | None:
        """Return the buffer of an instrument; create it if the interval mirrors every instrument."""
        buffers = self.buffers[interval]
        if token not in buffers and interval in self.all_instruments:
            buffers[token] = RowBuffer(self.keep[interval])
            self._add_name(token, symbol or str(token))
        return buffers.get(token)

    def _add_name(self, token: int, symbol: str) -> None:
        """Let the instrument be found by its symbol, also without `NSE:`, and by its token."""
        self.symbols[token] = symbol
        for name in (token, str(token), symbol, symbol.removeprefix("NSE:")):
            self.tokens.setdefault(name, token)

    def follow_names(self) -> None:
        """Mirror the tokens to which the master has moved mirrored names; an old token keeps its number.

        Raises redis-py's errors.
        """
        symbols = dict(self.symbols)
        tokens = read_tokens(self._store.client, self._store.keys, list(symbols.values()))
        moved = {old: tokens[name] for old, name in symbols.items() if tokens.get(name, old) != old}
        for interval, buffers in list(self.buffers.items()) if moved else ():
            new = [(token, symbols[old]) for old, token in moved.items() if old in buffers]
            missing = [(token, symbol) for token, symbol in new if token not in buffers]
            self.fill(interval, missing, self.keep[interval])
        for name, token in list(self.tokens.items()):
            if token in moved and not str(name).isdecimal():
                self.tokens[name] = moved[token]
        self.symbols.update({old: str(old) for old in moved})
        for old, token in moved.items():
            self._add_name(token, symbols[old])


def _as_row(candle: Candle) -> tuple[Floats, int]:
    return np.array(candle[:WIDTH], np.float64), FLAG_NAMES.index(candle.flag)
