"""The day's gainers, losers and most active, of all instruments, from day candles and quotes in two reads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pkbrokers_redis.candles.calendar import IST_SECONDS
from pkbrokers_redis.client.store import CandleStore

AGE_SECONDS_MAX = 5.0  # a picture serves all who ask meanwhile
QUOTES_A_PIPELINE = 1_000
DAY_SECONDS = 86_400


class Mover(NamedTuple):
    """One instrument's day. `change` is percent from the previous close, None where that is not known."""

    symbol: str
    price: float
    change: float | None
    volume: float
    turnover: float  # rupees, at the last price
    ticks: int


class Movers:
    """Reads all at once and remembers it for AGE_SECONDS_MAX. For threads."""

    def __init__(self, store: CandleStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._clock = store, clock
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._movers: list[Mover] = []

    def all(self) -> list[Mover]:
        """Every instrument that has traded on the latest day of any."""
        with self._lock:
            if self._clock() - self._read_at > AGE_SECONDS_MAX:
                self._movers = _read(self._store)
                self._read_at = self._clock()
            return self._movers


def _read(store: CandleStore) -> list[Mover]:
    bulk = store.bulk(
        None, "day" if "day" in store.intervals else store.intervals[-1], 1, include_current=True
    )
    if not len(bulk):
        return []
    last = bulk.offsets[1:] - 1
    rows = bulk.rows[last]
    days = (rows[:, 0].astype(np.int64) + IST_SECONDS) // DAY_SECONDS
    today = days == days.max()
    found: list[Mover] = []
    closes = _closes(store, bulk.tokens.tolist())
    for i in np.flatnonzero(today).tolist():
        close, volume, ticks = rows[i, 4], rows[i, 5], rows[i, 7]
        before = closes.get(int(bulk.tokens[i]))
        change = (close / before - 1) * 100 if before else None
        found.append(
            Mover(bulk.symbols[i], float(close), change, float(volume), float(volume * close), int(ticks))
        )
    return found


def _closes(store: CandleStore, tokens: list[int]) -> dict[int, float]:
    """The previous day's close, as the quotes have it."""
    found: dict[int, float] = {}
    for first in range(0, len(tokens), QUOTES_A_PIPELINE):
        some = tokens[first : first + QUOTES_A_PIPELINE]
        pipeline = store.client.pipeline(transaction=False)
        for token in some:
            pipeline.hget(store.keys.quote(token), "close")
        replies: list[Any] = pipeline.execute(raise_on_error=False)
        for token, reply in zip(some, replies, strict=True):
            try:
                found[token] = float(reply)
            except (TypeError, ValueError):
                continue  # none, or a foreign hand's
    return {token: close for token, close in found.items() if close > 0}
