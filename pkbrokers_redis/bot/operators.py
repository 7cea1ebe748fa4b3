"""Messages to the operators (PKB_TELEGRAM_ADMINS): one when a problem begins or gets worse, one when it ends.

P:{bot}:troubles   hash   check → {"level", "what", "since"}: problems that were reported, so that a restart
                          does not report them again
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import msgspec
import redis
from telegram.constants import ParseMode
from telegram.error import TelegramError
from telegram.ext import ExtBot

from pkbrokers_redis import logs
from pkbrokers_redis.bot.alerts.worker import AlertWorker, FeedMonitor
from pkbrokers_redis.bot.context import Services
from pkbrokers_redis.bot.telegram_client import with_retries
from pkbrokers_redis.bot.text import duration, escape, size
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.kite.rest import session_in
from pkbrokers_redis.runtime.cluster_state import ClusterState, read_cluster_state
from pkbrokers_redis.runtime.health import (
    BEAT_AGE_MS_MAX,
    FAILED_JOBS,
    STATUS_CHECKS,
    Finding,
    check_jobs,
    run_checks,
)
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.auth import load_session
from pkbrokers_redis.store.connect import describe
from pkbrokers_redis.store.queue import connect_queue

log = logs.get("operators")

CHECK_EVERY_SECONDS = 2.0  # a dead worker's beat is late for 4 s before its key expires: time for two checks
CHECKS_BEFORE_REPORT = 2  # a worker that is being replaced is not a problem
SILENT_SECONDS_MAX = 60.0
DISK_PART_MAX = 0.9
DISK_FREE_BYTES_MIN = 2**30
ROLES_IN_HEALTH = {"ingest", "aggregate"}  # whose heartbeats runtime/health.py judges
SYMBOLS = {"warn": "⚠️", "fail": "❌"}


class Problem(msgspec.Struct):
    """A finding that was reported to the operators; `since` is epoch seconds."""

    level: str
    what: str
    since: float


def check_pipeline(services: Services) -> tuple[ClusterState, list[Finding]]:
    """Return the pipeline's state and all findings, those of this module included. Blocks.

    Raises:
        redis.RedisError, PkbError: Redis is unavailable.
    """
    client, settings = services.client, services.settings
    cluster = read_cluster_state(client, settings.keys, describe(settings, for_reading=True))
    findings = run_checks(cluster, STATUS_CHECKS)
    findings += _late_workers(cluster)
    findings += [_session(client, settings), _disk(settings), _jobs(services)]
    return cluster, findings


def _late_workers(cluster: ClusterState) -> Iterator[Finding]:
    """Report workers without a heartbeat in roles that the pipeline can do without for a while."""
    for role in sorted({worker.role for worker in cluster.workers} - ROLES_IN_HEALTH):
        late = [worker.id for worker in cluster.alive(role) if (worker.age_ms or 0) > BEAT_AGE_MS_MAX]
        if late:
            yield Finding(role, "warn", f"{', '.join(late[:5])} does not beat", "look at its log")


def _session(client: redis.Redis, settings: Settings) -> Finding:
    try:
        session = load_session(client, settings.keys)
    except PkbError as error:
        return Finding("session", "warn", error.message, error.hint)
    if session is not None or session_in(settings) is not None:
        return Finding("session", "ok", "there is a Kite session")
    refused = client.hexists(settings.keys.auth(), "refused")
    what = "the Kite session has expired" if refused else "there is no Kite session"
    return Finding("session", "warn", what, "/refresh_token, or `pkb login`")


def _disk(settings: Settings) -> Finding:
    """Judge the disk of PKB_DATA_DIR, which holds the spool, snapshots and the embedded server."""
    folder = settings.data_dir
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    if usage.used > DISK_PART_MAX * usage.total and usage.free < DISK_FREE_BYTES_MIN * 10:
        level: Literal["warn", "fail"] = "fail" if usage.free < DISK_FREE_BYTES_MIN else "warn"
        what = f"{size(usage.free)} are free on the disk of PKB_DATA_DIR"
        return Finding("disk", level, what, "delete files there")
    return Finding("disk", "ok", f"{usage.free / 1e9:,.0f} GB free")


def _jobs(services: Services) -> Finding:
    """Judge the list of failed jobs, on the jobs' Redis if there is one."""
    client, settings = services.client, services.settings
    if settings.rq_redis_url is not None:
        try:
            client = services.jobs_client = services.jobs_client or connect_queue(settings)
        except PkbError as error:
            return Finding("jobs", "warn", error.message, error.hint)
    try:
        failed: Any = client.zcard(FAILED_JOBS)
    except redis.ConnectionError:
        if client is services.client:
            raise
        return Finding(
            "jobs", "warn", "the jobs' Redis does not answer", "start it, or correct PKB_RQ_REDIS_URL"
        )
    return check_jobs(int(failed))


