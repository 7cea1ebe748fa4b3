"""A store with a few days and minutes of three instruments, for the tests of snapshots and restores."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator

import pytest
import redis

from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.jobs.snapshots import Run, open_run
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.meta import ensure_meta
from tests.client.contract import INFY, NIFTY, OPEN_S, RELIANCE, push, row, write_master

DAY_S = 86_400
AFTER_CLOSE_S = OPEN_S + 7 * 3600


@pytest.fixture(params=["valkey"])
def server_kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def at_close(make_settings: Callable[..., Settings]) -> Settings:
    """Settings at 16:15 on Monday, 2026-01-05."""
    return make_settings(time_shift=f"{AFTER_CLOSE_S},{dt.datetime.now(dt.UTC).timestamp()},1")


@pytest.fixture
def run(client: redis.Redis, at_close: Settings) -> Iterator[Run]:
    """A store with a few days and minutes of three instruments, and a run on it."""
    keys = at_close.keys
    ensure_meta(client, at_close, "2026-01-05T09:00:00+05:30")
    write_master(client, keys)
    for token, price in ((INFY, 1500.05), (RELIANCE, 1400.5)):
        minutes = [row(OPEN_S + 60 * i, price + i / 4, 10 + i, oi=5, ticks=i + 1) for i in range(30)]
        minutes[3] = row(OPEN_S + 180, price, 13, "gap", ticks=4)
        push(client, keys, token, "1m", [row(OPEN_S - 3 * DAY_S + 22_440, price), *minutes])
        push(client, keys, token, "day", [row(OPEN_S - DAY_S * n, price - n, 1000) for n in (4, 3)])
        client.hset(keys.current(token), "day", row(OPEN_S, price + 1, 5000, ticks=77))
    push(client, keys, NIFTY, "1m", [row(OPEN_S, 25_000.5, 0, oi=None)])
    client.hset(keys.cursor(1), mapping={"id": "1767600000000-7", "epoch": 1})
    with CandleStore(at_close, client) as store, open_run(at_close, store) as opened:
        yield opened


def rows_of(client: redis.Redis) -> dict[bytes, list[bytes]]:
    """Every candle list there is."""
    return {key: client.lrange(key, 0, -1) for key in client.scan_iter("pkb:*:candles:*", 1000)}  # type: ignore[misc]
