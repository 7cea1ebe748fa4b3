"""Aggregators that join, leave, hang and die under load: their shards move, and every row is as if nothing
had happened."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import redis

from pkbrokers_redis.aggregate.shard import SETTLED_ENTRIES, SOURCES_MAX
from pkbrokers_redis.aggregate.worker import Aggregator
from pkbrokers_redis.candles.model import TickArray
from pkbrokers_redis.client.replay import lag_entries
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.cluster import Pipe
from pkbrokers_redis.store.tick_writer import queue_batches
from tests.e2e.conftest import drain
from tests.support import running_process, settings_env, wait_until

INSTRUMENTS = 64
START_MS = 1_785_728_700_000
Make = Callable[..., Settings]
MakeAggregator = Callable[[Settings], Aggregator]


def frame(n: int) -> TickArray:
    """The n-th second of a market: each instrument trades, prices wander, volumes rise."""
    tokens = (np.arange(INSTRUMENTS) + 1_000) * 256 + 1
    ticks = np.full((INSTRUMENTS, 10), np.nan)
    price = 100 + (tokens % 97) + np.round(5 * np.sin(n / 7 + tokens), 2)
    ticks[:, 0], ticks[:, 1], ticks[:, 2] = tokens, price, 1
    ticks[:, 3] = (n + 1) * 10 + tokens % 7
    ticks[:, 5:8] = 100, 300, 50
    ticks[:, 8] = START_MS + n * 1_000
    ticks[:, 9] = START_MS + n * 1_000
    return ticks


def send(client: redis.Redis, settings: Settings, first: int, last: int, source: str = "feed") -> None:
    """Frames `first` … `last` - 1 into the streams; `seq` is their number."""
    pipe = Pipe(client)
    frames = [(n + 1, START_MS + n * 1_000, frame(n)) for n in range(first, last)]
    queue_batches(pipe, settings.keys, source, frames)
    assert not [each for each in pipe.execute() if isinstance(each, Exception)]


def rows(client: redis.Redis, settings: Settings) -> dict[str, Any]:
    """All candles, and the announcements of each instrument and interval in order."""
    found: dict[str, Any] = {}
    for key in client.scan_iter(match=f"{settings.prefix}:{{*", count=1000):
        name = key.decode().removeprefix(settings.prefix)
        if ":candles:" in name:
            found[name] = client.lrange(key, 0, -1)
        elif ":current:" in name:
            found[name] = client.hgetall(key)
        elif name.endswith(":closed"):
            for _, fields in client.xrange(key):  # type: ignore[union-attr]
                place = "closed", fields[b"token"], fields[b"interval"]
                found.setdefault(str(place), []).append((fields[b"row"], fields[b"rev"]))
    return found


def owners(client: redis.Redis, settings: Settings) -> dict[int, str]:
    """shard → the holder of its lease, where there is one."""
    values = [client.get(settings.keys.lease(shard)) for shard in range(settings.shards)]
    return {shard: value.decode() for shard, value in enumerate(values) if value}  # type: ignore[union-attr]


def shared_by(client: redis.Redis, settings: Settings, number: int) -> dict[int, str] | None:
    """The owners once all shards are owned by so many, evenly."""
    found = owners(client, settings)
    sizes = [list(found.values()).count(each) for each in set(found.values())]
    even = len(found) == settings.shards and len(sizes) == number and max(sizes) - min(sizes) <= 1
    return found if even else None


def epochs(client: redis.Redis, settings: Settings) -> list[int]:
    return [int(client.hget(settings.keys.cursor(s), "epoch") or 0) for s in range(settings.shards)]


@pytest.fixture
def lease_settings(make_settings: Make) -> Settings:
    return make_settings(sessions="always", clock="event", intervals_text="1m:500,5m,day", lease_seconds=1.0)


@pytest.fixture
def undisturbed(
    client: redis.Redis, make_settings: Make, make_aggregator: MakeAggregator
) -> Callable[..., Any]:
    """The rows of a run in which nothing happens."""

    def run(frames: int) -> dict[str, Any]:
        calm = make_settings(
            prefix="calm", sessions="always", clock="event", intervals_text="1m:500,5m,day", lease_seconds=300
        )
        aggregator = make_aggregator(calm)
        send(client, calm, 0, frames)
        drain(aggregator, client, calm)
        aggregator.close()
        found = rows(client, calm)
        assert any(name.startswith("('closed'") for name in found)
        return found

    return run


@contextlib.contextmanager
def load(client: redis.Redis, settings: Settings) -> Iterator[Callable[[], int]]:
    """Frames in a steady stream while the block lasts; call the target afterwards for their number."""
    stop = threading.Event()
    sent = 0

    def write() -> None:
        nonlocal sent
        while not stop.is_set():
            send(client, settings, sent, sent + 1)
            sent += 1
            stop.wait(0.01)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield lambda: sent
    finally:
        stop.set()
        thread.join()


class Workers:
    """Real aggregator processes."""

    def __init__(self, settings: Settings, stack: contextlib.ExitStack) -> None:
        self._settings = settings
        self._stack = stack

    def start(self) -> subprocess.Popen[str]:
        process = running_process(sys.executable, "-m", "workers.aggregate", env=settings_env(self._settings))
        return self._stack.enter_context(process)


@pytest.fixture
def start_worker(lease_settings: Settings) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    with contextlib.ExitStack() as stack:
        yield Workers(lease_settings, stack).start


def finish(client: redis.Redis, settings: Settings) -> None:
    """Until everything sent is committed."""
    wait_until(lambda: lag_entries(client, settings.keys) == 0, timeout_seconds=60, what="the last commit")


on_one_server = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)


# -- processes ---------------------------------------------------------------------------------------


@on_one_server
def test_shards_rebalance_over_1_2_4_and_1_aggregators_without_loss(
    client: redis.Redis,
    lease_settings: Settings,
    start_worker: Callable[[], subprocess.Popen[str]],
    undisturbed: Callable[[int], Any],
) -> None:
    settings = lease_settings

    def wait_for(number: int) -> None:
        wait_until(
            lambda: shared_by(client, settings, number), timeout_seconds=60, what=f"{number} to share evenly"
        )

    with load(client, settings) as sent:
        workers = [start_worker()]
        wait_for(1)
        workers.append(start_worker())
        wait_for(2)
        workers += [start_worker(), start_worker()]
        wait_for(4)
        for each in workers[1:]:
            each.terminate()
        wait_for(1)
        assert [each.wait(30) for each in workers[1:]] == [0, 0, 0]
    finish(client, settings)
    assert rows(client, settings) == undisturbed(sent())


@on_one_server
def test_joining_aggregator_pauses_no_shard_for_two_leases(
    client: redis.Redis,
    make_settings: Make,
) -> None:
    settings = make_settings(sessions="always", clock="event", intervals_text="1m,day")
    reads: list[Any] = [None] * settings.shards
    changed = [0.0] * settings.shards
    longest = 0.0

    def watch() -> bool:
        """Note for how long no shard's cursor moved."""
        nonlocal longest
        now = time.monotonic()
        for shard in range(settings.shards):
            read = client.hget(settings.keys.cursor(shard), "read")
            if read != reads[shard]:
                reads[shard], changed[shard] = read, now
            longest = max(longest, now - changed[shard])
        return bool(shared_by(client, settings, 2))

    with contextlib.ExitStack() as stack, load(client, settings):
        workers = Workers(settings, stack)
        workers.start()
        moving = lambda: all(client.hget(settings.keys.cursor(s), "read") for s in range(settings.shards))  # noqa: E731
        wait_until(moving, timeout_seconds=60, what="all shards to move")
        changed[:] = [time.monotonic()] * settings.shards
        workers.start()
        wait_until(watch, timeout_seconds=60, what="two to share evenly")
        before = list(reads)
        wait_until(
            lambda: watch() and all(a != b for a, b in zip(reads, before, strict=True)), what="progress"
        )
    assert longest < 2 * settings.lease_seconds


