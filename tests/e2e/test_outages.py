"""Ingest as a process against a Kite that misbehaves: what it does about it, and what it tells of it."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
import redis

from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.ingest.watchdog import ACTIVE_TICKS_MIN
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.simulator.kite import SimulatedKite
from pkbrokers_redis.simulator.universe import universe
from pkbrokers_redis.store.queue import open_queue
from pkbrokers_redis.store.symbols import edit_watch, save_instruments
from tests.support import running_python, settings_env, wait_until

ROWS = [row for row in universe(40) if row["exchange"] in ("NSE", "BSE")][:20]
SYMBOLS = [f"{row['exchange']}:{row['tradingsymbol']}" for row in ROWS]
TOKENS = sorted(int(row["instrument_token"]) for row in ROWS)
MONDAY = datetime.fromisoformat("2026-01-05T10:00:00+05:30").timestamp() * 1000
SPEED = 60


@pytest.fixture
def server_kind() -> str:
    return "valkey"


class Stage:
    """A simulated Kite on a market day at sixty times its speed, and ingest workers that read it."""

    def __init__(self, client: redis.Redis, settings: Settings, stack: contextlib.ExitStack) -> None:
        self.client, self.keys, self.settings = client, settings.keys, settings
        self.stack = stack
        save_instruments(client, self.keys, ROWS)
        self.kite = stack.enter_context(
            SimulatedKite(ROWS, sessions=load_sessions("market"), start_ms=MONDAY, speed=SPEED)
        )

    def ingest(self) -> subprocess.Popen[str]:
        env = {
            **settings_env(self.settings),
            **self.kite.environment(),
            "PKB_KITE_ACCESS_TOKEN": self.kite.accounts.open_session(),
            "PKB_INSTRUMENTS": ",".join(SYMBOLS[1:]),
            "PKB_LEASE_SECONDS": "1",
        }
        return self.stack.enter_context(running_python("-m", "workers.ingest", env=env))

    def notices(self) -> list[tuple[tuple[int, ...], int, int]]:
        """Return every reported outage, with the parts of all shards combined."""
        parts: dict[tuple[int, int], list[int]] = {}
        for shard in range(self.keys.shards):
            for _, fields in self.client.xrange(self.keys.repairs(shard)):  # type: ignore[union-attr]
                span = int(fields[b"from"]), int(fields[b"to"])
                parts.setdefault(span, []).extend(json.loads(fields[b"tokens"]))
        return [(tuple(sorted(tokens)), *span) for span, tokens in sorted(parts.items())]

    def wait_for_notice(self, after: int, what: str) -> tuple[tuple[int, ...], int, int]:
        """The last notice, once there are more than `after`."""
        wait_until(lambda: len(self.notices()) > after, timeout_seconds=60, what=f"a notice of {what}")
        return self.notices()[-1]

    def figures(self) -> dict[str, str]:
        """The heartbeat of the worker."""
        for key in self.client.scan_iter(self.keys.worker("ingest-*")):
            found: Any = self.client.hgetall(key)
            return {name.decode(): value.decode() for name, value in found.items()}
        return {}

    def entries(self) -> int:
        return sum(self.client.xlen(self.keys.ticks(shard)) for shard in range(self.keys.shards))

    def ticks_a_token(self) -> Counter[int]:
        """How often each instrument has ticked."""
        found: Counter[int] = Counter()
        for shard in range(self.keys.shards):
            for _, fields in self.client.xrange(self.keys.ticks(shard)):  # type: ignore[union-attr]
                found.update(row[0] for row in json.loads(fields[b"ticks"]))
        return found

    def wait_for_ticks(self) -> None:
        before = self.entries()
        wait_until(lambda: self.entries() > before + 20, timeout_seconds=60, what="ticks")


@pytest.fixture
def stage(client: redis.Redis, settings: Settings) -> Iterator[Stage]:
    with contextlib.ExitStack() as stack:
        yield Stage(client, settings, stack)


def test_ingest_survives_list_changes_session_expiry_and_a_mute_feed(stage: Stage) -> None:
    worker = stage.ingest()
    wait_until(lambda: stage.kite.server.subscriptions == 19, timeout_seconds=60, what="subscriptions")
    stage.wait_for_ticks()
    assert stage.notices() == []

    # An instrument comes and another goes, on the same connection.
    edit_watch(stage.client, stage.keys, add=[SYMBOLS[0]])
    wait_until(lambda: stage.kite.server.subscriptions == 20, timeout_seconds=30, what="a subscription more")
    quote = stage.keys.quote(int(ROWS[0]["instrument_token"]))
    wait_until(lambda: stage.client.exists(quote), timeout_seconds=30, what="its quote")
    edit_watch(stage.client, stage.keys, remove=[SYMBOLS[1]])
    wait_until(lambda: stage.kite.server.subscriptions == 19, timeout_seconds=30, what="one less")
    edit_watch(stage.client, stage.keys, add=[SYMBOLS[1]])
    wait_until(lambda: stage.kite.server.subscriptions == 20, timeout_seconds=30, what="all of them")
    assert stage.kite.stats.connections == 1
    [again, *_] = stage.notices() or [stage.wait_for_notice(0, "the one that was not streamed")]
    assert again[0] == (int(ROWS[1]["instrument_token"]),)

    # The session ends: one worker logs in, and the outage is reported for all.
    notices_before = len(stage.notices())
    began = stage.kite.now_ms()
    stage.kite.expire_sessions()
    tokens, from_ms, to_ms = stage.wait_for_notice(notices_before, "the expiry")
    assert list(tokens) == TOKENS
    assert abs(from_ms - began) < 120_000 and began < to_ms <= stage.kite.now_ms()
    assert stage.kite.accounts.logins >= 1
    assert stage.kite.server.subscriptions == 20

    # Heartbeats, but no ticks: it reconnects, and the outage began with the last tick.
    stage.wait_for_ticks()
    notices_before, connections = len(stage.notices()), stage.kite.stats.connections
    began = stage.kite.now_ms()
    stage.kite.faults.add("mute")
    wait_until(lambda: stage.kite.stats.connections > connections, timeout_seconds=60, what="a reconnect")
    stage.kite.faults.clear()
    tokens, from_ms, to_ms = stage.wait_for_notice(notices_before, "the mute feed")
    assert list(tokens) == TOKENS and abs(from_ms - began) < 120_000
    assert len(stage.notices()) == notices_before + 1
    wait_until(lambda: int(stage.figures().get("watchdog_mute", 0)), what="its heartbeat to tell")

    # The jobs that repair it wait in RQ.
    def mended() -> set[tuple[int, int]]:
        jobs = open_queue(stage.settings).get_jobs()
        gaps = [job.kwargs for job in jobs if job.func_name.endswith("repair_gap")]
        return {(each["from_ms"], each["to_ms"]) for each in gaps}

    wait_until(lambda: mended() == {notice[1:] for notice in stage.notices()}, what="a job for each notice")
    assert worker.poll() is None


def test_partly_mute_feed_is_noticed_by_its_busiest_instruments(stage: Stage) -> None:
    stage.ingest()
    streamed = [token for token in TOKENS if token != int(ROWS[0]["instrument_token"])]

    def are_known() -> bool:
        ticks = stage.ticks_a_token()
        return min(ticks[token] for token in streamed) > ACTIVE_TICKS_MIN

    wait_until(are_known, timeout_seconds=60, what="the doctor to know who is lively")
    silent = streamed[: len(streamed) * 3 // 4]
    stage.kite.faults.add("mute_some", tokens=silent)
    connections = stage.kite.stats.connections
    wait_until(lambda: stage.kite.stats.connections > connections, timeout_seconds=60, what="a reconnect")
    stage.kite.faults.clear()
    wait_until(
        lambda: set(silent) <= {token for tokens, *_ in stage.notices() for token in tokens},
        timeout_seconds=60,
        what="a notice of the silent ones",
    )
    wait_until(lambda: int(stage.figures().get("watchdog_partly_mute", 0)), what="its heartbeat to tell")


def test_successor_of_a_killed_ingest_reports_exactly_one_outage(stage: Stage) -> None:
    victim = stage.ingest()
    stage.wait_for_ticks()
    wait_until(
        lambda: stage.client.hexists(stage.keys.feed_progress(), "0"),
        timeout_seconds=30,
        what="P:feed_progress",
    )
    stage.wait_for_ticks()
    killed_ms = stage.kite.now_ms()
    victim.kill()
    victim.wait()
    progress: Any = stage.client.hget(stage.keys.feed_progress(), "0")
    stage.ingest()
    tokens, from_ms, to_ms = stage.wait_for_notice(0, "the dead worker's outage")
    assert len(tokens) == 19
    assert from_ms == int(progress) <= killed_ms < to_ms
    stage.wait_for_ticks()
    later: Any = stage.client.hget(stage.keys.feed_progress(), "0")
    assert int(later) >= to_ms
    assert stage.notices() == [(tokens, from_ms, to_ms)]
