"""The market's packets → frames for one client, by what it subscribed. Pure.

What clients ask of the simulator's websocket. Pure; nothing a client sends makes it raise.

{"a": "subscribe", "v": [408065]}
{"a": "unsubscribe", "v": [408065]}
{"a": "mode", "v": ["full", [408065]]}
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from pkbrokers_redis.kite.protocol import DTYPES, FULL, INDEX_FULL, INDEX_QUOTE, LTP, QUOTE, encode_records
from pkbrokers_redis.simulator.market import Ints, Market

NONE, MODE_LTP, MODE_QUOTE, MODE_FULL = range(4)  # a client's mode of each row
MODES = {"ltp": MODE_LTP, "quote": MODE_QUOTE, "full": MODE_FULL}
FRAME_PACKETS_MAX = 300  # 56 KB of full packets

_INSTRUMENT_LENGTH = {MODE_LTP: LTP, MODE_QUOTE: QUOTE, MODE_FULL: FULL}
_INDEX_LENGTH = {MODE_LTP: LTP, MODE_QUOTE: INDEX_QUOTE, MODE_FULL: INDEX_FULL}


def frames_for(
    market: Market, rows: Ints, modes: npt.NDArray[np.int8], packets_max: int = FRAME_PACKETS_MAX
) -> Iterator[bytes]:
    """The last packets of `rows` in the modes given by row, in frames of at most `packets_max`."""
    rows = rows[modes[rows] != NONE]
    for start in range(0, len(rows), packets_max):
        part = rows[start : start + packets_max]
        body = b"".join(_packets(market, part, modes))
        yield len(part).to_bytes(2, "big") + body


def _packets(market: Market, rows: Ints, modes: npt.NDArray[np.int8]) -> Iterator[bytes]:
    wanted, index = modes[rows], market.is_index[rows]
    for mode in (MODE_FULL, MODE_QUOTE, MODE_LTP):
        for is_index, packets, length in (
            (True, market.index_packets, _INDEX_LENGTH[mode]),
            (False, market.packets, _INSTRUMENT_LENGTH[mode]),
        ):
            chosen = rows[(wanted == mode) & (index == is_index)]
            if chosen.size:
                # A packet of a lesser mode is the beginning of the full one.
                yield encode_records(_first_bytes(packets[chosen], length))[2:]


def _first_bytes(packets: npt.NDArray[np.void], length: int) -> npt.NDArray[np.void]:
    if packets.dtype.itemsize == length:
        return packets
    return np.ndarray((len(packets),), DTYPES[length], packets.tobytes(), strides=(packets.dtype.itemsize,))


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Ticks of these tokens, in quote mode until told otherwise."""

    tokens: list[int]


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    """No more ticks of these tokens."""

    tokens: list[int]


@dataclass(frozen=True, slots=True)
class SetMode:
    """Another mode (one of `frames.MODES`' values) for tokens that are subscribed."""

    mode: int
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class BadRequest:
    """Something else; `reason` is for the error text frame."""

    reason: str


def parse_request(message: bytes | str) -> Subscribe | Unsubscribe | SetMode | BadRequest:
    """One message of a client. Tokens that are no numbers give no ticks (as on Kite): dropped."""
    try:
        content = msgspec.json.decode(message)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return BadRequest("the message is not JSON")
    if not isinstance(content, dict):
        return BadRequest("the message is no object")
    action, value = content.get("a"), content.get("v")
    if action == "mode":
        if not (isinstance(value, list) and len(value) == 2 and isinstance(value[1], list)):
            return BadRequest("mode needs [mode, [tokens]]")
        mode = MODES.get(value[0]) if isinstance(value[0], str) else None
        return BadRequest("the mode is unknown") if mode is None else SetMode(mode, _tokens(value[1]))
    if action not in ("subscribe", "unsubscribe"):
        return BadRequest("the action is unknown")
    if not isinstance(value, list):
        return BadRequest(f"{action} needs a list of tokens")
    return Subscribe(_tokens(value)) if action == "subscribe" else Unsubscribe(_tokens(value))


def _tokens(values: list[object]) -> list[int]:
    numbers = [value for value in values if isinstance(value, int) and not isinstance(value, bool)]
    return list(dict.fromkeys(numbers))
