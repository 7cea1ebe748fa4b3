"""Many instruments at once: the last rows of thousands of instruments as arrays, or as one DataFrame.

2,000 instruments × 100 rows are 12 MB of text. Most of the time turns 1.6 million numbers from text into
floats. msgspec does that in one call a pipeline once its rows are joined into one flat array: 20 % faster
than an array a row. It needs no compiler, so the first call of a process is as fast as the hundredth.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt
import redis

from pkbrokers_redis.candles.model import CANDLE_FIELDS, FLAG_NAMES, Candle
from pkbrokers_redis.errors import UnknownSymbol
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.errors import is_wrong_type
from pkbrokers_redis.store.rows import Tally, parse_candles

if TYPE_CHECKING:
    import pandas as pd

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.int8]
Counts = npt.NDArray[np.int64]

INSTRUMENTS_PER_PIPELINE = 250  # 1.5 MB of replies at 100 rows: memory needed next to the result
ROWS_PER_PIPELINE = 25_000  # at most: Redis answers a pipeline in one go, and ticks wait for it
WIDTH = len(CANDLE_FIELDS)
PRICE_MAX = 31_536_000  # below every `start` since 1971, so that a shifted row is detected

_numbers = msgspec.json.Decoder(list[float | None])
_flag = re.compile(rb',\s*"(partial|gap|backfilled)"\s*\]')
_FLAG_CODES = {name.encode(): code for code, name in enumerate(FLAG_NAMES)}


@dataclass(frozen=True)
class Bulk:
    """Candles of k instruments in flat arrays; instrument i has rows `offsets[i]` to `offsets[i + 1]`.

    Attributes:
        interval: The interval's name.
        tokens: int64[k].
        symbols: k names, `NSE:INFY`.
        offsets: int64[k + 1].
        rows: float64[n, 8], columns as in CANDLE_FIELDS; `oi` is NaN if the instrument has none.
        flags: int8[n], index into FLAG_NAMES: 0 whole, 1 partial, 2 gap, 3 backfilled.
        rows_refused: Rows in Redis that were malformed.

    Example:
        >>> bulk = store.bulk(["INFY", "RELIANCE"], "5m", count=100)
        >>> bulk.symbols
        ['NSE:INFY', 'NSE:RELIANCE']
        >>> closes = bulk.of("INFY")[:, 4]
    """

    interval: str
    tokens: npt.NDArray[np.int64]
    symbols: list[str]
    offsets: npt.NDArray[np.int64]
    rows: Floats
    flags: Flags
    rows_refused: int = 0

    def __len__(self) -> int:
        return len(self.symbols)

    @property
    def counts(self) -> Counts:
        """Return int64[k], rows of each instrument."""
        return np.diff(self.offsets)

    @cached_property
    def start(self) -> npt.NDArray[np.int64]:
        """Return int64[n], epoch seconds."""
        return self.rows[:, 0].astype(np.int64)

    @cached_property
    def _index(self) -> dict[str, int]:
        places: dict[str, int] = {}
        for i, symbol in enumerate(self.symbols):
            places[symbol] = places[str(self.tokens[i])] = i
            places.setdefault(symbol.removeprefix("NSE:"), i)
        return places

    def of(self, symbol: str | int) -> Floats:
        """Return float64[count, 8], a view of one instrument's rows.

        Raises:
            UnknownSymbol: The instrument is not in this bulk.
        """
        text = str(symbol).strip()
        place = self._index.get(text, self._index.get(text.upper()))
        if place is None:
            raise UnknownSymbol(text[:40], [])
        return self.rows[self.offsets[place] : self.offsets[place + 1]]

    def column(self, field: str) -> Floats:
        """Return float64[n], a view of one field of CANDLE_FIELDS."""
        return self.rows[:, CANDLE_FIELDS.index(field)]

    def grid(self, field: str) -> Floats:
        """Return float64[k, longest], one line an instrument, newest last, padded with NaN on the left."""
        counts = self.counts
        width = int(counts.max(initial=0))
        grid = np.full((len(self), width), np.nan)
        line = np.repeat(np.arange(len(self)), counts)
        from_end = np.repeat(self.offsets[1:], counts) - np.arange(len(self.rows))
        grid[line, width - from_end] = self.column(field)
        return grid

    def with_rows_only(self) -> Bulk:
        """Return the bulk without instruments that have no rows."""
        keep = self.counts > 0
        symbols = [symbol for symbol, has_rows in zip(self.symbols, keep, strict=True) if has_rows]
        offsets = np.append(self.offsets[:-1][keep], self.offsets[-1])
        return replace(self, tokens=self.tokens[keep], symbols=symbols, offsets=offsets)

    def to_pandas(self) -> pd.DataFrame:
        """Return a DataFrame: open high low close volume oi ticks flag.

        The index is (symbol, datetime), the latter in Asia/Kolkata.
        """
        import pandas as pd  # a second of import that readers of arrays need not pay

        starts, moments = np.unique(self.start, return_inverse=True)
        levels: list[Any] = [self.symbols, kolkata_index(starts)]
        codes: list[Any] = [np.repeat(np.arange(len(self)), self.counts), moments]
        index = pd.MultiIndex(levels, codes, names=["symbol", "datetime"], verify_integrity=False)
        return candle_frame(self.rows, self.flags, index)


def arrays_of(candles: Sequence[Candle]) -> tuple[Floats, Flags]:
    """Convert candles into float64[n, 8] and int8[n] (index into FLAG_NAMES)."""
    rows = np.array([candle[:WIDTH] for candle in candles], np.float64).reshape(-1, WIDTH)
    return rows, np.array([FLAG_NAMES.index(candle.flag) for candle in candles], np.int8)


def candles_of(rows: Floats, flags: Flags) -> list[Candle]:
    """Convert float64[n, 8] and int8[n] into candles."""
    candles: list[Candle] = []
    for row, flag in zip(rows.tolist(), flags.tolist(), strict=True):
        start, open_, high, low, close, volume, oi, ticks = row
        oi = None if oi != oi else _as_int(oi)
        name = FLAG_NAMES[flag]
        candles.append(Candle(int(start), open_, high, low, close, _as_int(volume), oi, int(ticks), name))
    return candles


def _as_int(number: float) -> float:
    return int(number) if number == int(number) else number


def kolkata_index(starts: npt.NDArray[np.int64]) -> pd.DatetimeIndex:
    """Convert epoch seconds into an index named `datetime` in Asia/Kolkata."""
    import pandas as pd

    moments = pd.DatetimeIndex(starts.astype("datetime64[s]").astype("datetime64[ns]"), name="datetime")
    return moments.tz_localize("UTC").tz_convert("Asia/Kolkata")


def candle_frame(rows: Floats, flags: Flags, index: pd.Index[Any]) -> pd.DataFrame:
    """Convert float64[n, 8] and flags into a DataFrame; volume and ticks are int64 if all are whole."""
    import pandas as pd

    columns: dict[str, Any] = {name: rows[:, i] for i, name in enumerate(CANDLE_FIELDS) if name != "start"}
    for name in ("volume", "ticks"):
        whole = columns[name].astype(np.int64)
        if np.array_equal(whole, columns[name]):
            columns[name] = whole
    columns["flag"] = pd.Categorical.from_codes(flags, categories=pd.Index(FLAG_NAMES))
    return pd.DataFrame(columns, index=index, copy=False)


def read_bulk(
    client: redis.Redis,
    keys: Keys,
    instruments: Sequence[tuple[int, str]],
    interval: str,
    count: int,
    include_current: bool = False,
) -> Bulk:
    """Read the last `count` candles of each `(token, symbol)`, in this order. Raises redis.RedisError.

    A malformed row, or a key of another type, costs itself only and is counted in `rows_refused`.
    """
    tally = Tally()
    counts = np.zeros(len(instruments), np.int64)
    parts: list[tuple[Floats, Flags]] = [arrays_of([])]
    tokens = [token for token, _ in instruments]
    step = max(1, min(INSTRUMENTS_PER_PIPELINE, ROWS_PER_PIPELINE // max(count, 1)))
    for first in range(0, len(tokens) if count > 0 else 0, step):
        chunk = tokens[first : first + step]
        lists = _fetch(client, keys, chunk, interval, count, include_current, tally)
        rows, flags, found = _parse_lists(lists, tally)
        if include_current:
            rows, flags, found = _drop_moved(rows, flags, found, count)
        counts[first : first + len(chunk)] = found
        parts.append((rows, flags))
    return Bulk(
        interval,
        np.array(tokens, np.int64),
        [symbol for _, symbol in instruments],
        np.concatenate(([0], np.cumsum(counts))),
        np.concatenate([rows for rows, _ in parts]),
        np.concatenate([flags for _, flags in parts]),
        tally.rows_refused,
    )


def _fetch(
    client: redis.Redis,
    keys: Keys,
    tokens: list[int],
    interval: str,
    count: int,
    include_current: bool,
    tally: Tally,
) -> list[list[bytes]]:
    """Return row texts of each token, the current row last."""
    pipe = client.pipeline(transaction=False)
    for token in tokens:
        if include_current:
            # Before its list: a candle that moves in between is then read twice, and dropped once, instead
            # of being missed.
            pipe.hget(keys.current(token), interval)
        pipe.lrange(keys.candles(token, interval), -count, -1)
    replies = pipe.execute(raise_on_error=False)
    for i, reply in enumerate(replies):
        if isinstance(reply, Exception):
            if not is_wrong_type(reply):
                raise reply
            tally.rows_refused += 1
            replies[i] = None
    if not include_current:
        return [rows or [] for rows in replies]
    pairs = zip(replies[::2], replies[1::2], strict=True)
    return [[*(rows or []), current] if current else rows or [] for current, rows in pairs]


def _parse_lists(lists: list[list[bytes]], tally: Tally) -> tuple[Floats, Flags, Counts]:
    """Parse the row texts of each list into rows, flags and the number of rows of each list."""
    counts = np.fromiter(map(len, lists), np.int64, len(lists))
    flags = np.zeros(int(counts.sum()), np.int8)
    rows = _parse_text(b",".join([b",".join(texts) for texts in lists if texts]), flags)
    if rows is not None and _are_starts(rows[:, 0], counts):
        return rows, flags, counts
    # At least one row is malformed: parse row by row, so that no other row is lost.
    parsed = [parse_candles(texts, tally) for texts in lists]
    rows, flags = arrays_of([candle for candles in parsed for candle in candles])
    return rows, flags, np.fromiter(map(len, parsed), np.int64, len(parsed))


def _parse_text(text: bytes, flags: Flags) -> Floats | None:
    """Parse `[…],[…]` into float64[len(flags), 8] and set `flags`; return None if it is anything else."""
    n = len(flags)
    if b'"' in text:
        row = position = 0
        for match in _flag.finditer(text):
            row += text.count(b"[", position, match.start())
            position = match.start()
            if row > n:
                return None
            flags[row - 1] = _FLAG_CODES[match[1]]
        text = _flag.sub(b"]", text)
    try:
        numbers = _numbers.decode(text.replace(b"],[", b",") or b"[]")
    except msgspec.DecodeError:
        return None
    if len(numbers) != n * WIDTH:
        return None
    return np.array(numbers, np.float64).reshape(n, WIDTH)


def _are_starts(starts: Floats, counts: Counts) -> bool:
    """Return whether every list's starts rise and are times.

    This detects rows of 7 and 9 cells, 16 in all, which would pass for two rows of 8. The last start may
    repeat: a current row that has just moved to its list (see `_drop_moved`).
    """
    if not len(starts):
        return True
    is_rising = np.diff(starts) >= 0
    seams = np.cumsum(counts)[:-1]
    is_rising[seams[(seams > 0) & (seams < len(starts))] - 1] = True
    return bool(is_rising.all() and starts.min() > PRICE_MAX)


def _drop_moved(rows: Floats, flags: Flags, counts: Counts, count: int) -> tuple[Floats, Flags, Counts]:
    """Drop current rows that are in their list already, then the oldest row beyond `count`."""
    ends = np.cumsum(counts)
    last = ends[counts > 1] - 1
    keep = np.ones(len(rows), bool)
    keep[last[rows[last, 0] <= rows[last - 1, 0]]] = False
    owner = np.repeat(np.arange(len(counts)), counts)
    left = np.bincount(owner[keep], minlength=len(counts))
    over = np.flatnonzero(left > count)
    keep[ends[over] - counts[over]] = False
    return rows[keep], flags[keep], np.minimum(left, count)
