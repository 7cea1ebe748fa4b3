"""Ticks as programs hand them in, and an aggregator in this process that makes candles of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis

from pkbrokers_redis.aggregate.worker import Aggregator
from pkbrokers_redis.client.replay import lag_entries
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.meta import ensure_meta
from tests.client.contract import INFY, OPEN_S


def tick(seconds: float, price: float, volume: int, token: int = INFY, **fields: Any) -> dict[str, Any]:
    """A tick that many seconds after the open, in upstream's words."""
    return {
        "type": "tick",
        "instrument_token": token,
        "last_price": price,
        "day_volume": volume,
        "oi": 0,
        "exchange_timestamp": OPEN_S + seconds,
        **fields,
    }


@contextmanager
def aggregating(client: redis.Redis, settings: Settings) -> Iterator[Any]:
    """`drain()` applies and commits all that is in the streams."""
    ensure_meta(client, settings, "2026-01-01T00:00:00+00:00")
    aggregator = Aggregator(lambda: connect(settings), settings, now_ms=lambda: time.time() * 1000)
    aggregator.start()

    def drain() -> None:
        while aggregator.step(block_ms_max=1) or lag_entries(client, settings.keys):
            pass

    try:
        yield drain
    finally:
        aggregator.close()
