"""/instrument_history: the history of all instruments as an SQLite file."""

from __future__ import annotations

from pkbrokers_redis.bot.ask import Ask
from pkbrokers_redis.bot.files.delivery import deliver
from pkbrokers_redis.bot.registry import Command


async def instrument_history(ask: Ask) -> None:
    await deliver(ask, "instrument_history")


COMMAND = Command(
    "instrument_history", "the history of all instruments as an SQLite file", instrument_history, is_slow=True
)
