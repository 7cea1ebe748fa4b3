"""The trading day's jobs with real workers: a whole day in a rehearsal. test_killed.py kills them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import redis
from pydantic import SecretStr
from rq import Queue
from rq.job import Job

from pkbrokers_redis.candles.calendar import IST, load_sessions
from pkbrokers_redis.files.atomic import FilesUnwritable
from pkbrokers_redis.files.manifest import Entry, problems, read_manifest, update_manifest
from pkbrokers_redis.jobs import daily, view
from pkbrokers_redis.jobs.context import JobContext
from pkbrokers_redis.jobs.cron import Plan, schedules_of
from pkbrokers_redis.jobs.restore import restore, verify
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.simulator.kite import SimulatedKite
from pkbrokers_redis.store.auth import Session, load_session, save_session
from pkbrokers_redis.store.meta import ensure_meta
from pkbrokers_redis.store.queue import open_queue
from pkbrokers_redis.store.symbols import save_instruments
from tests.cli.conftest import Pkb, pkb
from tests.jobs.conftest import OPENED_S, ROWS, TOKENS, fill
from tests.jobs.remotes import BRANCH, FOLDER, Repository, partition, snapshot
from tests.support import running_python, wait_until

pytestmark = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)

__all__ = ["pkb"]  # a fixture

WHEN = {"at": "2026-08-05T15:41:00+05:30", "day": "2026-08-05"}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """The sync target of these settings."""
    repository = Repository(tmp_path / "remote" / "kite.git")
    monkeypatch.setenv("PKB_GITHUB_URL", f"file://{repository.path}")
    monkeypatch.setenv("PKB_GITHUB_BRANCH", BRANCH)
    monkeypatch.setenv("PKB_GITHUB_PATH", FOLDER)
    return repository


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def fetch(queue: Queue, id_: str) -> Job:
    job = queue.fetch_job(id_)
    assert job is not None
    return job


# --- a day


@pytest.mark.timeout(300)
def test_special_sunday_runs_all_rows_from_login_to_push(
    settings: Settings, client: redis.Redis, repository: Repository, stack: ExitStack, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Six minutes of Muhurat at 200 times the speed, on the jobs worker and two crons; nobody streams."""
    day, speed = date(2026, 8, 9), 200.0
    calendar = tmp_path / "calendar.json"
    special = {"windows": {"muhurat": ["11:00", "11:06"]}, "why": "Muhurat"}
    calendar.write_text(json.dumps({"calendars": {"equity": {"special": {str(day): special}}}}))
    sessions = load_sessions("market", path=calendar)
    opened_s = int(datetime(2026, 8, 9, 11, tzinfo=IST).timestamp())
    nse = [row for row in ROWS if int(row["instrument_token"]) & 0xFF in (1, 9)]
    begin_s = opened_s - 300
    kite = stack.enter_context(SimulatedKite(ROWS, sessions=sessions, start_ms=begin_s * 1000, speed=speed))
    assert settings.redis_url is not None
    env = {
        **kite.environment(),
        "PKB_REDIS_URL": settings.redis_url.get_secret_value(),
        "PKB_DATA_DIR": str(settings.data_dir),
        "PKB_INSTRUMENTS": ",".join(str(row["instrument_token"]) for row in nse),
        "PKB_CALENDAR": str(calendar),
    }
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    ensure_meta(client, settings, "2026-08-09T05:00:00+00:00")
    save_instruments(client, settings.keys, ROWS)
    fill(client, settings, opened_s)
    # The worker is there before the day begins to pass.
    lead_s = 8.0
    monkeypatch.setenv("PKB_TIME_SHIFT", f"{begin_s - lead_s * speed},{time.time()},{speed}")
    result = load_settings()
    queue = open_queue(result, client)
    for role in ("jobs", "cron", "cron"):
        stack.enter_context(running_python("-m", f"workers.{role}"))
    plan = Plan(sessions, schedules_of(client, result, sessions))
    runs = list(plan.day_of(day))
    last = {run.row.name: run for run in runs}
    assert len([run for run in runs if run.row.name == "ticks"]) == 6

    def status(name: str) -> str:
        job = queue.fetch_job(last[name].job_id)
        return str(job.get_status().value) if job is not None else "unknown"

    wait_until(lambda: status("trim") == "finished", timeout_seconds=90, what="the last job")
    done = {name: status(name) for name in last if name not in ("open", "ticks")}
    assert done == dict.fromkeys(done, "finished")
    # Nobody streams here: the check after the open says so, and comes again.
    assert status("open") in ("scheduled", "queued", "started", "failed")
    reason = view.reason(fetch(queue, last["open"].job_id))
    assert "\n" not in reason and reason

    folder = result.files_folder
    assert problems(folder) == []
    files = read_manifest(folder)
    assert {"ticks.json", "stock_data_09082026.pkl", "daily_candles.pkl", "stock_data.db"} <= set(files)
    made = datetime.fromisoformat(files["ticks.json"].made_at).timestamp()
    assert made >= last["close"].at_ms / 1000
    written = datetime.fromisoformat(files["daily_candles.pkl"].made_at).timestamp()
    assert written >= last["pickle"].at_ms / 1000
    pushed = {name.rpartition("/")[2] for name in repository.names()}
    assert {"ticks.json", "daily_candles.pkl", "manifest.json"} <= pushed
    ids = {run.job_id for run in runs}
    day_jobs = [job for job in all_ids(queue) if job.partition("-")[0] not in ("repair_gap", "warm_start")]
    assert set(day_jobs) <= ids  # nothing else, and none twice