@on_one_server
def test_shards_of_a_killed_aggregator_continue_with_new_epochs_and_equal_rows(
    client: redis.Redis,
    lease_settings: Settings,
    start_worker: Callable[[], subprocess.Popen[str]],
    undisturbed: Callable[[int], Any],
) -> None:
    settings = lease_settings
    with load(client, settings) as sent:
        victim, _ = start_worker(), start_worker()
        shares = wait_until(
            lambda: shared_by(client, settings, 2), timeout_seconds=60, what="two to share evenly"
        )
        before = epochs(client, settings)
        victim.kill()
        wait_until(lambda: shared_by(client, settings, 1), what="the other to take over")
        after = epochs(client, settings)
        [heir] = set(owners(client, settings).values())
        for shard, owner in shares.items():
            assert (after[shard] > before[shard]) == (owner != heir)
    finish(client, settings)
    assert rows(client, settings) == undisturbed(sent())


@on_one_server
def test_hung_aggregator_gets_its_share_again_and_rows_stay_equal(
    client: redis.Redis,
    lease_settings: Settings,
    start_worker: Callable[[], subprocess.Popen[str]],
    undisturbed: Callable[[int], Any],
) -> None:
    settings = lease_settings
    with load(client, settings) as sent:
        sleeper, _ = start_worker(), start_worker()
        wait_until(lambda: shared_by(client, settings, 2), timeout_seconds=60, what="two to share evenly")
        for _ in range(3):
            os.kill(sleeper.pid, signal.SIGSTOP)
            wait_until(lambda: shared_by(client, settings, 1), what="the other to take over")
            os.kill(sleeper.pid, signal.SIGCONT)
            wait_until(lambda: shared_by(client, settings, 2), what="the sleeper to take its share again")
    finish(client, settings)
    assert rows(client, settings) == undisturbed(sent())


