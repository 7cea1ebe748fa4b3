"""Ticks → bytes of Kite's websocket: what the simulator, the tests and the benchmarks send."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from pkbrokers_redis.core.model import (
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
from pkbrokers_redis.kite.layout import (
    DEPTH_LEVELS,
    DTYPES,
    FIELDS_OF_LENGTH,
    FULL,
    INDEX_FULL,
    INDEX_QUOTE,
    LTP,
    PRICE_DIVISOR_OF,
    PRICE_DIVISORS,
    QUOTE,
    STRUCTS,
)

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
