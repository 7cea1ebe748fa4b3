"""The wire layout of Kite's market packets, as one table. Everything that reads or writes packets uses it.

A binary frame, all numbers big-endian::

    +-------+--------+----------------+--------+----------------+----
    | count | length | packet         | length | packet         | …
    | u16   | u16    | <length> bytes | u16    | <length> bytes |
    +-------+--------+----------------+--------+----------------+----

The length of a packet says what it is::

      8  ltp     instrument, any segment
     28  quote   index                     28 is a prefix of 32
     32  full    index
     44  quote   instrument                 8 is a prefix of all, 44 of 184
    184  full    instrument, with depth
    164  –       full of the retired version 1: skipped like any unknown length

A frame of one byte is a heartbeat. Prices are signed (spreads and changes go below zero), quantities,
volumes, open interest and times (Unix seconds, UTC) unsigned. A low byte of 9 in the token marks an
index. Source: https://kite.trade/docs/connect/v3/websocket/ and the official SDKs, where those agree.

One packet → named fields: the quote hash's mapping, and the official SDK's dictionary.

Ticks → bytes of Kite's websocket: what the simulator, the tests and the benchmarks send.

Bytes of Kite's websocket ⇄ ticks. Pure; the layout table is in `kite.layout`.

`parse_frame` turns a whole frame into one tick batch and never raises. The rest, one packet at a
time (`decode`, `quote_fields`) and the way back (`encode_…`), lives in `kite.packets` and
`kite.encode` and is importable from here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from pkbrokers_redis.candles.calendar import IST
from pkbrokers_redis.candles.model import (
    AT_MS,
    BATCH_WIDTH,
    DAY_HIGH,
    DAY_LOW,
    DAY_OPEN,
    LAST_PRICE,
    LAST_QUANTITY,
    OI,
    SEGMENT_INDICES,
    TIME_MS,
    TOKEN,
    VOLUME,
    TickArray,
)
from pkbrokers_redis.errors import FrameError

LTP, INDEX_QUOTE, INDEX_FULL, QUOTE, FULL = 8, 28, 32, 44, 184  # packet lengths

MODE_OF_LENGTH: Final = {LTP: "ltp", INDEX_QUOTE: "quote", INDEX_FULL: "full", QUOTE: "quote", FULL: "full"}

_HEAD = (("instrument_token", "u4"), ("last_price", "i4"))
_INDEX = (
    *_HEAD,
    ("high", "i4"),
    ("low", "i4"),
    ("open", "i4"),
    ("close", "i4"),  # of the previous day
    ("price_change", "i4"),  # absolute, in the price's unit
)
_QUOTE = (
    *_HEAD,
    ("last_traded_quantity", "u4"),
    ("average_traded_price", "i4"),
    ("volume_traded", "u4"),  # cumulative over the day
    ("total_buy_quantity", "u4"),
    ("total_sell_quantity", "u4"),
    ("open", "i4"),
    ("high", "i4"),
    ("low", "i4"),
    ("close", "i4"),  # of the previous day
)
_FULL_HEAD = (
    *_QUOTE,
    ("last_trade_time", "u4"),
    ("oi", "u4"),
    ("oi_day_high", "u4"),
    ("oi_day_low", "u4"),
    ("exchange_timestamp", "u4"),
)
FIELDS_OF_LENGTH: Final = {
    LTP: _HEAD,
    INDEX_QUOTE: _INDEX,
    INDEX_FULL: (*_INDEX, ("exchange_timestamp", "u4")),
    QUOTE: _QUOTE,
    FULL: _FULL_HEAD,  # and then the depth
}

DEPTH_LEVELS = 5
# One level is 12 bytes: quantity, price, orders, two bytes of padding. Five to buy, then five to sell.
DEPTH_DTYPE: Final = np.dtype([("quantity", ">u4"), ("price", ">i4"), ("orders", ">u2"), ("pad", "V2")])


def _dtype(fields: tuple[tuple[str, str], ...], depth: bool = False) -> np.dtype[np.void]:
    table: list[tuple[object, ...]] = [(name, ">" + code) for name, code in fields]
    if depth:
        table.append(("depth", DEPTH_DTYPE, (2, DEPTH_LEVELS)))
    return np.dtype(table)


DTYPES: Final = {length: _dtype(fields, length == FULL) for length, fields in FIELDS_OF_LENGTH.items()}
# A full packet without its depth: all that a tick row needs, a third of the bytes to gather.
FULL_HEAD_DTYPE: Final = _dtype(_FULL_HEAD)


def _struct(fields: tuple[tuple[str, str], ...], depth: bool = False) -> struct.Struct:
    codes = "".join("i" if code == "i4" else "I" for _, code in fields)
    return struct.Struct(">" + codes + "IiH2x" * (2 * DEPTH_LEVELS if depth else 0))


STRUCTS: Final = {length: _struct(fields, length == FULL) for length, fields in FIELDS_OF_LENGTH.items()}

SEGMENT_CDS, SEGMENT_BCD = 3, 6
# Wire integer ÷ this = rupees, by segment (the low byte of a token).
PRICE_DIVISORS: Final = np.full(256, 100.0)
PRICE_DIVISORS[SEGMENT_CDS] = 1e7
PRICE_DIVISORS[SEGMENT_BCD] = 1e4
PRICE_DIVISOR_OF: Final = tuple(PRICE_DIVISORS.tolist())  # the same, faster to index one by one


_json = msgspec.json.Encoder()


class _Level(msgspec.Struct):
    """A depth level, in the order and with the names of Kite's quote API."""

    price: float
    quantity: int
    orders: int


