"""What operators see: problems as messages, and /status, /token, /refresh_token, /restart, /test_ticks.

PKB_TELEGRAM_ADMINS get one message when a problem begins or gets worse, and one when it ends.

P:{bot}:troubles   hash   check → {"level", "what", "since"}: problems that were reported, so that a restart
                          does not report them again
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import msgspec
import redis
from telegram.constants import ParseMode
from telegram.error import TelegramError
from telegram.ext import ExtBot

from pkbrokers_redis import logs
from pkbrokers_redis.bot.alerts.worker import FeedMonitor
from pkbrokers_redis.bot.context import Command, CommandContext, Services
from pkbrokers_redis.bot.files import FILE_KINDS, newest
from pkbrokers_redis.bot.telegram_client import with_retries
from pkbrokers_redis.bot.text import count, day_time, duration, escape, size
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.kite.rest import session_in
from pkbrokers_redis.kite.session import SessionManager
from pkbrokers_redis.runtime.cluster_state import ClusterState, Finding, Level, read_cluster_state
from pkbrokers_redis.runtime.health import (
    BEAT_AGE_MS_MAX,
    FAILED_JOBS,
    STATUS_CHECKS,
    check_jobs,
    health_of,
    run_checks,
)
from pkbrokers_redis.runtime.roles import request_restart
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.auth import load_session
from pkbrokers_redis.store.connect import connect, describe
from pkbrokers_redis.store.queue import connect_queue

log = logs.get("operators")

CHECK_EVERY_SECONDS = 2.0  # a dead worker's beat is late for 4 s before its key expires: time for two checks
CHECKS_BEFORE_REPORT = 2  # a worker that is being replaced is not a problem
SILENT_SECONDS_MAX = 60.0
DISK_PART_MAX = 0.9
DISK_FREE_BYTES_MIN = 2**30
SYMBOLS = {"ok": "✅", "warn": "⚠️", "fail": "❌"}
COUNT_SECONDS = 10.0  # of /test_ticks
ROLES_IN_HEALTH = {"ingest", "aggregate"}  # whose heartbeats runtime/health.py judges


class Problem(msgspec.Struct):
    """A finding that was reported to the operators; `since` is epoch seconds."""

    level: str
    what: str
    since: float


def check_pipeline(services: Services) -> tuple[ClusterState, list[Finding]]:
    """Return the pipeline's state and all findings, those of this module included. It blocks."""
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
    folder = settings.data_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    if usage.free >= 10 * DISK_FREE_BYTES_MIN or usage.used <= DISK_PART_MAX * usage.total:
        return Finding("disk", "ok", f"{usage.free / 1e9:,.0f} GB free")
    level: Level = "fail" if usage.free < DISK_FREE_BYTES_MIN else "warn"
    what = f"{size(usage.free)} are free on the disk of PKB_DATA_DIR"
    return Finding("disk", level, what, "delete files there")


def _jobs(services: Services) -> Finding:
    """Judge the list of failed jobs, on the jobs' Redis if there is one."""
    settings = services.settings
    try:
        if services.jobs_client is None:
            own = settings.rq_redis_url is not None
            services.jobs_client = connect_queue(settings) if own else services.client
        failed: Any = services.jobs_client.zcard(FAILED_JOBS)
    except PkbError as error:
        return Finding("jobs", "warn", error.message, error.hint)
    except redis.ConnectionError:
        hint = "start it, or correct PKB_RQ_REDIS_URL"
        return Finding("jobs", "warn", "the jobs' Redis does not answer", hint)
    return check_jobs(int(failed))


