"""/restart: a new Kite session, and a restart of the ingest workers with it."""

from __future__ import annotations

from pkbrokers_redis.bot.ask import Ask
from pkbrokers_redis.bot.commands.refresh_token import renew
from pkbrokers_redis.bot.registry import Command
from pkbrokers_redis.bot.text import escape
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.runtime.roles import request_restart

ROLE = "ingest"


async def restart(ask: Ask) -> None:
    try:
        await renew(ask)
    except PkbError as error:  # the old session may still be good, and a restart help without a new one
        await ask.reply(f"No new session: {escape(str(error))}")
    await ask.read(request_restart, ask.services.client, ask.services.keys, ROLE)
    await ask.reply("The ingest workers restart within seconds. /status shows them.")


COMMAND = Command(
    "restart", "log in anew and restart the ingest workers", restart, for_admins=True,
    question="Log in at Kite and restart all ingest workers?", is_slow=True,
)  # fmt: skip
