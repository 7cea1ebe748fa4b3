"""Upstream's shapes: candle dicts, OHLCV frames, ticks.json and the day candles of a pickle.

dict    timestamp last_tick_time open high low close volume oi tick_count is_complete
frame   index `datetime` (Asia/Kolkata), columns open high low close (float64), volume (int64)
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pandas as pd

from pkbrokers_redis.candles.calendar import KOLKATA
from pkbrokers_redis.candles.model import CANDLE_FIELDS, DAY, Candle
from pkbrokers_redis.client.bulk import Bulk, candles_of
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.files.atomic import replacing

try:  # public since pandas 3: 8 µs a frame instead of the constructor's 60
    _pandas_api: Any = importlib.import_module("pandas.api.internals")
except ImportError:
    _pandas_api = None

Floats = npt.NDArray[np.float64]

COLUMNS = ("open", "high", "low", "close", "volume")
EMPTY_COLUMNS = ("timestamp", *COLUMNS)  # of a frame without rows, as upstream has it
TIME_FIELDS = ["last_trade_time", "exchange_time", "received_at"]
QUOTE_FIELDS = [*TIME_FIELDS, "close", "buy_quantity", "sell_quantity", "depth"]
QUOTES_PER_PIPELINE = 1_000
NANOSECONDS = 1_000_000_000
INDEXES_MAX = 512  # cached indexes, of a few KB each

_OPEN, _VOLUME = CANDLE_FIELDS.index("open"), CANDLE_FIELDS.index("volume")
_KOLKATA_DTYPE = pd.DatetimeTZDtype("ns", "Asia/Kolkata")
_COLUMN_INDEX = pd.Index(COLUMNS)
_PRICES_AT, _VOLUME_AT = np.arange(4), np.array([4])


def candle_dict(candle: Candle, is_complete: bool, last_tick_time: int = 0) -> dict[str, Any]:
    """Return a candle as upstream's `Candle.to_dict()`; `last_tick_time` is 0 if unknown."""
    return {
        "timestamp": candle.start,
        "last_tick_time": last_tick_time,
        "open": candle.open,
        "high": candle.high,
        "low": candle.low,
        "close": candle.close,
        "volume": candle.volume,
        "oi": candle.oi or 0,
        "tick_count": candle.ticks,
        "is_complete": is_complete,
    }


def ohlcv_frame(rows: Floats) -> pd.DataFrame:
    """Copy float64[n, 8] (columns as in CANDLE_FIELDS) into upstream's frame.

    Without rows it has EMPTY_COLUMNS. `volume` keeps its fractions if the market trades them.
    """
    if not len(rows):
        return pd.DataFrame(columns=list(EMPTY_COLUMNS))
    index = _index(rows[:, 0].tobytes())
    cells = rows[:, _OPEN : _VOLUME + 1].T.copy()
    volumes: Any = cells[4:].astype(np.int64)
    if not np.array_equal(volumes, cells[4:]):
        volumes = cells[4:]
    if _pandas_api is None:
        columns = dict(zip(COLUMNS, [*cells[:4], volumes[0]], strict=True))
        return pd.DataFrame(columns, index=index)
    blocks = [(cells[:4], _PRICES_AT), (volumes, _VOLUME_AT)]
    frame: pd.DataFrame = _pandas_api.create_dataframe_from_blocks(blocks, index, _COLUMN_INDEX)
    return frame


@lru_cache(maxsize=INDEXES_MAX)
def _index(starts: bytes) -> pd.DatetimeIndex:
    """Return the index of these starts (float64, epoch seconds). Most instruments share one."""
    stamps: Any = np.frombuffer(starts, np.float64).astype(np.int64) * NANOSECONDS
    return pd.DatetimeIndex(stamps, dtype=_KOLKATA_DTYPE, name="datetime")


def newest_candles(store: CandleStore, interval: str = DAY) -> dict[int, dict[str, Any]]:
    """Return token → the newest candle dict, with `trading_symbol`, of all instruments that have one."""
    bulk = store.bulk(None, interval, 1, include_current=True)
    forming = _forming(store, bulk)
    quotes = _quotes(store, bulk.tokens.tolist(), TIME_FIELDS)
    found: dict[int, dict[str, Any]] = {}
    for (token, symbol, candle), quote in zip(_newest_of(bulk), quotes, strict=True):
        last_s = last_trade_s(quote, candle) if token in forming else 0
        candle_of_token = candle_dict(candle, token not in forming, last_s)
        found[token] = {**candle_of_token, "trading_symbol": symbol.removeprefix("NSE:")}
    return found


