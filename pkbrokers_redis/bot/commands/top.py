"""/top: what ticks most. Upstream's, with its twenty."""

from __future__ import annotations

from pkbrokers_redis.bot.ask import Ask
from pkbrokers_redis.bot.rankings import movers_of, reply_table, rows_asked
from pkbrokers_redis.bot.registry import Command
from pkbrokers_redis.bot.text import count, money


async def top(ask: Ask) -> None:
    rows = rows_asked(ask, 20)
    busiest = sorted(await movers_of(ask), key=lambda each: each.ticks, reverse=True)[:rows]
    columns = {"ticks": lambda m: count(m.ticks), "price": lambda m: money(m.price)}
    await reply_table(ask, "Top by ticks today", busiest, columns)


COMMAND = Command("top", "the instruments with the most ticks today", top, "[N]", words_max=1)
