"""/daily_pkl: daily candles as a pickle."""

from __future__ import annotations

from pkbrokers_redis.bot.ask import Ask
from pkbrokers_redis.bot.files.delivery import deliver
from pkbrokers_redis.bot.registry import Command


async def daily_pkl(ask: Ask) -> None:
    await deliver(ask, "daily_pkl")


COMMAND = Command("daily_pkl", "daily candles as a pickle", daily_pkl, is_slow=True)
