"""Kite's websocket protocol, both ways. Pure: no I/O, no clock.

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
volumes, open interest and times (Unix seconds, UTC) unsigned. A low byte of 9 in the token marks an index.

Text frames::

    {"type": "order", "data": {…the postback…}}
    {"type": "error", "data": "…"}
    {"type": "message", "data": "…"}
    {"type": "instruments_meta", "data": {"count": 86481, "etag": "W/…"}}
    {"type": "app_code", "timestamp": "2025-08-04T13:50:28+05:30"}      no data key

The last two are undocumented and arrive on every connect. Source:
https://kite.trade/docs/connect/v3/websocket/ and the official SDKs, where those agree.
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
    TIME_MIN_MS,
    TIME_MS,
    TOKEN,
    VOLUME,
    TickArray,
)
from pkbrokers_redis.errors import FrameError

Records = npt.NDArray[np.void]
Ints = npt.NDArray[np.int64]

# -- the layout: everything that reads or writes packets uses these tables -----------------------------------

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


def _struct(fields: tuple[tuple[str, str], ...], depth: bool = False) -> struct.Struct:
    codes = "".join("i" if code == "i4" else "I" for _, code in fields)
    return struct.Struct(">" + codes + "IiH2x" * (2 * DEPTH_LEVELS if depth else 0))


DTYPES: Final = {length: _dtype(fields, length == FULL) for length, fields in FIELDS_OF_LENGTH.items()}
STRUCTS: Final = {length: _struct(fields, length == FULL) for length, fields in FIELDS_OF_LENGTH.items()}
# A full packet without its depth: all that a tick row needs, a third of the bytes to gather.
_TICK_DTYPES: Final = DTYPES | {FULL: _dtype(_FULL_HEAD)}

SECONDS_MIN = TIME_MIN_MS // 1000  # an earlier time on the wire (0, or 1 as seen) means that there is none
SEGMENT_CDS, SEGMENT_BCD = 3, 6
# Wire integer ÷ this = rupees, by segment (the low byte of a token).
PRICE_DIVISORS: Final = np.full(256, 100.0)
PRICE_DIVISORS[SEGMENT_CDS] = 1e7
PRICE_DIVISORS[SEGMENT_BCD] = 1e4
PRICE_DIVISOR_OF: Final = tuple(PRICE_DIVISORS.tolist())  # the same, faster to index one by one
_PRICES = frozenset({"last_price", "average_traded_price", "open", "high", "low", "close", "price_change"})
_TIMES = frozenset({"last_trade_time", "exchange_timestamp"})


def length_of(mode: str, token: int) -> int:
    """Return the packet length of `ltp`, `quote` or `full` for an instrument. Raises KeyError otherwise."""
    if token & 0xFF == SEGMENT_INDICES:
        return {"ltp": LTP, "quote": INDEX_QUOTE, "full": INDEX_FULL}[mode]
    return {"ltp": LTP, "quote": QUOTE, "full": FULL}[mode]


# -- a frame → ticks -----------------------------------------------------------------------------------------

NAN = float("nan")


class ParsedFrame(NamedTuple):
    """What a binary frame held. Row i of `ticks` is the packet `frame[offsets[i]:][:lengths[i]]`."""

    ticks: TickArray  # float64[n, 10], columns as in `candles.model`, in the frame's order
    tokens: Ints  # int64[n], the first column
    offsets: list[int]  # where each row's packet begins, after its length
    lengths: list[int]  # 8, 28, 32, 44 or 184
    unknown: int = 0  # packets of other lengths, skipped
    truncated: bool = False  # the frame ended before its last packet did; the whole ones are here
    trailing: int = 0  # bytes after the last packet
    heartbeat: bool = False  # the one-byte frame


EMPTY: Final = ParsedFrame(np.empty((0, BATCH_WIDTH)), np.empty(0, np.int64), [], [])


def parse_frame(frame: bytes, at_ms: int) -> ParsedFrame:
    """Return all ticks of a frame received at `at_ms` (epoch ms). Any bytes are accepted: it never raises.

    A value is NaN where the packet has no such field, and for a day's open, high or low that is still 0 (no
    trade yet). `time_ms` is last_trade_time (184), the exchange timestamp (32), else `at_ms`.
    """
    size = len(frame)
    if size < 2:
        return EMPTY._replace(truncated=size == 0, heartbeat=size == 1)
    count = frame[0] << 8 | frame[1]
    if not count or size < 4:
        return EMPTY._replace(truncated=count > 0, trailing=0 if count else size - 2)
    length = frame[2] << 8 | frame[3]
    if length in _TICK_DTYPES and size == 2 + count * (length + 2):
        lengths = np.ndarray((count,), ">u2", frame, offset=2, strides=(length + 2,))
        if (lengths == length).all():
            # One kind of packet, as in most frames: read it in place.
            records = np.ndarray((count,), _TICK_DTYPES[length], frame, offset=4, strides=(length + 2,))
            tokens = records["instrument_token"].astype(np.int64)
            ticks = _ticks(records, tokens, length, at_ms)
            return ParsedFrame(ticks, tokens, list(range(4, size, length + 2)), [length] * count)
    return _parse_mixed(frame, count, at_ms)


def _parse_mixed(frame: bytes, count: int, at_ms: int) -> ParsedFrame:
    size = len(frame)
    offsets: list[int] = []
    lengths: list[int] = []
    unknown, truncated, position = 0, False, 2
    for _ in range(count):
        length = int.from_bytes(frame[position : position + 2], "big")
        if position + 2 + length > size:
            truncated = True
            break
        if length in _TICK_DTYPES:
            offsets.append(position + 2)
            lengths.append(length)
        else:
            unknown += 1
        position += 2 + length
    ticks = np.empty((len(offsets), BATCH_WIDTH))
    tokens = np.empty(len(offsets), np.int64)
    starts, kinds = np.array(offsets, np.int64), np.array(lengths, np.int64)
    for length in set(lengths):
        dtype = _TICK_DTYPES[length]
        # Every position of the frame seen as a packet (stride 1), and then those that are one.
        views = np.ndarray((size - dtype.itemsize + 1,), dtype, frame, strides=(1,))
        rows = kinds == length
        records = views[starts[rows]]
        tokens[rows] = records["instrument_token"]
        ticks[rows] = _ticks(records, tokens[rows], length, at_ms)
    trailing = 0 if truncated else size - position
    return ParsedFrame(ticks, tokens, offsets, lengths, unknown, truncated, trailing)


def _ticks(records: Records, tokens: Ints, length: int, at_ms: int) -> TickArray:
    """Return the records of one length as a tick batch."""
    ticks = np.empty((len(records), BATCH_WIDTH))
    divisor = PRICE_DIVISORS[tokens & 0xFF]
    ticks[:, TOKEN] = tokens
    ticks[:, LAST_PRICE] = records["last_price"] / divisor
    ticks[:, AT_MS] = at_ms
    if length == LTP:
        ticks[:, LAST_QUANTITY:TIME_MS] = NAN
        ticks[:, TIME_MS] = at_ms
        return ticks
    is_tradable = length in (QUOTE, FULL)
    ticks[:, LAST_QUANTITY] = records["last_traded_quantity"] if is_tradable else NAN
    ticks[:, VOLUME] = records["volume_traded"] if is_tradable else NAN
    for column, name in ((DAY_OPEN, "open"), (DAY_HIGH, "high"), (DAY_LOW, "low")):
        ticks[:, column] = records[name] / divisor
    day = ticks[:, DAY_OPEN : DAY_LOW + 1]
    day[day == 0.0] = NAN  # Kite sends 0 until there is one
    ticks[:, OI] = records["oi"] if length == FULL else NAN
    ticks[:, TIME_MS] = at_ms
    if length in (FULL, INDEX_FULL):
        seconds = records["last_trade_time" if length == FULL else "exchange_timestamp"].astype(np.int64)
        ticks[:, TIME_MS] = np.where(seconds >= SECONDS_MIN, seconds * 1000, at_ms)
    return ticks


# -- one packet → named fields -------------------------------------------------------------------------------

_json = msgspec.json.Encoder()
# Wire names of the quote hash's fields that have another one there; price_change is not in the hash.
_QUOTE_NAMES = {
    "last_traded_quantity": "last_quantity", "average_traded_price": "average_price",
    "volume_traded": "volume", "total_buy_quantity": "buy_quantity", "total_sell_quantity": "sell_quantity",
    "exchange_timestamp": "exchange_time",
}  # fmt: skip


def _quote_plan(length: int) -> tuple[list[tuple[int, str]], ...]:
    """Return where a packet has its prices, times and other numbers, with their names in the quote hash."""
    prices: list[tuple[int, str]] = []
    times: list[tuple[int, str]] = []
    numbers: list[tuple[int, str]] = []
    for n, (name, _) in enumerate(FIELDS_OF_LENGTH[length]):
        if name not in ("instrument_token", "price_change"):
            group = prices if name in _PRICES else times if name in _TIMES else numbers
            group.append((n, _QUOTE_NAMES.get(name, name)))
    return prices, times, numbers


_QUOTE_PLANS = {length: _quote_plan(length) for length in FIELDS_OF_LENGTH}


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
    """Return Unix seconds as `2021-07-05T10:41:27+05:30`; "" for no time."""
    return datetime.fromtimestamp(seconds, IST).isoformat() if seconds >= SECONDS_MIN else ""


@lru_cache(maxsize=1024)  # all packets of a frame share it
def iso_ist_ms(epoch_ms: int) -> str:
    """Return Unix milliseconds as `2021-07-05T10:41:27.005+05:30`."""
    return f"{iso_ist(epoch_ms // 1000)[:19]}.{epoch_ms % 1000:03d}+05:30"


def _unpack(packet: bytes | memoryview) -> tuple[int, ...]:
    layout = STRUCTS.get(len(packet))
    if layout is None:
        raise FrameError(f"a packet of {len(packet)} bytes is none of Kite's", bytes(packet[:64]))
    return layout.unpack(packet)


def _percent(last: float, close: float) -> float:
    return (last - close) * 100 / close if close else 0.0


def quote_fields(packet: bytes | memoryview, symbol: str, at_ms: int) -> dict[str, Any]:
    """Return the quote hash's fields (docs/keys.md) that a packet has; `depth` is JSON text.

    Times are ISO 8601 in IST, "" for none. `change` is per cent against the previous close, as the official
    SDKs compute it.

    Raises:
        FrameError: the packet's length is none of Kite's.
    """
    wire = _unpack(packet)
    length = len(packet)
    divisor = PRICE_DIVISOR_OF[wire[0] & 0xFF]
    fields: dict[str, Any] = {"symbol": symbol}
    prices, times, numbers = _QUOTE_PLANS[length]
    for n, name in prices:
        fields[name] = wire[n] / divisor
    for n, name in numbers:
        fields[name] = wire[n]
    for n, name in times:
        fields[name] = iso_ist(wire[n])
    if length != LTP:
        fields["change"] = _percent(fields["last_price"], fields["close"])
    fields["received_at"] = iso_ist_ms(at_ms)
    fields["mode"] = MODE_OF_LENGTH[length]
    if length == FULL:
        levels = [_Level(wire[i + 1] / divisor, wire[i], wire[i + 2]) for i in range(16, 46, 3)]
        fields["depth"] = _json.encode(_Depth(levels[:5], levels[5:])).decode()
    return fields


def decode(packet: bytes | memoryview) -> dict[str, Any]:
    """Return one packet as the official pykiteconnect names it; times are datetimes in IST, None for 0.

    Raises:
        FrameError: the packet's length is none of Kite's.
    """
    wire = _unpack(packet)
    length = len(packet)
    divisor = PRICE_DIVISOR_OF[wire[0] & 0xFF]
    tick: dict[str, Any] = {"tradable": wire[0] & 0xFF != SEGMENT_INDICES, "mode": MODE_OF_LENGTH[length]}
    ohlc: dict[str, float] = {}
    for (name, _), value in zip(FIELDS_OF_LENGTH[length], wire, strict=False):
        if name in ("open", "high", "low", "close"):
            ohlc[name] = value / divisor
        elif name in _TIMES:
            tick[name] = datetime.fromtimestamp(value, IST) if value >= SECONDS_MIN else None
        elif name != "price_change":
            tick[name] = value / divisor if name in _PRICES else value
    if length != LTP:
        tick["ohlc"] = ohlc
        tick["change"] = _percent(tick["last_price"], ohlc["close"])
    if length == FULL:
        levels = [
            {"quantity": wire[i], "price": wire[i + 1] / divisor, "orders": wire[i + 2]}
            for i in range(16, 46, 3)
        ]
        tick["depth"] = {"buy": levels[:5], "sell": levels[5:]}
    return tick


# -- ticks → packets and frames: what the simulator, the tests and the benchmarks send ----------------------


def encode_packet(mode: str, token: int, **fields: Any) -> bytes:
    """Return one packet; `fields` are named as `decode` names them, prices in rupees, a missing one is 0.

    Raises:
        struct.error: a number does not fit its field.
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
    """Return packets as one binary frame. Raises OverflowError beyond 65,535: the count has 16 bits."""
    packets = list(packets)
    parts = [len(packets).to_bytes(2, "big")]
    for packet in packets:
        parts += (len(packet).to_bytes(2, "big"), packet)
    return b"".join(parts)


