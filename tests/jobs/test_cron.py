"""Cron enqueues each run once, however many processes plan it, and only the latest missed run."""

from __future__ import annotations

import json
import signal
import time
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import redis
from rq import Queue

from pkbrokers_redis.candles.calendar import IST, load_sessions
from pkbrokers_redis.jobs.cron import Cron, Plan, schedules_of
from pkbrokers_redis.jobs.daily import AlreadyRunning, exclusive
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.queue import open_queue
from pkbrokers_redis.store.symbols import save_instruments
from tests.cli.conftest import Pkb, pkb
from tests.support import running_python, settings_env, wait_until

pytestmark = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
__all__ = ["pkb"]  # a fixture

MCX_FUTURE = {"instrument_token": 60_000 << 8 | 7, "tradingsymbol": "GOLD26OCTFUT", "exchange": "MCX"}


def ms(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=IST).timestamp() * 1000


class Time:
    def __init__(self, text: str) -> None:
        self.now_ms = ms(text)

    def __call__(self) -> float:
        return self.now_ms

    def to(self, text: str) -> None:
        self.now_ms = ms(text)


@pytest.fixture
def queue(settings: Settings, client: redis.Redis) -> Queue:
    return open_queue(settings, client)


@pytest.fixture
def plan() -> Plan:
    sessions = load_sessions("market")
    return Plan(sessions, [sessions.schedule_of(1)])


def names(queue: Queue) -> list[str]:
    return [str(job.description) for job in queue.get_jobs()]


def test_two_crons_enqueue_each_run_of_a_day_once(queue: Queue, plan: Plan) -> None:
    clock = Time("2026-08-05T08:00:00")
    crons = [Cron(plan, queue, clock), Cron(plan, queue, clock)]
    while clock.now_ms < ms("2026-08-05T16:00:00"):
        for cron in crons:
            cron.step()
        clock.now_ms += 20_000
    planned = [run.job_id for run in plan.day_of(plan.sessions.date_of(int(clock())))]
    assert sorted(queue.get_job_ids()) == sorted(planned)
    assert crons[0].enqueued + crons[1].enqueued == len(planned) == 375 + 12
    assert queue.get_job_ids() == planned  # in time order


@pytest.mark.parametrize("day", ["2026-01-26", "2026-08-09"])
def test_no_run_on_a_holiday_or_sunday(queue: Queue, plan: Plan, day: str) -> None:
    clock = Time(f"{day}T07:00:00")
    cron = Cron(plan, queue, clock)
    while clock.now_ms < ms(f"{day}T20:00:00"):
        assert cron.step() == []
        clock.now_ms += 300_000


def test_cron_after_downtime_enqueues_only_the_latest_useful_runs(queue: Queue, plan: Plan) -> None:
    clock = Time("2026-08-05T09:20:10")
    Cron(plan, queue, clock).step()
    assert names(queue) == ["login", "instruments", "calendar", "capacity", "feed", "day_snapshot"]
    clock.to("2026-08-05T11:00:30")
    assert len(Cron(plan, queue, clock).step()) == 1  # one of a hundred minutes
    clock.to("2026-08-05T20:00:00")
    evening = Cron(plan, queue, clock)
    assert len(evening.step()) == 7 and evening.step() == []
    clock.to("2026-08-06T05:00:00")
    assert Cron(plan, queue, clock).step() == []


def test_restarted_cron_repeats_no_run(queue: Queue, plan: Plan) -> None:
    clock = Time("2026-08-05T08:31:00")
    assert len(Cron(plan, queue, clock).step()) == 1
    assert Cron(plan, queue, clock).step() == []
    [job] = queue.get_jobs()
    queue.remove(job)  # a worker took it
    assert Cron(plan, queue, clock).step() == []


def test_streamed_instruments_determine_the_hours(
    settings: Settings, client: redis.Redis, make_settings: Any
) -> None:
    sessions = load_sessions("market")
    nse = {sessions.schedule_of(1)}
    assert schedules_of(client, settings, sessions) == nse
    assert schedules_of(client, make_settings(instruments="NSE:UNKNOWN"), sessions) == nse
    save_instruments(client, settings.keys, [MCX_FUTURE])
    streamed = make_settings(instruments="MCX:GOLD26OCTFUT")
    assert schedules_of(client, streamed, sessions) == {sessions.schedule_of(7)}


