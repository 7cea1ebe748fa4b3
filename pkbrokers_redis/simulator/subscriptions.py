"""Kite's subscription protocol without I/O: requests of a client, and the frames that it gets.

{"a": "subscribe", "v": [408065]}
{"a": "unsubscribe", "v": [408065]}
{"a": "mode", "v": ["full", [408065]]}
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from pkbrokers_redis.kite.protocol import DTYPES, FULL, INDEX_FULL, INDEX_QUOTE, LTP, QUOTE, encode_records
from pkbrokers_redis.simulator.faults import Packets
from pkbrokers_redis.simulator.market import Ints

NONE, MODE_LTP, MODE_QUOTE, MODE_FULL = range(4)  # a client's mode of each row
MODES = {"ltp": MODE_LTP, "quote": MODE_QUOTE, "full": MODE_FULL}
FRAME_PACKETS_MAX = 300  # 56 KB of full packets

_INSTRUMENT_LENGTH = {MODE_LTP: LTP, MODE_QUOTE: QUOTE, MODE_FULL: FULL}
_INDEX_LENGTH = {MODE_LTP: LTP, MODE_QUOTE: INDEX_QUOTE, MODE_FULL: INDEX_FULL}


class InvalidRequest(ValueError):
    """Raised for a message that is none of Kite's requests; its text is that of the error frame."""


class Request(NamedTuple):
    """One of Kite's requests. `mode` is a value of `MODES` for the action `mode`, else `NONE`."""

    action: str
    tokens: list[int]
    mode: int = NONE


def parse_request(message: bytes | str) -> Request:
    """Parse one message of a client; tokens that are not numbers are ignored, as on Kite.

    Raises:
        InvalidRequest: for any other message.
    """
    try:
        content = msgspec.json.decode(message)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise InvalidRequest("the message is not JSON") from None
    if not isinstance(content, dict):
        raise InvalidRequest("the message is no object")
    action, value = content.get("a"), content.get("v")
    if action == "mode":
        if not (isinstance(value, list) and len(value) == 2 and isinstance(value[1], list)):
            raise InvalidRequest("mode needs [mode, [tokens]]")
        if not isinstance(value[0], str) or value[0] not in MODES:
            raise InvalidRequest("the mode is unknown")
        return Request(action, _tokens(value[1]), MODES[value[0]])
    if action not in ("subscribe", "unsubscribe"):
        raise InvalidRequest("the action is unknown")
    if not isinstance(value, list):
        raise InvalidRequest(f"{action} needs a list of tokens")
    return Request(action, _tokens(value))


def _tokens(values: list[object]) -> list[int]:
    numbers = [value for value in values if isinstance(value, int) and not isinstance(value, bool)]
    return list(dict.fromkeys(numbers))


def frames_for(
    market: Packets, rows: Ints, modes: npt.NDArray[np.int8], packets_max: int = FRAME_PACKETS_MAX
) -> Iterator[bytes]:
    """Yield the last packets of market rows as binary frames, each row in its mode of `modes`."""
    rows = rows[modes[rows] != NONE]
    for start in range(0, len(rows), packets_max):
        part = rows[start : start + packets_max]
        yield len(part).to_bytes(2, "big") + b"".join(_packets(market, part, modes))


def _packets(market: Packets, rows: Ints, modes: npt.NDArray[np.int8]) -> Iterator[bytes]:
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