class OperatorMonitor:
    """Checks the pipeline every CHECK_EVERY_SECONDS and reports what changed."""

    def __init__(self, bot: ExtBot[Any], services: Services, worker: AlertWorker) -> None:
        self._bot, self._services, self._worker = bot, services, worker
        self._feed = FeedMonitor(services.settings)
        self._checks_failed: dict[str, int] = {}  # check → failures in a row

    async def run(self) -> None:
        """Check until cancelled."""
        while True:
            await asyncio.sleep(CHECK_EVERY_SECONDS)
            if self._services.access.admins:
                await self._check_once()

    async def _check_once(self) -> None:
        try:
            _, findings = await asyncio.to_thread(check_pipeline, self._services)
            findings += self._silent_feed()
            reported = await asyncio.to_thread(self._load_reported)
        except (redis.RedisError, PkbError, OSError) as error:
            log.warning("check_failed", reason=type(error).__name__)
            return
        problems = _worst_by_check(findings)
        self._checks_failed = {check: self._checks_failed.get(check, 0) + 1 for check in problems}
        for check, finding in problems.items():
            known = reported.get(check)
            is_news = known is None or (known.level != "fail" and finding.level == "fail")
            if not is_news or self._checks_failed[check] < CHECKS_BEFORE_REPORT:
                continue
            text = f"{SYMBOLS[finding.level]} <b>{escape(check)}</b>: {escape(finding.message)}"
            text += f"\n{escape(finding.hint)}" if finding.hint else ""
            since = time.time() if known is None else known.since
            if await self._report(text):
                await self._save(check, Problem(finding.level, finding.message, since))
        for check in reported.keys() - problems.keys():
            lasted = duration(time.time() - reported[check].since)
            if await self._report(f"✅ <b>{escape(check)}</b>: recovered after {lasted}"):
                await self._save(check, None)

    def _silent_feed(self) -> Iterator[Finding]:
        silent = self._worker.silent_seconds
        if silent > SILENT_SECONDS_MAX and self._feed.open_seconds() > SILENT_SECONDS_MAX:
            what = f"no tick came for {duration(silent)}, and the market is open"
            yield Finding("feed", "fail", what, "/test_ticks, /restart")

    async def _report(self, html: str) -> bool:
        """Send to every operator; return False when Telegram accepted it for none of them."""
        is_accepted = False
        for admin in sorted(self._services.access.admins):
            try:
                await with_retries(
                    lambda admin=admin: self._bot.send_message(admin, html, parse_mode=ParseMode.HTML)  # type: ignore[misc]
                )
                is_accepted = True
            except TelegramError as error:  # Forbidden: this operator never wrote to the bot
                log.warning("report_failed", admin=admin, reason=type(error).__name__)
        return is_accepted

    def _load_reported(self) -> dict[str, Problem]:
        cells: Any = self._services.client.hgetall(self._services.keys.bot_troubles())
        problems: dict[str, Problem] = {}
        for check, text in cells.items():
            try:
                problems[check.decode()] = msgspec.json.decode(text, type=Problem)
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue  # malformed: it is reported again
        return problems

    async def _save(self, check: str, problem: Problem | None) -> None:
        client, key = self._services.client, self._services.keys.bot_troubles()
        try:
            if problem is None:
                await asyncio.to_thread(client.hdel, key, check)
            else:
                await asyncio.to_thread(client.hset, key, check, msgspec.json.encode(problem))
        except redis.RedisError as error:
            log.warning("report_not_saved", check=check, reason=type(error).__name__)


def _worst_by_check(findings: Iterable[Finding]) -> dict[str, Finding]:
    worst: dict[str, Finding] = {}
    for finding in findings:
        if finding.level != "ok" and (finding.check not in worst or finding.level == "fail"):
            worst[finding.check] = finding
    return worst
