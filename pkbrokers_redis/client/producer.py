"""Send ticks that a program has as dicts into the tick streams, as if ingest had received them.

KiteTicker's dicts and upstream's are both understood:

    KiteTicker      instrument_token last_price last_traded_quantity volume_traded oi ohlc{open high low}
                    last_trade_time exchange_timestamp (naive datetimes of this host's zone, as it makes them)
    PKBrokers       instrument_token last_price last_quantity day_volume oi open_price high_price low_price
                    last_trade_timestamp exchange_timestamp (epoch seconds, or ISO text of Asia/Kolkata)
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

BATCHES_MAX = 10_000  # kept while Redis is unavailable; further ticks are refused, and the caller sees it
TICKS_PER_BATCH = 1_000
RETRY_SECONDS = 1.0  # after Redis was unavailable
NUMBER_MAX = 1e12
TIME_S_MAX = 1e11  # larger times are milliseconds

Row = list[float]


class TickProducer:
    """Write ticks into the streams; keep them, in order and bounded, while Redis is unavailable.

    Any thread may call it; the calling thread writes. A forked child process gets a source id of its own, so
    that its ticks are not taken for repeats of its parent's.

    Args:
        settings: The store's settings.

    Example:
        >>> producer = TickProducer(settings)
        >>> producer.send([{"instrument_token": 408065, "last_price": 1512.5, "day_volume": 1200}])
        (1, 0)
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._clock = market_clock(settings)
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._writer: TickWriter | None = None
        self._waiting: deque[TickBatch] = deque()  # at most BATCHES_MAX
        self._retry_at = -math.inf  # monotonic seconds

    def send(self, ticks: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
        """Send ticks; return how many were accepted, and how many refused: malformed, or no room to wait.

        An accepted tick is in Redis, or waits for the next call that reaches Redis. Raises PkbError if the
        store can never accept them, for example because its layout differs.
        """
        if self._pid != os.getpid():
            self._reset()
        now_ms = self._clock()
        rows = [tick_row(tick, now_ms) if isinstance(tick, Mapping) else None for tick in ticks]
        valid = [row for row in rows if row is not None]
        accepted = 0
        with self._lock:
            for first in range(0, len(valid), TICKS_PER_BATCH):
                if len(self._waiting) >= BATCHES_MAX:
                    break
                chunk = valid[first : first + TICKS_PER_BATCH]
                batch = np.array(chunk, np.float64).reshape(-1, BATCH_WIDTH)
                self._waiting.append(self._tick_writer().number(batch, int(now_ms)))
                accepted += len(chunk)
            self._flush(int(now_ms))
        return accepted, len(rows) - accepted

    @property
    def waiting(self) -> int:
        """Return how many batches Redis does not have yet."""
        return len(self._waiting)

    def _flush(self, now_ms: int) -> None:
        if not self._waiting or time.monotonic() < self._retry_at:
            return
        one_attempt = threading.Event()
        one_attempt.set()  # the caller must not wait for Redis
        if self._tick_writer().write(list(self._waiting), now_ms, one_attempt):
            self._waiting.clear()
        else:
            self._retry_at = time.monotonic() + RETRY_SECONDS

    def _tick_writer(self) -> TickWriter:
        if self._writer is None:
            # Imported here: the writer's kernels need numba, which readers do without.
            from pkbrokers_redis.store.connect import connect
            from pkbrokers_redis.store.meta import ensure_meta
            from pkbrokers_redis.store.tick_writer import TickWriter

            def connect_writer() -> Any:
                client = connect(self._settings)
                ensure_meta(client, self._settings, datetime.now(UTC).isoformat(timespec="seconds"))
                return client

            self._writer = TickWriter(connect_writer, self._settings)
        return self._writer


def tick_row(tick: Mapping[str, Any], now_ms: float) -> Row | None:
    """Convert a dict into a row of a tick batch (`candles.model`); return None if it is malformed.

    A token and a price above 0 are required. The volume of an index is ignored. A tick without a time has the
    receive time `now_ms` (epoch ms).
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


def _first(tick: Mapping[str, Any], *names: str) -> Any:
    return next((tick[name] for name in names if tick.get(name) is not None), None)


def _number(value: Any) -> float:
    """Return a finite number that is not negative, else NaN."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if 0 <= number < NUMBER_MAX else math.nan


def _price(value: Any) -> float:
    """Return a price of the day; 0 means that there is none yet."""
    return _number(value) or math.nan


def _time_ms(value: Any) -> float | None:
    """Convert epoch seconds, ISO text or a datetime into epoch ms; return None for anything else."""
    try:
        if isinstance(value, str):
            moment = datetime.fromisoformat(value)
            return (moment if moment.tzinfo else moment.replace(tzinfo=KOLKATA)).timestamp() * 1000
        if isinstance(value, datetime):
            return value.timestamp() * 1000  # a naive one is KiteTicker's, in this host's zone
        seconds = float(value)
    except (TypeError, ValueError, OverflowError, OSError):
        return None
    if not 0 < seconds < NUMBER_MAX * 100:
        return None
    return seconds if seconds > TIME_S_MAX else seconds * 1000
