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
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np

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
