"""Fixtures of the end-to-end tests: recorded data next to the checkout, and an aggregator to drive."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from pkbrokers_redis.aggregate.worker import Aggregator
from pkbrokers_redis.client.replay import lag_entries
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.meta import ensure_meta

DATA = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture
def market_data() -> Path:
    """Recorded trades with the exchange's own candles; they lie next to a checkout, not in it."""
    folder = DATA / "market"
    if not folder.is_dir():
        pytest.skip("needs the recorded market data in ../shared/data")
    return folder


@pytest.fixture
def make_aggregator(client: redis.Redis) -> Iterator[Callable[[Settings], Aggregator]]:
    """An aggregator in this process, started."""

    def make(settings: Settings) -> Aggregator:
        ensure_meta(client, settings, "2026-01-01T00:00:00+00:00")
        aggregator = Aggregator(lambda: connect(settings), settings, now_ms=lambda: time.time() * 1000)
        aggregator.start()
        return aggregator

    yield make


def drain(aggregator: Aggregator, client: redis.Redis, settings: Settings) -> None:
    """Step until every stream entry is applied and committed."""
    while aggregator.step(block_ms_max=1) or lag_entries(client, settings.keys):
        pass
