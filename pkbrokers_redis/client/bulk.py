"""Everything at once: the last rows of thousands of instruments as arrays, or as one DataFrame.

2,000 instruments × 100 rows are 12 MB of text. Most of the time goes into turning 1.6 million numbers
from text into floats; msgspec does that in one call a slice, once the rows of a slice are written as one
flat array. It is not the fastest reader there is, but it needs no compiler: the first call of a
fresh process is as fast as the hundredth.
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

from pkbrokers_redis.candles.model import CANDLE_FIELDS, FLAG_NAMES
from pkbrokers_redis.errors import UnknownSymbol
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.rows import Tally, parse_candles

if TYPE_CHECKING:
    import pandas as pd

Floats = npt.NDArray[np.float64]

INSTRUMENTS_A_PIPELINE = 250  # 1.5 MB of replies at 100 rows: what is in memory beside the result
ROWS_A_PIPELINE = 25_000  # at most: Redis answers a pipeline in one go, and the ticks wait those milliseconds
WIDTH = len(CANDLE_FIELDS)
PRICE_MAX = 31_536_000  # below every `start` since 1971: a shifted row cannot pass for one
NANOSECONDS = 1_000_000_000

_numbers = msgspec.json.Decoder(list[float | None])
_flag = re.compile(rb',\s*"(partial|gap|backfilled)"\s*\]')
_FLAG_CODES = {name.encode(): code for code, name in enumerate(FLAG_NAMES)}


@dataclass(frozen=True)
class Bulk:
    """Candles of k instruments in flat arrays; instrument i has rows `offsets[i]` to `offsets[i + 1]`.

    `rows`    float64[n, 8]  columns as in CANDLE_FIELDS; `oi` is NaN where there is none
    `flags`   int8[n]        index into FLAG_NAMES: 0 whole, 1 partial, 2 gap, 3 backfilled
    `offsets` int64[k + 1]
    `rows_refused`           rows in Redis that were no candle rows
    """

    interval: str
    tokens: npt.NDArray[np.int64]
    symbols: list[str]
    offsets: npt.NDArray[np.int64]
    rows: Floats
    flags: npt.NDArray[np.int8]
    rows_refused: int = 0

    def __len__(self) -> int:
        return len(self.symbols)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """int64[k], rows of each instrument."""
        return np.diff(self.offsets)

    @cached_property
    def start(self) -> npt.NDArray[np.int64]:
        """int64[n], epoch seconds."""
        return self.rows[:, 0].astype(np.int64)

    @cached_property
    def _index(self) -> dict[str, int]:
        places: dict[str, int] = {}
        for i, symbol in enumerate(self.symbols):
            places[symbol] = places[str(self.tokens[i])] = i
            places.setdefault(symbol.removeprefix("NSE:"), i)
        return places

    def of(self, symbol: str | int) -> Floats:
        """float64[count, 8], a view of one instrument's rows. Raises UnknownSymbol if it is not here."""
        text = str(symbol).strip()
        place = self._index.get(text, self._index.get(text.upper()))
        if place is None:
            raise UnknownSymbol(text[:40], [])
        return self.rows[self.offsets[place] : self.offsets[place + 1]]

    def column(self, field: str) -> Floats:
        """float64[n], a view of one field of CANDLE_FIELDS."""
        return self.rows[:, CANDLE_FIELDS.index(field)]

    def grid(self, field: str) -> Floats:
        """float64[k, longest], one line an instrument, newest in the last column, NaN where rows lack."""
        counts = self.counts
        width = int(counts.max(initial=0))
        grid = np.full((len(self), width), np.nan)
        line = np.repeat(np.arange(len(self)), counts)
        back = np.repeat(self.offsets[1:], counts) - np.arange(len(self.rows))
        grid[line, width - back] = self.column(field)
        return grid

    def with_rows_only(self) -> Bulk:
        """Without the instruments that have no rows."""
        keep = self.counts > 0
        symbols = [symbol for symbol, has_rows in zip(self.symbols, keep, strict=True) if has_rows]
        offsets = np.append(self.offsets[:-1][keep], self.offsets[-1])
        return replace(self, tokens=self.tokens[keep], symbols=symbols, offsets=offsets)

    def to_pandas(self) -> pd.DataFrame:
        """Rows under (symbol, datetime in Asia/Kolkata): open high low close volume oi ticks flag."""
        import pandas as pd  # a second of import that readers of arrays need not pay

        starts, moments = np.unique(self.start, return_inverse=True)
        levels: list[Any] = [self.symbols, kolkata_index(starts)]
        codes: list[Any] = [np.repeat(np.arange(len(self)), self.counts), moments]
        index = pd.MultiIndex(levels, codes, names=["symbol", "datetime"], verify_integrity=False)
        return candle_frame(self.rows, self.flags, index)


