"""The last candle rows of one instrument and interval: completed rows, then the candle being formed.

Every change makes new arrays. So a view needs no copy when it is read, and never changes afterwards.

The rows of a mirror in memory, and how rows enter it: bulk reads, announcements, current candles.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pkbrokers_redis.candles.model import CANDLE_FIELDS, Candle
from pkbrokers_redis.client.bulk import Bulk, arrays_of, candles_of
from pkbrokers_redis.client.follow import Fields
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.store.errors import is_wrong_type
from pkbrokers_redis.store.rows import parse_candle
from pkbrokers_redis.store.symbols import read_tokens

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.int8]

WIDTH = len(CANDLE_FIELDS)
NO_ROWS: Floats = np.empty((0, WIDTH))
NO_FLAGS: Flags = np.empty(0, np.int8)


class RowBuffer:
    """At most `keep` completed rows, and behind them the candle being formed, if there is one.

    Readers need no lock: rows, flags and whether the last row is being formed are replaced together.
    `version` rises with each change. `current_at` is when the current candle was last read, on the monotonic
    clock (-inf for never). `tail_start` is the start of the current candle whose predecessors were last read.
    """

    __slots__ = ("_state", "current_at", "keep", "tail_start", "version")

    def __init__(self, keep: int, rows: Floats = NO_ROWS, flags: Flags | None = None) -> None:
        self.keep = keep
        self.version = 0
        self.current_at = -math.inf
        self.tail_start = 0.0
        first = max(len(rows) - keep, 0)
        kept = rows[first:].copy()
        self._state = kept, np.zeros(len(kept), np.int8) if flags is None else flags[first:].copy(), False

    def view(self, count: int, include_current: bool = False) -> Floats:
        """Return the last rows, at most `count`, without a copy."""
        rows, _, has_current = self._state
        end = len(rows) - (has_current and not include_current)
        return rows[max(end - count, 0) : end]

    def view_flags(self, count: int, include_current: bool = False) -> Flags:
        """Return the flags (index into FLAG_NAMES) of the rows of `view`."""
        _, flags, has_current = self._state
        end = len(flags) - (has_current and not include_current)
        return flags[max(end - count, 0) : end]

    @property
    def size_bytes(self) -> int:
        """Return the memory of the rows."""
        return self._state[0].nbytes

    def add(self, row: Floats, flag: int) -> None:
        """Append a completed row, replace the one with the same start, or insert it between two rows."""
        rows, flags, has_current = self._state
        end = len(rows) - has_current
        index = int(np.searchsorted(rows[:end, 0], row[0]))
        is_replaced = index < end and rows[index, 0] == row[0]
        if not is_replaced and index == 0 and end >= self.keep:
            return  # older than all rows kept
        if has_current and rows[end, 0] <= row[0]:  # the row is the current candle's last state, or later
            rows, flags, has_current = rows[:end], flags[:end], False
        self._replace(*_splice(rows, flags, index, index + is_replaced, row, flag), has_current)

    def set_current(self, row: Floats | None, flag: int = 0) -> bool:
        """Set the candle being formed (None for no candle); return whether its predecessors are unread.

        A current candle that has a successor stays as a completed row until its announcement replaces it.
        """
        rows, flags, has_current = self._state
        end = len(rows) - has_current
        before = float(rows[end, 0]) if has_current else 0.0
        start = 0.0 if row is None else float(row[0])
        if has_current and start != before:
            end += row is None or start > before
            rows, flags, has_current = rows[:end], flags[:end], False
            self._replace(rows, flags, False)
        is_newest = start > (rows[end - 1, 0] if end else 0.0)
        if row is not None and is_newest and not (has_current and np.array_equal(rows[end], row)):
            self._replace(*_splice(rows, flags, end, end + has_current, row, flag), True)
        is_unread = start != self.tail_start
        self.tail_start = start
        return is_unread

    def _replace(self, rows: Floats, flags: Flags, has_current: bool) -> None:
        """Set the state, without the oldest rows beyond `keep`."""
        dropped = max(len(rows) - has_current - self.keep, 0)
        self._state = rows[dropped:], flags[dropped:], has_current
        self.version += 1


def _splice(
    rows: Floats, flags: Flags, start: int, stop: int, row: Floats, flag: int
) -> tuple[Floats, Flags]:
    """Return new arrays with one row in place of rows `start` to `stop`."""
    return (
        np.concatenate((rows[:start], row[None], rows[stop:])),
        np.concatenate((flags[:start], np.array([flag], np.int8), flags[stop:])),
    )


ROW_BYTES = WIDTH * 8
SPARE_SHARE = 1.25  # of the rows' memory: replaced arrays that readers still hold
BUFFERS_PER_PIPELINE = 500
TAIL_ROWS = 3  # rows that can complete unread before they are announced: the grace's worth

BufferKey = tuple[int, str]  # token, interval


class MirrorRows:
    """Row buffers and names. `lock` is held while rows change: hold it to read several of one moment."""

    def __init__(self, bytes_max: int) -> None:
        self.lock = threading.RLock()
        self.buffers: dict[str, dict[int, RowBuffer]] = {}  # interval → token → buffer
        self.keep: dict[str, int] = {}  # interval → rows kept of each instrument
        self.all_instruments: set[str] = set()  # intervals that mirror every instrument
        self.symbols: dict[int, str] = {}
        self.tokens: dict[str | int, int] = {}  # every spelling that callers use → token
        self._bytes_max = bytes_max
        self._last_bulk: tuple[Any, Bulk] | None = None

    def has(self, symbol: str | int, interval: str, count: int) -> bool:
        """Return whether `count` rows of it are mirrored, or all that exist."""
        buffers = self.buffers.get(interval)
        if buffers is None or self.tokens.get(symbol) not in buffers:
            return False
        return self.keep.get(interval, 0) >= count

    def buffer_of(self, token: int, interval: str, symbol: str = "") -> RowBuffer | None:
        """Return the buffer of an instrument; create it if the interval mirrors every instrument."""
        buffers = self.buffers.get(interval)
        if buffers is None:
            return None
        buffer = buffers.get(token)
        if buffer is None and interval in self.all_instruments:
            buffer = buffers[token] = RowBuffer(self.keep[interval])
            self.add_name(token, symbol or str(token))
        return buffer

    def add_name(self, token: int, symbol: str) -> None:
        """Let the instrument be found by its symbol, also without `NSE:`, and by its token."""
        self.symbols[token] = symbol
        for name in (token, str(token), symbol, symbol.removeprefix("NSE:")):
            self.tokens.setdefault(name, token)

    def rename(self, moved: dict[int, tuple[int, str]]) -> None:
        """Move symbols to other tokens (old token → new token, symbol); the old token keeps its number."""
        with self.lock:
            for name, token in self.tokens.items():
                if token in moved and not str(name).isdecimal():
                    self.tokens[name] = moved[token][0]
            self.symbols.update({token: str(token) for token in moved})
            for token, symbol in moved.values():
                self.add_name(token, symbol)

    def named(self, tokens: Iterable[int]) -> list[tuple[int, str]]:
        """Return `(token, symbol)` of each token."""
        return [(token, self.symbols.get(token, str(token))) for token in tokens]

    def replace(self, bulk: Bulk, keep: int) -> None:
        """Create buffers of `keep` rows from a bulk; they replace those of the same instruments."""
        interval, offsets = bulk.interval, bulk.offsets.tolist()
        created = {
            token: RowBuffer(
                keep, bulk.rows[offsets[n] : offsets[n + 1]], bulk.flags[offsets[n] : offsets[n + 1]]
            )
            for n, token in enumerate(bulk.tokens.tolist())
        }
        with self.lock:
            for token, symbol in zip(created, bulk.symbols, strict=True):
                self.add_name(token, symbol)
            self.buffers[interval] = {**self.buffers.get(interval, {}), **created}
            self.keep[interval] = keep  # after the rows: `has` takes no lock

    def check_size(self, interval: str, tokens: set[int], keep: int) -> None:
        """Raise PkbError if buffers of `keep` rows of these instruments would exceed the bound."""
        kept_bytes = sum(
            buffer.size_bytes
            for name, buffers in self.buffers.items()
            for token, buffer in buffers.items()
            if name != interval or token not in tokens
        )
        if kept_bytes + len(tokens) * keep * ROW_BYTES * SPARE_SHARE > self._bytes_max:
            raise PkbError(
                f"a mirror of {len(tokens):,} instruments × {keep} rows of {interval} would "
                f"exceed {self._bytes_max / 2**20:,.0f} MB",
                "mirror fewer instruments, intervals or rows, or raise bytes_max",
            )

    def size_bytes(self) -> int:
        """Return the memory of the rows."""
        with self.lock:
            return sum(buffer.size_bytes for buffers in self.buffers.values() for buffer in buffers.values())

    def candles(self, buffer: RowBuffer, count: int, include_current: bool) -> list[Candle]:
        """Return a buffer's last rows as candles."""
        with self.lock:
            return candles_of(buffer.view(count, include_current), buffer.view_flags(count, include_current))

    def bulk(self, tokens: Sequence[int], interval: str, count: int, include_current: bool) -> Bulk:
        """Copy the last rows of these instruments; return the previous answer if nothing has changed."""
        with self.lock:
            buffers = [self.buffers[interval].get(token) for token in tokens]
            versions = [buffer.version if buffer else -1 for buffer in buffers]
            state = interval, count, include_current, tokens, versions
            if self._last_bulk is not None and self._last_bulk[0] == state:
                return self._last_bulk[1]
            views = [buffer.view(count, include_current) if buffer else NO_ROWS for buffer in buffers]
            flags = [buffer.view_flags(count, include_current) if buffer else NO_FLAGS for buffer in buffers]
            bulk = Bulk(
                interval,
                np.array(tokens, np.int64),
                [symbol for _, symbol in self.named(tokens)],
                np.concatenate(([0], np.cumsum([len(view) for view in views], dtype=np.int64))),
                np.concatenate(views or [NO_ROWS]),
                np.concatenate(flags or [NO_FLAGS]),
            )
            self._last_bulk = state, bulk
            return bulk


