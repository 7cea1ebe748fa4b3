"""Health checks over constructed cluster states, and the state of a real store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import redis

from pkbrokers_redis.errors import MetaMismatch, WrongKeyType
from pkbrokers_redis.keys import AGGREGATOR_GROUP
from pkbrokers_redis.runtime import health, market_checks
from pkbrokers_redis.runtime.cluster_state import (
    ClusterState,
    Finding,
    Heartbeat,
    Server,
    Shard,
    Worker,
    _server,
    read_cluster_state,
)
from pkbrokers_redis.runtime.health import Check, check_jobs, check_master, health_of, run_checks
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store import leases
from pkbrokers_redis.store.functions import load_functions
from pkbrokers_redis.store.instruments import Manifest

SERVER = Server("", "redis 7.0.15", 10, 0, "noeviction", aof=True, saves=True)


def worker(role: str, name: str = "", age_ms: float | None = 500.0, **fields: object) -> Worker:
    skew_ms = fields.pop("skew_ms", 3.0)
    texts = {field: str(value) for field, value in fields.items()}
    return Worker(name or f"{role}-1", role, age_ms, skew_ms, texts)  # type: ignore[arg-type]


def shard(number: int, owner: str | None = "aggregate-1", **changes: Any) -> Shard:
    return replace(Shard(number, owner, 100, "5-0", 0, 0.0), **changes)


def cluster(**changes: Any) -> ClusterState:
    """A healthy pipeline of two shards and one feed, but for the changes."""
    whole = ClusterState(
        "redis://here",
        1_000_000.0,
        2.0,
        [SERVER],
        [
            worker("aggregate", shards="0,1"),
            worker("ingest", feeds="0", feeds_total=1, connected=1, list="a", instruments_total=9),
        ],
        [shard(0), shard(1)],
        ["ingest-1"],
    )
    return replace(whole, **changes)


EVERY_CHECK = (
    *health.STATUS_CHECKS,
    *health.SETUP_CHECKS,
    health.progress_since(cluster()),
    health.streams_below(1_000),
)


def test_a_healthy_pipeline_passes_every_check() -> None:
    findings = run_checks(cluster(), EVERY_CHECK)
    assert {finding.level for finding in findings} == {"ok"}
    assert len({finding.check for finding in findings}) > len(EVERY_CHECK) - len(market_checks.MARKET_CHECKS)
    assert health_of(findings) == "healthy"


AGGREGATE, INGEST = cluster().workers

PROBLEMS: list[tuple[str, Check, dict[str, Any], str, str]] = [
    ("no aggregator", health.workers_beat, {"workers": [INGEST]}, "fail", "no worker makes candles"),
    ("no ingest", health.workers_beat, {"workers": [AGGREGATE]}, "fail", "no worker reads Kite"),
    (
        "a dead aggregator is none",
        health.workers_beat,
        {"workers": [replace(AGGREGATE, age_ms=None), INGEST]},
        "fail",
        "no worker makes candles",
    ),
    (
        "a late beat",
        health.workers_beat,
        {"workers": [replace(AGGREGATE, age_ms=7_000.0), INGEST]},
        "warn",
        "aggregate-1 did not beat",
    ),
    ("a free shard", health.shards_owned, {"shards": [shard(0), shard(1, None)]}, "warn", "shard 1"),
    ("a free feed", health.feeds_read, {"feeds": ["ingest-1", None]}, "warn", "feed 1"),
    (
        "names that the master lacks",
        market_checks.names_known,
        {"workers": [AGGREGATE, worker("ingest", unknown_instruments="NSE:OLDNAME,NSE:B")]},
        "warn",
        "not in the instrument master, so not streamed: NSE:B, NSE:OLDNAME",
    ),
    (
        "a mute feed",
        health.feeds_read,
        {"workers": [AGGREGATE, worker("ingest", feed_state="0:ok,1:mute,2:mute")]},
        "warn",
        "feed 1, 2 gets no ticks in market hours",
    ),
    (
        "a dead session",
        health.feeds_read,
        {"workers": [AGGREGATE, worker("ingest", feed_state="0:expired")]},
        "warn",
        "403",
    ),
    (
        "a feed offline",
        health.feeds_read,
        {"workers": [AGGREGATE, worker("ingest", feeds="0,1", connected=1)], "feeds": ["ingest-1"] * 2},
        "warn",
        "ingest-1 is not connected",
    ),
    (
        "lag",
        health.lag_small,
        {"shards": [shard(0, lag_entries=700, lag_ms=8_000.0), shard(1)]},
        "warn",
        "shard 0 is behind: 700 entries wait, the oldest for 8 s",
    ),
    (
        "drops",
        health.nothing_lost,
        {"workers": [AGGREGATE, worker("ingest", dropped_at_cap=12)]},
        "warn",
        "12 entries were cut",
    ),
    (
        "lost frames",
        health.nothing_lost,
        {"workers": [AGGREGATE, worker("ingest", frames_lost=3)]},
        "warn",
        "3 frames were lost",
    ),
    ("disk", health.redis_takes_writes, {"servers": [replace(SERVER, saves=False)]}, "fail", "cannot save"),
    (
        "memory",
        health.redis_takes_writes,
        {"servers": [SERVER, replace(SERVER, name="b:1", used_bytes=95, limit_bytes=100)]},
        "warn",
        "Redis b:1 has used 95% of its maxmemory",
    ),
    (
        "a replica",
        health.redis_takes_writes,
        {"servers": [replace(SERVER, is_replica=True)]},
        "fail",
        "Redis is a replica and refuses writes",
    ),
    (
        "evicted keys",
        health.redis_takes_writes,
        {"servers": [replace(SERVER, evicted=1_200)]},
        "fail",
        "Redis has deleted 1,200 keys",
    ),
    (
        "a key of another type",
        health.keys_typed,
        {"wrong_keys": [WrongKeyType("pkb:workers", "string", "zset")]},
        "fail",
        "pkb:workers holds a string, not a zset",
    ),
    ("no AOF", health.persistent, {"servers": [replace(SERVER, aof=False)]}, "warn", "appendonly is off"),
    (
        "evicts leases",
        health.persistent,
        {"servers": [replace(SERVER, eviction="volatile-lru")]},
        "warn",
        "maxmemory-policy is volatile-lru",
    ),
    (
        "evicts all",
        health.persistent,
        {"servers": [replace(SERVER, eviction="allkeys-lru")]},
        "fail",
        "maxmemory-policy is allkeys-lru",
    ),
    (
        "forks",
        health.forks_rare,
        {"servers": [SERVER, replace(SERVER, forks=10, up_seconds=60)]},
        "warn",
        "forks every 6 s",
    ),
    (
        "this host's clock",
        health.clocks_agree,
        {"host_skew_ms": -4_000.0},
        "warn",
        "this host is 4.0 s behind",
    ),
    (
        "a worker's clock",
        health.clocks_agree,
        {"workers": [worker("ingest", skew_ms=90_000.0)]},
        "warn",
        "ingest-1 is 90.0 s ahead of Redis's",
    ),
    (
        "two lists",
        health.one_instrument_list,
        {"workers": [INGEST, worker("ingest", "ingest-2", list="b"), worker("ingest", "ingest-3", list="a")]},
        "fail",
        "ingest-2 has another instrument list",
    ),
    (
        "long streams",
        health.streams_below(150),
        {"shards": [shard(0), shard(1, entries=10, stream_bytes=4_000_000)]},
        "warn",
        "shard 0 nears its hard cap: 4.0 MB, the longest has 100 of 150 entries",
    ),
    (
        "stuck",
        health.progress_since(cluster(shards=[shard(0, lag_entries=1), shard(1)], at_ms=998_500.0)),
        {"shards": [shard(0, lag_entries=9), shard(1, lag_entries=9)]},
        "fail",
        "shard 0 did not move for 1.5 s",
    ),
]


@pytest.mark.parametrize(
    ("rule", "changes", "level", "what"), [case[1:] for case in PROBLEMS], ids=[case[0] for case in PROBLEMS]
)
def test_each_problem_is_found_and_has_a_hint(
    rule: Check, changes: dict[str, Any], level: str, what: str
) -> None:
    trouble = [finding for finding in run_checks(cluster(**changes), [rule]) if finding.level != "ok"]
    assert [finding.level for finding in trouble] == [level]
    assert what in trouble[0].message
    assert trouble[0].hint


def test_a_shard_that_moved_or_has_nothing_waiting_is_not_stuck() -> None:
    before = cluster(shards=[shard(0, lag_entries=1), shard(1)])
    now = cluster(shards=[shard(0, lag_entries=1, position="6-0"), shard(1)])
    assert {finding.level for finding in run_checks(now, [health.progress_since(before)])} == {"ok"}


def test_without_any_aggregator_shards_are_not_reported_one_by_one() -> None:
    down = cluster(workers=[], shards=[shard(0, None), shard(1, None)], feeds=[None])
    assert [finding.check for finding in run_checks(down, health.STATUS_CHECKS) if finding.level != "ok"] == [
        "ingest",
        "aggregate",
    ]


def test_many_names_are_cut_short() -> None:
    many = cluster(shards=[shard(n, None) for n in range(20)])
    [finding] = run_checks(many, [health.shards_owned])
    assert finding.message.endswith("shard 0, 1, 2, 3, 4 and 15 more")


def test_the_meta_finding_names_what_disagrees() -> None:
    mismatch = MetaMismatch("shards", "8", "4", "set PKB_SHARDS")
    assert health.check_settings(mismatch, True).level == "fail"
    assert health.check_settings(None, False).level == "fail"
    assert health.check_settings(None, True).level == "ok"


def test_missing_functions_are_named() -> None:
    assert health.check_functions(["pkb_commit"]).message == "missing: pkb_commit"
    assert health.check_functions([]).level == "ok"


@pytest.mark.parametrize(
    ("workers", "level"),
    [
        ([worker("ingest", host="box")], "ok"),
        ([worker("ingest", host="other")], "fail"),
        ([worker("ingest", host="box", age_ms=None)], "fail"),
        ([worker("ingest", host="box", age_ms=9_000.0)], "warn"),
    ],
)
def test_check_host_looks_only_at_this_hosts_workers(workers: list[Worker], level: str) -> None:
    assert health.check_host(workers, "box").level == level


def test_the_worst_finding_is_the_health() -> None:
    ok, warn, fail = (Finding("x", level, "y") for level in ("ok", "warn", "fail"))  # type: ignore[arg-type]
    assert [health_of(some) for some in ([], [ok], [ok, warn], [warn, fail])] == [
        "healthy",
        "healthy",
        "degraded",
        "down",
    ]


# --- gathered from a real store


@pytest.fixture
def beating(client: redis.Redis, settings: Settings) -> Callable[..., None]:
    """`beating("ingest", "ingest-1", skew_ms=0, feeds="0")`: a member with a heartbeat, no process."""
    load_functions(client)

    def beat(role: str, name: str, skew_ms: int = 0, **figures: object) -> None:
        leases.announce(client, settings.keys, role, name)
        seconds, micros = client.time()
        now_ms = seconds * 1000 + micros // 1000 + skew_ms
        Heartbeat(settings.keys, role, name, now_ms).beat(client, now_ms, 7, figures)

    return beat


def test_an_empty_redis_is_down_and_raises_nothing(client: redis.Redis, settings: Settings) -> None:
    found = read_cluster_state(client, settings.keys, "here")
    assert health_of(run_checks(found, health.STATUS_CHECKS)) == "down"
    assert [each.entries for each in found.shards] == [0] * settings.shards


def test_keys_of_another_type_are_named_and_the_rest_is_read(
    client: redis.Redis, settings: Settings, beating: Callable[..., None]
) -> None:
    keys = settings.keys
    for key in (keys.symbols(), keys.ticks(1), keys.lease(2)):
        client.delete(key)
        client.rpush(key, "x")
    beating("ingest", "ingest-a")
    found = read_cluster_state(client, keys, "here")
    assert sorted(each.key for each in found.wrong_keys) == sorted(
        (keys.symbols(), keys.ticks(1), keys.lease(2))
    )
    assert [each.id for each in found.workers] == ["ingest-a"]
    client.delete(keys.workers())
    client.set(keys.workers(), "x")
    found = read_cluster_state(client, keys, "here")
    assert found.workers == []
    said = [each.message for each in run_checks(found, health.STATUS_CHECKS) if each.check == "keys"]
    assert f"{keys.workers()} holds a string, not a zset" in said


def test_a_replica_and_evictions_are_read_from_info(client: redis.Redis, settings: Settings) -> None:
    (server,) = read_cluster_state(client, settings.keys, "here").servers
    assert (server.is_replica, server.evicted) == (False, 0)
    found = _server("", {"role": "slave", "evicted_keys": "7"})
    assert (found.is_replica, found.evicted) == (True, 7)


def test_workers_are_read_with_age_and_skew(
    client: redis.Redis, settings: Settings, beating: Callable[..., None]
) -> None:
    beating("ingest", "ingest-a", feeds="0,2", feeds_total=3, connected=2)
    beating("aggregate", "aggregate-b", skew_ms=60_000)
    leases.announce(client, settings.keys, "aggregate", "aggregate-gone")
    found = read_cluster_state(client, settings.keys, "here")
    b, gone, a = found.workers
    assert (a.id, a.role, a.numbers("feeds"), a.number("ticks_total")) == ("ingest-a", "ingest", [0, 2], 7)
    assert a.age_ms is not None and 0 <= a.age_ms < 9_000
    assert a.skew_ms is not None and abs(a.skew_ms) < 5_000
    assert b.skew_ms is not None and abs(b.skew_ms - 60_000) < 5_000
    assert (gone.id, gone.age_ms) == ("aggregate-gone", None)
    assert found.feeds == [None, None, None]
    assert [each.id for each in found.alive("aggregate")] == ["aggregate-b"]


def test_lag_is_counted_and_timed_from_the_oldest_entry_that_waits(
    client: redis.Redis, settings: Settings
) -> None:
    keys = settings.keys
    now = client.time()[0] * 1000
    for n, ms in enumerate((now - 60_000, now - 30_000, now - 10_000)):
        client.xadd(keys.ticks(3), {"seq": n}, id=f"{ms}-0")
    client.xgroup_create(keys.ticks(3), AGGREGATOR_GROUP, id=f"{now - 60_000}-0", entries_read=1)
    client.set(keys.lease(3), "aggregate-b")
    found = read_cluster_state(client, keys, "here", stream_bytes=True).shards[3]
    assert (found.owner, found.entries, found.lag_entries) == ("aggregate-b", 3, 2)
    assert 30_000 <= found.lag_ms < 60_000
    assert found.stream_bytes
    client.xgroup_setid(keys.ticks(3), AGGREGATOR_GROUP, f"{now - 10_000}-0", entries_read=3)
    found = read_cluster_state(client, keys, "here").shards[3]
    assert (found.lag_entries, found.lag_ms) == (0, 0.0)


def test_entries_of_a_stream_without_a_group_all_wait(client: redis.Redis, settings: Settings) -> None:
    client.xadd(settings.keys.ticks(0), {"seq": 1})
    client.xadd(settings.keys.ticks(0), {"seq": 2})
    assert read_cluster_state(client, settings.keys, "here").shards[0].lag_entries == 2


def test_keys_of_another_type_do_not_break_the_state(client: redis.Redis, settings: Settings) -> None:
    keys = settings.keys
    client.set(keys.ticks(0), "mine")
    client.lpush(keys.lease(1), "mine")
    client.zadd(keys.workers(), {"nonsense": 1, "ingest x": 2, b"\xff \xfe": 3})
    client.set(keys.worker("x"), "mine")
    found = read_cluster_state(client, keys, "here", stream_bytes=True)
    assert found.shards[0].entries == 0
    assert found.shards[1].owner is None
    assert all(each.age_ms is None for each in found.workers)


def test_the_heartbeat_reports_the_lag_of_each_shard(client: redis.Redis, settings: Settings) -> None:
    now = client.time()[0] * 1000
    client.xadd(settings.keys.ticks(1), {"seq": 1}, id=f"{now - 5_000}-0")
    Heartbeat(settings.keys, "aggregate", "a", now).beat(client, now, 0, {}, shards=[0, 1])
    fields = client.hgetall(settings.keys.worker("a"))
    assert fields[b"lags"] == b'{"0":[0,0],"1":[1,5000]}'
    assert (fields[b"lag_entries"], fields[b"lag_ms"]) == (b"1", b"5000")


def test_servers_are_read_from_info(client: redis.Redis, settings: Settings) -> None:
    [server] = read_cluster_state(client, settings.keys, "here").servers
    assert server.version.split()[0] in ("redis", "valkey") and server.used_bytes > 0
    assert (server.aof, server.eviction, server.saves) == (True, "noeviction", True)


def test_a_read_only_user_gets_the_state_too(client: redis.Redis, settings: Settings) -> None:
    client.acl_setuser("looker", enabled=True, nopass=True, keys=["*"], categories=["+@read", "+@connection"])
    try:
        with redis.Redis.from_url(settings.redis_url.get_secret_value()) as looker:  # type: ignore[union-attr]
            looker.execute_command("AUTH", "looker", "x")
            found = read_cluster_state(looker, settings.keys, "here")
    finally:
        client.acl_deluser("looker")
    assert found.servers == [] and len(found.shards) == settings.shards


@pytest.mark.parametrize(("failed", "level"), [(0, "ok"), (3, "warn")])
def test_failed_jobs_are_a_warning(failed: int, level: str) -> None:
    assert check_jobs(failed).level == level


@pytest.mark.parametrize(("days", "level"), [(1, "ok"), (3, "ok"), (5, "warn")])
def test_a_master_of_last_week_is_a_warning(days: int, level: str) -> None:
    manifest = Manifest("2026-11-16T08:30:00+05:30", "", 119_000, 0, "", "")
    synced_s = 1_794_798_000.0  # that moment
    assert check_master(manifest, synced_s + days * 86_400).level == level


def test_a_master_without_a_readable_time_is_a_warning_and_a_missing_one_is_not() -> None:
    assert check_master(Manifest("soon", "", 1, 0, "", ""), 0.0).level == "warn"
    assert check_master(None, 0.0).level == "ok"
