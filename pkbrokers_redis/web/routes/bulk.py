"""Everything at once: the last candles of many instruments, as JSON or as an Arrow stream."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from aiohttp import web

from pkbrokers_redis.candles.model import CANDLE_FIELDS, FLAG_NAMES, find_interval
from pkbrokers_redis.client.bulk import Bulk
from pkbrokers_redis.web.answers import send_whole
from pkbrokers_redis.web.questions import Mistake, flag_of, list_of, number_of, word_of
from pkbrokers_redis.web.reading import Busy
from pkbrokers_redis.web.registry import Route
from pkbrokers_redis.web.services import DOWNLOADS_MAX, Services

ROWS_MAX = 400_000  # 30 MB of JSON
JSON, ARROW = "application/json; charset=utf-8", "application/vnd.apache.arrow.stream"
WHOLE_NUMBERS = {"start", "volume", "oi", "ticks"}


async def bulk(request: web.Request, services: Services) -> Any:
    """`?interval=5m&count=100&symbols=INFY,TCS&current=1&format=arrow`; without symbols all with candles."""
    interval = word_of(request, "interval", "5m")
    count, current = number_of(request, "count", 100), flag_of(request, "current")
    symbols, form = list_of(request, "symbols"), word_of(request, "format", "json")
    if form not in ("json", "arrow"):
        raise Mistake("format is neither json nor arrow", "write format=json")
    if services.downloads >= DOWNLOADS_MAX:
        raise Busy("too many downloads at once", "ask again in a moment")
    services.downloads += 1
    try:
        body = await services.heavy(_read, services, symbols, interval, count, current, form)
        return await send_whole(request, services, body, JSON if form == "json" else ARROW)
    finally:
        services.downloads -= 1


def _read(
    services: Services, symbols: list[str] | None, interval: str, count: int, current: bool, form: str
) -> bytes:
    store = services.store
    wanted = find_interval(store.settings.intervals, interval)
    count = min(count, wanted.keep + 1)  # there are no more
    instruments = len(store.tokens_seen() if symbols is None else symbols)
    if instruments * count > ROWS_MAX:
        raise Mistake(
            f"{instruments} instruments of {count} candles are more than {ROWS_MAX:,} rows",
            f"ask for count={ROWS_MAX // instruments}, or name symbols",
        )
    found = store.bulk(symbols, wanted.name, count, current)
    return _as_json(found) if form == "json" else _as_arrow(found)


def _as_json(found: Bulk) -> bytes:
    rows = list(zip(*_columns(found), strict=True))
    for place in np.flatnonzero(found.flags).tolist():
        rows[place] = (*rows[place], FLAG_NAMES[found.flags[place]])
    bounds = found.offsets.tolist()
    candles = {symbol: rows[bounds[i] : bounds[i + 1]] for i, symbol in enumerate(found.symbols)}
    return msgspec.json.encode({"interval": found.interval, "fields": CANDLE_FIELDS, "candles": candles})


def _columns(found: Bulk) -> list[list[Any]]:
    """The fields of all rows, whole numbers without a point where they are whole."""
    columns = []
    for i, name in enumerate(CANDLE_FIELDS):
        values = found.rows[:, i]
        cells = values.tolist()
        if name in WHOLE_NUMBERS:
            is_empty = np.isnan(values)
            if is_empty.any():
                cells = [
                    None if empty else cell for cell, empty in zip(cells, is_empty.tolist(), strict=True)
                ]
            if np.array_equal(values[~is_empty], np.trunc(values[~is_empty])):
                cells = [None if cell is None else int(cell) for cell in cells]
        columns.append(cells)
    return columns


def _as_arrow(found: Bulk) -> bytes:
    """A stream of one batch: `symbol` (dictionary), the fields of a row, `flag` ("" for a whole candle)."""
    import pyarrow as pa

    owners = np.repeat(np.arange(len(found), dtype=np.int32), found.counts)
    names = ["symbol", *CANDLE_FIELDS, "flag"]
    arrays = [
        pa.DictionaryArray.from_arrays(pa.array(owners), pa.array(found.symbols, pa.string())),
        pa.array(found.start),
        *(pa.array(found.rows[:, i], from_pandas=True) for i in range(1, len(CANDLE_FIELDS))),
        pa.DictionaryArray.from_arrays(pa.array(found.flags), pa.array(FLAG_NAMES)),
    ]
    batch = pa.record_batch(arrays, names=names)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


ROUTES = [Route("/api/bulk", bulk, "/api/bulk?interval=5m&count=3&symbols=INFY&current=1", is_long=True)]
