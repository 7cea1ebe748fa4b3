"""Routes that read the market: quotes, candles of one instrument, candles of many, the instrument search."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
from aiohttp import web

from pkbrokers_redis.candles.model import CANDLE_FIELDS, FLAG_NAMES, find_interval
from pkbrokers_redis.client.bulk import Bulk
from pkbrokers_redis.store.instruments import search_instruments
from pkbrokers_redis.store.rows import read_quote
from pkbrokers_redis.web.executor import DOWNLOADS_MAX, Route, Services, TooBusy
from pkbrokers_redis.web.http import (
    CHUNK_BYTES,
    BadRequest,
    StreamBody,
    candle_row,
    flag_param,
    int_param,
    json_response,
    list_param,
    split_list,
    text_param,
)

SEARCH_RESULTS_MAX = 50
ROWS_MAX = 400_000  # 30 MB of JSON
JSON, ARROW = "application/json; charset=utf-8", "application/vnd.apache.arrow.stream"
INTEGER_FIELDS = {"start", "volume", "oi", "ticks"}


async def quote(request: web.Request, services: Services) -> web.Response:
    """Answer an object for one symbol, an array for several; token and symbol only if there is no quote."""
    names = split_list("symbols", request.match_info["symbols"].replace("/", ",").split(","))
    quotes = await services.quick(_read_quotes, services, names)
    return json_response(quotes[0] if len(quotes) == 1 else quotes)


def _read_quotes(services: Services, names: list[str]) -> list[dict[str, Any]]:
    store = services.store
    return [
        {"token": token, "symbol": symbol, **read_quote(store.client, store.keys, token)}
        for token, symbol in store.resolve_all(names)
    ]


async def candles(request: web.Request, services: Services) -> web.Response:
    """Answer `?count=50&current=1&fill=1` with Redis' rows, newest last; see `CandleStore.get_candles`."""
    [symbol] = split_list("symbol", [request.match_info["symbol"]]) or [""]
    [interval] = split_list("interval", [request.match_info["interval"]]) or [""]
    count = int_param(request, "count", 50)
    current, fill = flag_param(request, "current"), flag_param(request, "fill")
    return json_response(
        await services.quick(_read_candles, services, symbol, interval, count, current, fill)
    )


def _read_candles(
    services: Services, symbol: str, interval: str, count: int, current: bool, fill: bool
) -> dict[str, Any]:
    store = services.store
    name = find_interval(store.settings.intervals, interval).name
    token, full_symbol = store.resolve(symbol)
    return {
        "token": token,
        "symbol": full_symbol,
        "interval": name,
        "fields": CANDLE_FIELDS,
        "candles": [candle_row(c) for c in store.get_candles(token, name, count, current, fill)],
    }


async def search(request: web.Request, services: Services) -> web.Response:
    """Answer `?q=infos&limit=10` with the best matches; without `q` with the first streamed instruments."""
    text, limit = text_param(request, "q"), int_param(request, "limit", 10, SEARCH_RESULTS_MAX)
    return json_response(await services.heavy(_search, services, text, limit))


def _search(services: Services, text: str, limit: int) -> list[dict[str, Any]]:
    store = services.store
    if text:
        found = search_instruments(store.client, store.keys, text, limit=limit)
        return [{name: row[name] for name in ("token", "symbol", "name")} for row in found.rows]
    tokens = sorted(store.tokens_seen())[:limit]
    return [{"token": token, "symbol": symbol, "name": ""} for token, symbol in store.resolve_all(tokens)]


async def bulk(request: web.Request, services: Services) -> Any:
    """Answer `?interval=5m&count=100&symbols=INFY,TCS&current=1&format=arrow`; default: all instruments."""
    interval = text_param(request, "interval", "5m")
    count, current = int_param(request, "count", 100), flag_param(request, "current")
    symbols, form = list_param(request, "symbols"), text_param(request, "format", "json")
    if form not in ("json", "arrow"):
        raise BadRequest("format is neither json nor arrow", "write format=json")
    if services.downloads >= DOWNLOADS_MAX:
        raise TooBusy("too many downloads at once", "try again in a moment")
    services.downloads += 1
    try:
        body = await services.heavy(_read_bulk, services, symbols, interval, count, current, form)
        stream = StreamBody(request, services, JSON if form == "json" else ARROW, len(body))
        await stream.start()
        with suppress(ConnectionError):  # the client has disconnected
            for first in range(0, len(body), CHUNK_BYTES):
                await stream.send(body[first : first + CHUNK_BYTES])
        return stream.response
    finally:
        services.downloads -= 1


def _read_bulk(
    services: Services, symbols: list[str] | None, interval: str, count: int, current: bool, form: str
) -> bytes:
    store = services.store
    row = find_interval(store.settings.intervals, interval)
    count = min(count, row.keep + 1)  # Redis keeps no more
    instruments = len(store.tokens_seen() if symbols is None else symbols)
    if instruments * count > ROWS_MAX:
        raise BadRequest(
            f"{instruments} instruments of {count} candles are more than {ROWS_MAX:,} rows",
            f"use count={ROWS_MAX // instruments}, or name symbols",
        )
    result = store.bulk(symbols, row.name, count, current)
    return _bulk_json(result) if form == "json" else _bulk_arrow(result)


def _bulk_json(result: Bulk) -> bytes:
    rows = list(zip(*_json_columns(result), strict=True))
    for i in np.flatnonzero(result.flags).tolist():
        rows[i] = (*rows[i], FLAG_NAMES[result.flags[i]])
    bounds = result.offsets.tolist()
    by_symbol = {symbol: rows[bounds[i] : bounds[i + 1]] for i, symbol in enumerate(result.symbols)}
    return msgspec.json.encode({"interval": result.interval, "fields": CANDLE_FIELDS, "candles": by_symbol})


def _json_columns(result: Bulk) -> list[list[Any]]:
    """Return the fields of all rows; whole numbers are integers, NaN becomes null."""
    columns = []
    for i, name in enumerate(CANDLE_FIELDS):
        cells = result.rows[:, i].tolist()
        if name in INTEGER_FIELDS:
            cells = [int(cell) if cell.is_integer() else cell for cell in cells]
        columns.append(cells)
    return columns


def _bulk_arrow(result: Bulk) -> bytes:
    """Return a stream of one batch: `symbol` (dictionary), the fields of a row, `flag` ("" if whole)."""
    import pyarrow as pa

    symbol_index = np.repeat(np.arange(len(result), dtype=np.int32), result.counts)
    names = ["symbol", *CANDLE_FIELDS, "flag"]
    arrays = [
        pa.DictionaryArray.from_arrays(pa.array(symbol_index), pa.array(result.symbols, pa.string())),
        pa.array(result.start),
        *(pa.array(result.rows[:, i], from_pandas=True) for i in range(1, len(CANDLE_FIELDS))),
        pa.DictionaryArray.from_arrays(pa.array(result.flags), pa.array(FLAG_NAMES)),
    ]
    batch = pa.record_batch(arrays, names=names)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


ROUTES = [
    Route("/api/quote/{symbols:.+}", quote, "/api/quote/INFY/NSE:RELIANCE"),
    Route("/api/candles/{symbol}/{interval}", candles, "/api/candles/INFY/5m?count=3&current=1&fill=1"),
    Route("/api/bulk", bulk, "/api/bulk?interval=5m&count=3&symbols=INFY&current=1", is_long=True),
    Route("/api/search", search, "/api/search?q=infy&limit=5"),
]