class OperatorMonitor:
    """Checks the pipeline every CHECK_EVERY_SECONDS and reports what changed. It needs operators."""

    def __init__(self, bot: ExtBot[Any], services: Services, feed: FeedMonitor) -> None:
        self._bot, self._services, self._feed = bot, services, feed
        self._failures: dict[str, int] = {}  # check → failures in a row

    async def run(self) -> None:
        """Check until cancelled."""
        while True:
            await asyncio.sleep(CHECK_EVERY_SECONDS)
            try:
                _, findings = await asyncio.to_thread(check_pipeline, self._services)
                findings += self._silent_feed()
                # Of two findings of a check the worse one counts: "warn" before "fail".
                findings.sort(key=lambda finding: finding.level, reverse=True)
                await self._report_changes({each.check: each for each in findings if each.level != "ok"})
            except (redis.RedisError, PkbError, OSError) as error:
                log.warning("check_failed", reason=type(error).__name__)

    def _silent_feed(self) -> Iterator[Finding]:
        silent = self._feed.silent_seconds
        if min(silent, self._feed.open_seconds()) > SILENT_SECONDS_MAX:
            what = f"no tick came for {duration(silent)}, and the market is open"
            yield Finding("feed", "fail", what, "/test_ticks, /restart")

    async def _report_changes(self, problems: dict[str, Finding]) -> None:
        client, key = self._services.client, self._services.keys.bot_troubles()
        reported = await asyncio.to_thread(self._load_reported)
        self._failures = {check: self._failures.get(check, 0) + 1 for check in problems}
        for check, finding in problems.items():
            known = reported.get(check)
            is_news = known is None or (known.level != "fail" and finding.level == "fail")
            if not is_news or self._failures[check] < CHECKS_BEFORE_REPORT:
                continue
            text = f"{SYMBOLS[finding.level]} <b>{escape(check)}</b>: {escape(finding.message)}"
            since = time.time() if known is None else known.since
            if await self._report(f"{text}\n{escape(finding.hint)}".strip()):
                problem = Problem(finding.level, finding.message, since)
                await asyncio.to_thread(client.hset, key, check, msgspec.json.encode(problem))
        for check in reported.keys() - problems.keys():
            lasted = duration(time.time() - reported[check].since)
            if await self._report(f"✅ <b>{escape(check)}</b>: recovered after {lasted}"):
                await asyncio.to_thread(client.hdel, key, check)

    async def _report(self, html: str) -> bool:
        """Send to every operator; return False when Telegram accepted it for none of them."""
        is_accepted = False
        for admin in sorted(self._services.access.admins):
            try:
                await with_retries(self._bot.send_message, admin, html, parse_mode=ParseMode.HTML)
                is_accepted = True
            except TelegramError as error:  # Forbidden: this operator never wrote to the bot
                log.warning("report_failed", admin=admin, reason=type(error).__name__)
        return is_accepted

    def _load_reported(self) -> dict[str, Problem]:
        cells: Any = self._services.client.hgetall(self._services.keys.bot_troubles())
        problems: dict[str, Problem] = {}
        for check, text in cells.items():
            with suppress(msgspec.DecodeError, UnicodeDecodeError):  # malformed: it is reported again
                problems[check.decode()] = msgspec.json.decode(text, type=Problem)
        return problems


@Command("status", "the pipeline's health, workers and files")
async def status(context: CommandContext) -> None:
    """Send the pipeline's health as `pkb status` has it, the workers, and the age of the files."""
    await context.reply(await context.read(_status_text, context.services))


def _status_text(services: Services) -> str:
    cluster, findings = check_pipeline(services)
    lines = [f"<b>The pipeline is {health_of(findings)}.</b>"]
    lines += [f"{SYMBOLS[row.level]} {escape(row.check)}: {escape(row.message)}" for row in findings]
    lines.append("")
    for worker in cluster.workers:
        rate = worker.number("ticks_per_second")
        age = "dead" if worker.age_ms is None else f"alive {duration(worker.age_ms / 1000)} ago"
        lines.append(f"{escape(worker.role)}: {age}" + (f", {count(rate)} ticks/s" if rate else ""))
    lines.append("")
    for name, kind in FILE_KINDS.items():
        if found := newest(services.settings.files_folder, kind):
            lines.append(f"/{name}: {size(found.size_bytes)}, {day_time(found.made_at)}")
    return "\n".join(lines)