class _Depth(msgspec.Struct):
    buy: list[_Level]
    sell: list[_Level]


@lru_cache(maxsize=4096)  # neighbours in a frame share their second
def iso_ist(seconds: int) -> str:
    """Unix seconds → `2021-07-05T10:41:27+05:30`; "" for 0, which on the wire means none."""
    return datetime.fromtimestamp(seconds, IST).isoformat() if seconds else ""


@lru_cache(maxsize=1024)  # all packets of a frame share it
def iso_ist_ms(epoch_ms: int) -> str:
    """Unix milliseconds → `2021-07-05T10:41:27.005+05:30`."""
    return f"{iso_ist(epoch_ms // 1000)[:19]}.{epoch_ms % 1000:03d}+05:30"


def _unpack(packet: bytes | memoryview) -> tuple[int, ...]:
    layout = STRUCTS.get(len(packet))
    if layout is None:
        raise FrameError(f"a packet of {len(packet)} bytes is none of Kite's", bytes(packet[:64]))
    return layout.unpack(packet)


def quote_fields(packet: bytes | memoryview, symbol: str, at_ms: int) -> dict[str, str | int | float]:
    """The quote hash's fields (docs/keys.md) that this packet has. Times are ISO 8601 in IST, "" for none.

    `change` is per cent against the previous close, as the official SDKs compute it.
    Raises FrameError for a packet whose length is none of Kite's.
    """
    wire = _unpack(packet)
    length = len(packet)
    divisor = PRICE_DIVISOR_OF[wire[0] & 0xFF]
    last = wire[1] / divisor
    fields: dict[str, str | int | float] = {"symbol": symbol, "last_price": last}
    if length in (QUOTE, FULL):
        close = wire[10] / divisor
        fields["last_quantity"] = wire[2]
        fields["average_price"] = wire[3] / divisor
        fields["volume"] = wire[4]
        fields["buy_quantity"] = wire[5]
        fields["sell_quantity"] = wire[6]
        fields["open"] = wire[7] / divisor
        fields["high"] = wire[8] / divisor
        fields["low"] = wire[9] / divisor
        fields["close"] = close
        fields["change"] = _percent(last, close)
        if length == FULL:
            fields["oi"] = wire[12]
            fields["oi_day_high"] = wire[13]
            fields["oi_day_low"] = wire[14]
            fields["last_trade_time"] = iso_ist(wire[11])
            fields["exchange_time"] = iso_ist(wire[15])
    elif length != LTP:
        close = wire[5] / divisor
        fields["open"] = wire[4] / divisor
        fields["high"] = wire[2] / divisor
        fields["low"] = wire[3] / divisor
        fields["close"] = close
        fields["change"] = _percent(last, close)
        if length == INDEX_FULL:
            fields["exchange_time"] = iso_ist(wire[7])
    fields["received_at"] = iso_ist_ms(at_ms)
    fields["mode"] = MODE_OF_LENGTH[length]
    if length == FULL:
        levels = [_Level(wire[i + 1] / divisor, wire[i], wire[i + 2]) for i in range(16, 46, 3)]
        fields["depth"] = _json.encode(_Depth(levels[:5], levels[5:])).decode()
    return fields


