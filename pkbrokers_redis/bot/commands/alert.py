"""/alert: set, list and remove alerts."""

from __future__ import annotations

import time

from pkbrokers_redis.bot.alerts.model import USAGE, Alert, Wish, parse
from pkbrokers_redis.bot.alerts.rules import MINUTES_AVERAGED, first_state
from pkbrokers_redis.bot.ask import Ask
from pkbrokers_redis.bot.registry import Command
from pkbrokers_redis.bot.symbols import resolve_word
from pkbrokers_redis.bot.text import MESSAGE_CHARS_MAX, escape
from pkbrokers_redis.bot.usage import UsageError


async def alert(ask: Ask) -> None:
    first = ask.words[0].lower() if ask.words else "list"
    if first == "list":
        await _list(ask)
    elif first in ("remove", "delete", "rm"):
        await _remove(ask)
    else:
        await _add(ask)


async def _add(ask: Ask) -> None:
    wish = parse(ask.words)
    made = await ask.read(_keep, ask, wish)
    ask.services.alerts_changed()
    name = f"<b>{escape(made.symbol)}</b> " if made.symbol else ""
    await ask.reply(f"Alert {made.id}: {name}{escape(made.condition)}. /alert lists yours.")


def _keep(ask: Ask, wish: Wish) -> Alert:
    store = ask.services.store
    token, name = resolve_word(store, wish.symbol) if wish.symbol else (0, "")
    made = Alert(0, ask.chat_id, ask.user_id, token, name, wish.kind, wish.value, wish.once, time.time())
    state = []
    if token:
        minutes: list[float] = []
        if wish.kind == "volume" and "1m" in store.intervals:
            minutes = [candle.volume for candle in store.get_candles(token, "1m", MINUTES_AVERAGED)]
        state = first_state(made, store.get_quote(token), minutes)
    return ask.services.alerts.add(made, state)


async def _list(ask: Ask) -> None:
    found = await ask.read(ask.services.alerts.of_chat, ask.chat_id)
    if not found:
        await ask.reply(f"This chat has no alerts. Set one:\n{escape(USAGE)}")
        return
    lines: list[str] = []
    room = MESSAGE_CHARS_MAX - 200
    for each in found:
        line = f"{each.id}  <b>{escape(each.symbol or 'feed')}</b> {escape(each.condition)}"
        if (room := room - len(line) - 1) < 0:
            lines.append(f"… and {len(found) - len(lines)} more")
            break
        lines.append(line)
    await ask.reply("\n".join(lines) + "\n/alert remove NUMBER, or all")


async def _remove(ask: Ask) -> None:
    words = [word.strip("#,").lower() for word in ask.words[1:]]
    mine = {each.id for each in await ask.read(ask.services.alerts.of_chat, ask.chat_id)}
    if words == ["all"]:
        chosen = mine
    elif words and all(word.isascii() and word.isdecimal() and len(word) < 10 for word in words):
        chosen = set(map(int, words))
    else:
        raise UsageError(
            "which one?", "send /alert remove NUMBER (as /alert lists them), or /alert remove all"
        )
    removed = await ask.read(ask.services.alerts.remove, sorted(chosen & mine))
    ask.services.alerts_changed()
    missing = sorted(chosen - mine)
    gone = f" This chat has no alert {', '.join(map(str, missing))}." if missing else ""
    await ask.reply(f"{removed} removed.{gone}")


COMMAND = Command(
    "alert", "be told of a price, a move, volume, a day's high or low, a silent feed", alert,
    "[SYMBOL CONDITION | remove N]", words_max=30,
)  # fmt: skip