def all_ids(queue: Queue) -> list[str]:
    registries = (queue.finished_job_registry, queue.failed_job_registry, queue.scheduled_job_registry)
    return [*queue.get_job_ids(), *(id_ for registry in registries for id_ in registry.get_job_ids())]


# --- one by one


def test_failed_check_of_the_day_has_a_hint(
    context: JobContext, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(daily.NotReady, match="no holidays for 2027"):
        daily.calendar("2026-12-30T08:45:00+05:30", "2026-12-30")
    assert daily.calendar(WHEN["at"], "2026-11-07")["next"][0] == "2026-11-08"
    with pytest.raises(daily.NotReady):
        daily.feed(**WHEN)
    found = daily.capacity(**WHEN)
    assert (found["instruments"], found["connections"]) == (len(TOKENS), 1)
    kept = Entry("", 1 << 60, 1, 1, "", "", WHEN["at"], "")  # files that no day writes again
    entries = {partition(f"2026-08-0{day}"): replace(kept, bytes=1) for day in (2, 3, 4)}
    entries[partition("2026-08-01")] = entries["stock_data_03082026.pkl"] = kept
    update_manifest(context.settings.files_folder, entries)
    daily.capacity(**WHEN)
    update_manifest(context.settings.files_folder, {"daily_candles.pkl": kept})
    with pytest.raises(daily.NotReady, match="make room"):
        daily.capacity(**WHEN)
    update_manifest(context.settings.files_folder, {}, removed=["daily_candles.pkl"])
    monkeypatch.setattr(daily, "DISK_BYTES_MIN", 1 << 62)
    with pytest.raises(daily.NotReady, match="make room"):
        daily.capacity(**WHEN)


def test_unwritable_folder_is_reported_before_the_open(
    context: JobContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PKB_FILES_DIR", str(tmp_path / "file" / "files"))
    with pytest.raises(FilesUnwritable, match=r"cannot be written .*PKB_FILES_DIR") as error:
        daily.capacity(**WHEN)
    assert "\n" not in str(error.value)


def test_login_job_renews_a_refused_session(
    context: JobContext, kite: SimulatedKite, client: redis.Redis
) -> None:
    account = kite.accounts.first
    dead = save_session(client, context.keys, Session(account.api_key, "X1", access_token=SecretStr("dead")))
    assert daily.login(**WHEN) == {"user_id": account.user_id}
    alive = load_session(client, context.keys)
    assert alive is not None and not alive.is_same(dead)


def test_daily_push_without_a_target_is_skipped(context: JobContext) -> None:
    assert "skipped" in daily.sync_push(**WHEN)


def test_fresh_store_is_restored_from_the_pushed_files(
    context: JobContext,
    repository: Repository,
    client: redis.Redis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def candles() -> dict[bytes, list[Any]]:
        lists = client.scan_iter("pkb:*:candles:*", 1000)
        return {key: [json.loads(row) for row in cast(Any, client.lrange(key, 0, -1))] for key in lists}

    fill(client, context.settings, OPENED_S)
    for kind in ("ticks", "pickle", "parquet"):
        daily.day_snapshot(**WHEN, kind=kind)
    before = candles()
    assert daily.sync_push(**WHEN)["changed"]
    client.flushdb()
    monkeypatch.setenv("PKB_FILES_DIR", str(tmp_path / "elsewhere"))
    assert daily.sync_pull()["pulled"] >= 5
    assert restore().instruments == len(TOKENS) and verify() == []
    assert {key: rows for key, rows in candles().items() if key in before} == before


def test_trim_drops_manifest_entries_of_deleted_files(context: JobContext) -> None:
    folder = context.settings.files_folder
    removed = ["stock_data_03082026.pkl", partition("2026-08-04")]
    there, old = ["stock_data_04082026.pkl", "ticks.json"], "stock_data_01012026.pkl"
    for name in [*removed, *there, old]:
        snapshot(folder, name, b"")
    for name in removed:
        (folder / name).unlink()
    assert daily.trim(**WHEN)["removed"] == 1
    assert sorted(read_manifest(folder)) == there and problems(folder) == []


def test_sync_command_with_enqueue_leaves_the_push_to_a_worker(
    context: JobContext, repository: Repository, client: redis.Redis, pkb: Pkb
) -> None:
    result = json.loads(pkb("sync", "push", "--enqueue", "--json").out)
    again = json.loads(pkb("sync", "push", "--enqueue", "--json").out)
    assert result["new"] and again == {"job": result["job"], "new": False}
    job = fetch(open_queue(context.settings, client), result["job"])
    assert job.func_name == "pkbrokers_redis.jobs.daily.sync_push"
    assert daily.retry_delay_seconds(job) == 1.0
    job.created_at -= timedelta(hours=1)
    assert daily.retry_delay_seconds(job) == 60.0


@pytest.mark.parametrize(
    ("kind", "name"), [("ticks", "ticks.json"), ("pickle", "daily_candles.pkl"), ("sqlite", "stock_data.db")]
)
def test_empty_store_replaces_no_files(
    context: JobContext, client: redis.Redis, kind: str, name: str
) -> None:
    client.hset(context.keys.cursor(0), "id", "1-0")  # a first tick is a baseline
    snapshot(context.settings.files_folder, name, b"yesterday's")
    assert daily.day_snapshot(**WHEN, kind=kind)["files"] == {}
    assert (context.settings.files_folder / name).read_bytes() == b"yesterday's"


def test_pickle_written_after_midnight_carries_the_sessions_date(
    context: JobContext, client: redis.Redis
) -> None:
    """MCX closes at 23:55: its rows run when the date is another."""
    fill(client, context.settings, OPENED_S)
    result = daily.day_snapshot("2026-08-05T00:06:00+05:30", "2026-08-04", "pickle")
    assert "stock_data_04082026.pkl" in result["files"] and "stock_data_05082026.pkl" not in result["files"]


def test_newer_ticks_json_supersedes_a_planned_one(context: JobContext, client: redis.Redis) -> None:
    fill(client, context.settings, OPENED_S)
    old = "2026-08-05T09:16:05+05:30"
    assert "superseded" not in daily.day_snapshot(old, "2026-08-05", "ticks")
    assert daily.day_snapshot(old, "2026-08-05", "ticks") == {"superseded": True}
    assert "superseded" not in daily.day_snapshot("2026-08-05T11:00:05+05:30", "2026-08-05", "ticks")


def test_ticks_json_from_the_future_does_not_supersede(context: JobContext, client: redis.Redis) -> None:
    """It was made before the host's clock was set right."""
    fill(client, context.settings, OPENED_S)
    snapshot(context.settings.files_folder, "ticks.json", b"{}", "2027-01-01T09:15:00+05:30")
    assert "superseded" not in daily.day_snapshot("2026-08-05T09:16:05+05:30", "2026-08-05", "ticks")
