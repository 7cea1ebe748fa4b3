"""The table of the bot's commands, and /alert, /start, /help. docs/adding.md shows how to add one."""

from __future__ import annotations

import time
from typing import Any

from msgspec import structs

from pkbrokers_redis.bot import commands_market, files, operators  # noqa: F401  they add their commands
from pkbrokers_redis.bot.alerts.rules import (
    MINUTES_AVERAGED,
    USAGE,
    Alert,
    first_state,
    parse,
)
from pkbrokers_redis.bot.context import COMMANDS, Command, CommandContext, resolve_word
from pkbrokers_redis.bot.text import escape
from pkbrokers_redis.errors import PkbError

__all__ = ["COMMANDS"]

LIST_ROWS_MAX = 50  # fit into a message


@Command(
    "alert",
    "get a message on a price, a move, volume, a day's high or low, a silent feed",
    "[SYMBOL CONDITION | remove N]",
    words_max=30,
)
async def alert(context: CommandContext) -> None:
    first = context.words[0].lower() if context.words else "list"
    if first == "list":
        await _list(context)
    elif first in ("remove", "delete", "rm"):
        await _remove(context)
    else:
        await _add(context)


async def _add(context: CommandContext) -> None:
    stored = await context.read(_store, context, parse(context.words))
    name = f"<b>{escape(stored.symbol)}</b> " if stored.symbol else ""
    condition = escape(stored.condition)
    await context.reply(f"Alert {stored.id}: {name}{condition}. /alert lists this chat's alerts.")


def _store(context: CommandContext, alert: Alert) -> Alert:
    """Store an alert, with the current quote as its first tick."""
    store = context.services.store
    state: list[Any] = []
    token, name = resolve_word(store, alert.symbol) if alert.symbol else (0, "")
    if token:
        volumes: list[float] = []
        if alert.kind == "volume" and "1m" in store.intervals:
            volumes = [candle.volume for candle in store.get_candles(token, "1m", MINUTES_AVERAGED)]
        state = first_state(alert, store.get_quote(token), volumes)
    made = structs.replace(
        alert,
        chat_id=context.chat_id,
        user_id=context.user_id,
        token=token,
        symbol=name,
        since=time.time(),
    )
    return context.services.alerts.add(made, state)


async def _list(context: CommandContext) -> None:
    alerts = await context.read(context.services.alerts.of_chat, context.chat_id)
    if not alerts:
        await context.reply(f"This chat has no alerts. Set one:\n{escape(USAGE)}")
        return
    lines = [
        f"{row.id}  <b>{escape(row.symbol or 'feed')}</b> {escape(row.condition)}"
        for row in alerts[:LIST_ROWS_MAX]
    ]
    if len(alerts) > LIST_ROWS_MAX:
        lines.append(f"… and {len(alerts) - LIST_ROWS_MAX} more")
    await context.reply("\n".join(lines) + "\n/alert remove NUMBER, or all")


async def _remove(context: CommandContext) -> None:
    words = [word.strip("#,").lower() for word in context.words[1:]]
    if words != ["all"] and not (words and all(map(str.isdecimal, words))):
        raise PkbError("which one?", "send /alert remove NUMBER, or /alert remove all")
    alerts = context.services.alerts
    mine = {str(row.id): row.id for row in await context.read(alerts.of_chat, context.chat_id)}
    chosen = list(mine) if words == ["all"] else words
    removed = await context.read(alerts.remove, [mine[word] for word in chosen if word in mine])
    missing = [word for word in chosen if word not in mine]
    note = f" This chat has no alert {', '.join(missing)}." if missing else ""
    await context.reply(f"{removed} removed.{note}")


@Command("start", "say hello", words_max=5)  # a deep link sends words with it
async def start(context: CommandContext) -> None:
    await context.reply(
        "📊 <b>The market in a chat.</b>\n"
        "/quote INFY TCS – the latest quotes\n"
        "/chart INFY 5m – a picture of the day\n"
        "/alert INFY above 1600 – a message when it happens\n"
        "/gainers, /losers, /active – the day's movers\n"
        "/help – all commands"
    )


@Command("help", "list the commands, or explain one", "[COMMAND]", words_max=1)
async def help_(context: CommandContext) -> None:
    if context.words:
        name = context.words[0].lstrip("/").lower()
        row = COMMANDS.get(name)
        if row is None:
            raise PkbError(f"there is no /{name}", "/help lists all")
        audience = " Operators only." if row.for_admins else ""
        await context.reply(f"<code>{escape(row.usage)}</code>\n{escape(row.does)}.{audience}")
        return
    shown = [row for row in COMMANDS.values() if context.is_admin or not row.for_admins]
    lines = [f"{escape(row.usage)} – {escape(row.does)}" for row in shown]
    note = "SYMBOL is INFY (NSE), BSE:INFY, an index name or a token. Large files come in parts."
    await context.reply("\n".join(lines) + f"\n\n{note}")
