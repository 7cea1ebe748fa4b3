"""Kite's subscription protocol without I/O: requests of a client, and the frames that it gets.

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


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Send ticks of these tokens, in quote mode at first."""

    tokens: list[int]


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    """Stop the ticks of these tokens."""

    tokens: list[int]


@dataclass(frozen=True, slots=True)
class SetMode:
    """Change the mode (a value of `MODES`) of subscribed tokens."""

    mode: int
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class InvalidRequest:
    """A message that is none of Kite's requests; `reason` is the text of the error frame."""

    reason: str


def parse_request(message: bytes | str) -> Subscribe | Unsubscribe | SetMode | InvalidRequest:
    """Parse one message of a client. No message makes it raise.

    Tokens that are not numbers are ignored, as on Kite.
    """
    try:
        content = msgspec.json.decode(message)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return InvalidRequest("the message is not JSON")
    if not isinstance(content, dict):
        return InvalidRequest("the message is no object")
    action, value = content.get("a"), content.get("v")
    if action == "mode":
        if not (isinstance(value, list) and len(value) == 2 and isinstance(value[1], list)):
            return InvalidRequest("mode needs [mode, [tokens]]")
        mode = MODES.get(value[0]) if isinstance(value[0], str) else None
        return InvalidRequest("the mode is unknown") if mode is None else SetMode(mode, _tokens(value[1]))
    if action not in ("subscribe", "unsubscribe"):
        return InvalidRequest("the action is unknown")
    if not isinstance(value, list):
        return InvalidRequest(f"{action} needs a list of tokens")
    return Subscribe(_tokens(value)) if action == "subscribe" else Unsubscribe(_tokens(value))


def _tokens(values: list[object]) -> list[int]:
    numbers = [value for value in values if isinstance(value, int) and not isinstance(value, bool)]
    return list(dict.fromkeys(numbers))


def frames_for(
    market: Market, rows: Ints, modes: npt.NDArray[np.int8], packets_max: int = FRAME_PACKETS_MAX
) -> Iterator[bytes]:
    """Yield the last packets of market rows as binary frames.

    Args:
        market: The simulated market.
        rows: Market rows with a new packet.
        modes: The client's mode of every market row; rows with `NONE` are left out.
        packets_max: The most packets of one frame.
    """
    rows = rows[modes[rows] != NONE]
    for start in range(0, len(rows), packets_max):
        part = rows[start : start + packets_max]
        yield len(part).to_bytes(2, "big") + b"".join(_packets(market, part, modes))


def _packets(market: Market, rows: Ints, modes: npt.NDArray[np.int8]) -> Iterator[bytes]:
    row_modes, is_index = modes[rows], market.is_index[rows]
    for mode in (MODE_FULL, MODE_QUOTE, MODE_LTP):
        for of_index, packets, length in (
            (True, market.index_packets, _INDEX_LENGTH[mode]),
            (False, market.packets, _INSTRUMENT_LENGTH[mode]),
        ):
            chosen = rows[(row_modes == mode) & (is_index == of_index)]
            if chosen.size:
                yield encode_records(_prefixes(packets[chosen], length))[2:]


def _prefixes(packets: npt.NDArray[np.void], length: int) -> npt.NDArray[np.void]:
    """Return the first `length` bytes of each packet: a lesser mode is a prefix of the full packet."""
    if packets.dtype.itemsize == length:
        return packets
    return np.ndarray((len(packets),), DTYPES[length], packets.tobytes(), strides=(packets.dtype.itemsize,))
