"""Bytes of Kite's websocket ⇄ ticks. Pure; the layout table is in `kite.layout`.

`parse_frame` turns a whole frame into one tick batch and never raises. The rest, one packet at a
time (`decode`, `quote_fields`) and the way back (`encode_…`), lives in `kite.packets` and
`kite.encode` and is importable from here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pkbrokers_redis.core.model import (
    AT_MS,
    BATCH_WIDTH,
    DAY_HIGH,
    DAY_LOW,
    DAY_OPEN,
    LAST_PRICE,
    LAST_QUANTITY,
    OI,
    TIME_MS,
    TOKEN,
    VOLUME,
    TickArray,
)
from pkbrokers_redis.kite.encode import encode_frame, encode_full, encode_packet, encode_records
from pkbrokers_redis.kite.layout import (
    DTYPES,
    FULL,
    FULL_HEAD_DTYPE,
    INDEX_FULL,
    LTP,
    PRICE_DIVISORS,
    QUOTE,
)
from pkbrokers_redis.kite.packets import decode, quote_fields

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

NAN = float("nan")
_TICK_DTYPES = DTYPES | {FULL: FULL_HEAD_DTYPE}


class ParsedFrame(NamedTuple):
    """What one binary frame held. Row i of `ticks` is the packet `frame[offsets[i]:][:lengths[i]]`."""

    ticks: TickArray  # float64[n, 10], columns as in core.model, in the frame's order
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
        return ParsedFrame(_empty(), [], [], truncated=size == 0, heartbeat=size == 1)
    count = frame[0] << 8 | frame[1]
    if not count or size < 4:
        return ParsedFrame(_empty(), [], [], truncated=count > 0, trailing=0 if count else size - 2)
    length = frame[2] << 8 | frame[3]
    if length in _TICK_DTYPES and size == 2 + count * (length + 2):
        lengths = np.ndarray((count,), ">u2", frame, offset=2, strides=(length + 2,))
        if (lengths == length).all():
            # One kind of packet, as most frames are: read it where it lies.
            records = np.ndarray((count,), _TICK_DTYPES[length], frame, offset=4, strides=(length + 2,))
            offsets = list(range(4, size, length + 2))
            return ParsedFrame(_ticks(records, length, at_ms), offsets, [length] * count)
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
    return ParsedFrame(
        _gather(frame, offsets, lengths, at_ms), offsets, lengths, unknown, truncated, trailing
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
        ticks[rows] = _ticks(every[where[rows]], length, at_ms)
    return ticks


def _ticks(records: Records, length: int, at_ms: int) -> TickArray:
    """Records of one length → tick batch."""
    ticks = np.empty((len(records), BATCH_WIDTH))
    token = records["instrument_token"].astype(np.int64)
    divisor = PRICE_DIVISORS[token & 0xFF]
    ticks[:, TOKEN] = token
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
