"""Reads of one instrument: its lists, hashes and stream entries as Python values. The one parser of rows.

        P:{S}:candles:<token>:<interval>   list    oldest … newest   [start,o,h,l,c,volume,oi,ticks(,flag)]
        P:{S}:current:<token>              hash    interval → the same row, still forming
        P:{S}:quote:<token>                hash    named fields, text
        P:{S}:ticks                        stream  ticks = [[token,price,…],…] of one frame

A malformed row (written by another program) is skipped and counted in a `Tally`. A key of another type raises
WrongKeyType. `interval` is always a name as in the keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import redis

from pkbrokers_redis.candles.model import FLAG_NAMES, TICK_WIDTH, Candle
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.errors import expect_type

ENTRIES_A_READ = 1_000
START_MAX = 7_258_118_400  # 2200, as far as a date can be trusted
ENTRIES_SCANNED_MAX = 50_000  # bound of the search for an instrument that ticks rarely, in frames

QUOTE_FLOATS = {"last_price", "average_price", "open", "high", "low", "close", "change"}
QUOTE_INTS = {
    "last_quantity",
    "volume",
    "buy_quantity",
    "sell_quantity",
    "oi",
    "oi_day_high",
    "oi_day_low",
}


@dataclass
class Tally:
    """Counts the malformed rows that a reader skipped."""

    rows_refused: int = 0


class Tick(NamedTuple):
    """One tick row of the stream, and `at_ms`, the receive time of its frame.

    Prices are rupees, `volume` is cumulative for the day, times are epoch milliseconds. A field that the
    packet did not have is None.
    """

    token: int
    last_price: float
    last_quantity: int | None
    volume: int | None
    oi: int | None
    day_open: float | None
    day_high: float | None
    day_low: float | None
    time_ms: int
    at_ms: int


_json = msgspec.json.Decoder()


def parse_candle(row: bytes) -> Candle | None:
    """Parse a candle row's JSON text; None when it is malformed."""
    try:
        cells = _json.decode(row)
    except (msgspec.DecodeError, RecursionError, ValueError):
        return None
    if type(cells) is not list or not 8 <= len(cells) <= 9:
        return None
    flag = cells[8] if len(cells) == 9 else ""
    start, open_, high, low, close, volume, oi, ticks = cells[:8]
    if flag not in FLAG_NAMES or not all(map(_is_number, (start, open_, high, low, close, volume, ticks))):
        return None
    if not 0 <= start < START_MAX or not (oi is None or _is_number(oi)):
        return None
    prices = float(open_), float(high), float(low), float(close)
    return Candle(int(start), *prices, volume, oi, int(ticks), flag)


def parse_candles(rows: list[bytes], tally: Tally | None = None) -> list[Candle]:
    """Parse rows in their order, and skip the malformed ones."""
    candles = [candle for candle in map(parse_candle, rows) if candle is not None]
    if tally is not None:
        tally.rows_refused += len(rows) - len(candles)
    return candles


def read_candles(
    client: redis.Redis, keys: Keys, token: int, interval: str, count: int, tally: Tally | None = None
) -> list[Candle]:
    """Return the last `count` completed candles, newest last."""
    if count < 1:
        return []
    key = keys.candles(token, interval)
    with expect_type(client, key, "list"):
        rows: Any = client.lrange(key, -count, -1)
    return parse_candles(rows, tally)


def read_current(
    client: redis.Redis, keys: Keys, token: int, interval: str, tally: Tally | None = None
) -> Candle | None:
    """Return the open candle, None before the first trade."""
    key = keys.current(token)
    with expect_type(client, key, "hash"):
        row: Any = client.hget(key, interval)
    return next(iter(parse_candles([row], tally)), None) if row else None


