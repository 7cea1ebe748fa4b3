"""/active: what was traded most today, in rupees."""

from __future__ import annotations

from pkbrokers_redis.bot.ask import Ask
from pkbrokers_redis.bot.rankings import movers_of, reply_table, rows_asked
from pkbrokers_redis.bot.registry import Command
from pkbrokers_redis.bot.text import count, money, percent

CRORE = 1e7


async def active(ask: Ask) -> None:
    rows = rows_asked(ask)
    traded = sorted(await movers_of(ask), key=lambda each: each.turnover, reverse=True)
    columns = {
        "price": lambda m: money(m.price),
        "change": lambda m: percent(m.change),
        "₹ crore": lambda m: (
            count(m.turnover / CRORE) if m.turnover >= CRORE else f"{m.turnover / CRORE:.2f}"
        ),
    }
    await reply_table(ask, "Most active", [each for each in traded if each.turnover][:rows], columns)


COMMAND = Command("active", "what was traded most today, in rupees", active, "[N]", words_max=1)
