"""/ticks: the latest day of every instrument as ticks.json."""

from __future__ import annotations

from pkbrokers_redis.bot.ask import Ask
from pkbrokers_redis.bot.files.delivery import deliver
from pkbrokers_redis.bot.registry import Command


async def ticks(ask: Ask) -> None:
    await deliver(ask, "ticks")


COMMAND = Command("ticks", "the latest day of every instrument as ticks.json", ticks, is_slow=True)