def read_window(
    client: redis.Redis, keys: Keys, token: int, interval: str, count: int, tally: Tally | None = None
) -> tuple[list[Candle], Candle | None]:
    """Return the last `count` completed candles and the open one, read in one step."""
    pipe = client.pipeline(transaction=True)  # one slot: MULTI/EXEC works on a cluster too
    pipe.hget(keys.current(token), interval)
    pipe.lrange(keys.candles(token, interval), -max(count, 1), -1)
    with expect_type(client, keys.current(token), "hash"):
        row, rows = _execute(pipe, client, keys.candles(token, interval))
    done = parse_candles(rows, tally)
    current = next(iter(parse_candles([row], tally)), None) if row else None
    if current and done and current.start <= done[-1].start:
        current = None
    return done[-count:] if count > 0 else [], current


def _execute(pipe: Any, client: redis.Redis, list_key: str) -> tuple[bytes | None, list[bytes]]:
    row, rows = pipe.execute(raise_on_error=False)
    if isinstance(rows, redis.ResponseError):
        with expect_type(client, list_key, "list"):
            raise rows
    if isinstance(row, Exception):
        raise row
    return row, rows


def read_quote(client: redis.Redis, keys: Keys, token: int) -> dict[str, Any]:
    """Return the latest quote: prices as floats, quantities as ints, `depth` decoded; {} when there is none.

    An empty field is None. A text that is not the expected number is returned as text.
    """
    key = keys.quote(token)
    with expect_type(client, key, "hash"):
        fields: Any = client.hgetall(key)
    return {
        name.decode(): _quote_value(name.decode(), value.decode(errors="replace"))
        for name, value in fields.items()
    }


def _quote_value(name: str, text: str) -> Any:
    if text in ("", "null"):
        return None
    try:
        if name in QUOTE_FLOATS:
            return float(text)
        if name in QUOTE_INTS:
            return int(float(text))
        if name == "depth":
            return _json.decode(text)
    except (ValueError, OverflowError):  # msgspec.DecodeError is a ValueError
        pass
    return text


def read_ticks(
    client: redis.Redis, keys: Keys, token: int, count: int, tally: Tally | None = None
) -> list[Tick]:
    """Return the last `count` ticks of an instrument that are still in its stream, newest last.

    The stream is trimmed by age, so these are minutes at most. The search ends after ENTRIES_SCANNED_MAX
    frames of the shard.
    """
    key = keys.ticks(keys.shard_of(token))
    found: list[Tick] = []
    before = "+"
    with expect_type(client, key, "stream"):
        for _ in range(ENTRIES_SCANNED_MAX // ENTRIES_A_READ):
            entries: Any = client.xrevrange(key, before, "-", count=ENTRIES_A_READ)
            for _, fields in entries:
                found += reversed(ticks_of(fields, token, tally))
            if len(entries) < ENTRIES_A_READ or len(found) >= count:
                break
            before = "(" + entries[-1][0].decode()
    return found[: max(count, 0)][::-1]


def ticks_of(fields: dict[bytes, bytes], token: int, tally: Tally | None = None) -> list[Tick]:
    """Return one instrument's ticks in a stream entry, in their order."""
    text = fields.get(b"ticks", b"")
    if b"[%d," % token not in text.replace(b" ", b""):  # cheaper than decoding a frame of 500 others
        return []
    try:
        rows = _json.decode(text)
        at_ms = int(fields.get(b"at", b"0"))
    except (ValueError, RecursionError):
        rows, at_ms = None, 0
    if type(rows) is not list:
        if tally is not None:
            tally.rows_refused += 1
        return []
    found = [row for row in rows if type(row) is list and row[:1] == [token]]
    valid = [row for row in found if len(row) == TICK_WIDTH and all(c is None or _is_number(c) for c in row)]
    if tally is not None:
        tally.rows_refused += len(found) - len(valid)
    return [Tick._make([*row, at_ms]) for row in valid]


def _is_number(cell: object) -> bool:
    return type(cell) is int or (type(cell) is float and cell == cell and abs(cell) != float("inf"))
