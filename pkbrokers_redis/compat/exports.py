"""Exports in upstream's shapes: ticks.json, and day candles for pickles."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from pkbrokers_redis.candles.calendar import KOLKATA
from pkbrokers_redis.candles.model import CANDLE_FIELDS, DAY, Candle
from pkbrokers_redis.client.bulk import Bulk
from pkbrokers_redis.client.dataframes import candle_dict
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.files.atomic import replacing

QUOTES_A_PIPELINE = 1_000
TIME_FIELDS = ["last_trade_time", "exchange_time", "received_at"]
QUOTE_FIELDS = [*TIME_FIELDS, "close", "buy_quantity", "sell_quantity", "depth"]
PICKLE_COLUMNS = ["open", "high", "low", "close", "volume"]

_json = msgspec.json.Decoder()


def newest_candles(store: CandleStore, interval: str = DAY) -> dict[int, dict[str, Any]]:
    """Token → the newest candle of each instrument that has one, with `trading_symbol`."""
    bulk = store.bulk(None, interval, 1, include_current=True)
    forming = _forming(store, bulk)
    quotes = _quotes(store, bulk.tokens.tolist(), TIME_FIELDS)
    found: dict[int, dict[str, Any]] = {}
    for (token, symbol, candle), quote in zip(_each_last(bulk), quotes, strict=True):
        is_forming = token in forming
        last_s = last_trade_s(quote, candle) if is_forming else 0
        found[token] = {
            **candle_dict(candle, not is_forming, last_s),
            "trading_symbol": symbol.removeprefix("NSE:"),
        }
    return found


def pickle_format(store: CandleStore, rows_max: int) -> dict[str, Any]:
    """Symbol → data, columns and index (ISO, Kolkata) of its day candles; the one that forms stands at its
    last trade, as upstream has it."""
    bulk = store.bulk(None, DAY, rows_max, include_current=True)
    forming = _forming(store, bulk)
    quotes = _quotes(store, bulk.tokens.tolist(), TIME_FIELDS)
    result: dict[str, Any] = {}
    for n, (token, symbol, last) in enumerate(_each_last(bulk)):
        rows = bulk.rows[bulk.offsets[n] : bulk.offsets[n + 1]]
        index = [_iso(start) for start in rows[:, 0].tolist()]
        if token in forming:
            index[-1] = _iso(last_trade_s(quotes[n], last))
        data = [[*row[1:5], _whole(row[5])] for row in rows.tolist()]
        result[symbol.removeprefix("NSE:")] = {"data": data, "columns": PICKLE_COLUMNS, "index": index}
    return result


def ticks_json(store: CandleStore) -> dict[str, Any]:
    """Token (as text) → the newest day of each: upstream's ticks.json, with both generations of its keys."""
    bulk = store.bulk(None, DAY, 1, include_current=True)
    quotes = _quotes(store, bulk.tokens.tolist(), QUOTE_FIELDS)
    result: dict[str, Any] = {}
    for (token, symbol, candle), quote in zip(_each_last(bulk), quotes, strict=True):
        stamp = _iso(last_trade_s(quote[:3], candle))
        close, buy, sell, depth = quote[3:]
        oi = candle.oi or 0
        result[str(token)] = {
            "instrument_token": token,
            "trading_symbol": symbol.removeprefix("NSE:"),
            "tick_count": candle.ticks,
            "ohlcv": {
                "timestamp": stamp,
                "open": candle.open,
                "high": candle.high,
                "low": candle.low,
                "close": candle.close,
                "volume": candle.volume,
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
    """Write it under a temporary name and rename: a reader sees the old file or the new one."""
    with replacing(path) as file:
        file.write(msgspec.json.format(msgspec.json.encode(data), indent=2))


def last_trade_s(times: list[bytes | None], candle: Candle) -> int:
    """The latest of a quote's times that does not lie before the candle; else the candle's start."""
    for text in times:
        try:
            moment = datetime.fromisoformat((text or b"").decode()).timestamp()
        except ValueError:
            continue
        if moment >= candle.start:
            return int(moment)
    return candle.start


def _each_last(bulk: Bulk) -> list[tuple[int, str, Candle]]:
    """Token, symbol and newest candle of each instrument of a bulk, which has rows of all of them."""
    width = len(CANDLE_FIELDS)
    found: list[tuple[int, str, Candle]] = []
    rows = bulk.rows[bulk.offsets[1:] - 1].tolist()
    for token, symbol, row in zip(bulk.tokens.tolist(), bulk.symbols, rows, strict=True):
        start, open_, high, low, close, volume, oi, ticks = row[:width]
        oi = None if oi != oi else _whole(oi)
        found.append(
            (token, symbol, Candle(int(start), open_, high, low, close, _whole(volume), oi, int(ticks)))
        )
    return found


def _forming(store: CandleStore, bulk: Bulk) -> set[int]:
    """The tokens whose newest row still forms."""
    tokens = bulk.tokens.tolist()
    pipe = store.client.pipeline(transaction=False)
    for token in tokens:
        pipe.hexists(store.keys.current(token), bulk.interval)
    replies = pipe.execute(raise_on_error=False) if tokens else []
    return {token for token, reply in zip(tokens, replies, strict=True) if reply is True or reply == 1}


def _quotes(store: CandleStore, tokens: list[int], fields: list[str]) -> list[list[bytes | None]]:
    """The fields of each instrument's quote; all None where there is none, or a foreign hand's key."""
    found: list[list[bytes | None]] = []
    for first in range(0, len(tokens), QUOTES_A_PIPELINE):
        pipe = store.client.pipeline(transaction=False)
        for token in tokens[first : first + QUOTES_A_PIPELINE]:
            pipe.hmget(store.keys.quote(token), fields)
        replies = pipe.execute(raise_on_error=False)
        found += [reply if isinstance(reply, list) else [None] * len(fields) for reply in replies]
    return found


def _iso(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, KOLKATA).isoformat()


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def _number(text: bytes | None) -> float:
    try:
        return _whole(float(text or b"0"))
    except (ValueError, OverflowError):
        return 0


def _depth(text: bytes | None) -> dict[str, list[Any]]:
    """A quote's depth (`buy`, `sell`) under upstream's names."""
    try:
        depth = _json.decode(text or b"{}")
        return {"bid": list(depth.get("buy", [])), "ask": list(depth.get("sell", []))}
    except (ValueError, AttributeError, TypeError):
        return {"bid": [], "ask": []}
