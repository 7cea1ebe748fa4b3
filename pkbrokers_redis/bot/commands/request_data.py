"""/request_data: everything another instance wants, one file after the other."""

from __future__ import annotations

from pkbrokers_redis.bot.ask import Ask
from pkbrokers_redis.bot.files.delivery import deliver
from pkbrokers_redis.bot.registry import Command
from pkbrokers_redis.bot.text import escape
from pkbrokers_redis.errors import PkbError

FILES = ("daily_pkl", "intraday_pkl", "db", "instrument_history")


async def request_data(ask: Ask) -> None:
    sent = 0
    for name in FILES:
        try:
            await deliver(ask, name)
            sent += 1
        except PkbError as error:  # the others may be there
            await ask.reply(f"/{name}: {escape(str(error))}")
    await ask.reply(f"{sent} of {len(FILES)} files sent.")


COMMAND = Command(
    "request_data", "all files, one after the other", request_data, for_admins=True, is_slow=True
)
