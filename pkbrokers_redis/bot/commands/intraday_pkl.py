"""/intraday_pkl: 1-minute candles as a pickle."""

from __future__ import annotations

from pkbrokers_redis.bot.ask import Ask
from pkbrokers_redis.bot.files.delivery import deliver
from pkbrokers_redis.bot.registry import Command


async def intraday_pkl(ask: Ask) -> None:
    await deliver(ask, "intraday_pkl")


COMMAND = Command("intraday_pkl", "1-minute candles as a pickle", intraday_pkl, is_slow=True)