@Command("token", "the Kite session's age and expiry, never the token", for_admins=True)
async def token(context: CommandContext) -> None:
    """Send the Kite session's age and expiry. It never sends the token: a chat is not a safe place."""
    await context.reply(await context.read(_session_text, context))


def _session_text(context: CommandContext) -> str:
    services = context.services
    session = load_session(services.client, services.keys)
    if session is None and session_in(services.settings) is None:
        return "There is no Kite session. /refresh_token makes one."
    if session is None:
        return "The session comes from the settings; its age is unknown. /refresh_token makes a new one."
    kind = "access token" if session.kind == "access_token" else "web session"
    now = time.time()
    lines = [f"Kite session ({kind}{', ' + escape(session.user_id) if session.user_id else ''})"]
    if session.login_at:
        lines.append(f"made {day_time(session.login_at)}, {duration(now - session.login_at)} ago")
    if session.expires_at:
        lines.append(f"ends {day_time(session.expires_at)}, in {duration(session.expires_at - now)}")
    return "\n".join(lines)


@Command(
    "refresh_token",
    "log in at Kite again; all processes get the session",
    for_admins=True,
    question="Log in at Kite and replace everybody's session?",
    is_slow=True,
)
async def refresh_token(context: CommandContext) -> None:
    """Log in at Kite; all processes get the new session."""
    await _log_in(context)
    await context.reply("✅ " + await context.read(_session_text, context))


async def _log_in(context: CommandContext) -> None:
    """Log in and share the session. Raise as `SessionManager.log_in`."""
    settings = context.services.settings

    def log_in() -> None:
        with connect(settings) as client:
            SessionManager(settings, lambda: client).log_in()

    progress = await context.reply("Logging in at Kite; a fresh TOTP may take half a minute …")
    await context.read(log_in)
    await context.edit(progress, "Logged in at Kite.")


@Command(
    "restart",
    "log in again and restart the ingest workers",
    for_admins=True,
    question="Log in at Kite and restart all ingest workers?",
    is_slow=True,
)
async def restart(context: CommandContext) -> None:
    """Log in at Kite and restart the ingest workers."""
    try:
        await _log_in(context)
    except PkbError as error:  # the old session can still be valid, and a restart can help without a new one
        await context.reply(f"No new session: {escape(str(error))}")
    await context.read(request_restart, context.services.client, context.services.keys, "ingest")
    await context.reply("The ingest workers restart within seconds. /status shows them.")


@Command("test_ticks", "count the ticks that arrive for ten seconds", for_admins=True, is_slow=True)
async def count_ticks(context: CommandContext) -> None:
    """Count the entries that arrive in COUNT_SECONDS. It starts no feed of its own, unlike upstream."""
    progress = await context.reply(f"Counting ticks for {COUNT_SECONDS:.0f} s …")
    before = await context.read(_entries_added, context.services)
    await asyncio.sleep(COUNT_SECONDS)
    after = await context.read(_entries_added, context.services)
    added = [later - earlier for earlier, later in zip(before, after, strict=True)]
    text = f"{count(sum(added))} entries in {COUNT_SECONDS:.0f} s: "
    if not any(added):
        text += "no tick came.\n/status shows the cause, /restart logs in again and restarts the feed."
    elif silent := [str(shard) for shard, number in enumerate(added) if not number]:
        text += f"ticks arrive, but nothing on shard {', '.join(silent)}."
    else:
        text += "ticks arrive on every shard."
    await context.edit(progress, text)


def _entries_added(services: Services) -> list[int]:
    """Return the number of entries ever added to the tick stream of each shard."""
    pipeline = services.client.pipeline(transaction=False)
    for shard in range(services.keys.shards):
        pipeline.xinfo_stream(services.keys.ticks(shard))
    replies: list[Any] = pipeline.execute(raise_on_error=False)
    return [int(info["entries-added"]) if isinstance(info, dict) else 0 for info in replies]
