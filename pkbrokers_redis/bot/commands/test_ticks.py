"""/test_ticks: counts what arrives for ten seconds. Upstream starts a second feed for it; ours only looks."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from pkbrokers_redis.bot.ask import Ask
from pkbrokers_redis.bot.registry import Command
from pkbrokers_redis.bot.text import count, escape

SECONDS = 10.0


async def count_ticks(ask: Ask) -> None:
    progress = await ask.reply(f"Counting ticks for {SECONDS:.0f} s …")
    before, began = await ask.read(_added, ask), time.monotonic()
    await asyncio.sleep(SECONDS)
    after, seconds = await ask.read(_added, ask), time.monotonic() - began
    frames = sum(after[shard] - before.get(shard, 0) for shard in after)
    rates = await ask.read(_rates, ask)
    silent = sorted(shard for shard in after if after[shard] == before.get(shard, 0))
    lines = [
        f"{count(frames)} entries in {seconds:.0f} s: " + ("ticks arrive." if frames else "no tick came.")
    ]
    lines += [f"{escape(worker)}: {count(rate)} ticks/s" for worker, rate in rates]
    if frames and silent:
        lines.append(f"Nothing on shard {', '.join(map(str, silent))}.")
    if not frames:
        lines.append("/status shows why, /restart logs in anew and starts the feed again.")
    await ask.edit(progress, "\n".join(lines))


def _added(ask: Ask) -> dict[int, int]:
    """Shard → entries ever added to its tick stream."""
    keys, client = ask.services.keys, ask.services.client
    pipeline = client.pipeline(transaction=False)
    for shard in range(keys.shards):
        pipeline.xinfo_stream(keys.ticks(shard))
    replies: list[Any] = pipeline.execute(raise_on_error=False)
    return {n: int(info["entries-added"]) for n, info in enumerate(replies) if isinstance(info, dict)}


def _rates(ask: Ask) -> list[tuple[str, float]]:
    from pkbrokers_redis.runtime.cluster_state import read_workers

    workers = read_workers(ask.services.client, ask.services.keys, time.time() * 1000)
    return [(each.id, each.number("ticks_per_second")) for each in workers if each.role == "ingest"]


COMMAND = Command(
    "test_ticks", "count the ticks that arrive for ten seconds", count_ticks, for_admins=True, is_slow=True
)