def test_cron_list_prints_the_next_times(pkb: Pkb, settings: Settings, monkeypatch: Any) -> None:
    assert settings.redis_url is not None
    monkeypatch.setenv("PKB_REDIS_URL", settings.redis_url.get_secret_value())
    monkeypatch.setenv("PKB_TIME_SHIFT", f"{ms('2026-11-07T12:00:00') / 1000},{time.time()},0.01")
    rows = {row["row"]: row for row in json.loads(pkb("cron", "--list", "--json").out)}
    assert rows["login"]["next"].startswith("2026-11-08T")  # muhurat, a Sunday
    assert rows["ticks"]["next"].endswith("+05:30")
    assert "every minute + 5 s" in pkb("cron", "--list").out
    monkeypatch.setenv("PKB_REDIS_URL", "redis://127.0.0.1:1")
    assert pkb("cron", "--list").code == 0  # the table needs no store


def test_cron_list_uses_the_hours_of_the_embedded_servers_instruments(
    pkb: Pkb, make_settings: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    data = tmp_path / "data"
    monkeypatch.setenv("PKB_DATA_DIR", str(data))
    monkeypatch.setenv("PKB_INSTRUMENTS", "MCX:GOLD26OCTFUT")
    monkeypatch.setenv("PKB_TIME_SHIFT", f"{ms('2026-08-05T12:00:00') / 1000},{time.time()},0.01")

    def closes() -> str:
        rows = json.loads(pkb("cron", "--list", "--json").out)
        return next(str(row["next"]) for row in rows if row["row"] == "close")

    assert closes() == "2026-08-05T15:31:00+05:30"
    assert not (data / "redis").exists()  # a list starts no server
    settings = load_settings()
    with connect(settings) as store:
        save_instruments(store, settings.keys, [MCX_FUTURE])
        assert closes() == "2026-08-05T23:31:00+05:30"


def test_cron_role_enqueues_due_runs_sends_heartbeats_and_stops(
    settings: Settings, client: redis.Redis, queue: Queue
) -> None:
    env = {
        **settings_env(settings),
        "PKB_TIME_SHIFT": f"{ms('2026-08-05T08:50:30') / 1000},{time.time()},0.01",
        "TZ": "America/New_York",
    }
    with ExitStack() as stack:
        crons = [stack.enter_context(running_python("-m", "workers.cron", env=env)) for _ in range(2)]

        def beats() -> list[Any]:
            members = client.scan_iter(settings.keys.worker("cron-*"))
            return [key for key in members if client.hget(key, "enqueued") is not None]

        wait_until(lambda: len(beats()) == 2, timeout_seconds=60, what="two heartbeats")
        wait_until(lambda: len(names(queue)) >= 4, timeout_seconds=30, what="the morning's jobs")
        for cron in crons:
            cron.send_signal(signal.SIGTERM)
        stated = [cron.communicate(timeout=30)[0] for cron in crons]
        assert [cron.returncode for cron in crons] == [0, 0], stated
    assert names(queue) == ["login", "instruments", "calendar", "capacity"]
    assert beats() == []


# --- the lock


def test_lock_excludes_the_same_kind_of_job_only(settings: Settings, client: redis.Redis) -> None:
    with exclusive(client, settings.keys, "sync") as owner:
        with pytest.raises(AlreadyRunning) as busy, exclusive(client, settings.keys, "sync"):
            pass
        assert busy.value.holder == owner
        with exclusive(client, settings.keys, "trim"):
            pass
    with exclusive(client, settings.keys, "sync"):
        pass
    assert client.keys(settings.keys.job_lock("*")) == []


def test_lock_is_renewed_by_its_holder_and_expires_without_it(
    settings: Settings, client: redis.Redis
) -> None:
    key = settings.keys.job_lock("sync")
    with exclusive(client, settings.keys, "sync", ttl_seconds=0.3):
        began = time.monotonic()
        wait_until(lambda: time.monotonic() - began > 0.7)  # more than two lives of an unrenewed one
        assert client.pttl(key) > 0
    client.set(key, "a dead host", px=50)
    wait_until(lambda: not client.exists(key))
    with exclusive(client, settings.keys, "sync"):
        pass
