"""The jobs worker as a process: it does what is asked, survives its own death, and says why it cannot."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from rq import Queue
from rq.job import Job, JobStatus

from pkbrokers_redis.errors import PkbError, RedisUnavailable, SettingsError
from pkbrokers_redis.jobs import view
from pkbrokers_redis.jobs.context import JobContext
from pkbrokers_redis.jobs.progress import Progress
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.simulator.kite import SimulatedKite
from pkbrokers_redis.store.queue import (
    JOBS,
    KnownJob,
    connect_queue,
    enqueue,
    job_id,
    open_queue,
    queue_of,
)
from tests.cli.conftest import Pkb, pkb
from tests.jobs.conftest import OPENED_S, ROWS
from tests.support import is_alive, running_python, settings_env, wait_until
from tests.topologies import free_ports, running_node

pytestmark = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
__all__ = ["pkb"]  # a fixture

TOKENS = [int(row["instrument_token"]) for row in ROWS]
GAP = {"tokens": TOKENS[:3], "from_ms": OPENED_S * 1000, "to_ms": (OPENED_S + 120) * 1000}
HISTORY = "/instruments/historical"


@pytest.fixture
def queue(context: JobContext) -> Iterator[Queue]:
    """The queue, on a store that workers find in the environment."""
    queue = open_queue(context.settings)
    yield queue
    queue.connection.close()


@pytest.fixture
def workers() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start(workers: ExitStack, **env: str) -> subprocess.Popen[str]:
    return workers.enter_context(running_python("-m", "workers.jobs", env=env))


def fetch(queue: Queue, id_: str | None) -> Job:
    job = queue.fetch_job(id_ or "")
    assert job is not None
    return job


def status_is(queue: Queue, id_: str | None, expected_names: str) -> bool:
    return fetch(queue, id_).get_status() == expected_names


# --- doing


def test_worker_runs_a_job_sends_heartbeats_and_stops(
    queue: Queue, workers: ExitStack, context: JobContext
) -> None:
    id_ = enqueue(queue, "repair_gap", GAP)
    later = enqueue(queue, "repair_gap", {**GAP, "why": "later"}, delay_seconds=0.01)
    worker = start(workers)
    wait_until(lambda: status_is(queue, id_, "finished"), timeout_seconds=60, what="the job")
    result = fetch(queue, id_).return_value()
    assert result == {"instruments": 3, "rows": 6, "applied": False}  # no aggregator is there
    wait_until(lambda: status_is(queue, later, "finished"), timeout_seconds=60, what="RQ's scheduler")

    def heartbeat() -> dict[str, str]:
        members: Any = context.client.zrange(context.keys.workers(), 0, -1)
        ids = [member.decode().removeprefix("jobs ") for member in members if member.startswith(b"jobs ")]
        found: Any = context.client.hgetall(context.keys.worker(ids[0])) if ids else {}
        return {name.decode(): value.decode() for name, value in found.items()}

    wait_until(lambda: heartbeat().get("jobs_done") == "2", what="a heartbeat")
    assert heartbeat()["role"] == "jobs"
    worker.send_signal(signal.SIGTERM)
    output, _ = worker.communicate(timeout=30)
    assert worker.returncode == 0, output
    assert "event=job_ended" in output and "Traceback" not in output
    assert heartbeat() == {}


def test_child_dies_with_its_worker_and_another_worker_finishes_the_job(
    queue: Queue, workers: ExitStack, kite: SimulatedKite, context: JobContext
) -> None:
    kite.faults.add("slow", on="rest", path=HISTORY, delay_seconds=0.3)
    id_ = enqueue(queue, "repair_gap", GAP)
    first = start(workers)
    done = lambda: context.client.hget(context.keys.job(id_ or ""), "done") == b"1"  # noqa: E731
    wait_until(done, timeout_seconds=60, what="the first instrument")
    children = psutil.Process(first.pid).children()
    os.kill(first.pid, signal.SIGKILL)
    for child in children:
        wait_until(lambda pid=child.pid: not is_alive(pid), what="the child's end")
    # RQ gives the job to another once it has been silent for long: say that this time is over, and the
    # time of the lock of the dead worker's scheduler.
    queue.started_job_registry.cleanup(time.time() + 3600)
    context.client.delete("rq:scheduler-lock:pkb")
    assert status_is(queue, id_, "scheduled")
    queue.scheduled_job_registry.schedule(fetch(queue, id_), datetime.now(UTC))
    kite.faults.clear()
    start(workers)
    wait_until(lambda: status_is(queue, id_, "finished"), timeout_seconds=60, what="the second worker")
    assert fetch(queue, id_).return_value()["rows"] == 6
    requests = [each for each in kite.limits.seen if each.kind == "historical"]
    assert len(requests) <= 3 + 1  # what was done is not done again; one may have been under way


def test_equal_requests_are_one_job(queue: Queue) -> None:
    id_ = enqueue(queue, "repair_gap", GAP)
    assert id_ == job_id("repair_gap", dict(reversed(GAP.items())))
    assert enqueue(queue, "repair_gap", GAP) is None
    assert enqueue(queue, "repair_gap", GAP, again=True) is None  # it waits: nothing to repeat
    fetch(queue, id_).cancel()
    assert enqueue(queue, "repair_gap", GAP) is None
    assert enqueue(queue, "repair_gap", GAP, again=True) == id_
    assert queue.count == 1


def test_finished_jobs_are_kept_a_day_and_failed_ones_a_week(queue: Queue) -> None:
    job = fetch(queue, enqueue(queue, "repair_gap", GAP))
    spec = JOBS["repair_gap"]
    assert (job.timeout, job.result_ttl, job.failure_ttl) == (300, 86_400, 7 * 86_400)
    assert job.retry_intervals == list(spec.retry_seconds)
    assert job.retries_left == len(spec.retry_seconds)


def test_worker_survives_a_redis_restart(workers: ExitStack, tmp_path: Path, server_kind: str) -> None:
    [port] = free_ports(1)
    settings = load_settings(redis_url=f"redis://127.0.0.1:{port}/0", data_dir=tmp_path)

    def does_a_job() -> None:
        with connect_queue(settings) as connection:
            job = queue_of(connection).enqueue("os.getcwd")  # refused: but that takes a worker, too
            wait_until(lambda: job.get_status() == "failed", timeout_seconds=60, what="the job")

    with running_node(tmp_path / "first", port):
        worker = start(workers, **settings_env(settings))
        does_a_job()
    with running_node(tmp_path / "second", port):
        does_a_job()
        worker.send_signal(signal.SIGTERM)
        output, _ = worker.communicate(timeout=30)
    assert worker.returncode == 0, output
    assert "Traceback" not in output


# --- failing


def test_failed_job_is_one_line_and_can_be_retried(
    queue: Queue, workers: ExitStack, pkb: Pkb, context: JobContext
) -> None:
    wrong = queue.enqueue(
        "pkbrokers_redis.jobs.backfill.repair_day",
        kwargs={"day": "2026-08-05", "tokens": TOKENS[:1], "interval": "2m"},
    )
    foreign = queue.enqueue("os.getcwd")
    bug = queue.enqueue("pkbrokers_redis.jobs.backfill.repair_gap", kwargs={"tokens": "x"})
    start(workers)
    ids = [wrong.id, foreign.id, bug.id]
    wait_until(lambda: all(status_is(queue, id_, "failed") for id_ in ids), timeout_seconds=60)
    why = {row["id"]: row["reason"] for row in view.failed_jobs(queue)}
    assert why[wrong.id].startswith("Kite has no '2m' history: use one of 1m")
    assert why[foreign.id].startswith("os.getcwd is not in the table of jobs")
    assert why[bug.id].startswith("TypeError: repair_gap() missing")
    assert all("\n" not in line for line in why.values())

    ended = pkb("jobs", "--failed", "--json")
    assert ended.code == 0 and wrong.id in ended.out
    assert pkb("jobs", "--retry", "nothing").code == 2
    assert pkb("jobs", "--retry", wrong.id, "--json").out.strip() == f'[{{"id":"{wrong.id}"}}]'
    wait_until(lambda: status_is(queue, wrong.id, "failed"), timeout_seconds=60)


def test_queue_listing_shows_progress(queue: Queue, context: JobContext, pkb: Pkb) -> None:
    waiting = enqueue(queue, "repair_gap", GAP)
    due_later = enqueue(queue, "warm_start", {"tokens": TOKENS}, delay_seconds=600)
    Progress(context.client, context.keys, waiting or "").begin(["1", "2"])
    rows = {row["id"]: row for row in view.list_jobs(queue, context.client, context.keys)}
    assert (rows[waiting]["state"], rows[waiting]["done"], rows[waiting]["total"]) == ("waiting", 0, 2)
    assert (rows[due_later]["job"], rows[due_later]["state"]) == ("warm_start", "scheduled")
    assert "0/2" in pkb("jobs", "--list").out


def put_raw(queue: Queue, id_: str, **fields: bytes) -> None:
    """A job as another program, another serializer or a person wrote it."""
    client = queue.connection
    client.hset(f"rq:job:{id_}", mapping={"created_at": "2026-01-01T00:00:00.000000Z", **fields})
    client.rpush(queue.key, id_)


def test_a_job_that_cannot_be_decoded_is_a_row_that_says_so(
    queue: Queue, workers: ExitStack, pkb: Pkb, context: JobContext
) -> None:
    raw = {"pickled": pickle.dumps(("os.getcwd", None, (), {})), "broken": b"{", "empty": b""}
    for id_, data in raw.items():
        put_raw(queue, id_, data=data, origin=b"pkb", status=b"queued")
    put_raw(queue, "dated", data=b"{", created_at=b"yesterday")
    listed = {row["id"]: row for row in view.list_jobs(queue, context.client, context.keys)}
    assert {listed[id_]["job"] for id_ in (*raw, "dated")} == {"cannot be read"}
    assert pkb("jobs", "--list").code == 0
    queue.connection.lrem(queue.key, 0, "dated")  # RQ itself cannot load it
    good = enqueue(queue, "repair_day", {"day": "2026-08-05", "tokens": TOKENS[:1], "interval": "2m"})
    start(workers)
    wait_until(lambda: status_is(queue, good, "scheduled"), timeout_seconds=60)  # tried, to be retried
    wait_until(lambda: len(view.failed_jobs(queue)) == len(raw), timeout_seconds=60)
    assert {row["reason"] for row in view.failed_jobs(queue)} == {
        "its data is no JSON of a job: another program wrote it"
    }
    assert pkb("jobs", "--failed").code == 0
    assert pkb("jobs", "--retry", "all").code == 0
    ended = pkb("jobs", "--retry", "pickled")
    assert (ended.code, "cannot be read" in ended.err) == (2, True)


def test_a_job_of_a_newer_release_is_left_for_a_worker_that_knows_it(
    queue: Queue, workers: ExitStack, context: JobContext
) -> None:
    newer = queue.enqueue("pkbrokers_redis.jobs.archive.compact", kwargs={"day": "2026-08-05"})
    old = queue.enqueue(  # of a release whose name for it was another one
        "pkbrokers_redis.jobs.daily.settle", kwargs={"at": "2026-08-05T15:40:00+05:30", "day": "2026-08-05"}
    )
    start(workers)
    wait_until(lambda: status_is(queue, newer.id, "scheduled"), timeout_seconds=60)
    wait_until(lambda: status_is(queue, old.id, "finished"), timeout_seconds=60)
    assert queue.failed_job_registry.get_job_ids() == []
    [row] = view.list_jobs(queue, context.client, context.keys)
    assert (row["job"], row["state"]) == ("pkbrokers_redis.jobs.archive.compact", "scheduled")
    assert queue.connection.llen(queue.intermediate_queue_key) == 0


def test_a_job_of_a_newer_release_waits_a_day_and_then_fails(queue: Queue) -> None:
    job = queue.enqueue("pkbrokers_redis.jobs.archive.compact")
    assert isinstance(job, KnownJob)
    assert job.is_newer(job.created_at + timedelta(hours=23))
    assert not job.is_newer(job.created_at + timedelta(hours=25))
    other = queue.enqueue("os.getcwd")
    assert isinstance(other, KnownJob) and not other.is_newer(other.created_at)


def test_retried_job_has_all_its_retries(queue: Queue, context: JobContext) -> None:
    id_ = enqueue(queue, "repair_gap", GAP) or ""
    job = queue.fetch_job(id_)
    assert job is not None
    queue.remove(id_)
    job.retries_left = 0
    job.set_status(JobStatus.FAILED)
    job.save()
    queue.failed_job_registry.add(job, ttl=60)
    assert view.retry(queue, "all") == [id_]
    [row] = view.list_jobs(queue, context.client, context.keys)
    assert (row["state"], row["retries_left"]) == ("waiting", len(JOBS["repair_gap"].retry_seconds))


@pytest.mark.parametrize("role_env", [{"PKB_RQ_REDIS_URL": "redis://:geheim@127.0.0.1:1/0"}])
def test_unavailable_queue_is_one_line_that_names_its_setting(
    context: JobContext, workers: ExitStack, role_env: dict[str, str]
) -> None:
    worker = start(workers, **role_env)
    output, _ = worker.communicate(timeout=60)
    assert worker.returncode == 2
    assert output.startswith("pkb: redis://127.0.0.1:1/0 cannot be reached")
    assert "geheim" not in output and output.count("\n") == 1


def test_queue_on_a_cluster_is_refused_with_a_hint(settings: Settings) -> None:
    cluster = load_settings(redis_url="redis+cluster://127.0.0.1:7000")
    with pytest.raises(SettingsError, match="PKB_RQ_REDIS_URL"):
        connect_queue(cluster)
    assert settings.redis_url is not None
    other = load_settings(
        redis_url="redis+cluster://127.0.0.1:7000", rq_redis_url=settings.redis_url.get_secret_value()
    )
    with connect_queue(other) as client:
        assert client.ping()


def test_invalid_queue_url_names_its_setting(settings: Settings) -> None:
    for url in ("http://localhost", "redis://localhost:port", "redis://:a/b@localhost"):
        with pytest.raises(PkbError) as error:
            connect_queue(load_settings(redis_url="redis://127.0.0.1:1", rq_redis_url=url))
        assert "PKB_RQ_REDIS_URL" in str(error.value)
        assert "PKB_REDIS_URL" not in str(error.value)
    with pytest.raises(RedisUnavailable):
        connect_queue(load_settings(rq_redis_url="redis://127.0.0.1:1"))


def test_worker_process_uses_indias_time_zone(settings: Settings, client: redis.Redis) -> None:
    program = (
        "import time\nfrom pkbrokers_redis.jobs.worker import use_market_timezone\n"
        "use_market_timezone()\nprint(time.tzname[0])"
    )
    env = {**os.environ, "TZ": "America/New_York"}
    found = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.strip() == "IST"