def _percent(last: float, close: float) -> float:
    return (last - close) * 100 / close if close else 0.0


def decode(packet: bytes | memoryview) -> dict[str, Any]:
    """One packet as the official pykiteconnect names it, with times as aware datetimes in IST (None for 0).

    Raises FrameError for a packet whose length is none of Kite's.
    """
    wire = _unpack(packet)
    length = len(packet)
    token, divisor = wire[0], PRICE_DIVISOR_OF[wire[0] & 0xFF]
    tick: dict[str, Any] = {
        "tradable": token & 0xFF != SEGMENT_INDICES,
        "mode": MODE_OF_LENGTH[length],
        "instrument_token": token,
        "last_price": wire[1] / divisor,
    }
    if length == LTP:
        return tick
    if length in (INDEX_QUOTE, INDEX_FULL):
        high, low, opening, close = (value / divisor for value in wire[2:6])
        tick["ohlc"] = {"open": opening, "high": high, "low": low, "close": close}
        tick["change"] = _percent(tick["last_price"], close)
        if length == INDEX_FULL:
            tick["exchange_timestamp"] = _datetime(wire[7])
        return tick
    tick["last_traded_quantity"] = wire[2]
    tick["average_traded_price"] = wire[3] / divisor
    tick["volume_traded"] = wire[4]
    tick["total_buy_quantity"] = wire[5]
    tick["total_sell_quantity"] = wire[6]
    opening, high, low, close = (value / divisor for value in wire[7:11])
    tick["ohlc"] = {"open": opening, "high": high, "low": low, "close": close}
    tick["change"] = _percent(tick["last_price"], close)
    if length == FULL:
        tick["last_trade_time"] = _datetime(wire[11])
        tick["oi"], tick["oi_day_high"], tick["oi_day_low"] = wire[12:15]
        tick["exchange_timestamp"] = _datetime(wire[15])
        levels = [
            {"quantity": wire[i], "price": wire[i + 1] / divisor, "orders": wire[i + 2]}
            for i in range(16, 46, 3)
        ]
        tick["depth"] = {"buy": levels[:5], "sell": levels[5:]}
    return tick


def _datetime(seconds: int) -> datetime | None:
    return datetime.fromtimestamp(seconds, IST) if seconds else None


_PRICES = frozenset({"last_price", "average_traded_price", "open", "high", "low", "close", "price_change"})


def length_of(mode: str, token: int) -> int:
    """The packet length of `ltp`, `quote` or `full` for this instrument. Raises KeyError for another mode."""
    if token & 0xFF == SEGMENT_INDICES:
        return {"ltp": LTP, "quote": INDEX_QUOTE, "full": INDEX_FULL}[mode]
    return {"ltp": LTP, "quote": QUOTE, "full": FULL}[mode]


def encode_packet(mode: str, token: int, **fields: Any) -> bytes:
    """One packet; `fields` are named as `decode` names them, prices in rupees, what is missing is 0.

    Raises struct.error when a number does not fit its field.
    """
    length = length_of(mode, token)
    divisor = PRICE_DIVISOR_OF[token & 0xFF]
    values = {"instrument_token": token} | fields | dict(fields.get("ohlc") or {})
    wire = [_wire(name, values.get(name), divisor) for name, _ in FIELDS_OF_LENGTH[length]]
    if length == FULL:
        depth: Mapping[str, list[Mapping[str, Any]]] = fields.get("depth") or {}
        for side in ("buy", "sell"):
            levels = list(depth.get(side, ()))[:DEPTH_LEVELS]
            for level in [*levels, *[{}] * (DEPTH_LEVELS - len(levels))]:
                price = round(level.get("price", 0) * divisor)
                wire += [level.get("quantity", 0), price, level.get("orders", 0)]
    return STRUCTS[length].pack(*wire)


def _wire(name: str, value: Any, divisor: float) -> int:
    if value is None:
        return 0
    if isinstance(value, datetime):
        return int(value.timestamp())
    return round(value * divisor) if name in _PRICES else int(value)