# -- in this process: each moment at will ------------------------------------------------------------


@pytest.fixture
def slow_settings(make_settings: Make) -> Settings:
    """Leases that neither run out nor are looked at again within a test."""
    return make_settings(sessions="always", clock="event", intervals_text="1m:500,5m,day", lease_seconds=300)


def take_over(client: redis.Redis, settings: Settings, heir: Aggregator, shards: list[int]) -> None:
    """As when leases run out while their owner sleeps."""
    client.delete(*(settings.keys.lease(shard) for shard in shards))
    heir.leases.renew_now()
    heir.step(block_ms_max=1)
    assert set(heir.workers) == set(shards)


def test_stale_owner_commits_nothing_and_keeps_its_valid_shards(
    client: redis.Redis,
    slow_settings: Settings,
    make_aggregator: MakeAggregator,
    undisturbed: Callable[[int], Any],
) -> None:
    settings = slow_settings
    zombie, heir = make_aggregator(settings), make_aggregator(settings)
    assert (len(zombie.workers), len(heir.workers)) == (8, 0)
    send(client, settings, 0, 100)
    zombie.step(block_ms_max=1)
    take_over(client, settings, heir, [0, 1, 2])
    send(client, settings, 100, 200)
    zombie.step(block_ms_max=1)  # applies all eight, three of which are no longer its own
    assert zombie.counts["fenced"] == 3
    assert set(zombie.workers) == {3, 4, 5, 6, 7}
    assert epochs(client, settings) == [2, 2, 2, 1, 1, 1, 1, 1]
    send(client, settings, 200, 300)
    while lag_entries(client, settings.keys):
        for each in (zombie, heir):
            each.leases.renew_now()
            each.step(block_ms_max=1)
    assert zombie.counts["fenced"] == 3
    assert len(zombie.workers) + len(heir.workers) == 8
    assert rows(client, settings) == undisturbed(300)


def test_suspended_aggregator_notices_lost_leases_before_committing(
    client: redis.Redis,
    slow_settings: Settings,
    make_aggregator: MakeAggregator,
    undisturbed: Callable[[int], Any],
) -> None:
    settings = slow_settings
    sleeper, heir = make_aggregator(settings), make_aggregator(settings)
    send(client, settings, 0, 100)
    sleeper.step(block_ms_max=1)
    applied = sleeper.workers[0].apply

    def fall_asleep(dirty_max: int) -> Any:
        """Between read and commit, for longer than the leases run."""
        result = applied(dirty_max)
        take_over(client, settings, heir, [0, 1, 2, 3])
        sleeper.leases.may_have_expired = lambda: True  # type: ignore[method-assign]
        sleeper.leases.renew_now()
        return result

    send(client, settings, 100, 200)
    sleeper.workers[0].apply = fall_asleep  # type: ignore[method-assign]
    sleeper.step(block_ms_max=1)
    assert sleeper.counts["fenced"] == 0
    assert set(sleeper.workers) == {4, 5, 6, 7}
    drain(heir, client, settings)
    assert rows(client, settings) == undisturbed(200)


SHARD = 3


def copy_of(client: redis.Redis, settings: Settings) -> dict[bytes, bytes]:
    """All keys of one shard but its stream, as a replica that lags would have them."""
    names = client.scan_iter(match=f"{settings.prefix}:{{{SHARD}}}:*", count=1000)
    return {name: client.dump(name) for name in names if not name.endswith((b":ticks", b":lease"))}  # type: ignore[misc]


