"""Several consumers at once on a running pipeline: each follower sees every closed candle once, in order."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import redis

from pkbrokers_redis.client.follow import ClosedCandle
from pkbrokers_redis.client.mirror import Mirror
from pkbrokers_redis.client.replay import lag_entries
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.cluster import Pipe
from pkbrokers_redis.store.meta import ensure_meta
from pkbrokers_redis.store.tick_writer import queue_batches
from tests.client.contract import OPEN_S
from tests.support import PKB, running_process, running_python, settings_env, wait_until

Key = tuple[int, str, int, int]  # token, interval, start, rev
TOKENS = [(n + 1_000) * 256 + 1 for n in range(40)]
FRAMES, STEP_S = 400, 5.0  # 33 minutes of market time


def feed(client: redis.Redis, settings: Settings, frames: range) -> None:
    """A tick of every instrument each five seconds, as an ingest writes them; two a minute come late."""
    rng = np.random.default_rng(frames.start)
    for n in frames:
        ticks = np.full((len(TOKENS), 10), np.nan)
        late_s = 70.0 if n % 6 == 5 else 0.0
        ticks[:, 0], ticks[:, 1], ticks[:, 2] = TOKENS, 100 + rng.integers(0, 50, len(TOKENS)), 1
        ticks[:, 3] = 1_000 + 10 * n - late_s
        ticks[:, 8] = (OPEN_S + n * STEP_S - late_s) * 1000
        ticks[:, 9] = ticks[:, 8]
        pipe = Pipe(client)
        queue_batches(pipe, settings.keys, "test", [(n + 1, int(ticks[0, 9]), ticks)])
        pipe.execute()


def announced(client: redis.Redis, settings: Settings) -> list[Key]:
    """All that the closed streams hold, read by none of our readers."""
    found: list[Key] = []
    for shard in range(settings.shards):
        entries: Any = client.xrange(settings.keys.closed(shard))
        for _, fields in entries:
            start = json.loads(fields[b"row"])[0]
            found.append((int(fields[b"token"]), fields[b"interval"].decode(), start, int(fields[b"rev"])))
    return found


def key(closed: ClosedCandle) -> Key:
    return closed.token, closed.interval, closed.candle.start, closed.rev


def check_order(seen: list[Key]) -> None:
    """First announcements rise within each instrument and interval, and so do a candle's revisions."""
    starts: dict[tuple[int, str], list[int]] = defaultdict(list)
    revisions: dict[tuple[int, str, int], list[int]] = defaultdict(list)
    for token, interval, start, rev in seen:
        revisions[token, interval, start].append(rev)
        if rev == 0:
            starts[token, interval].append(start)
    assert starts and all(each == sorted(set(each)) for each in starts.values())
    assert all(each == list(range(len(each))) for each in revisions.values())


@pytest.mark.xdist_group("heavy")
@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
def test_every_follower_sees_every_closed_candle_once_and_in_order(
    client: redis.Redis, make_settings: Callable[..., Settings]
) -> None:
    settings = make_settings(sessions="always", clock="event", shards=4, closed_max_entries=1_000_000)
    ensure_meta(client, settings, "2026-01-05T09:00:00+05:30")
    env, done = settings_env(settings), threading.Event()
    chosen = [str(token) for token in TOKENS[:7]]

    def follow(symbols: list[str] | None = None, intervals: list[str] | None = None) -> list[Key]:
        follower = CandleStore(settings).follow(symbols, intervals, position="0", block_seconds=0.1)
        seen: list[Key] = []
        while not done.is_set():
            seen += map(key, follower)
        seen += map(key, follower)
        assert follower.missed == 0
        return seen

    def follow_and_restart() -> list[Key]:
        """A consumer that keeps its position and reconnects all the time."""
        seen: list[Key] = []
        position = "0"
        while True:
            was_done = done.is_set()
            follower = CandleStore(settings).follow(position=position, block_seconds=0.05)
            some = [closed for closed, _ in zip(follower, range(97), strict=False)]
            seen += map(key, some)
            position = some[-1].position if some else position
            if was_done and not some:
                return seen

    async def follow_async() -> list[Key]:
        seen: list[Key] = []
        async with CandleStore(settings).follow_async(position="0", block_seconds=0.1) as follower:
            while not done.is_set():
                seen += [key(closed) async for closed in follower]
            return seen + [key(closed) async for closed in follower]

    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(running_python("-m", "workers.aggregate", env=env))
        pool = stack.enter_context(ThreadPoolExecutor(8))
        stack.callback(done.set)  # also when something fails: the pool waits for them
        command = [*PKB, "closed", "--follow", "--json", "--position", "0"]
        process = stack.enter_context(running_process(*command, env=env, stderr_too=False))
        lines: list[dict[str, Any]] = []

        def read_lines() -> None:
            assert process.stdout is not None
            lines.extend(map(json.loads, process.stdout))

        pool.submit(read_lines)
        followers = [
            pool.submit(follow),
            pool.submit(follow_and_restart),
            pool.submit(lambda: asyncio.run(follow_async())),
        ]
        some = pool.submit(follow, chosen, ["1m", "5m"])
        mirror = stack.enter_context(Mirror(CandleStore(settings), TOKENS, ["1m", "5m"], count=400))
        feed(client, settings, range(FRAMES // 2))
        wait_until(lambda: announced(client, settings), timeout_seconds=60, what="the first closed candles")
        feed(client, settings, range(FRAMES // 2, FRAMES))
        wait_until(
            lambda: lag_entries(client, settings.keys) == 0, timeout_seconds=60, what="all to be applied"
        )
        expected = announced(client, settings)
        assert len(expected) > len(TOKENS) * 60 and any(rev for *_, rev in expected)
        wait_until(lambda: len(lines) == len(expected), what="`pkb closed --follow` to print them")
        store = CandleStore(settings)
        wait_until(
            lambda: all(mirror.candles(t, "1m", 400) == store.get_candles(t, "1m", 400) for t in TOKENS),
            what="the mirror to hold what the store holds",
        )
        done.set()
        for future in followers:
            seen = future.result(timeout=60)
            assert sorted(seen) == sorted(expected)
            check_order(seen)
        selected = [event for event in expected if event[0] in TOKENS[:7] and event[1] in ("1m", "5m")]
        assert sorted(some.result(timeout=60)) == sorted(selected)
        printed = [(each["token"], each["interval"], each["start"], each["rev"]) for each in lines]
        assert sorted(printed) == sorted(expected)
        check_order(printed)
        process.kill()