def encode_frame(packets: Iterable[bytes]) -> bytes:
    """Packets → one binary frame. Raises OverflowError beyond 65,535 packets: the count field has 16 bits."""
    packets = list(packets)
    parts = [len(packets).to_bytes(2, "big")]
    for packet in packets:
        parts += (len(packet).to_bytes(2, "big"), packet)
    return b"".join(parts)


def encode_records(records: npt.NDArray[np.void]) -> bytes:
    """An array of one of `layout.DTYPES` → one frame of such packets, without a loop."""
    framed = np.dtype([("length", ">u2"), ("packet", records.dtype)])
    frame = np.empty(len(records), framed)
    frame["length"] = records.dtype.itemsize
    frame["packet"] = records
    return len(records).to_bytes(2, "big") + frame.tobytes()


def encode_full(ticks: TickArray, mode: str = "full") -> bytes:
    """A tick batch → one frame of `mode` packets; NaN becomes 0, what a tick row lacks is 0.

    Indices get their own packets; a batch of one kind is encoded without a loop.
    """
    is_index = ticks[:, TOKEN].astype(np.int64) & 0xFF == SEGMENT_INDICES
    if not is_index.any():
        return encode_records(_records(ticks, length_of(mode, 0)))
    if is_index.all():
        return encode_records(_records(ticks, length_of(mode, SEGMENT_INDICES)))
    packets = [b""] * len(ticks)
    for kind, token in ((False, 0), (True, SEGMENT_INDICES)):
        rows = np.flatnonzero(is_index == kind)
        records = _records(ticks[rows], length_of(mode, token))
        for row, record in zip(rows.tolist(), records, strict=True):
            packets[row] = record.tobytes()
    return encode_frame(packets)


def _records(ticks: TickArray, length: int) -> npt.NDArray[np.void]:
    records = np.zeros(len(ticks), DTYPES[length])
    names = set(records.dtype.names or ())
    whole = np.nan_to_num(ticks)
    divisor = PRICE_DIVISORS[whole[:, TOKEN].astype(np.int64) & 0xFF]
    for column, name in (
        (LAST_PRICE, "last_price"),
        (DAY_OPEN, "open"),
        (DAY_HIGH, "high"),
        (DAY_LOW, "low"),
    ):
        if name in names:
            records[name] = np.rint(whole[:, column] * divisor)
    seconds = whole[:, TIME_MS] // 1000
    for name, values in (
        ("instrument_token", whole[:, TOKEN]),
        ("last_traded_quantity", whole[:, LAST_QUANTITY]),
        ("volume_traded", whole[:, VOLUME]),
        ("oi", whole[:, OI]),
        ("last_trade_time", seconds),
        ("exchange_timestamp", seconds),
    ):
        if name in names:
            records[name] = values
    return records


__all__ = [
    "ParsedFrame",
    "decode",
    "encode_frame",
    "encode_full",
    "encode_packet",
    "encode_records",
    "parse_frame",
    "quote_fields",
]

Records = npt.NDArray[np.void]
Ints = npt.NDArray[np.int64]

NAN = float("nan")
NO_TOKENS: Final = np.empty(0, np.int64)
_TICK_DTYPES = DTYPES | {FULL: FULL_HEAD_DTYPE}


class ParsedFrame(NamedTuple):
    """What one binary frame held. Row i of `ticks` is the packet `frame[offsets[i]:][:lengths[i]]`."""

    ticks: TickArray  # float64[n, 10], columns as in candles.model, in the frame's order
    tokens: Ints  # int64[n], the first column
    offsets: list[int]  # where each row's packet begins (behind its length)
    lengths: list[int]  # 8, 28, 32, 44 or 184
    unknown: int = 0  # packets of other lengths, skipped
    truncated: bool = False  # the frame ended before its last packet did; the whole ones are here
    trailing: int = 0  # bytes behind the last packet
    heartbeat: bool = False  # the one-byte frame