def encode_records(records: Records) -> bytes:
    """Return an array of one of `DTYPES` as one frame of such packets, without a loop."""
    framed = np.dtype([("length", ">u2"), ("packet", records.dtype)])
    frame = np.empty(len(records), framed)
    frame["length"] = records.dtype.itemsize
    frame["packet"] = records
    return len(records).to_bytes(2, "big") + frame.tobytes()


def encode_full(ticks: TickArray, mode: str = "full") -> bytes:
    """Return a tick batch as one frame of `mode` packets; NaN becomes 0, what a tick row lacks is 0.

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


def _records(ticks: TickArray, length: int) -> Records:
    records = np.zeros(len(ticks), DTYPES[length])
    whole = np.nan_to_num(ticks)
    divisor = PRICE_DIVISORS[whole[:, TOKEN].astype(np.int64) & 0xFF]
    seconds = whole[:, TIME_MS] // 1000
    values = {
        "instrument_token": whole[:, TOKEN],
        "last_traded_quantity": whole[:, LAST_QUANTITY],
        "volume_traded": whole[:, VOLUME],
        "oi": whole[:, OI],
        "last_trade_time": seconds,
        "exchange_timestamp": seconds,
        "last_price": np.rint(whole[:, LAST_PRICE] * divisor),
        "open": np.rint(whole[:, DAY_OPEN] * divisor),
        "high": np.rint(whole[:, DAY_HIGH] * divisor),
        "low": np.rint(whole[:, DAY_LOW] * divisor),
    }
    for name in records.dtype.names or ():
        if name in values:
            records[name] = values[name]
    return records


# -- text frames ---------------------------------------------------------------------------------------------

EVIDENCE_CHARS_MAX = 200  # of a frame that is not understood, for the log
_DATA_TYPES: dict[str, type] = {"order": dict, "error": str, "message": str, "instruments_meta": dict}
_decode_json = msgspec.json.Decoder().decode


class TextEvent(NamedTuple):
    """A text frame.

    `kind` is Kite's type, `unknown` or `invalid`. `data` is Kite's `data` (of `app_code`: the timestamp);
    `evidence` is the beginning of a frame that is not understood, `reason` why an `invalid` one is not.
    """

    kind: str
    data: Any = None
    reason: str = ""
    evidence: str = ""


def parse_text(frame: bytes | str) -> TextEvent:
    """Return a text frame as an event. Any bytes are accepted: it never raises."""
    try:
        content = _decode_json(frame)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        return TextEvent("invalid", None, f"no JSON ({type(error).__name__})", _evidence(frame))
    if not isinstance(content, dict) or not isinstance(content.get("type"), str):
        return TextEvent("invalid", None, "no object with a type", _evidence(frame))
    kind, data = content["type"], content.get("data")
    if kind == "app_code":
        stamp = content.get("timestamp")
        return TextEvent(kind, stamp if isinstance(stamp, str) else None)
    if kind not in _DATA_TYPES:
        return TextEvent("unknown", kind[:EVIDENCE_CHARS_MAX], "", _evidence(frame))
    if not isinstance(data, _DATA_TYPES[kind]):
        return TextEvent("invalid", None, f"{kind}: its data has another type", _evidence(frame))
    return TextEvent(kind, data)


def _evidence(frame: bytes | str) -> str:
    if isinstance(frame, bytes):
        frame = frame[:EVIDENCE_CHARS_MAX].decode("utf-8", "backslashreplace")
    return frame[:EVIDENCE_CHARS_MAX]
