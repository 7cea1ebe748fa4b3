"""Commands that show and operate the pipeline: /status, /token, /refresh_token, /restart, /test_ticks."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from pkbrokers_redis.bot.context import Command, CommandContext
from pkbrokers_redis.bot.operators import check_pipeline
from pkbrokers_redis.bot.snapshot_index import FILE_KINDS, newest
from pkbrokers_redis.bot.text import count, day_time, duration, escape, size
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.kite.rest import session_in
from pkbrokers_redis.runtime.cluster_state import ClusterState, read_workers
from pkbrokers_redis.runtime.health import Finding, health_of
from pkbrokers_redis.runtime.roles import request_restart
from pkbrokers_redis.store.auth import load_session

SYMBOLS = {"ok": "✅", "warn": "⚠️", "fail": "❌"}
COUNT_SECONDS = 10.0  # of /test_ticks


async def status(context: CommandContext) -> None:
    """Send the pipeline's health as `pkb status` has it, the workers, and the age of the files."""
    cluster, findings = await context.read(check_pipeline, context.services)
    files = await context.read(_files_text, context)
    parts = [_health_text(findings), _workers_text(cluster), files]
    await context.reply("\n\n".join(filter(None, parts)))


def _health_text(findings: list[Finding]) -> str:
    lines = [f"{SYMBOLS[row.level]} {escape(row.check)}: {escape(row.message)}" for row in findings]
    return f"<b>The pipeline is {health_of(findings)}.</b>\n" + "\n".join(lines)


def _workers_text(cluster: ClusterState) -> str:
    lines = []
    for worker in cluster.workers:
        rate = worker.number("ticks_per_second")
        age = "dead" if worker.age_ms is None else f"alive {duration(worker.age_ms / 1000)} ago"
        lines.append(f"{escape(worker.role)}: {age}" + (f", {count(rate)} ticks/s" if rate else ""))
    return "\n".join(lines)


def _files_text(context: CommandContext) -> str:
    folder = context.services.settings.files_folder
    found = [(name, snapshot) for name, kind in FILE_KINDS.items() if (snapshot := newest(folder, kind))]
    return "\n".join(f"/{name}: {size(found.size_bytes)}, {day_time(found.made_at)}" for name, found in found)


async def token(context: CommandContext) -> None:
    """Send the Kite session's age and expiry. It never sends the token: a chat is not a safe place."""
    await context.reply(await context.read(_session_text, context))


def _session_text(context: CommandContext) -> str:
    services = context.services
    session = load_session(services.client, services.keys)
    if session is None:
        if session_in(services.settings) is not None:
            return "The session comes from the settings; its age is unknown. /refresh_token makes a new one."
        return "There is no Kite session. /refresh_token makes one."
    kind = "access token" if session.kind == "access_token" else "web session"
    now = time.time()
    lines = [f"Kite session ({kind}{', ' + escape(session.user_id) if session.user_id else ''})"]
    if session.login_at:
        lines.append(f"made {day_time(session.login_at)}, {duration(now - session.login_at)} ago")
    if session.expires_at:
        lines.append(f"ends {day_time(session.expires_at)}, in {duration(session.expires_at - now)}")
    return "\n".join(lines)


async def refresh_token(context: CommandContext) -> None:
    """Log in at Kite; all processes get the new session."""
    await _log_in(context)
    await context.reply("✅ " + await context.read(_session_text, context))


async def _log_in(context: CommandContext) -> None:
    """Log in and share the session. Raise as `SessionManager.log_in`."""

    def log_in() -> None:
        from pkbrokers_redis.kite.session import SessionManager
        from pkbrokers_redis.store.connect import connect

        settings = context.services.settings
        with connect(settings) as client:
            SessionManager(settings, lambda: client).log_in()

    progress = await context.reply("Logging in at Kite; a fresh TOTP may take half a minute …")
    await context.read(log_in)
    await context.edit(progress, "Logged in at Kite.")


async def restart(context: CommandContext) -> None:
    """Log in at Kite and restart the ingest workers."""
    try:
        await _log_in(context)
    except PkbError as error:  # the old session can still be valid, and a restart can help without a new one
        await context.reply(f"No new session: {escape(str(error))}")
    await context.read(request_restart, context.services.client, context.services.keys, "ingest")
    await context.reply("The ingest workers restart within seconds. /status shows them.")


async def count_ticks(context: CommandContext) -> None:
    """Count the entries that arrive in COUNT_SECONDS. It starts no feed of its own, unlike upstream."""
    progress = await context.reply(f"Counting ticks for {COUNT_SECONDS:.0f} s …")
    before, started = await context.read(_entries_added, context), time.monotonic()
    await asyncio.sleep(COUNT_SECONDS)
    after, seconds = await context.read(_entries_added, context), time.monotonic() - started
    added = {shard: total - before.get(shard, 0) for shard, total in after.items()}
    frames = sum(added.values())
    summary = "ticks arrive." if frames else "no tick came."
    lines = [f"{count(frames)} entries in {seconds:.0f} s: {summary}"]
    workers = await context.read(
        read_workers, context.services.client, context.services.keys, time.time() * 1000
    )
    lines += [
        f"{escape(worker.id)}: {count(worker.number('ticks_per_second'))} ticks/s"
        for worker in workers
        if worker.role == "ingest"
    ]
    silent = sorted(shard for shard, number in added.items() if not number)
    if frames and silent:
        lines.append(f"Nothing on shard {', '.join(map(str, silent))}.")
    if not frames:
        lines.append("/status shows the cause, /restart logs in again and restarts the feed.")
    await context.edit(progress, "\n".join(lines))


def _entries_added(context: CommandContext) -> dict[int, int]:
    """Return shard → entries ever added to its tick stream."""
    keys, client = context.services.keys, context.services.client
    pipeline = client.pipeline(transaction=False)
    for shard in range(keys.shards):
        pipeline.xinfo_stream(keys.ticks(shard))
    replies: list[Any] = pipeline.execute(raise_on_error=False)
    return {n: int(info["entries-added"]) for n, info in enumerate(replies) if isinstance(info, dict)}


COMMANDS = [
    Command("status", "the pipeline's health, workers and files", status),
    Command("token", "the Kite session's age and expiry, never the token", token, for_admins=True),
    Command(
        "refresh_token",
        "log in at Kite again; all processes get the session",
        refresh_token,
        for_admins=True,
        question="Log in at Kite and replace everybody's session?",
        is_slow=True,
    ),
    Command(
        "restart",
        "log in again and restart the ingest workers",
        restart,
        for_admins=True,
        question="Log in at Kite and restart all ingest workers?",
        is_slow=True,
    ),
    Command(
        "test_ticks",
        "count the ticks that arrive for ten seconds",
        count_ticks,
        for_admins=True,
        is_slow=True,
    ),
]
