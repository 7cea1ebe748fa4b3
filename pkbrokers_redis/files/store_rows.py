"""What a candle file takes over from a store: the days, and the minutes closed since the last time."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pkbrokers_redis.candles.model import DAY, Candle
from pkbrokers_redis.client.bulk import Bulk, read_bulk
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.files.frames import (
    KOLKATA_SECONDS,
    Floats,
    date_texts,
    file_symbol,
    is_symbol,
    is_whole,
    iso_texts,
    kolkata,
)

INSTRUMENTS_A_CHUNK = 500  # 200,000 minutes at most: 13 MB as arrays, some 60 MB as records
OVERLAP_SECONDS = 15 * 60  # ticks that come later than this amend rows unnoticed until a full update
MINUTE = "1m"

Records = list[tuple[Any, ...]]


def changed_rows(store: Any, since_s: int | None, now_s: int) -> Iterator[tuple[Records, Records]]:
    """(day records, minute records) a chunk of instruments.

    Of a CandleStore, or of a store with upstream's methods. `since_s` None: everything it keeps; else the
    current day and the minutes from a quarter of an hour before.
    """
    inner = _inner(store)
    if inner is not None:
        yield from _from_redis(inner, since_s, now_s)
    else:
        yield from _from_upstream(store, now_s)


def is_ours(store: Any) -> bool:
    """Whether the rows come from Redis, checked and in the file's form."""
    return _inner(store) is not None


def _inner(store: Any) -> CandleStore | None:
    """The CandleStore itself, or the one an InMemoryCandleStore stands on."""
    inner = store if isinstance(store, CandleStore) else getattr(store, "store", None)
    return inner if isinstance(inner, CandleStore) else None


def _from_redis(store: CandleStore, since_s: int | None, now_s: int) -> Iterator[tuple[Records, Records]]:
    names = store.intervals
    keep = {interval.name: interval.keep for interval in store.settings.intervals}
    minutes = keep.get(MINUTE, 0)
    days = keep.get(DAY, 0)
    if since_s is not None:
        minutes = min(minutes, max(0, now_s - since_s + OVERLAP_SECONDS) // 60 + 1)
        days = min(days, 2 + max(0, now_s - since_s) // 86_400)
    instruments = store.instruments()
    for first in range(0, len(instruments), INSTRUMENTS_A_CHUNK):
        chunk = instruments[first : first + INSTRUMENTS_A_CHUNK]
        some = [(token, symbol) for token, symbol in chunk if is_symbol(symbol)]
        daily: Records = []
        intraday: Records = []
        if DAY in names and days:
            daily = _records(read_bulk(store.client, store.keys, some, DAY, days, include_current=True), None)
        if MINUTE in names and minutes:
            bulk = read_bulk(store.client, store.keys, some, MINUTE, minutes)
            intraday = _records(bulk, MINUTE, None if since_s is None else since_s - OVERLAP_SECONDS)
        yield daily, intraday


def _records(bulk: Bulk, interval: str | None, from_s: int | None = None) -> Records:
    texts = iso_texts(kolkata(bulk.start)) if interval else date_texts(bulk.start)
    symbols = [
        file_symbol(int(token), symbol) for token, symbol in zip(bulk.tokens, bulk.symbols, strict=True)
    ]
    owners = np.repeat(np.arange(len(bulk)), bulk.counts).tolist()
    keys = (interval,) if interval else ()
    volumes = bulk.rows[:, 5]
    whole = volumes.astype(np.int64) if is_whole(volumes) else volumes
    cells = zip(*(bulk.rows[:, i].tolist() for i in range(1, 5)), whole.tolist(), strict=True)
    wanted = (_are_candles(bulk.rows) & (bulk.start >= (from_s or 0))).tolist()
    return [
        (symbols[owner], text, *keys, *row)
        for owner, text, row, is_wanted in zip(owners, texts, cells, wanted, strict=True)
        if is_wanted
    ]


def _are_candles(rows: Floats) -> npt.NDArray[np.bool_]:
    """bool[n]: what `candle_records.checked` asks of a row, of all rows at once."""
    open_, high, low, close, volume = (rows[:, i] for i in range(1, 6))
    inside = (low <= np.minimum(open_, close)) & (np.maximum(open_, close) <= high)  # a NaN fails it
    return np.asarray(inside & np.isfinite(low) & np.isfinite(high) & (volume >= 0) & np.isfinite(volume))


def _from_upstream(store: Any, now_s: int) -> Iterator[tuple[Records, Records]]:
    """A store with `get_all_symbols`, `get_current_candle` and `get_candles` that answer with dicts."""
    today = dt.datetime.fromtimestamp(now_s + KOLKATA_SECONDS, dt.UTC).date().isoformat()
    for symbol in store.get_all_symbols():
        day = store.get_current_candle(trading_symbol=symbol, interval=DAY)
        minutes = store.get_candles(trading_symbol=symbol, interval=MINUTE, count=390)
        yield (
            [(symbol, today, *_cells(day))] if day else [],
            [(symbol, _cell(candle, "timestamp"), MINUTE, *_cells(candle)) for candle in minutes or []],
        )


def _cells(candle: Any) -> tuple[Any, ...]:
    return tuple(_cell(candle, name) for name in ("open", "high", "low", "close", "volume"))


def _cell(candle: Any, name: str) -> Any:
    if isinstance(candle, Candle):
        return getattr(candle, "start" if name == "timestamp" else name)
    return candle.get(name)
