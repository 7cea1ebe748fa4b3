"""Messages to the operators: what `pkb status` would call degraded or down, once when it begins and once when
it is over.

    P:{bot}:troubles   hash   check → {"level", "what", "since"}, so that a restart does not tell it again
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import redis
from telegram.constants import ParseMode
from telegram.error import TelegramError
from telegram.ext import ExtBot

from pkbrokers_redis import logs
from pkbrokers_redis.bot.alerts.feed import FeedWatch
from pkbrokers_redis.bot.alerts.worker import AlertWorker
from pkbrokers_redis.bot.sending import insist
from pkbrokers_redis.bot.services import Services
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

log = logs.get("operators")

LOOK_EVERY_SECONDS = 2.0  # a dead worker is late for 4 s, then gone: two looks must fall into that
LOOKS_BEFORE_TOLD = 2  # a worker that is replaced, a shard on its way, is no trouble
SILENT_SECONDS_MAX = 60.0
DISK_PART_MAX = 0.9
DISK_FREE_BYTES_MIN = 2**30
ROLES_JUDGED = {"ingest", "aggregate"}  # by health.py
PROBLEM, WORSE = {"warn": "⚠️", "fail": "❌"}, "fail"


class Trouble(msgspec.Struct):
    """A finding the operators were told of."""

    level: str
    what: str
    since: float


def look(services: Services) -> tuple[ClusterState, list[Finding]]:
    """One picture of the pipeline and what the rules say of it, ours included. For threads."""
    client, settings = services.client, services.settings
    cluster = read_cluster_state(client, settings.keys, describe(settings, for_reading=True))
    findings = run_checks(cluster, STATUS_CHECKS)
    findings += [*_others_live(cluster), *_session(client, settings), *_disk(settings), *_jobs(services)]
    return cluster, findings


def _session(client: redis.Redis, settings: Settings) -> Iterator[Finding]:
    """The Kite session is there, and Kite has not refused it."""
    try:
        session = load_session(client, settings.keys)
    except PkbError as error:
        yield Finding("session", "warn", error.message, error.hint)
        return
    if session is None and session_in(settings) is None:
        refused = client.hexists(settings.keys.auth(), "refused")
        what = "the Kite session has expired" if refused else "there is no Kite session"
        yield Finding("session", "warn", what, "/refresh_token, or `pkb login`")
    else:
        yield Finding("session", "ok", "there is a Kite session")


def _disk(settings: Settings) -> Iterator[Finding]:
    """The disk of PKB_DATA_DIR (spool, snapshots, the embedded server) has room."""
    folder = settings.data_dir
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    if usage.used > DISK_PART_MAX * usage.total and usage.free < DISK_FREE_BYTES_MIN * 10:
        level: Any = "fail" if usage.free < DISK_FREE_BYTES_MIN else "warn"
        yield Finding("disk", level, f"{size(usage.free)} are free on the disk of PKB_DATA_DIR", "make room")
    else:
        yield Finding("disk", "ok", f"{usage.free / 1e9:,.0f} GB free")


def _others_live(cluster: ClusterState) -> Iterator[Finding]:
    """The workers of roles that the pipeline can do without for a while beat, too."""
    for role in sorted({each.role for each in cluster.workers} - ROLES_JUDGED):
        late = [each.id for each in cluster.alive(role) if (each.age_ms or 0) > BEAT_AGE_MS_MAX]
        if late:
            yield Finding(role, "warn", f"{', '.join(late[:5])} does not beat", "look at its log")


def _jobs(services: Services) -> Iterator[Finding]:
    """No job is listed as failed."""
    client, settings = services.client, services.settings
    if settings.rq_redis_url is not None:
        from pkbrokers_redis.store.queue import connect_queue

        try:
            if services.jobs_client is None:
                services.jobs_client = connect_queue(settings)
            client = services.jobs_client
        except PkbError as error:
            yield Finding("jobs", "warn", error.message, error.hint)
            return
    try:
        failed: Any = client.zcard(FAILED_JOBS)
    except redis.ConnectionError:
        if client is services.client:
            raise
        yield Finding(
            "jobs", "warn", "the jobs' Redis does not answer", "start it, or correct PKB_RQ_REDIS_URL"
        )
        return
    yield check_jobs(int(failed))


class Monitor:
    """Looks every few seconds, and tells PKB_TELEGRAM_ADMINS what changed."""

    def __init__(self, bot: ExtBot[Any], services: Services, worker: AlertWorker) -> None:
        self._bot, self._services, self._worker = bot, services, worker
        self._feed = FeedWatch(services.settings, time.monotonic)
        self._seen: dict[str, int] = {}  # check → looks in a row that found it

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_SECONDS)
            if self._services.access.admins:
                await self.look_once()

    async def look_once(self) -> None:
        """One look; messages for what began, got worse or ended."""
        try:
            _, findings = await asyncio.to_thread(look, self._services)
            findings += self._mute()
            told = await asyncio.to_thread(self._told)
        except (redis.RedisError, PkbError, OSError) as error:
            log.warning("cannot_look", error=type(error).__name__)
            return
        worst: dict[str, Finding] = {}
        for finding in findings:
            if finding.level == "ok":
                continue
            if finding.check not in worst or finding.level == WORSE:
                worst[finding.check] = finding
        self._seen = {check: self._seen.get(check, 0) + 1 for check in worst}
        for check, finding in worst.items():
            known = told.get(check)
            is_worse = known is not None and known.level != WORSE and finding.level == WORSE
            if (known is None or is_worse) and self._seen[check] >= LOOKS_BEFORE_TOLD:
                since = time.time() if known is None else known.since
                text = f"{PROBLEM[finding.level]} <b>{escape(check)}</b>: {escape(finding.message)}"
                text += f"\n{escape(finding.hint)}" if finding.hint else ""
                if await self.tell(text):
                    await self._note(check, Trouble(finding.level, finding.message, since))
        for check in told.keys() - worst.keys():
            lasted = duration(time.time() - told[check].since)
            if await self.tell(f"✅ <b>{escape(check)}</b>: well again, after {lasted}"):
                await self._note(check, None)

    def _mute(self) -> Iterator[Finding]:
        """The market is open and no tick comes, though somebody reads Kite."""
        silent = self._worker.silent_seconds
        if silent > SILENT_SECONDS_MAX and self._feed.open_seconds() > SILENT_SECONDS_MAX:
            what = f"no tick came for {duration(silent)}, and the market is open"
            yield Finding("feed", "fail", what, "/test_ticks, /restart")

    async def tell(self, html: str) -> bool:
        """To every admin; False when Telegram took it for none of them."""
        taken = False
        for admin in sorted(self._services.access.admins):
            try:
                await insist(
                    lambda admin=admin: self._bot.send_message(admin, html, parse_mode=ParseMode.HTML)  # type: ignore[misc]
                )
                taken = True
            except TelegramError as error:  # one who never wrote to the bot cannot be written to
                log.warning("not_told", admin=admin, error=type(error).__name__)
        return taken

    def _told(self) -> dict[str, Trouble]:
        found: Any = self._services.client.hgetall(self._services.keys.bot_troubles())
        troubles: dict[str, Trouble] = {}
        for check, text in found.items():
            try:
                troubles[check.decode()] = msgspec.json.decode(text, type=Trouble)
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue  # a foreign hand's
        return troubles

    async def _note(self, check: str, trouble: Trouble | None) -> None:
        client, key = self._services.client, self._services.keys.bot_troubles()
        try:
            if trouble is None:
                await asyncio.to_thread(client.hdel, key, check)
            else:
                await asyncio.to_thread(client.hset, key, check, msgspec.json.encode(trouble))
        except redis.RedisError as error:
            log.warning("not_noted", check=check, error=type(error).__name__)
