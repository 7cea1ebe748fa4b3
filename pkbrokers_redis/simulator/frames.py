"""The market's packets → frames for one client, by what it subscribed. Pure."""

from __future__ import annotations

from collections.abc import Iterator

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
