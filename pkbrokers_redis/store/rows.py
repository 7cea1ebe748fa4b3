"""Reading rows: what the lists, hashes and streams of one instrument hold, as Python values.

        P:{S}:candles:<token>:<interval>   list    oldest … newest   [start,o,h,l,c,volume,oi,ticks(,flag)]
        P:{S}:current:<token>              hash    interval → the same row, still forming
        P:{S}:quote:<token>                hash    named fields, text
        P:{S}:ticks                        stream  ticks = [[token,price,…],…] of one frame

A row that is no row (somebody's redis-cli) is skipped and counted in a `Tally`; a key of another
type raises WrongKeyType.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import redis

from pkbrokers_redis.candles.model import FLAG_NAMES, TICK_WIDTH, Candle
from pkbrokers_redis.errors import WrongKeyType
from pkbrokers_redis.keys import Keys

ENTRIES_A_READ = 1_000
START_MAX = 7_258_118_400  # 2200, as far as a date can be trusted
ENTRIES_SCANNED_MAX = 50_000  # an instrument that ticks rarely: give up after about this many frames

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
    """Counts what a reader met and could not use."""

    rows_refused: int = 0


class Tick(NamedTuple):
    """One tick row as it stands in the stream, and `at_ms`, when its frame was received.

    Prices in rupees, `volume` cumulative for the day, times in epoch milliseconds, None where the
    packet had no such field.
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


@contextmanager
def expecting(client: redis.Redis, key: str, wanted: str) -> Iterator[None]:
    """Turns Redis' WRONGTYPE into a WrongKeyType that names the key."""
    try:
        yield
    except redis.ResponseError as error:
        if "WRONGTYPE" not in str(error):
            raise
        found: Any = client.type(key)
        raise WrongKeyType(key, found.decode(), wanted) from error


def parse_candle(row: bytes) -> Candle | None:
    """A candle row's text → Candle; None when it is not one."""
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
    """Rows → candles, in their order, without the rows that are none."""
    candles = [candle for candle in map(parse_candle, rows) if candle is not None]
    if tally is not None:
        tally.rows_refused += len(rows) - len(candles)
    return candles


def read_candles(
    client: redis.Redis, keys: Keys, token: int, interval: str, count: int, tally: Tally | None = None
) -> list[Candle]:
    """The last `count` completed candles, newest last. `interval` is a name as in the keys."""
    if count < 1:
        return []
    key = keys.candles(token, interval)
    with expecting(client, key, "list"):
        rows: Any = client.lrange(key, -count, -1)
    return parse_candles(rows, tally)


def read_current(
    client: redis.Redis, keys: Keys, token: int, interval: str, tally: Tally | None = None
) -> Candle | None:
    """The candle being formed, None before the first trade."""
    key = keys.current(token)
    with expecting(client, key, "hash"):
        row: Any = client.hget(key, interval)
    return next(iter(parse_candles([row], tally)), None) if row else None


def read_window(
    client: redis.Redis, keys: Keys, token: int, interval: str, count: int, tally: Tally | None = None
) -> tuple[list[Candle], Candle | None]:
    """The last `count` completed candles and the current one, both of one moment."""
    pipe = client.pipeline(transaction=True)  # one slot: MULTI/EXEC works on a cluster too
    pipe.hget(keys.current(token), interval)
    pipe.lrange(keys.candles(token, interval), -max(count, 1), -1)
    with expecting(client, keys.current(token), "hash"):
        row, rows = _execute(pipe, client, keys.candles(token, interval))
    done = parse_candles(rows, tally)
    current = next(iter(parse_candles([row], tally)), None) if row else None
    if current and done and current.start <= done[-1].start:
        current = None
    return done[-count:] if count > 0 else [], current


def _execute(pipe: Any, client: redis.Redis, list_key: str) -> tuple[bytes | None, list[bytes]]:
    row, rows = pipe.execute(raise_on_error=False)
    if isinstance(rows, redis.ResponseError):
        with expecting(client, list_key, "list"):
            raise rows
    if isinstance(row, Exception):
        raise row
    return row, rows


def read_quote(client: redis.Redis, keys: Keys, token: int) -> dict[str, Any]:
    """The latest quote: prices as floats, quantities as ints, `depth` decoded; {} when there is none.

    An empty field is None; text that is not the number it should be comes back as text.
    """
    key = keys.quote(token)
    with expecting(client, key, "hash"):
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
    """The last `count` ticks of an instrument still in its stream, newest last.

    The stream is trimmed by age, so this is minutes at most; it looks through ENTRIES_SCANNED_MAX
    frames of the shard.
    """
    key = keys.ticks(keys.shard_of(token))
    found: list[Tick] = []
    before = "+"
    with expecting(client, key, "stream"):
        for _ in range(ENTRIES_SCANNED_MAX // ENTRIES_A_READ):
            entries: Any = client.xrevrange(key, before, "-", count=ENTRIES_A_READ)
            for _, fields in entries:
                found += reversed(ticks_of(fields, token, tally))
            if len(entries) < ENTRIES_A_READ or len(found) >= count:
                break
            before = "(" + entries[-1][0].decode()
    return found[: max(count, 0)][::-1]


def ticks_of(fields: dict[bytes, bytes], token: int, tally: Tally | None = None) -> list[Tick]:
    """One instrument's ticks in a stream entry, in their order."""
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
    mine = [row for row in rows if type(row) is list and row[:1] == [token]]
    good = [row for row in mine if len(row) == TICK_WIDTH and all(c is None or _is_number(c) for c in row)]
    if tally is not None:
        tally.rows_refused += len(mine) - len(good)
    return [Tick._make([*row, at_ms]) for row in good]


def _is_number(cell: object) -> bool:
    return type(cell) is int or (type(cell) is float and cell == cell and abs(cell) != float("inf"))
