"""A store with an aggregator on it: frames in, rows and announcements out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from pkbrokers_redis.aggregate.worker import Aggregator
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import connect

INFY, RELIANCE, TCS = 408065, 738561, 2953217
START_S = 1_767_584_700  # 2026-01-05 09:15 in Kolkata, a Monday
EVENT = {"sessions": "always", "clock": "event", "intervals_text": "1m,5m,60m,day", "lease_seconds": 60}
Row = list[Any]


def tick(second: float, price: float, volume: int, token: int = INFY) -> Row:
    """A trade `second` seconds after 09:15."""
    return [token, price, 1, volume, None, None, None, None, int((START_S + second) * 1000)]


def minute(n: float, *prices: float, volume: int, ticks: int) -> Row:
    """The 1m row of minute `n` after 09:15: open, high, low, close."""
    return [START_S + int(60 * n), *prices, volume, None, ticks]


class Clock:
    """The wall clock of an aggregator, in the test's hand."""

    def __init__(self, second: float = 0) -> None:
        self.ms = 0.0
        self.set(second)

    def set(self, second: float) -> None:
        self.ms = (START_S + second) * 1000

    def __call__(self) -> float:
        return self.ms


class Store:
    """A feed into the tick streams, aggregators on them, and what they left in Redis."""

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        self.client, self.settings, self.keys = client, settings, settings.keys
        self.clock = Clock()
        self.seqs: dict[str, int] = {}
        self.started: list[Aggregator] = []

    def send(self, *rows: Row, source: str = "s", seq: int | None = None, at_ms: int | None = None) -> None:
        """One frame: an entry a shard."""
        self.seqs[source] = seq = self.seqs.get(source, 0) + 1 if seq is None else seq
        shards: dict[int, list[Row]] = {}
        for row in rows:
            shards.setdefault(self.keys.shard_of(row[0]), []).append(row)
        for shard, part in shards.items():
            at = part[-1][8] + 300 if at_ms is None else at_ms
            text = json.dumps(part, separators=(",", ":"))
            fields: dict[Any, Any] = {"src": source, "seq": seq, "at": at, "n": len(part), "ticks": text}
            self.client.xadd(self.keys.ticks(shard), fields)

    def foreign(self, fields: dict[Any, Any], token: int = INFY) -> None:
        self.client.xadd(self.keys.ticks(self.keys.shard_of(token)), fields)

    def aggregator(self) -> Aggregator:
        """A new aggregator that owns all shards: the leases of earlier ones are deleted."""
        self.evict()
        new = Aggregator(
            lambda: connect(self.settings), self.settings, now_ms=self.clock, machine_ms=self.clock
        )
        new.start()
        self.started.append(new)
        return new

    def evict(self) -> None:
        """The leases and the signs of life of all aggregators run out."""
        self.client.delete(*(self.keys.lease(s) for s in range(self.keys.shards)), self.keys.workers())

    def drain(self, aggregator: Aggregator | None = None) -> Aggregator:
        aggregator = aggregator or self.aggregator()
        while aggregator.step(block_ms_max=1) or any(
            worker.pending for worker in aggregator.workers.values()
        ):
            pass
        return aggregator

    def rows(self, token: int = INFY, interval: str = "1m") -> list[Row]:
        """Completed rows, then the current one."""
        rows: Any = [*self.client.lrange(self.keys.candles(token, interval), 0, -1)]  # type: ignore[misc]
        current = self.client.hget(self.keys.current(token), interval)
        return [json.loads(row) for row in (*rows, *([current] if current else []))]

    def all_rows(self) -> dict[str, Any]:
        """Every row of the store, by key."""
        found: dict[str, Any] = {}
        for key in self.client.scan_iter(f"{self.settings.prefix}:*"):
            name = key.decode().removeprefix(self.settings.prefix)
            if ":candles:" in name:
                found[name] = self.client.lrange(key, 0, -1)
            elif ":current:" in name:
                found[name] = self.client.hgetall(key)
        return found

    def closed(
        self, token: int | None = None, interval: str | None = None
    ) -> list[tuple[int, str, int, int]]:
        """(token, interval, start, rev) as announced, shard after shard."""
        found: list[tuple[int, str, int, int]] = []
        for shard in range(self.keys.shards):
            for _, each in self.client.xrange(self.keys.closed(shard)):  # type: ignore[union-attr]
                start = json.loads(each[b"row"])[0]
                found.append((int(each[b"token"]), each[b"interval"].decode(), start, int(each[b"rev"])))
        return [each for each in found if token in (None, each[0]) and interval in (None, each[1])]

    def lag(self, token: int = INFY) -> int | None:
        groups: Any = self.client.xinfo_groups(self.keys.ticks(self.keys.shard_of(token)))
        return groups[0]["lag"]  # type: ignore[no-any-return]


@pytest.fixture
def make_store(client: redis.Redis, make_settings: Callable[..., Settings]) -> Iterator[Callable[..., Store]]:
    """`make_store(shards=1)`: event time, all day long, unless options say otherwise."""
    stores: list[Store] = []

    def make(**overrides: Any) -> Store:
        stores.append(Store(client, make_settings(**{**EVENT, **overrides})))
        return stores[-1]

    yield make
    for store in stores:
        for aggregator in store.started:
            aggregator.close()


@pytest.fixture
def store(make_store: Callable[..., Store]) -> Store:
    return make_store()


def some_frames(seconds: int = 900, tokens: tuple[int, ...] = (INFY, RELIANCE, TCS)) -> list[list[Row]]:
    """A quarter of an hour of trades, a frame every 5 seconds, prices that go up and down."""
    frames = [[tick(-30, 100, 1_000, token) for token in tokens]]
    for n, second in enumerate(range(0, seconds, 5)):
        price = 100 + round(5 * math.sin(n / 3), 2)
        frames.append(
            [tick(second, price + each % 7, 1_000 + 10 * n, each) for each in tokens if (n + each) % 4]
        )
    return frames