def kolkata_index(starts: npt.NDArray[np.int64]) -> pd.DatetimeIndex:
    """Epoch seconds → tz-aware index named `datetime`."""
    import pandas as pd

    moments = pd.DatetimeIndex(starts.astype("datetime64[s]").astype("datetime64[ns]"), name="datetime")
    return moments.tz_localize("UTC").tz_convert("Asia/Kolkata")


def candle_frame(rows: Floats, flags: npt.NDArray[np.int8], index: pd.Index[Any]) -> pd.DataFrame:
    """float64[n, 8] and flags → a DataFrame with lower-case columns; volume and ticks are int64."""
    import pandas as pd

    columns: dict[str, Any] = {name: rows[:, i] for i, name in enumerate(CANDLE_FIELDS) if name != "start"}
    columns["volume"] = _whole(columns["volume"])
    columns["ticks"] = _whole(columns["ticks"])
    columns["flag"] = pd.Categorical.from_codes(flags, categories=pd.Index(FLAG_NAMES))
    return pd.DataFrame(columns, index=index, copy=False)


def _whole(values: Floats) -> npt.NDArray[Any]:
    """Whole numbers as int64; a market that trades fractions of a unit keeps its floats."""
    whole = values.astype(np.int64)
    return whole if np.array_equal(whole, values) else values


