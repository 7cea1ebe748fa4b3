"""The memory of a mirror: rings by interval and token, and what is read from them. No Redis here."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pkbrokers_redis.consumers.bulk import Bulk
from pkbrokers_redis.consumers.ring import WIDTH, Flags, Floats, Ring
from pkbrokers_redis.core.errors import PkbError
from pkbrokers_redis.core.model import FLAG_NAMES, Candle

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
