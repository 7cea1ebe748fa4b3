"""/token: how old the Kite session is and when it ends. Never the token: a chat is no place for it."""

from __future__ import annotations

import time

from pkbrokers_redis.bot.ask import Ask
from pkbrokers_redis.bot.registry import Command
from pkbrokers_redis.bot.text import day_time, duration, escape
from pkbrokers_redis.kite.rest import session_in
from pkbrokers_redis.store.auth import load_session


async def token(ask: Ask) -> None:
    await ask.reply(await ask.read(session_text, ask))


def session_text(ask: Ask) -> str:
    """What may be said of the session, as HTML."""
    services = ask.services
    session = load_session(services.client, services.keys)
    if session is None:
        if session_in(services.settings) is not None:
            return (
                "The session comes from the settings; nobody knows its age. /refresh_token makes a new one."
            )
        return "There is no Kite session. /refresh_token makes one."
    kind = "access token" if session.kind == "access_token" else "web session"
    now = time.time()
    lines = [f"Kite session ({kind}{', ' + escape(session.user_id) if session.user_id else ''})"]
    if session.login_at:
        lines.append(f"made {day_time(session.login_at)}, {duration(now - session.login_at)} ago")
    if session.expires_at:
        lines.append(f"ends {day_time(session.expires_at)}, in {duration(session.expires_at - now)}")
    return "\n".join(lines)


COMMAND = Command("token", "the Kite session's age and expiry, never the token", token, for_admins=True)
