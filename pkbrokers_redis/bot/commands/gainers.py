"""/gainers: what gained most since yesterday's close."""

from __future__ import annotations

from pkbrokers_redis.bot.ask import Ask
from pkbrokers_redis.bot.rankings import movers_of, reply_table, rows_asked
from pkbrokers_redis.bot.registry import Command
from pkbrokers_redis.bot.text import money, percent


async def gainers(ask: Ask) -> None:
    rows = rows_asked(ask)
    known = [each for each in await movers_of(ask) if each.change is not None and each.volume]
    known.sort(key=lambda each: each.change or 0.0, reverse=True)
    columns = {"price": lambda m: money(m.price), "change": lambda m: percent(m.change)}
    await reply_table(ask, "Gainers", known[:rows], columns)


COMMAND = Command("gainers", "what gained most since the previous close", gainers, "[N]", words_max=1)