def apply_entries(store: CandleStore, memory: MirrorRows, entries: Sequence[Fields]) -> int:
    """Add announced rows to their buffers; return how many. Count malformed entries in the store's tally."""
    added = 0
    with memory.lock:
        for fields in entries:
            try:
                token, interval = int(fields[b"token"]), fields[b"interval"].decode()
            except (KeyError, ValueError):
                store.tally.rows_refused += 1
                continue
            if interval not in memory.buffers:
                continue  # most of a stream, for a small mirror: no row is parsed for them
            symbol = fields.get(b"symbol", b"").decode(errors="replace")
            buffer = memory.buffer_of(token, interval, symbol)
            if buffer is not None:
                added += _add_row(store, buffer, fields.get(b"row", b""))
    return added


def refresh_currents(store: CandleStore, memory: MirrorRows, keys: Sequence[BufferKey]) -> None:
    """Read the current candle of each (token, interval), and the rows completed before a new one.

    Raises redis-py's errors.
    """
    for first in range(0, len(keys), BUFFERS_PER_PIPELINE):
        chunk = keys[first : first + BUFFERS_PER_PIPELINE]
        pipe = store.client.pipeline(transaction=False)
        for token, interval in chunk:
            pipe.hget(store.keys.current(token), interval)
        replies = pipe.execute(raise_on_error=False)
        now = time.monotonic()
        replaced: list[BufferKey] = []
        with memory.lock:
            for (token, interval), reply in zip(chunk, replies, strict=True):
                buffer = memory.buffer_of(token, interval)
                if buffer is None:
                    continue
                if isinstance(reply, Exception) and not is_wrong_type(reply):
                    raise reply
                candle = parse_candle(reply) if isinstance(reply, bytes) else None
                store.tally.rows_refused += reply is not None and candle is None
                row, flag = (None, 0) if candle is None else _as_row(candle)
                buffer.current_at = now
                if buffer.set_current(row, flag):
                    replaced.append((token, interval))
        if replaced:
            _read_tails(store, memory, replaced)