def go_back(client: redis.Redis, settings: Settings, older: dict[bytes, bytes]) -> None:
    client.delete(*copy_of(client, settings))
    for name, value in older.items():
        client.restore(name, 0, value)  # type: ignore[arg-type]


def test_rolled_back_shard_is_loaded_and_applied_again(
    client: redis.Redis,
    slow_settings: Settings,
    make_aggregator: MakeAggregator,
    undisturbed: Callable[[int], Any],
) -> None:
    settings = slow_settings
    aggregator = make_aggregator(settings)
    send(client, settings, 0, 100)
    drain(aggregator, client, settings)
    older = copy_of(client, settings)
    send(client, settings, 100, 250)
    drain(aggregator, client, settings)
    others = {shard: id(worker) for shard, worker in aggregator.workers.items() if shard != SHARD}
    go_back(client, settings, older)
    send(client, settings, 250, 300)
    drain(aggregator, client, settings)
    assert (aggregator.counts["stale"], aggregator.counts["fenced"]) == (1, 0)
    drain(aggregator, client, settings)
    assert {s: id(worker) for s, worker in aggregator.workers.items() if s != SHARD} == others
    wait_until(
        lambda: aggregator.step(1) or client.hget(settings.keys.cursor(SHARD), "read") == b"300",
        what="the shard to catch up",
    )
    drain(aggregator, client, settings)
    assert rows(client, settings) == undisturbed(300)


def test_shard_rolled_back_before_its_epoch_is_leased_again(
    client: redis.Redis,
    slow_settings: Settings,
    make_aggregator: MakeAggregator,
    undisturbed: Callable[[int], Any],
) -> None:
    settings = slow_settings
    first = make_aggregator(settings)
    send(client, settings, 0, 100)
    drain(first, client, settings)
    first.close()
    older = copy_of(client, settings)
    second = make_aggregator(settings)
    send(client, settings, 100, 250)
    drain(second, client, settings)
    go_back(client, settings, older)
    send(client, settings, 250, 300)
    wait_until(
        lambda: second.step(1) or client.hget(settings.keys.cursor(SHARD), "read") == b"300",
        what="the shard to catch up",
    )
    drain(second, client, settings)
    assert second.counts["stale"] == 1
    assert rows(client, settings) == undisturbed(300)


def test_functions_lost_by_a_failover_are_loaded_again(
    client: redis.Redis,
    slow_settings: Settings,
    make_aggregator: MakeAggregator,
    undisturbed: Callable[[int], Any],
) -> None:
    settings = slow_settings
    aggregator = make_aggregator(settings)
    stop = threading.Event()
    thread = threading.Thread(target=aggregator.run, args=(stop,))
    thread.start()
    try:
        send(client, settings, 0, 100)
        finish(client, settings)
        client.function_flush("SYNC")
        send(client, settings, 100, 200)
        finish(client, settings)
    finally:
        stop.set()
        thread.join()
    assert owners(client, settings) == {}  # released, so that another need not wait
    assert rows(client, settings) == undisturbed(200)


def test_old_producers_are_evicted_and_live_ones_kept(
    client: redis.Redis, make_settings: Make, make_aggregator: MakeAggregator
) -> None:
    settings = make_settings(sessions="always", clock="event", shards=1, lease_seconds=300)
    cursor = settings.keys.cursor(0)
    old = {f"src:old-{n}": n for n in range(SOURCES_MAX + 40)}
    client.hset(cursor, mapping={"src:alive": 1, **old})
    aggregator = make_aggregator(settings)
    send(client, settings, 5, 6, "alive")
    drain(aggregator, client, settings)
    assert client.hlen(cursor) > SOURCES_MAX + 40  # not before each producer was recent once
    pipe = Pipe(client)
    for n in range(SETTLED_ENTRIES):
        pipe.add("XADD", settings.keys.ticks(0), "*", "src", "new", "seq", n, "at", START_MS, "ticks", "[]")
    pipe.execute()
    drain(aggregator, client, settings)
    send(client, settings, 6, 7, "alive")
    drain(aggregator, client, settings)
    fields: dict[bytes, bytes] = client.hgetall(cursor)  # type: ignore[assignment]
    sources = {name for name in fields if name.startswith(b"src:")}
    assert len(sources) == SOURCES_MAX
    assert fields[b"src:alive"] == b"7" and b"src:new" in sources
    assert len(aggregator.workers[0].cursor.sources) == SOURCES_MAX