def pickle_format(store: CandleStore, rows_max: int) -> dict[str, Any]:
    """Return symbol → data, columns and index (ISO, Asia/Kolkata) of its day candles.

    The index of a candle being formed is the time of its last trade, as upstream has it.
    """
    bulk = store.bulk(None, DAY, rows_max, include_current=True)
    forming = _forming(store, bulk)
    quotes = _quotes(store, bulk.tokens.tolist(), TIME_FIELDS)
    result: dict[str, Any] = {}
    for n, (token, symbol, newest) in enumerate(_newest_of(bulk)):
        rows = bulk.rows[bulk.offsets[n] : bulk.offsets[n + 1]].tolist()
        index = [_iso(row[0]) for row in rows]
        if token in forming:
            index[-1] = _iso(last_trade_s(quotes[n], newest))
        data = [[*row[_OPEN:_VOLUME], _as_int(row[_VOLUME])] for row in rows]
        result[symbol.removeprefix("NSE:")] = {"data": data, "columns": list(COLUMNS), "index": index}
    return result


def ticks_json(store: CandleStore) -> dict[str, Any]:
    """Return token (as text) → its newest day: upstream's ticks.json, with both generations of its keys."""
    bulk = store.bulk(None, DAY, 1, include_current=True)
    quotes = _quotes(store, bulk.tokens.tolist(), QUOTE_FIELDS)
    result: dict[str, Any] = {}
    for (token, symbol, candle), quote in zip(_newest_of(bulk), quotes, strict=True):
        stamp = _iso(last_trade_s(quote[:3], candle))
        close, buy, sell, depth = quote[3:]
        oi = candle.oi or 0
        result[str(token)] = {
            "instrument_token": token,
            "trading_symbol": symbol.removeprefix("NSE:"),
            "tick_count": candle.ticks,
            "ohlcv": {
                "timestamp": stamp,
                **{name: getattr(candle, name) for name in COLUMNS},
                "oi": oi,
            },
            "prev_day_close": _number(close),
            "buy_quantity": _number(buy),
            "sell_quantity": _number(sell),
            "oi": oi,
            "market_depth": _depth(depth),
            "last_update": stamp,
            "last_updated": stamp,
        }
    return result


def write_json(path: Path, data: Any) -> None:
    """Write JSON to a temporary file and rename it."""
    with replacing(path) as file:
        file.write(msgspec.json.format(msgspec.json.encode(data), indent=2))


def write_pickle(path: Path, data: Any) -> None:
    """Write a pickle to a temporary file and rename it."""
    with replacing(path) as file:
        pickle.dump(data, file, pickle.HIGHEST_PROTOCOL)


def last_trade_s(times: Sequence[bytes | None], candle: Candle) -> int:
    """Return the first of a quote's times that is not before the candle, else the candle's start."""
    for text in times:
        try:
            moment = datetime.fromisoformat((text or b"").decode()).timestamp()
        except ValueError:
            continue
        if moment >= candle.start:
            return int(moment)
    return candle.start


def _newest_of(bulk: Bulk) -> list[tuple[int, str, Candle]]:
    """Return token, symbol and newest candle of each instrument; the bulk has rows of all of them."""
    last = bulk.offsets[1:] - 1
    candles = candles_of(bulk.rows[last], bulk.flags[last])
    return list(zip(bulk.tokens.tolist(), bulk.symbols, candles, strict=True))


def _forming(store: CandleStore, bulk: Bulk) -> set[int]:
    """Return the tokens whose newest row is being formed."""
    tokens = bulk.tokens.tolist()
    pipe = store.client.pipeline(transaction=False)
    for token in tokens:
        pipe.hexists(store.keys.current(token), bulk.interval)
    replies = pipe.execute(raise_on_error=False) if tokens else []
    return {token for token, reply in zip(tokens, replies, strict=True) if reply is True or reply == 1}


def _quotes(store: CandleStore, tokens: list[int], fields: list[str]) -> list[list[bytes | None]]:
    """Return the fields of each instrument's quote; all None if there is none or the key has another type."""
    found: list[list[bytes | None]] = []
    for first in range(0, len(tokens), QUOTES_PER_PIPELINE):
        pipe = store.client.pipeline(transaction=False)
        for token in tokens[first : first + QUOTES_PER_PIPELINE]:
            pipe.hmget(store.keys.quote(token), fields)
        replies = pipe.execute(raise_on_error=False)
        found += [reply if isinstance(reply, list) else [None] * len(fields) for reply in replies]
    return found


def _iso(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, KOLKATA).isoformat()


def _as_int(number: float) -> float:
    return int(number) if number == int(number) else number


def _number(text: bytes | None) -> float:
    try:
        return _as_int(float(text or b"0"))
    except (ValueError, OverflowError):
        return 0


def _depth(text: bytes | None) -> dict[str, list[Any]]:
    """Return a quote's depth (`buy`, `sell`) under upstream's names."""
    try:
        depth = msgspec.json.decode(text or b"{}")
        return {"bid": list(depth.get("buy", [])), "ask": list(depth.get("sell", []))}
    except (ValueError, AttributeError, TypeError):
        return {"bid": [], "ask": []}
