"""/status: the pipeline's health, as `pkb status` has it, and the age of the files."""

from __future__ import annotations

from pkbrokers_redis.bot.ask import Ask
from pkbrokers_redis.bot.files.shelf import KINDS, newest
from pkbrokers_redis.bot.operators import look
from pkbrokers_redis.bot.registry import Command
from pkbrokers_redis.bot.text import count, day_time, duration, escape, size
from pkbrokers_redis.runtime.cluster_state import ClusterState
from pkbrokers_redis.runtime.health import Finding, health_of

MARKS = {"ok": "✅", "warn": "⚠️", "fail": "❌"}


async def status(ask: Ask) -> None:
    cluster, findings = await ask.read(look, ask.services)
    files = await ask.read(_files, ask)
    await ask.reply("\n\n".join(filter(None, [_health(findings), _workers(cluster), files])))


def _health(findings: list[Finding]) -> str:
    lines = [f"{MARKS[each.level]} {escape(each.check)}: {escape(each.message)}" for each in findings]
    return f"<b>The pipeline is {health_of(findings)}.</b>\n" + "\n".join(lines)


def _workers(cluster: ClusterState) -> str:
    lines = []
    for worker in cluster.workers:
        rate = worker.number("ticks_per_second")
        age = "gone" if worker.age_ms is None else f"heard {duration(worker.age_ms / 1000)} ago"
        lines.append(f"{escape(worker.role)}: {age}" + (f", {count(rate)} ticks/s" if rate else ""))
    return "\n".join(lines)


def _files(ask: Ask) -> str:
    folder = ask.services.settings.files_folder
    lines = []
    for name, kind in KINDS.items():
        found = newest(folder, kind)
        if found is not None:
            lines.append(f"/{name}: {size(found.size_bytes)}, {day_time(found.made_at)}")
    return "\n".join(lines)


COMMAND = Command("status", "the pipeline's health, workers and files", status)
