"""A machine whose clock is set back by hours: nothing waits for the time that was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import redis

from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.ingest.outages import JobOutbox
from pkbrokers_redis.ingest.writer import FrameWriter
from pkbrokers_redis.runtime.cluster_state import Heartbeat
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.queue import open_queue
from tests.aggregate.stores import INFY, Store, make_store, tick
from tests.ingest.test_ingest import frames

__all__ = ["make_store"]  # a fixture

NOW_MS = 1_767_584_705_027
HOURS_MS = 5 * 3_600_000

pytestmark = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)


def test_quotes_are_written_and_streams_are_capped(
    make_settings: Callable[..., Settings], client: redis.Redis
) -> None:
    settings = make_settings(stream_max_entries=200, shards=1)
    writer = FrameWriter(lambda: connect(settings), settings, {INFY: "NSE:INFY"}, only_known=True)
    for now_ms in (NOW_MS, NOW_MS - HOURS_MS):
        batches = writer.parse_new([(frame, now_ms) for frame in frames(500, writer.seq)])
        writer.write(batches, now_ms)
    assert client.hget(settings.keys.quote(INFY), "volume") == b"999"
    assert client.xlen(settings.keys.ticks(0)) < 500


def test_a_worker_beats(settings: Settings, client: redis.Redis) -> None:
    heart = Heartbeat(settings.keys, "ingest", "w", NOW_MS)
    heart.beat(client, NOW_MS, 1_000, {})
    now_ms = NOW_MS - HOURS_MS
    assert heart.due(now_ms)
    heart.beat(client, now_ms, 2_000, {})
    assert client.hget(heart.key, "ticks_per_second") == b"500.0"
    assert not heart.due(now_ms + 1_000) and heart.due(now_ms + 2_000)


def test_jobs_of_a_dead_worker_are_queued(settings: Settings, client: redis.Redis) -> None:
    now_ms = float(NOW_MS)
    dead, alive = (
        JobOutbox(lambda: client, lambda: open_queue(settings), settings.keys, now_ms=lambda: now_ms)
        for _ in range(2)
    )
    alive.send()
    dead.add(client, "warm_start", {"tokens": [INFY]})
    now_ms -= HOURS_MS
    alive.send()
    assert alive.counts["jobs_queued"] == 1 and not client.exists(settings.keys.job_outbox())


def test_an_aggregator_trims_and_retries_quarantined_shards(
    make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(shards=1, clock="wall")
    trimmed: list[float] = []
    monkeypatch.setattr(
        "pkbrokers_redis.aggregate.worker.trim",
        lambda client, keys, held, now_ms, kept: trimmed.append(now_ms),
    )
    aggregator = store.aggregator()
    aggregator.step(block_ms_max=1)
    aggregator._quarantine(0, PkbError("a key is odd", "look at it"))
    aggregator.step(block_ms_max=1)
    assert not aggregator.workers and len(trimmed) == 1
    store.clock.set(-HOURS_MS / 1000)
    aggregator.step(block_ms_max=1)
    assert list(aggregator.workers) == [0] and len(trimmed) == 2

    store.client.set(store.keys.ticks(0), "mine")
    aggregator.step(block_ms_max=1)
    store.client.delete(store.keys.ticks(0))
    store.clock.set(-2 * HOURS_MS / 1000)
    store.send(tick(5, 100, 10))
    assert aggregator.step(block_ms_max=1) == 1
