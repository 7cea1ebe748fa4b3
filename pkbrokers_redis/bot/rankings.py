"""What /gainers, /losers, /active and /top share."""

from __future__ import annotations

from collections.abc import Callable

from pkbrokers_redis.bot.ask import Ask
from pkbrokers_redis.bot.movers import Mover, Movers
from pkbrokers_redis.bot.text import table
from pkbrokers_redis.bot.usage import UsageError

ROWS, ROWS_MAX = 10, 50


async def movers_of(ask: Ask) -> list[Mover]:
    """All instruments' day, read at most every few seconds for everybody together."""
    services = ask.services
    if services.movers is None:
        services.movers = Movers(services.store)
    return await ask.read(services.movers.all)


def rows_asked(ask: Ask, default: int = ROWS) -> int:
    """The number behind the command. Raises UsageError."""
    if not ask.words:
        return default
    word = ask.words[0]
    if not (word.isascii() and word.isdecimal() and 1 <= int(word[:6]) <= ROWS_MAX):
        raise UsageError(f"{word[:20]!r} is not a number from 1 to {ROWS_MAX}", "send it without, or e.g. 20")
    return int(word)


async def reply_table(
    ask: Ask,
    title: str,
    movers: list[Mover],
    columns: dict[str, Callable[[Mover], str]],
) -> None:
    """A ranking; one line where there is nothing to rank."""
    if not movers:
        await ask.reply("Nothing has been traded yet.")
        return
    rows = [(each.symbol.removeprefix("NSE:"), *(cell(each) for cell in columns.values())) for each in movers]
    await ask.reply(f"<b>{title}</b>\n{table(('', *columns), rows)}")
