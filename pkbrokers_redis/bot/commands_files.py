"""Commands that send files; `snapshot_index.FILE_KINDS` says which."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from pkbrokers_redis.bot.context import Command, CommandContext
from pkbrokers_redis.bot.file_delivery import deliver
from pkbrokers_redis.bot.text import escape
from pkbrokers_redis.errors import PkbError

REQUEST_DATA = ("daily_pkl", "intraday_pkl", "db", "instrument_history")


def _deliver(name: str) -> Callable[[CommandContext], Awaitable[None]]:
    async def handler(context: CommandContext) -> None:
        await deliver(context, name)

    return handler


async def request_data(context: CommandContext) -> None:
    """Send all files that another instance needs; a missing one does not stop the rest."""
    sent = 0
    for name in REQUEST_DATA:
        try:
            await deliver(context, name)
            sent += 1
        except PkbError as error:
            await context.reply(f"/{name}: {escape(str(error))}")
    await context.reply(f"{sent} of {len(REQUEST_DATA)} files sent.")


COMMANDS = [
    *(
        Command(name, does, _deliver(name), is_slow=True)
        for name, does in (
            ("ticks", "the latest day of every instrument as ticks.json"),
            ("db", "all candles as an SQLite file"),
            ("daily_pkl", "daily candles as a pickle"),
            ("intraday_pkl", "1-minute candles as a pickle"),
            ("instrument_history", "the history of all instruments as an SQLite file"),
        )
    ),
    Command("request_data", "all files, one after the other", request_data, for_admins=True, is_slow=True),
]