def read_bulk(
    client: redis.Redis,
    keys: Keys,
    instruments: Sequence[tuple[int, str]],
    interval: str,
    count: int,
    include_current: bool = False,
) -> Bulk:
    """The last `count` candles of each `(token, symbol)`, the current one among them if asked.

    A key of another type counts as one refused row: it must not cost the others theirs.
    """
    tally = Tally()
    counts = np.zeros(len(instruments), np.int64)
    parts: list[tuple[Floats, npt.NDArray[np.int8]]] = []
    tokens = [token for token, _ in instruments]
    step = max(1, min(INSTRUMENTS_A_PIPELINE, ROWS_A_PIPELINE // max(count, 1)))
    for first in range(0, len(tokens) if count > 0 else 0, step):
        some = tokens[first : first + step]
        lists = _fetch(client, keys, some, interval, count, include_current, tally)
        rows, flags, found = _parse(lists, tally)
        if include_current:
            rows, flags, found = _drop_moved(rows, flags, found, count)
        counts[first : first + len(some)] = found
        parts.append((rows, flags))
    empty = (np.empty((0, WIDTH)), np.empty(0, np.int8))
    return Bulk(
        interval,
        np.array(tokens, np.int64),
        [symbol for _, symbol in instruments],
        np.concatenate(([0], np.cumsum(counts))),
        np.concatenate([rows for rows, _ in parts] or [empty[0]]),
        np.concatenate([flags for _, flags in parts] or [empty[1]]),
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
    """Row texts of each token, the current row last."""
    pipe = client.pipeline(transaction=False)
    for token in tokens:
        if include_current:
            # Before its list, not after: a candle that moves in between is then seen twice (and dropped
            # once), where the other order would miss it.
            pipe.hget(keys.current(token), interval)
        pipe.lrange(keys.candles(token, interval), -count, -1)
    replies = pipe.execute(raise_on_error=False)
    for i, reply in enumerate(replies):
        if isinstance(reply, Exception):
            if "WRONGTYPE" not in str(reply):
                raise reply
            tally.rows_refused += 1
            replies[i] = None
    if not include_current:
        return [rows or [] for rows in replies]
    pairs = zip(replies[::2], replies[1::2], strict=True)
    return [[*(rows or []), current] if current else rows or [] for current, rows in pairs]


def _parse(
    lists: list[list[bytes]], tally: Tally
) -> tuple[Floats, npt.NDArray[np.int8], npt.NDArray[np.int64]]:
    """Row texts a list → (rows, flags, rows of each list)."""
    counts = np.fromiter(map(len, lists), np.int64, len(lists))
    text = b",".join([b",".join(rows) for rows in lists if rows])
    n = int(counts.sum())
    flags = np.zeros(n, np.int8)
    rows = _parse_text(text, n, flags)
    if rows is not None and _in_order(rows[:, 0], counts):
        return rows, flags, counts
    return _parse_each(lists, tally)


def _parse_text(text: bytes, n: int, flags: npt.NDArray[np.int8]) -> Floats | None:
    """`[…],[…]` of n rows → float64[n, 8], filling flags; None when the text is anything else."""
    if b'"' in text:
        row = pos = 0
        for match in _flag.finditer(text):
            row += text.count(b"[", pos, match.start())
            pos = match.start()
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


def _in_order(starts: Floats, counts: npt.NDArray[np.int64]) -> bool:
    """Whether every list's starts look like starts and rise: what says that rows of 7 and 9 cells,
    16 in all, were not taken for two rows of 8."""
    if not len(starts):
        return True
    rising = np.diff(starts) > 0
    seams = np.cumsum(counts)[:-1]
    rising[seams[(seams > 0) & (seams < len(starts))] - 1] = True
    # A current row that has just moved to its list repeats the last start; see _drop_moved.
    rising[np.diff(starts) == 0] = True
    return bool(rising.all() and starts.min() > PRICE_MAX)


def _parse_each(
    lists: list[list[bytes]], tally: Tally
) -> tuple[Floats, npt.NDArray[np.int8], npt.NDArray[np.int64]]:
    """List by list, and in a list that holds a row that is none, row by row: nothing else is lost."""
    parts: list[Floats] = []
    part_flags: list[npt.NDArray[np.int8]] = []
    for texts in lists:
        flags = np.zeros(len(texts), np.int8)
        rows = _parse_text(b",".join(texts), len(texts), flags)
        if rows is None or not _in_order(rows[:, 0], np.array([len(texts)])):
            candles = parse_candles(texts, tally)
            rows = np.array([candle[:WIDTH] for candle in candles], np.float64).reshape(-1, WIDTH)
            flags = np.array([FLAG_NAMES.index(candle.flag) for candle in candles], np.int8)
        parts.append(rows)
        part_flags.append(flags)
    counts = np.fromiter(map(len, parts), np.int64, len(parts))
    return np.concatenate(parts), np.concatenate(part_flags), counts


def _drop_moved(
    rows: Floats, flags: npt.NDArray[np.int8], counts: npt.NDArray[np.int64], count: int
) -> tuple[Floats, npt.NDArray[np.int8], npt.NDArray[np.int64]]:
    """Without current rows that are in their list already, and at most `count` rows an instrument."""
    ends = np.cumsum(counts)
    last = ends[counts > 1] - 1
    keep = np.ones(len(rows), bool)
    keep[last[rows[last, 0] <= rows[last - 1, 0]]] = False
    owner = np.repeat(np.arange(len(counts)), counts)
    left = np.bincount(owner[keep], minlength=len(counts))
    over = np.flatnonzero(left > count)
    keep[ends[over] - counts[over]] = False  # one too many, the oldest
    return rows[keep], flags[keep], np.minimum(left, count)
