"""kill -9 in the middle of each job: whole files, no lock for ever, no process left, the same result."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from rq import Queue
from rq.job import Job

from pkbrokers_redis.files.manifest import problems, read_manifest
from pkbrokers_redis.jobs import daily
from pkbrokers_redis.jobs.context import JobContext
from pkbrokers_redis.jobs.github import Target, target_of
from pkbrokers_redis.jobs.sync import push
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.kite import session
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.simulator.kite import SimulatedKite
from pkbrokers_redis.store.auth import load_login_state, load_session
from pkbrokers_redis.store.queue import OVER, enqueue, open_queue
from tests.jobs.conftest import OPENED_S, fill
from tests.jobs.deadly import Moment, Worker, Workers, deadly_workers
from tests.jobs.remotes import BRANCH, FOLDER, GitHost, Repository, snapshot
from tests.support import wait_until

pytestmark = [
    pytest.mark.parametrize("server_kind", ["valkey"], indirect=True),
    pytest.mark.timeout(300),
]

WHEN = {"at": "2026-08-05T15:41:00+05:30", "day": "2026-08-05"}
TOKEN = "ghp_made_up"
LARGE = 1 << 20  # bytes of a file whose way takes more than one packet

MASTER = "pkbrokers_redis.store.instruments"
MOMENTS = [
    # job, its arguments, where it is killed
    ("calendar", {}, Moment("pkbrokers_redis.jobs.daily", "load_sessions")),
    ("capacity", {}, Moment("shutil", "disk_usage")),
    ("instruments", {}, Moment("pkbrokers_redis.kite.instruments", "KiteInstruments.store")),
    (
        "instruments",
        {"at": "2026-08-05T08:35:00+05:30"},
        Moment("pkbrokers_redis.store.instruments", "_swap_derivatives"),
    ),
    ("feed", {}, Moment("pkbrokers_redis.jobs.daily", "read_cluster_state")),
    ("final_candles", {}, Moment("pkbrokers_redis.jobs.progress", "Progress.note", 3)),
    ("day_snapshot", {"kind": "ticks"}, Moment("os", "fsync")),
    ("day_snapshot", {"kind": "pickle"}, Moment("os", "fsync", 1)),
    (
        "day_snapshot",
        {"kind": "pickle", "at": "2026-08-05T15:42:00+05:30"},
        Moment("pkbrokers_redis.files.atomic", "_sync_folder", 1),
    ),
    ("day_snapshot", {"kind": "sqlite"}, Moment("os", "fsync")),
    ("day_snapshot", {"kind": "parquet"}, Moment("os", "fsync", 1)),
    ("sync_push", {}, Moment("pkbrokers_redis.jobs.sync", "_commit")),
    ("trim", {}, Moment("pkbrokers_redis.jobs.daily", "update_manifest")),
]


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    with deadly_workers(tmp_path_factory.mktemp("workers")) as workers:
        yield workers


@pytest.fixture
def workers(forked: Workers) -> Iterator[Workers]:
    yield forked
    forked.end_all()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """The sync target of these settings."""
    repository = Repository(tmp_path / "remote" / "kite.git")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PKB_GITHUB_URL", f"file://{repository.path}")
    monkeypatch.setenv("PKB_GITHUB_BRANCH", BRANCH)
    monkeypatch.setenv("PKB_GITHUB_PATH", FOLDER)
    return repository


@pytest.fixture
def queue(context: JobContext, client: redis.Redis) -> Queue:
    return open_queue(context.settings, client)


def fetch(queue: Queue, id_: str) -> Job:
    job = queue.fetch_job(id_)
    assert job is not None
    return job


def give_up_the_dead(queue: Queue, keys: Keys, *ids: str) -> None:
    """Say that the time of a killed worker is over: its silence, and its locks, none of which is for ever."""
    client = queue.connection
    for lock in client.scan_iter(keys.job_lock("*")):
        assert 0 < client.pttl(lock) <= daily.LOCK_TTL_SECONDS * 1000
        client.delete(lock)
    queue.started_job_registry.cleanup(time.time() + 3600)
    for id_ in ids:
        assert fetch(queue, id_).get_status() == "scheduled", id_  # and not given up
        queue.scheduled_job_registry.remove(fetch(queue, id_))  # it waits for `finish`, however slow we are


def finish(workers: Workers, queue: Queue, *ids: str) -> Worker:
    """Another worker takes the jobs over, at once instead of after their pause."""
    for id_ in ids:
        queue.enqueue_job(fetch(queue, id_))
    worker = workers.start()
    for id_ in ids:
        wait_until(
            lambda id_=id_: fetch(queue, id_).get_status() in (*OVER, "scheduled"),
            timeout_seconds=90,
            what=f"the second {id_}",
        )
    return worker


def test_job_killed_midway_leaves_whole_files_and_resumes_to_the_same_result(
    context: JobContext,
    queue: Queue,
    repository: Repository,
    workers: Workers,
    client: redis.Redis,
    tmp_path: Path,
) -> None:
    fill(client, context.settings, OPENED_S)
    folder = context.settings.files_folder
    expected = undisturbed(folder, tmp_path / "undisturbed")
    snapshot(folder, "stock_data_01012026.pkl", b"")  # for the trim
    jobs: list[str] = []
    for name, more, moment in MOMENTS:
        jobs.append(enqueue(queue, name, {**WHEN, **more}) or "")
        workers.start(moment).wait_for_its_death()
        assert fetch(queue, jobs[-1]).get_status() == "started", name
        assert [line for line in problems(folder) if "missing" not in line] == [], name
        give_up_the_dead(queue, context.keys, jobs[-1])
    assert repository.tip() == "" and not list(tmp_path.glob("pkb-sync-*"))
    outcome = finish(workers, queue, jobs[-1], *jobs[:-1]).log
    [feed] = [id_ for id_ in jobs if fetch(queue, id_).get_status() != "finished"]
    assert feed.startswith("feed-") and "no worker reads Kite" in outcome  # which is right, nobody does
    assert problems(folder) == []
    assert contents(folder) == expected
    assert f"{FOLDER}/ticks.json" in repository.names() and len(repository.log()) == 1
    assert not (folder / "stock_data_01012026.pkl").exists()


def undisturbed(folder: Path, elsewhere: Path) -> dict[str, Any]:
    """What the files hold when nobody is killed; made here, then put away."""
    for kind in ("ticks", "pickle", "sqlite", "parquet"):
        daily.day_snapshot(**WHEN, kind=kind)
    found = contents(folder)
    shutil.move(folder, elsewhere)
    assert len(found) >= 6
    return found


def contents(folder: Path) -> dict[str, Any]:
    """File → its sha256; of a database, whose pages may differ, how many rows there are."""
    listed = read_manifest(folder)
    return {
        name: entry.rows
        if entry.kind == "sqlite"
        else hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name, entry in listed.items()
    }


# --- the login


def test_login_killed_before_storing_its_token_blocks_no_later_login(
    context: JobContext, queue: Queue, workers: Workers, kite: SimulatedKite, client: redis.Redis
) -> None:
    keys = context.keys
    id_ = enqueue(queue, "login", WHEN) or ""
    workers.start(Moment("pkbrokers_redis.store.auth", "save_session")).wait_for_its_death()
    assert kite.accounts.logins == 1 and not client.exists(keys.auth())  # Kite gave one, nobody has it
    assert 0 < client.pttl(keys.login_lock()) <= session.LOCK_SECONDS * 1000 < session.WAIT_SECONDS_MAX * 1000
    assert load_login_state(client, keys, time.time()).attempts == 1
    give_up_the_dead(queue, keys, id_)
    # The lock runs out, and the half minute of the TOTP that was used.
    client.delete(keys.login_lock())
    client.hdel(keys.login(), "totp_window")
    kite.accounts.first.totp_used = 0
    finish(workers, queue, id_)
    assert fetch(queue, id_).return_value() == {"user_id": kite.accounts.first.user_id}
    found = load_session(client, keys)
    assert found is not None and kite.accounts.with_access(found.api_key, found.token) is not None
    assert client.ttl(keys.auth()) > 0 and not client.exists(keys.login_lock())
    assert [each.path for each in kite.limits.seen].count("/api/login") == kite.accounts.logins == 2


# --- git's own transfer


def blocking_hook(repository: Repository) -> Path:
    """A pre-receive hook that never ends; the file that it makes when it has begun."""
    begun, never = repository.path / "begun", repository.path / "never"
    os.mkfifo(never)
    hook = repository.path / "hooks" / "pre-receive"
    hook.write_text(f"#!/bin/sh\n: > {begun}\nread -r _ < {never}\n")
    hook.chmod(0o755)
    return begun


def test_push_killed_during_transfer_leaves_no_residue(
    context: JobContext, queue: Queue, repository: Repository, workers: Workers, tmp_path: Path
) -> None:
    snapshot(context.settings.files_folder, "ticks.json", b"{}")
    begun = blocking_hook(repository)
    id_ = enqueue(queue, "sync_push", WHEN) or ""
    worker = workers.start()
    wait_until(begun.exists, timeout_seconds=60, what="the remote's hook")
    worker.kill()
    assert repository.tip() == ""
    wait_until(lambda: not list(tmp_path.glob("pkb-sync-*")), what="the guard's last act")
    give_up_the_dead(queue, context.keys, id_)
    (repository.path / "hooks" / "pre-receive").unlink()
    finish(workers, queue, id_)
    assert fetch(queue, id_).get_status() == "finished"
    assert repository.read(f"{FOLDER}/ticks.json") == b"{}" and len(repository.log()) == 1


def test_late_end_of_a_killed_push_does_not_undo_the_next_push(
    context: JobContext,
    queue: Queue,
    repository: Repository,
    workers: Workers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with GitHost(repository.path.parent, TOKEN) as host:
        monkeypatch.setenv("PKB_GITHUB_URL", f"{host.url}/kite.git")
        monkeypatch.setenv("PKB_GITHUB_TOKEN", TOKEN)
        snapshot(context.settings.files_folder, "ticks.json", b"{}")
        gate = host.hold("POST", "/git-receive-pack")
        id_ = enqueue(queue, "sync_push", WHEN) or ""
        worker = workers.start()
        assert gate.reached.wait(60)
        worker.kill()
        give_up_the_dead(queue, context.keys, id_)
        snapshot(context.settings.files_folder, "ticks.json", b"{ }")
        finish(workers, queue, id_)
        assert fetch(queue, id_).get_status() == "finished"
        after = repository.tip()
        gate.release()
        assert gate.passed.wait(60)
        assert repository.tip() == after and repository.read(f"{FOLDER}/ticks.json") == b"{ }"


@pytest.mark.parametrize("via", ["git", "https"])
def test_pull_killed_midway_keeps_the_old_file_and_the_next_pull_completes(
    context: JobContext, queue: Queue, repository: Repository, workers: Workers, via: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    there, folder = tmp_path / "there", context.settings.files_folder
    new = json.dumps({"x": os.urandom(LARGE).hex()}).encode()
    snapshot(there, "ticks.json", b"{}")
    snapshot(there, "daily_candles.pkl", b"\x80\x03}.")
    push(target_of(load_settings()), there)
    with GitHost(repository.path.parent, TOKEN) as host:
        monkeypatch.setenv("PKB_GITHUB_URL", f"{host.url}/kite.git")
        monkeypatch.setenv("PKB_GITHUB_TOKEN", TOKEN)
        monkeypatch.setenv("PKB_FILES_URL", f"{host.url}/raw/{BRANCH}/{FOLDER}")
        daily.sync_pull(via=via)
        snapshot(there, "ticks.json", new, "2026-11-21T15:36:02+05:30")
        push(Target(f"file://{repository.path}", BRANCH, FOLDER), there)
        gate = host.hold_answer(bytes_min=LARGE)
        id_ = enqueue(queue, "sync_pull", {"at": WHEN["at"], "via": via}) or ""
        worker = workers.start()
        assert gate.reached.wait(60)
        worker.kill()
        assert (folder / "ticks.json").read_bytes() == b"{}" and problems(folder) == []
        wait_until(lambda: not list(tmp_path.glob("pkb-sync-*")), what="the guard's last act")
        give_up_the_dead(queue, context.keys, id_)
        gate.release()
        finish(workers, queue, id_)
    assert fetch(queue, id_).return_value()["pulled"] == 1
    assert (folder / "ticks.json").read_bytes() == new and problems(folder) == []
    left = list(folder.glob(".*.tmp"))
    assert len(left) <= 1  # of the killed one
    for each in left:
        os.utime(each, (0, 0))
    daily.trim(**WHEN)
    assert not list(folder.glob(".*.tmp")) and problems(folder) == []


# --- the disk


def test_full_disk_is_one_line_and_the_next_run_succeeds(
    context: JobContext, queue: Queue, workers: Workers, client: redis.Redis
) -> None:
    fill(client, context.settings, OPENED_S)
    snapshot(context.settings.files_folder, "ticks.json", b"{}")
    id_ = enqueue(queue, "day_snapshot", {**WHEN, "kind": "ticks"}) or ""
    worker = workers.start(file_bytes_max=2_000)
    wait_until(lambda: fetch(queue, id_).get_status() == "scheduled", timeout_seconds=60, what="its failure")
    queue.scheduled_job_registry.remove(fetch(queue, id_))
    worker.kill()
    assert f"the files in {context.settings.files_folder} cannot be written (File too large)" in worker.log
    assert "Traceback" not in worker.log
    assert (context.settings.files_folder / "ticks.json").read_bytes() == b"{}"
    assert problems(context.settings.files_folder) == [] and not left_over(context.settings)
    finish(workers, queue, id_)
    assert fetch(queue, id_).get_status() == "finished" and problems(context.settings.files_folder) == []


def left_over(settings: Settings) -> list[Path]:
    return list(settings.files_folder.rglob(".*.tmp*"))
