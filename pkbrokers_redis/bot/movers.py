"""The day's movers of all instruments: gainers, losers, most active, most ticks.

Read from day candles and quotes in two bulk reads, at most once in AGE_SECONDS_MAX for all users together.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pkbrokers_redis.bot.text import count, money, percent
from pkbrokers_redis.candles.calendar import IST_SECONDS
from pkbrokers_redis.client.store import CandleStore

AGE_SECONDS_MAX = 5.0
QUOTES_PER_PIPELINE = 1_000
DAY_SECONDS = 86_400
CRORE = 1e7


class Mover(NamedTuple):
    """One instrument's day. `change` is percent from the previous close, None when that is unknown."""

    symbol: str
    price: float
    change: float | None
    volume: float
    turnover: float  # rupees, at the last price
    ticks: int


@dataclass(frozen=True, slots=True)
class Ranking:
    """One way to rank movers: largest `key` first; a key of None leaves the instrument out."""

    title: str
    key: Callable[[Mover], float | None]
    columns: dict[str, Callable[[Mover], str]]
    rows: int = 10


def _change(mover: Mover) -> float | None:
    return mover.change if mover.volume else None


def _crores(mover: Mover) -> str:
    crores = mover.turnover / CRORE
    return count(crores) if crores >= 1 else f"{crores:.2f}"


def _price(mover: Mover) -> str:
    return money(mover.price)


def _percent(mover: Mover) -> str:
    return percent(mover.change)


RANKINGS = {
    "gainers": Ranking("Gainers", _change, {"price": _price, "change": _percent}),
    "losers": Ranking(
        "Losers",
        lambda m: None if (change := _change(m)) is None else -change,
        {"price": _price, "change": _percent},
    ),
    "active": Ranking(
        "Most active",
        lambda m: m.turnover or None,
        {"price": _price, "change": _percent, "₹ crore": _crores},
    ),
    "top": Ranking(
        "Top by ticks today", lambda m: m.ticks, {"ticks": lambda m: count(m.ticks), "price": _price}, rows=20
    ),
}


class Movers:
    """The movers of a store. Methods block: call them in a thread."""

    def __init__(self, store: CandleStore, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._store, self._monotonic = store, monotonic
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._movers: list[Mover] = []

    def all(self) -> list[Mover]:
        """Return every instrument that traded on the latest day of any."""
        with self._lock:
            if self._monotonic() - self._read_at > AGE_SECONDS_MAX:
                self._movers = _read(self._store)
                self._read_at = self._monotonic()
            return self._movers

    def ranked(self, ranking: Ranking, rows: int) -> list[Mover]:
        """Return the first `rows` movers of a ranking."""
        keyed = [(key, mover) for mover in self.all() if (key := ranking.key(mover)) is not None]
        keyed.sort(key=lambda pair: pair[0], reverse=True)
        return [mover for _, mover in keyed[:rows]]


def _read(store: CandleStore) -> list[Mover]:
    interval = "day" if "day" in store.intervals else store.intervals[-1]
    bulk = store.bulk(None, interval, 1, include_current=True)
    if not len(bulk):
        return []
    rows = bulk.rows[bulk.offsets[1:] - 1]
    days = (rows[:, 0].astype(np.int64) + IST_SECONDS) // DAY_SECONDS
    closes = _previous_closes(store, bulk.tokens.tolist())
    movers: list[Mover] = []
    for i in np.flatnonzero(days == days.max()).tolist():
        price, volume, ticks = float(rows[i, 4]), float(rows[i, 5]), int(rows[i, 7])
        previous = closes.get(int(bulk.tokens[i]))
        change = (price / previous - 1) * 100 if previous else None
        movers.append(Mover(bulk.symbols[i], price, change, volume, volume * price, ticks))
    return movers


def _previous_closes(store: CandleStore, tokens: Sequence[int]) -> dict[int, float]:
    """Return token → the previous day's close from the quotes; without absent and malformed ones."""
    closes: dict[int, float] = {}
    for first in range(0, len(tokens), QUOTES_PER_PIPELINE):
        chunk = tokens[first : first + QUOTES_PER_PIPELINE]
        pipeline = store.client.pipeline(transaction=False)
        for token in chunk:
            pipeline.hget(store.keys.quote(token), "close")
        replies: list[Any] = pipeline.execute(raise_on_error=False)
        for token, reply in zip(chunk, replies, strict=True):
            try:
                closes[token] = float(reply)
            except (TypeError, ValueError):
                continue
    return {token: close for token, close in closes.items() if close > 0}
