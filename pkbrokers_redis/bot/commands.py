"""The table of the bot's commands, in the order of /help; and /start, /help, /alert.

docs/adding.md shows how to add a command.
"""

from __future__ import annotations

import time

from pkbrokers_redis.bot import commands_market, files, operators
from pkbrokers_redis.bot.alerts.rules import (
    MINUTES_AVERAGED,
    USAGE,
    Alert,
    ParsedAlert,
    first_state,
    parse,
)
from pkbrokers_redis.bot.context import Command, CommandContext, UsageError, resolve_word
from pkbrokers_redis.bot.text import MESSAGE_CHARS_MAX, escape

LIST_CHARS_MAX = MESSAGE_CHARS_MAX - 200  # leaves room for the last line


async def alert(context: CommandContext) -> None:
    """Set an alert, or list or remove this chat's alerts."""
    first = context.words[0].lower() if context.words else "list"
    if first == "list":
        await _list(context)
    elif first in ("remove", "delete", "rm"):
        await _remove(context)
    else:
        await _add(context)


async def _add(context: CommandContext) -> None:
    stored = await context.read(_store, context, parse(context.words))
    context.services.alerts_changed()
    name = f"<b>{escape(stored.symbol)}</b> " if stored.symbol else ""
    await context.reply(
        f"Alert {stored.id}: {name}{escape(stored.condition)}. /alert lists this chat's alerts."
    )


def _store(context: CommandContext, parsed: ParsedAlert) -> Alert:
    store = context.services.store
    token, name = resolve_word(store, parsed.symbol) if parsed.symbol else (0, "")
    made = Alert(
        0, context.chat_id, context.user_id, token, name, parsed.kind, parsed.value, parsed.once, time.time()
    )
    state = []
    if token:
        volumes: list[float] = []
        if parsed.kind == "volume" and "1m" in store.intervals:
            volumes = [candle.volume for candle in store.get_candles(token, "1m", MINUTES_AVERAGED)]
        state = first_state(made, store.get_quote(token), volumes)
    return context.services.alerts.add(made, state)


async def _list(context: CommandContext) -> None:
    alerts = await context.read(context.services.alerts.of_chat, context.chat_id)
    if not alerts:
        await context.reply(f"This chat has no alerts. Set one:\n{escape(USAGE)}")
        return
    lines: list[str] = []
    room = LIST_CHARS_MAX
    for row in alerts:
        line = f"{row.id}  <b>{escape(row.symbol or 'feed')}</b> {escape(row.condition)}"
        if (room := room - len(line) - 1) < 0:
            lines.append(f"… and {len(alerts) - len(lines)} more")
            break
        lines.append(line)
    await context.reply("\n".join(lines) + "\n/alert remove NUMBER, or all")


async def _remove(context: CommandContext) -> None:
    words = [word.strip("#,").lower() for word in context.words[1:]]
    existing = {row.id for row in await context.read(context.services.alerts.of_chat, context.chat_id)}
    if words == ["all"]:
        chosen = existing
    elif words and all(word.isascii() and word.isdecimal() and len(word) < 10 for word in words):
        chosen = set(map(int, words))
    else:
        raise UsageError(
            "which one?", "send /alert remove NUMBER (as /alert lists them), or /alert remove all"
        )
    removed = await context.read(context.services.alerts.remove, sorted(chosen & existing))
    context.services.alerts_changed()
    missing = sorted(chosen - existing)
    note = f" This chat has no alert {', '.join(map(str, missing))}." if missing else ""
    await context.reply(f"{removed} removed.{note}")


async def start(context: CommandContext) -> None:
    """Say what this bot is."""
    await context.reply(
        "📊 <b>The market in a chat.</b>\n"
        "/quote INFY TCS – the latest quotes\n"
        "/chart INFY 5m – a picture of the day\n"
        "/alert INFY above 1600 – a message when it happens\n"
        "/gainers, /losers, /active – the day's movers\n"
        "/help – all commands"
    )


async def help_(context: CommandContext) -> None:
    """List all commands, or explain one."""
    if context.words:
        name = context.words[0].lstrip("/").lower()
        command = COMMANDS.get(name)
        if command is None:
            raise UsageError(f"there is no /{name}", "/help lists all")
        audience = " Operators only." if command.for_admins else ""
        await context.reply(f"<code>{escape(command.usage)}</code>\n{escape(command.does)}.{audience}")
        return
    shown = [command for command in COMMANDS.values() if context.is_admin or not command.for_admins]
    lines = [f"{escape(command.usage)} – {escape(command.does)}" for command in shown]
    note = "SYMBOL is INFY (NSE), BSE:INFY, an index name or a token. Large files come in parts."
    await context.reply("\n".join(lines) + f"\n\n{note}")


COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        Command("start", "say hello", start, words_max=5),  # a deep link sends words with it
        Command("help", "list the commands, or explain one", help_, "[COMMAND]", words_max=1),
        *commands_market.COMMANDS,
        Command(
            "alert",
            "get a message on a price, a move, volume, a day's high or low, a silent feed",
            alert,
            "[SYMBOL CONDITION | remove N]",
            words_max=30,
        ),
        *files.COMMANDS,
        *operators.COMMANDS,
    )
}
