"""The jobs of the trading day (`cron.DAY`), one of each kind at a time. Each is repeatable.

Each is called with `at` (its planned time, ISO), `day` (the session's date) and, if its row needs other rows,
`after`: their job ids. A job that must wait for those or for the lock of its kind reschedules itself and does
not occupy a worker. It returns what it found.

    P:job:lock:<name>   string, TTL 30 s   the job of this kind that is running

The lock saves duplicate work only. What jobs write is complete in any case (renamed files,
`--force-with-lease`, absolute values), so a holder that was suspended does no harm.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import date, datetime
from typing import Any

import redis
from rq import Retry, get_current_job
from rq.exceptions import NoSuchJobError
from rq.job import Job
from rq.serializers import JSONSerializer

from pkbrokers_redis import logs
from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.candles.model import DAY as DAY_INTERVAL
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.errors import PkbError, SessionExpired
from pkbrokers_redis.files.atomic import sweep, writing_into
from pkbrokers_redis.files.manifest import Entry, read_manifest, update_manifest
from pkbrokers_redis.ingest.feeds import feeds_needed, sessions_of
from pkbrokers_redis.jobs import backfill, pull, retention, snapshots, sync
from pkbrokers_redis.jobs.github import target_of
from pkbrokers_redis.jobs.progress import job_listener, reschedule
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.kite.instruments import KiteInstruments
from pkbrokers_redis.kite.rest import open_kite
from pkbrokers_redis.kite.session import SessionManager
from pkbrokers_redis.runtime.cluster_state import read_cluster_state, read_servers
from pkbrokers_redis.runtime.health import STATUS_CHECKS, health_of, run_checks
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.connect import connect, describe
from pkbrokers_redis.store.leases import LeaderLease, LeaseTaken
from pkbrokers_redis.store.meta import adopt_meta
from pkbrokers_redis.store.queue import OVER, KnownJob
from pkbrokers_redis.store.symbols import instrument_list

LOCK_TTL_SECONDS = 30.0


class AlreadyRunning(PkbError):
    """Raised when another job of the kind is running. `.holder` says which."""

    def __init__(self, name: str, holder: str) -> None:
        super().__init__(f"another {name} is running ({holder})", "wait for its end: `pkb jobs --list`")
        self.holder = holder


@contextmanager
def exclusive(
    client: redis.Redis, keys: Keys, name: str, ttl_seconds: float = LOCK_TTL_SECONDS
) -> Iterator[str]:
    """Hold the lock of a kind of job and yield the owner id. Raise AlreadyRunning if it is taken."""
    owner = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    lease = LeaderLease(client, keys.job_lock(name), owner, ttl_seconds)
    try:
        with lease.hold():
            yield owner
    except LeaseTaken as error:
        if error.key != keys.job_lock(name):
            raise
        raise AlreadyRunning(name, error.holder or "just ended") from None


RETRY_DELAY_SECONDS = 1.0, 60.0  # while waiting for a job or a lock: a fifth of its age
SUPERSEDED_SECONDS = 60  # a ticks.json this much newer than planned replaces the run
DISK_BYTES_MIN = 1 << 30
FILES_FACTOR = 2  # a snapshot is written next to the one it replaces
PARTITIONS_A_DAY = 2  # per interval of a snapshot
MEMORY_SHARE_MAX = 0.8  # of Redis' maxmemory, at the start of the day
SESSIONS_KNOWN_MIN = 5  # the calendar must know so many coming sessions

log = logs.get("day")


class NotReady(PkbError):
    """Raised when a check of the day finds a problem that a person must solve."""


# --- before the open


def login(at: str, day: str) -> Any:
    """Check the Kite session and renew it if Kite refuses it."""
    with _work("login") as work:
        if work.must_wait:
            return work.must_wait
        settings = sessions_of(work.settings)[0]
        manager = SessionManager(settings, lambda: work.client)
        session = manager.current()
        try:
            open_kite(settings, session).profile()
        except SessionExpired:
            session = manager.renew(session, threading.Event())
        return {"user_id": session.user_id}


def instruments(at: str, day: str) -> Any:
    """Fetch the instrument master of the day and replace the old one at once."""
    with _work("instruments") as work:
        if work.must_wait:
            return work.must_wait
        clock = market_clock(work.settings)
        master = KiteInstruments(settings=work.settings, client=work.client, now=lambda: clock() / 1000)
        return master.sync()._asdict()


def calendar(at: str, day: str) -> Any:
    """Check that the calendar knows the coming sessions. Raise NotReady for a year without holidays."""
    settings = load_settings()
    sessions = load_sessions(settings.sessions, settings.timezone, settings.calendar)
    if settings.sessions == "always":
        return {"sessions": "always"}
    coming: list[date] = []
    local = date.fromisoformat(day)
    while len(coming) < SESSIONS_KNOWN_MIN and (following := sessions.session_near(0, local, 1)) is not None:
        coming.append(following)
        local = following
    unknown = sorted({each.year for each in coming if not sessions.reasons(0, each.year)})
    if unknown or len(coming) < SESSIONS_KNOWN_MIN:
        raise NotReady(
            f"the calendar has no holidays for {unknown[0] if unknown else local.year}",
            "put the exchange's list into a file and set PKB_CALENDAR (docs/calendar.md)",
        )
    return {"today": sessions.reason(0, date.fromisoformat(day)), "next": [str(each) for each in coming]}


def capacity(at: str, day: str) -> Any:
    """Check connections to Kite, Redis memory and disk space.

    Raises:
        SettingsError: more instruments than the api keys allow.
        NotReady: too little memory or disk.
        FilesUnwritable: the folder of the files cannot be written.
    """
    with _work("capacity") as work:
        if work.must_wait:
            return work.must_wait
        settings = work.settings
        tokens = len(instrument_list(work.client, settings))
        feeds = feeds_needed(tokens, len(sessions_of(settings)))
        folder = settings.files_folder
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:  # it has no name, so a kill leaves nothing
            probe.write(b"\n")
        free = shutil.disk_usage(folder).free
        needed = max(DISK_BYTES_MIN, FILES_FACTOR * _day_bytes(read_manifest(folder)))
        if free < needed:
            raise NotReady(
                f"{free >> 20:,} MB are free for the day's files, {needed >> 20:,} MB are needed",
                "make room, or move PKB_FILES_DIR",
            )
        for server in read_servers(work.client):
            if server.limit_bytes and server.used_bytes > MEMORY_SHARE_MAX * server.limit_bytes:
                raise NotReady(
                    f"Redis {server.name} uses {server.used_bytes:,} of {server.limit_bytes:,} bytes",
                    "raise its maxmemory before the open",
                )
        return {"instruments": tokens, "connections": feeds, "disk_free_mb": free >> 20}


def _day_bytes(files: Mapping[str, Entry]) -> int:
    """Estimate the bytes that a day writes: the two newest Parquet partitions, one of each other file."""
    written = [name for name in files if not retention.is_of_a_day(name)]
    partitions: dict[str, list[str]] = {}
    for name in sorted(files):
        if match := retention.PARTITION.fullmatch(name):
            partitions.setdefault(match[1], []).append(name)
    written += [name for names in partitions.values() for name in names[-PARTITIONS_A_DAY:]]
    return sum(files[name].bytes for name in written)


# --- in the session


def feed(at: str, day: str) -> Any:
    """Check a minute after the open that all roles run and ticks arrive. Raise NotReady otherwise."""
    with _work("feed") as work:
        if work.must_wait:
            return work.must_wait
        cluster = read_cluster_state(work.client, work.settings.keys, describe(work.settings))
        findings = [each for each in run_checks(cluster, STATUS_CHECKS) if each.level != "ok"]
        health = health_of(findings)
        if health == "down":
            first = next(each for each in findings if each.level == "fail")
            raise NotReady(first.message, first.hint or "`pkb doctor` says more")
        return {"health": health, "findings": [each.message for each in findings]}


def day_snapshot(at: str, day: str, kind: str, after: Sequence[str] = ()) -> Any:
    """Write one kind of snapshot of the day. A newer ticks.json makes the run unnecessary."""
    with _work(f"snapshot-{kind}", after) as work:
        if work.must_wait:
            return work.must_wait
        if kind == "ticks" and _is_superseded(work.settings, at):
            return {"superseded": True}
        return snapshots.snapshot(kind, day=day)


# --- after the close


def final_candles(at: str, day: str) -> Any:
    """Replace the day's candles by Kite's final ones, whose close may come from the closing auction."""
    with _work("final_candles") as work:
        if work.must_wait:
            return work.must_wait
        tokens = [token for token, _ in instrument_list(work.client, work.settings)]
        if not tokens or not any(each.name == DAY_INTERVAL for each in work.settings.intervals):
            return {"instruments": 0}
        return backfill.repair_day(day, tokens, DAY_INTERVAL)


def sync_push(
    at: str = "", day: str = "", after: Sequence[str] = (), files: Sequence[str] | None = None
) -> Any:
    """Push the files to the data branch; skip if no target is set."""
    with _work("sync", after) as work:
        if work.must_wait:
            return work.must_wait
        settings = work.settings
        if day and not settings.github_url and not settings.github_repo:
            return {"skipped": "no PKB_GITHUB_REPO"}
        return sync.push(
            target_of(settings),
            settings.files_folder,
            files,
            intervals=settings.intervals,
            at_s=market_clock(settings)() / 1000,
            listener=work.listener,
        )


def sync_pull(
    at: str = "", files: Sequence[str] | None = None, via: pull.Via = "auto", force: bool = False
) -> Any:
    """Fetch the files of the data branch that are newer than the local ones."""
    with _work("sync") as work:
        if work.must_wait:
            return work.must_wait
        folder = work.settings.files_folder
        return pull.pull(work.settings, folder, files, via=via, force=force, listener=work.listener)


def trim(at: str, day: str, after: Sequence[str] = ()) -> Any:
    """Delete dated pickles older than a month: the undated ones and the database hold their rows.

    Also remove temporary files of killed jobs, and manifest entries whose files were deleted by hand.
    """
    with _work("trim", after) as work:
        if work.must_wait:
            return work.must_wait
        folder = work.settings.files_folder
        listed = read_manifest(folder)
        old = retention.outdated(listed, date.fromisoformat(day))
        # Files first: a later trim would not find a file that the manifest no longer names.
        for name in old:
            (folder / name).unlink(missing_ok=True)
        update_manifest(folder, {}, removed={*old, *retention.deleted(folder, listed)})
        return {"removed": len(old), "swept": sweep(folder)}


# --- helpers


class _Work:
    """The tools of a daily job, or the reschedule that it must return."""

    def __init__(self, settings: Settings, client: redis.Redis) -> None:
        self.settings, self.client = settings, client
        self.must_wait: Retry | None = None
        self.listener = job_listener(client, settings.keys)


@contextmanager
def _work(name: str, after: Sequence[str] = ()) -> Iterator[_Work]:
    """Open the store and hold the lock of this kind of job.

    Raises:
        AlreadyRunning: the lock is taken, outside a worker; a worker reschedules instead.
        FilesUnwritable: a disk error, as one line.
    """
    settings = load_settings()
    with ExitStack() as stack:
        client = stack.enter_context(connect(settings))
        work = _Work(adopt_meta(client, settings), client)
        if (job := get_current_job()) is not None and _is_pending(job.connection, after):
            work.must_wait = reschedule(retry_delay_seconds(job))
        else:
            try:
                stack.enter_context(exclusive(client, settings.keys, name))
            except AlreadyRunning as busy:
                if job is None:
                    raise
                log.info("job_rescheduled", job=job.id, reason=busy.message)
                work.must_wait = reschedule(retry_delay_seconds(job))
        stack.enter_context(writing_into(settings.files_folder))
        yield work


def retry_delay_seconds(job: Job) -> float:
    """Return seconds until the next try: 9,000 instruments take most of an hour, a snapshot takes seconds."""
    least, most = RETRY_DELAY_SECONDS
    age = time.time() - job.created_at.timestamp() if job.created_at else 0.0
    return min(most, max(least, age / 5))


def _is_pending(connection: redis.Redis, ids: Sequence[str]) -> bool:
    """Return whether one of these jobs has not ended; failed and unknown jobs have ended."""
    for id_ in ids:
        try:
            job = KnownJob.fetch(id_, connection=connection, serializer=JSONSerializer)
        except NoSuchJobError:
            continue
        if job.get_status() not in OVER:
            return True
    return False


def _is_superseded(settings: Settings, at: str) -> bool:
    entry = read_manifest(settings.files_folder).get("ticks.json")
    if entry is None or entry.made_at_ms is None:
        return False
    planned_ms = datetime.fromisoformat(at).timestamp() * 1000
    # A file from the future was made before a clock was corrected: it must not delay later runs.
    return planned_ms + SUPERSEDED_SECONDS * 1000 <= entry.made_at_ms <= market_clock(settings)()
