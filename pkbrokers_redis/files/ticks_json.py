"""`ticks.json`: the latest quote of every instrument, in the shape that PKScreener and scripts read.

{"256265": {"instrument_token": 256265, "trading_symbol": "NIFTY 50",
            "ohlcv": {"open": …, "high": …, "low": …, "close": …, "volume": …, "timestamp": "2026-…+05:30"},
            "prev_day_close": …, "buy_quantity": …, "sell_quantity": …, "oi": …,
            "market_depth": {"bid": [{"price", "quantity", "orders"}, …], "ask": [...]},
            "last_updated": "2026-…+05:30", "tick_count": …}, …}
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pandas as pd
import redis

from pkbrokers_redis.candles.model import DAY, Candle
from pkbrokers_redis.errors import InputFileError
from pkbrokers_redis.files.frames import COLUMNS, Frames, file_symbol, is_symbol, moments_of, whole
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.rows import Tally, parse_candles

NAME = "ticks.json"
BYTES_MAX = 256 << 20  # 9,000 instruments with five levels of depth are 15 MB
INSTRUMENTS_A_PIPELINE = 500  # 1 MB of quotes in memory

QUOTE_FIELDS = (
    "open", "high", "low", "last_price", "volume", "last_trade_time", "exchange_time", "received_at", "close",
    "buy_quantity", "sell_quantity", "oi", "depth",
)  # fmt: skip
_PRICES = slice(0, 4)

_json = msgspec.json.Decoder()
_encode = msgspec.json.Encoder().encode


def read_entries(
    client: redis.Redis, keys: Keys, instruments: list[tuple[int, str]], tally: Tally | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (token, entry) of each instrument that has a price: its quote and its day candle's tick count.

    Without a quote (in a replay ingest writes none) the prices are those of the day candle.
    """
    for first in range(0, len(instruments), INSTRUMENTS_A_PIPELINE):
        batch = instruments[first : first + INSTRUMENTS_A_PIPELINE]
        pipe = client.pipeline(transaction=False)
        for token, _ in batch:
            pipe.hmget(keys.quote(token), QUOTE_FIELDS)
            pipe.hget(keys.current(token), DAY)
        replies = pipe.execute(raise_on_error=False)
        for (token, symbol), quote, row in zip(batch, replies[::2], replies[1::2], strict=True):
            for reply in (quote, row):
                if isinstance(reply, redis.ConnectionError | redis.TimeoutError):
                    raise reply
            candles = parse_candles([row], tally) if isinstance(row, bytes) else []
            cells = quote if isinstance(quote, list) else [None] * len(QUOTE_FIELDS)
            entry = entry_of(token, symbol, cells, candles[0] if candles else None)
            if entry is not None:
                yield token, entry


def entry_of(token: int, symbol: str, cells: list[bytes | None], day: Candle | None) -> dict[str, Any] | None:
    """Return an instrument's entry from its quote (QUOTE_FIELDS) and its day candle; None without a price."""
    quote = dict(zip(QUOTE_FIELDS, cells, strict=True))
    prices = [_number(cell) for cell in cells[_PRICES]]
    volume = _number(quote["volume"])
    if day is not None and None in prices:
        prices, volume = [day.open, day.high, day.low, day.close], day.volume
    if prices[3] is None:
        return None
    last = prices[3]
    received = _text(quote["received_at"])
    traded = _text(quote["last_trade_time"]) or _text(quote["exchange_time"]) or received
    if not traded and day is not None:
        traded = moments_of(pd.DatetimeIndex([pd.Timestamp(day.start, unit="s", tz="UTC")]))[0].isoformat()
    ohlc = [last if price is None else price for price in prices]
    return {
        "instrument_token": token,
        "trading_symbol": file_symbol(token, symbol),
        "ohlcv": {
            **dict(zip(COLUMNS, ohlc, strict=False)),
            "volume": int(volume or 0),
            "timestamp": traded,
        },
        "prev_day_close": _number(quote["close"]) or 0.0,
        "buy_quantity": int(_number(quote["buy_quantity"]) or 0),
        "sell_quantity": int(_number(quote["sell_quantity"]) or 0),
        "oi": int(_number(quote["oi"]) or 0),
        "market_depth": market_depth(quote["depth"]),
        "last_updated": received or traded,
        "tick_count": day.ticks if day is not None else 0,
    }


def market_depth(text: bytes | None) -> dict[str, list[Any]]:
    """Convert Kite's `{"buy": [{quantity, price, orders}…], "sell": …}` to upstream's `{"bid": …, "ask": …}`.

    Levels without a price or a quantity are left out, as upstream leaves them.
    """
    try:
        depth = _json.decode(text) if text else {}
        return {name: _levels(depth.get(side)) for name, side in (("bid", "buy"), ("ask", "sell"))}
    except (ValueError, AttributeError, RecursionError):
        return {"bid": [], "ask": []}