def parse_frame(frame: bytes, at_ms: int) -> ParsedFrame:
    """All ticks of a frame received at `at_ms` (epoch ms). Any bytes are fine: it never raises.

    Numbers as in `core.model`: NaN where the packet has no such field, and for a day's open, high
    or low that is still 0 on the wire (no trade yet). `time_ms` is last_trade_time (184), the
    exchange timestamp (32), else `at_ms`.
    """
    size = len(frame)
    if size < 2:
        return ParsedFrame(_empty(), NO_TOKENS, [], [], truncated=size == 0, heartbeat=size == 1)
    count = frame[0] << 8 | frame[1]
    if not count or size < 4:
        return ParsedFrame(
            _empty(), NO_TOKENS, [], [], truncated=count > 0, trailing=0 if count else size - 2
        )
    length = frame[2] << 8 | frame[3]
    if length in _TICK_DTYPES and size == 2 + count * (length + 2):
        lengths = np.ndarray((count,), ">u2", frame, offset=2, strides=(length + 2,))
        if (lengths == length).all():
            # One kind of packet, as most frames are: read it where it lies.
            records = np.ndarray((count,), _TICK_DTYPES[length], frame, offset=4, strides=(length + 2,))
            offsets = list(range(4, size, length + 2))
            tokens = records["instrument_token"].astype(np.int64)
            return ParsedFrame(_ticks(records, tokens, length, at_ms), tokens, offsets, [length] * count)
    return _parse_mixed(frame, count, at_ms)


def _empty() -> TickArray:
    return np.empty((0, BATCH_WIDTH))


def _parse_mixed(frame: bytes, count: int, at_ms: int) -> ParsedFrame:
    size = len(frame)
    offsets: list[int] = []
    lengths: list[int] = []
    unknown, truncated, position = 0, False, 2
    for _ in range(count):
        if position + 2 > size:
            truncated = True
            break
        length = frame[position] << 8 | frame[position + 1]
        if position + 2 + length > size:
            truncated = True
            break
        if length in _TICK_DTYPES:
            offsets.append(position + 2)
            lengths.append(length)
        else:
            unknown += 1
        position += 2 + length
    trailing = 0 if truncated else size - position
    ticks = _gather(frame, offsets, lengths, at_ms)
    return ParsedFrame(
        ticks, ticks[:, TOKEN].astype(np.int64), offsets, lengths, unknown, truncated, trailing
    )


def _gather(frame: bytes, offsets: list[int], lengths: list[int], at_ms: int) -> TickArray:
    """The packets at `offsets`, one vectorised pass for each length present."""
    ticks = np.empty((len(offsets), BATCH_WIDTH))
    if not offsets:
        return ticks
    where, kind = np.array(offsets), np.array(lengths)
    for length in set(lengths):
        dtype = _TICK_DTYPES[length]
        # Every position of the frame seen as a packet (stride 1), and then those that are one.
        every = np.ndarray((len(frame) - dtype.itemsize + 1,), dtype, frame, strides=(1,))
        rows = kind == length
        records = every[where[rows]]
        ticks[rows] = _ticks(records, records["instrument_token"].astype(np.int64), length, at_ms)
    return ticks


def _ticks(records: Records, tokens: Ints, length: int, at_ms: int) -> TickArray:
    """Records of one length → tick batch."""
    ticks = np.empty((len(records), BATCH_WIDTH))
    divisor = PRICE_DIVISORS[tokens & 0xFF]
    ticks[:, TOKEN] = tokens
    ticks[:, LAST_PRICE] = records["last_price"] / divisor
    ticks[:, AT_MS] = at_ms
    if length == LTP:
        ticks[:, LAST_QUANTITY:TIME_MS] = NAN
        ticks[:, TIME_MS] = at_ms
        return ticks
    if length in (QUOTE, FULL):
        ticks[:, LAST_QUANTITY] = records["last_traded_quantity"]
        ticks[:, VOLUME] = records["volume_traded"]
    else:
        ticks[:, LAST_QUANTITY] = NAN
        ticks[:, VOLUME] = NAN
    for column, name in ((DAY_OPEN, "open"), (DAY_HIGH, "high"), (DAY_LOW, "low")):
        ticks[:, column] = records[name] / divisor
    day = ticks[:, DAY_OPEN : DAY_LOW + 1]
    day[day == 0.0] = NAN  # Kite sends 0 until there is one
    ticks[:, OI] = records["oi"] if length == FULL else NAN
    if length in (FULL, INDEX_FULL):
        seconds = records["last_trade_time" if length == FULL else "exchange_timestamp"].astype(np.int64)
        ticks[:, TIME_MS] = np.where(seconds > 0, seconds * 1000, at_ms)
    else:
        ticks[:, TIME_MS] = at_ms
    return ticks
