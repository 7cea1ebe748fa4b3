"""/refresh_token: a new Kite session for all processes."""

from __future__ import annotations

from pkbrokers_redis.bot.ask import Ask
from pkbrokers_redis.bot.commands.token import session_text
from pkbrokers_redis.bot.registry import Command


async def refresh_token(ask: Ask) -> None:
    await renew(ask)
    await ask.reply("✅ " + await ask.read(session_text, ask))


async def renew(ask: Ask) -> None:
    """Log in anew and share the session. Raises as `SessionManager.log_in`."""
    progress = await ask.reply("Logging in at Kite; a fresh TOTP may take half a minute …")
    await ask.read(_log_in, ask)
    await ask.edit(progress, "Logged in at Kite.")


def _log_in(ask: Ask) -> None:
    from pkbrokers_redis.kite.session import SessionManager
    from pkbrokers_redis.store.connect import connect

    settings = ask.services.settings
    with connect(settings) as client:
        SessionManager(settings, lambda: client).log_in()


COMMAND = Command(
    "refresh_token", "log in at Kite anew; all processes get the session", refresh_token, for_admins=True,
    question="Log in at Kite and replace everybody's session?", is_slow=True,
)  # fmt: skip