def _levels(levels: Any) -> list[dict[str, Any]]:
    return [
        {"price": level["price"], "quantity": level["quantity"], "orders": level.get("orders", 0)}
        for level in levels or []
        if level.get("price") and level.get("quantity")
    ]


def _number(cell: bytes | None) -> float | None:
    try:
        value = float(cell) if cell else None
    except ValueError:
        return None
    return value if value is not None and abs(value) < 1e15 else None  # false for NaN and infinities


def _text(cell: bytes | None) -> str:
    return cell.decode(errors="replace") if cell else ""


class TicksFile:
    """Write the file entry by entry.

    Example:
        >>> with replacing(path) as file:
        ...     ticks = TicksFile(file)
        ...     ticks.add(408065, entry)
        ...     ticks.finish()
    """

    def __init__(self, file: Any) -> None:
        self.entries = 0
        self._file = file
        file.write(b"{")

    def add(self, token: int, entry: Mapping[str, Any]) -> None:
        """Write one more instrument; tokens must differ."""
        comma = b",\n" if self.entries else b"\n"
        self._file.write(comma + b'"%d":' % token + _encode(entry))
        self.entries += 1

    def finish(self) -> None:
        """Write the end of the object."""
        self._file.write(b"\n}\n")


class ReadTicks(NamedTuple):
    """The content of a ticks.json.

    Attributes:
        frames: Symbol → frame of one row.
        refused: How many entries were malformed.
        why: The reason for the first of them, one line.
        as_of_ms: The newest `timestamp`, epoch ms.
    """

    frames: Frames
    refused: int
    why: str
    as_of_ms: float | None = None


def read_ticks_json(source: Path | bytes) -> ReadTicks:
    """Read symbol → frame of one row (the current day, at its midnight) from the file or its zip.

    Malformed entries are counted and left out.

    Raises:
        InputFileError: The source is no ticks.json, or larger than 256 MB.
        OSError: The path cannot be read.
    """
    data = source if isinstance(source, bytes) else source.read_bytes()
    try:
        tree = _json.decode(_unzipped(data))
    except (ValueError, RecursionError) as error:
        raise InputFileError(f"ticks.json is no JSON ({str(error)[:80]})", "write it again") from error
    if not isinstance(tree, dict):
        raise InputFileError("ticks.json holds no object", "write it again")
    symbols: list[str] = []
    rows: list[list[float]] = []
    moments: list[Any] = []
    refused, why = 0, ""
    for token, entry in tree.items():
        try:
            symbol, row, moment = _row_of(entry)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            refused += 1
            why = why or f"{token[:20]!r}: {type(error).__name__} {str(error)[:60]}"
            continue
        symbols.append(symbol)
        rows.append(row)
        moments.append(moment)
    if not symbols:
        return ReadTicks({}, refused, why)
    times = moments_of(pd.Index(moments, dtype=object))
    stamps = times.normalize()
    frames: Frames = {}
    table = np.array(rows)
    undated = np.asarray(stamps.isna())
    for i, symbol in enumerate(symbols):
        if undated[i]:
            refused += 1
            continue
        frame = pd.DataFrame(table[i : i + 1], columns=list(COLUMNS), index=stamps[i : i + 1])
        frame["volume"] = whole(frame["volume"])
        frames[symbol] = frame
    newest = times.max()
    return ReadTicks(frames, refused, why, newest.timestamp() * 1000 if frames else None)


def _row_of(entry: Any) -> tuple[str, list[float], str]:
    symbol, ohlcv = entry["trading_symbol"], entry["ohlcv"]
    if not is_symbol(symbol):
        raise ValueError("no symbol")
    row = [float(ohlcv[name]) for name in COLUMNS[:4]] + [float(ohlcv.get("volume") or 0)]
    if not np.isfinite(row).all() or row[3] <= 0:
        raise ValueError("no price")
    return symbol, row, str(ohlcv.get("timestamp") or entry["last_updated"])


def _unzipped(data: bytes) -> bytes:
    """Return the `ticks.json` in upstream's `ticks.json.zip`, other bytes unchanged, bounded in size."""
    if data[:4] == b"PK\x03\x04":
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive, archive.open(NAME) as member:
                data = member.read(BYTES_MAX + 1)
        except (zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError, EOFError) as error:
            raise InputFileError("the zip holds no readable ticks.json", "write it again") from error
    if len(data) > BYTES_MAX:
        raise InputFileError(f"ticks.json is larger than {BYTES_MAX >> 20} MB", "split it")
    return data
