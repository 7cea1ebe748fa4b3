"""/db: all candles as an SQLite file."""

from __future__ import annotations

from pkbrokers_redis.bot.ask import Ask
from pkbrokers_redis.bot.files.delivery import deliver
from pkbrokers_redis.bot.registry import Command


async def db(ask: Ask) -> None:
    await deliver(ask, "db")


COMMAND = Command("db", "all candles as an SQLite file", db, is_slow=True)
