"""Ticks that a program hands us as dicts → the tick streams, as if an ingest had received them.

KiteTicker's dicts and upstream's are both understood:

    KiteTicker      instrument_token last_price last_traded_quantity volume_traded oi ohlc{open high low}
                    last_trade_time exchange_timestamp (naive datetimes of this host's zone, as it makes them)
    PKBrokers       instrument_token last_price last_quantity day_volume oi open_price high_price low_price
                    last_trade_timestamp exchange_timestamp (epoch seconds, or ISO text of Kolkata)
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from pkbrokers_redis.candles.calendar import KOLKATA
from pkbrokers_redis.candles.model import BATCH_WIDTH, SEGMENT_INDICES, TOKEN_MAX
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.settings import Settings

if TYPE_CHECKING:
    from pkbrokers_redis.store.tick_writer import TickBatch, TickWriter

BATCHES_MAX = 10_000  # waiting for a Redis that is away; then ticks are refused, which the caller is told
TICKS_A_BATCH = 1_000
PAUSE_SECONDS = 1.0  # before a Redis that was away is tried again

NUMBER_MAX = 1e12

Row = list[float]


def tick_row(tick: Mapping[str, Any], now_ms: float) -> Row | None:
    """A dict → a row of a tick batch (`core.model`), None when it is no tick.

    It needs a token and a price above 0. A volume counts where the instrument can have one; a missing time is
    the time received.
    """
    token = _number(tick.get("instrument_token"))
    price = _number(tick.get("last_price"))
    if not (0 < token <= TOKEN_MAX and token == int(token) and price > 0):
        return None
    ohlc = tick.get("ohlc")
    day = ohlc if isinstance(ohlc, Mapping) else {}
    is_index = int(token) & 0xFF == SEGMENT_INDICES
    moment = _time_ms(_first(tick, "last_trade_time", "last_trade_timestamp"))
    if moment is None:
        moment = _time_ms(tick.get("exchange_timestamp"))
    return [
        token,
        price,
        _number(_first(tick, "last_traded_quantity", "last_quantity")),
        math.nan if is_index else _number(_first(tick, "volume_traded", "day_volume", "volume")),
        _number(tick.get("oi")),
        _price(day.get("open", tick.get("open_price"))),
        _price(day.get("high", tick.get("high_price"))),
        _price(day.get("low", tick.get("low_price"))),
        now_ms if moment is None else moment,
        now_ms,
    ]


class TickInput:
    """Writes ticks into the streams; keeps them, in order and bounded, while Redis is away.

    Any thread may call it. A forked child gets a source of its own, so that nothing it sends is taken for a
    repeat of its parent's.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._clock = market_clock(settings)
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._writer: TickWriter | None = None
        self._waiting: deque[TickBatch] = deque()  # at most BATCHES_MAX
        self._again_at = -math.inf  # monotonic seconds

    def put(self, ticks: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
        """Returns how many ticks were taken, and how many were refused: no ticks, or no room for them.

        A tick that was taken is in Redis, or waits here and is sent with the next call that reaches it.
        Raises PkbError for a store that can never take them.
        """
        if self._pid != os.getpid():
            self._new_process()
        now_ms = self._clock()
        rows: list[Row] = []
        refused = 0
        for tick in ticks:
            row = tick_row(tick, now_ms) if isinstance(tick, Mapping) else None
            if row is None:
                refused += 1
            else:
                rows.append(row)
        with self._lock:
            taken = 0
            for first in range(0, len(rows), TICKS_A_BATCH):
                if len(self._waiting) >= BATCHES_MAX:
                    break
                some = rows[first : first + TICKS_A_BATCH]
                batch = np.array(some, np.float64).reshape(-1, BATCH_WIDTH)
                self._waiting.append(self._writer_of().number(batch, int(now_ms)))
                taken += len(some)
            self._flush(int(now_ms))
        return taken, refused + len(rows) - taken

    @property
    def waiting(self) -> int:
        """Batches that Redis does not have yet."""
        return len(self._waiting)

    def _flush(self, now_ms: int) -> None:
        if not self._waiting or time.monotonic() < self._again_at:
            return
        once = threading.Event()
        once.set()  # one try: a caller with ticks in its hands must not wait for Redis
        if self._writer_of().write(list(self._waiting), now_ms, once):
            self._waiting.clear()
        else:
            self._again_at = time.monotonic() + PAUSE_SECONDS

    def _writer_of(self) -> TickWriter:
        if self._writer is None:
            # Late: the writer's kernels need a compiler that readers do without.
            from pkbrokers_redis.store.connect import connect
            from pkbrokers_redis.store.meta import ensure_meta
            from pkbrokers_redis.store.tick_writer import TickWriter

            def connect_writer() -> Any:
                client = connect(self._settings)
                ensure_meta(client, self._settings, datetime.now(UTC).isoformat(timespec="seconds"))
                return client

            self._writer = TickWriter(connect_writer, self._settings)
        return self._writer

    def _new_process(self) -> None:
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._writer = None
        self._waiting = deque()
        self._again_at = -math.inf


def _first(tick: Mapping[str, Any], *names: str) -> Any:
    return next((tick[name] for name in names if tick.get(name) is not None), None)


def _number(value: Any) -> float:
    """A finite number that is not negative, else NaN."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if 0 <= number < NUMBER_MAX else math.nan


def _price(value: Any) -> float:
    """A day's price: 0 means that there is none yet."""
    return _number(value) or math.nan


def _time_ms(value: Any) -> float | None:
    """Epoch seconds, ISO text or a datetime → epoch ms; None for what is no time."""
    try:
        if isinstance(value, str):
            moment = datetime.fromisoformat(value)
            return (moment if moment.tzinfo else moment.replace(tzinfo=KOLKATA)).timestamp() * 1000
        if isinstance(value, datetime):
            return value.timestamp() * 1000  # a naive one is KiteTicker's, made by this host's zone
        seconds = float(value)
    except (TypeError, ValueError, OverflowError, OSError):
        return None
    if not 0 < seconds < NUMBER_MAX * 100:
        return None
    return seconds if seconds > 1e11 else seconds * 1000  # some senders give milliseconds
