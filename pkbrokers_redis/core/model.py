"""The shapes everything speaks: a tick batch, a candle, the segments of Kite.

A batch of ticks is one `float64[n, 10]` array, one row per tick, NaN where a packet has no such field.
Every number Kite sends fits a float64 exactly (tokens and volumes are 32 bits, times 41).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

TickArray = npt.NDArray[np.float64]

# Columns of a tick batch; the first nine are the tick row of the streams, in its order.
TOKEN, LAST_PRICE, LAST_QUANTITY, VOLUME, OI, DAY_OPEN, DAY_HIGH, DAY_LOW, TIME_MS, AT_MS = range(10)
TICK_FIELDS = (
    "token",
    "last_price",
    "last_quantity",
    "volume",
    "oi",
    "day_open",
    "day_high",
    "day_low",
    "time_ms",
)
TICK_WIDTH = 9
BATCH_WIDTH = 10

TOKEN_MAX = 2**32 - 1

SEGMENTS = {
    1: "NSE",
    2: "NFO",
    3: "CDS",
    4: "BSE",
    5: "BFO",
    6: "BCD",
    7: "MCX",
    8: "MCXSX",
    9: "INDICES",
}
SEGMENT_INDICES = 9

CANDLE_FIELDS = ("start", "open", "high", "low", "close", "volume", "oi", "ticks")

# The ninth element of a row that is not a whole candle of ours. Arrays hold its place in FLAG_NAMES.
FLAG_NAMES = ("", "partial", "gap", "backfilled")
FLAG_WHOLE, FLAG_PARTIAL, FLAG_GAP, FLAG_BACKFILLED = range(len(FLAG_NAMES))


class Candle(NamedTuple):
    """One candle as it stands in Redis: `[start, open, high, low, close, volume, oi, ticks(, flag)]`.

    `start` is epoch seconds, prices are rupees, `ticks` counts the ticks that changed it. `flag` is
    "" for a whole candle, else "partial", "gap" or "backfilled".
    """

    start: int
    open: float
    high: float
    low: float
    close: float
    volume: float
    oi: float | None
    ticks: int
    flag: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return self._asdict()