def _read_tails(store: CandleStore, memory: MirrorRows, keys: Sequence[BufferKey]) -> None:
    """Read the newest completed rows behind a new current candle.

    They may not be announced yet, and what the mirror last saw of them was not their last tick.
    """
    pipe = store.client.pipeline(transaction=False)
    for token, interval in keys:
        pipe.lrange(store.keys.candles(token, interval), -TAIL_ROWS, -1)
    replies: list[Any] = pipe.execute(raise_on_error=False)
    with memory.lock:
        for (token, interval), rows in zip(keys, replies, strict=True):
            buffer = memory.buffer_of(token, interval)
            if buffer is None or isinstance(rows, Exception):
                continue
            for text in rows:
                _add_row(store, buffer, text)


def _add_row(store: CandleStore, buffer: RowBuffer, text: bytes) -> int:
    """Add a completed row's text; return 1, or 0 (counted) if it is no candle."""
    candle = parse_candle(text)
    if candle is None:
        store.tally.rows_refused += 1
        return 0
    buffer.add(*_as_row(candle))
    return 1


def _as_row(candle: Candle) -> tuple[Any, int]:
    rows, flags = arrays_of([candle])
    return rows[0], int(flags[0])


def moved_names(store: CandleStore, memory: MirrorRows) -> dict[int, tuple[int, str]]:
    """Return mirrored token → (token, symbol): the token that the master now gives its symbol to.

    Raises redis.RedisError.
    """
    symbols = dict(memory.symbols)
    tokens = read_tokens(store.client, store.keys, list(symbols.values()))
    return {
        token: (tokens[symbol], symbol)
        for token, symbol in symbols.items()
        if tokens.get(symbol, token) != token
    }
