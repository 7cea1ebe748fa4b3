"""`pkb status`, `pkb doctor`, `pkb top`: what they print and how they end, over a store made by hand."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable

import pytest
import redis

from pkbrokers_redis.keys import AGGREGATOR_GROUP
from pkbrokers_redis.runtime import health as status_module
from pkbrokers_redis.runtime.cluster_state import Heartbeat
from pkbrokers_redis.runtime.health import longest_interval
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store import leases
from pkbrokers_redis.store.functions import load_functions
from pkbrokers_redis.store.meta import ensure_meta
from tests.cli.conftest import Pkb


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_module, "SECOND_LOOK_SECONDS", 0.01)
    monkeypatch.setattr("pkbrokers_redis.cli.pipeline.LOOK_SECONDS", 0.01)


@pytest.fixture
def pipeline(client: redis.Redis, store_env: Settings) -> Settings:
    """A store as a healthy pipeline of one ingest worker and one aggregator leaves it."""
    keys = store_env.keys
    load_functions(client)
    ensure_meta(client, store_env, "2026-01-01T00:00:00+00:00")
    beat(client, store_env, "ingest", feeds="0", feeds_total=1, connected=1, instruments=2, list="x")
    beat(client, store_env, "aggregate", shards=",".join(map(str, range(store_env.shards))))
    client.set(keys.feed(0), "ingest-1")
    for shard in range(store_env.shards):
        client.xgroup_create(keys.ticks(shard), AGGREGATOR_GROUP, id="0-0", mkstream=True)
        client.set(keys.lease(shard), "aggregate-1")
    return store_env


def beat(client: redis.Redis, settings: Settings, role: str, **figures: object) -> None:
    now_ms = time.time() * 1000
    leases.announce(client, settings.keys, role, f"{role}-1")
    Heartbeat(settings.keys, role, f"{role}-1", now_ms).beat(client, now_ms, 0, figures)


def trouble(out: str) -> dict[str, str]:
    return {each["check"]: each["level"] for each in json.loads(out)["findings"] if each["level"] != "ok"}


def test_a_healthy_pipeline_exits_with_0(pkb: Pkb, pipeline: Settings) -> None:
    ended = pkb("status")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("healthy")
    assert "ingest-1" in ended.out and "1 of 1 connected" in ended.out


def test_json_has_the_whole_picture(pkb: Pkb, pipeline: Settings) -> None:
    found = json.loads(pkb("status", "--json").out)
    assert found["health"] == "healthy"
    assert [each["shard"] for each in found["shards"]] == list(range(8))
    by_role = {each["role"]: each for each in found["workers"]}
    assert by_role["ingest"]["feeds"] == [0]
    assert by_role["aggregate"]["shards"] == list(range(8))
    assert found["feeds"] == [{"feed": 0, "owner": "ingest-1"}]
    assert found["redis"]["servers"][0]["appendonly"] is True
    assert found["counters"] == {"dropped_at_cap": 0, "frames_lost": 0, "fenced": 0}


def test_a_shard_without_an_owner_is_degraded_and_exits_with_1(
    pkb: Pkb, pipeline: Settings, client: redis.Redis
) -> None:
    client.delete(pipeline.keys.lease(5))
    ended = pkb("status")
    assert ended.code == 1
    assert ended.out.startswith("degraded")
    assert "no aggregator has shard 5" in ended.out
    assert trouble(pkb("status", "--json").out) == {"shards": "warn"}


def test_a_handover_that_is_over_at_the_second_look_is_no_trouble(
    pkb: Pkb, pipeline: Settings, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.delete(pipeline.keys.lease(5))
    monkeypatch.setattr(
        status_module.time, "sleep", lambda _: client.set(pipeline.keys.lease(5), "aggregate-1")
    )
    assert pkb("status").code == 0


def test_no_workers_is_down_and_exits_with_2(pkb: Pkb, store_env: Settings) -> None:
    ended = pkb("status")
    assert ended.code == 2
    assert ended.out.startswith("down")
    assert "start `pkb aggregate`" in ended.out


@pytest.mark.parametrize("command", ["status", "doctor"])
def test_an_unavailable_redis_is_down_also_as_json(
    pkb: Pkb, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PKB_REDIS_URL", "redis://:geheim@127.0.0.1:1/0")
    for arguments in ([command], [command, "--json"]):
        ended = pkb(*arguments)
        assert ended.code == 2
        assert "geheim" not in ended.out + ended.err and "Traceback" not in ended.err
    assert trouble(ended.out) == {"redis": "fail"}


def test_a_key_of_another_type_is_named_by_every_command(
    pkb: Pkb, client: redis.Redis, pipeline: Settings
) -> None:
    client.delete(pipeline.keys.symbols(), pipeline.keys.workers())
    client.rpush(pipeline.keys.symbols(), "x")
    client.set(pipeline.keys.workers(), "x")
    for command in ("status", "doctor"):
        ended = pkb(command, "--json")
        said = [each["message"] for each in json.loads(ended.out)["findings"] if each["check"] == "keys"]
        assert said == ["pkb:symbols holds a list, not a hash", "pkb:workers holds a string, not a zset"]
    ended = pkb("instruments", "search", "INFY")
    assert (ended.code, "pkb:symbols holds a list, not a hash" in ended.err) == (2, True)


def test_status_here_checks_only_this_hosts_workers(
    pkb: Pkb, pipeline: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pkb("status", "--here").code == 0
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    ended = pkb("status", "--here")
    assert ended.code == 2 and "no worker of elsewhere beats" in ended.out


def test_status_without_a_store_is_one_line(pkb: Pkb) -> None:
    ended = pkb("status")
    assert ended.code == 2 and "there is no store in" in ended.err


# --- doctor


def test_doctor_runs_every_check(pkb: Pkb, pipeline: Settings) -> None:
    ended = pkb("doctor")
    assert ended.code == 0, ended.out
    assert [line.split()[0] for line in ended.out.splitlines()] == ["ok"] * len(ended.out.splitlines())
    checks = {line.split()[1] for line in ended.out.splitlines()}
    assert checks >= {
        "redis", "meta", "functions", "ingest", "aggregate", "shards", "feeds", "lag", "losses", "memory",
        "stuck", "streams", "persistence", "eviction", "clocks", "instruments", "volumes", "quotes",
    }  # fmt: skip


def stale(client: redis.Redis, settings: Settings) -> None:
    client.xadd(settings.keys.ticks(0), {"seq": 1}, id=f"{int(time.time() * 1000) - 9_000}-0")


def forget_functions(client: redis.Redis, settings: Settings) -> None:
    client.function_flush("SYNC")


def no_aof(client: redis.Redis, settings: Settings) -> None:
    client.config_set("appendonly", "no")


def evict(client: redis.Redis, settings: Settings) -> None:
    client.config_set("maxmemory-policy", "allkeys-lru")


def wrong_volume(client: redis.Redis, settings: Settings) -> None:
    # baseline 100, last cumulative volume 150, and a candle that says 20 of it
    client.hset(settings.keys.state(3), "779", "[0,0,0,0,150,100]")
    client.rpush(
        settings.keys.candles(779, longest_interval(settings.intervals).name), "[60,1,1,1,1,20,null,1]"
    )


def ask_for_an_unseen_instrument(client: redis.Redis, settings: Settings) -> None:
    client.delete(settings.keys.quote(256265))


@pytest.mark.parametrize(
    ("spoil", "env", "level", "check", "says"),
    [
        (stale, {}, "warn", "lag", "the oldest for 9 s"),
        (stale, {}, "fail", "stuck", "shard 0 did not move"),
        (forget_functions, {}, "warn", "functions", "missing: pkb_"),
        (no_aof, {}, "warn", "persistence", "appendonly is off"),
        (evict, {}, "fail", "eviction", "allkeys-lru"),
        (wrong_volume, {}, "fail", "volumes", "add up for 0 of 1 instruments: look at 779"),
        (lambda *_: None, {"PKB_SHARDS": "4"}, "fail", "meta", "made with shards=8"),
        (
            ask_for_an_unseen_instrument,
            {"PKB_INSTRUMENTS": "256265"},
            "warn",
            "quotes",
            "1 of 1 instruments have no quote",
        ),
        (lambda *_: None, {"PKB_SHARD": "9"}, "warn", "settings", "did you mean PKB_SHARDS?"),
        (lambda *_: None, {"PKB_INSTRUMENTS": "NOSUCHNAME"}, "warn", "quotes", "unknown symbol"),
    ],
)
def test_doctor_finds_the_problem_and_prints_its_hint(
    pkb: Pkb,
    pipeline: Settings,
    client: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[redis.Redis, Settings], None],
    env: dict[str, str],
    level: str,
    check: str,
    says: str,
) -> None:
    before = client.config_get("appendonly") | client.config_get("maxmemory-policy")
    try:
        spoil(client, pipeline)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        ended = pkb("doctor")
    finally:
        for name, value in before.items():
            client.config_set(name, value)
    lines = [line for line in ended.out.splitlines() if line.split()[:2] == [level, check]]
    assert len(lines) == 1, ended.out
    assert says in lines[0] and lines[0].count(": ") >= 1
    assert ended.code == (2 if level == "fail" or check == "lag" else 1)


def test_a_list_that_does_not_reach_back_is_not_reported_as_wrong(
    pkb: Pkb, pipeline: Settings, client: redis.Redis
) -> None:
    wrong_volume(client, pipeline)
    interval = longest_interval(pipeline.intervals)
    for n in range(2, interval.keep + 1):
        client.rpush(pipeline.keys.candles(779, interval.name), f"[{60 * n},1,1,1,1,1,null,1]")
    ended = pkb("doctor")
    assert ended.code == 0
    assert "1 lists do not reach back" in ended.out


# --- top


def test_top_prints_a_line_a_second_without_a_terminal(pkb: Pkb, pipeline: Settings) -> None:
    ended = pkb("top", "--seconds", "0")
    assert ended.code == 0
    assert ended.out.startswith("healthy  in ")
    assert ended.out.count("\n") == 1


def test_top_shows_problems(pkb: Pkb, store_env: Settings) -> None:
    assert "no worker makes candles" in pkb("top", "--seconds", "0").out


@pytest.mark.parametrize("command", ["status", "doctor"])
def test_where_there_is_no_store_programs_still_get_json(pkb: Pkb, command: str) -> None:
    ended = pkb(command, "--json")
    assert (ended.code, ended.err) == (2, "")
    assert json.loads(ended.out)["health"] == "down" and trouble(ended.out) == {"redis": "fail"}
