"""/watch SYMBOL…: a message that edits itself for a quarter of an hour."""

from __future__ import annotations

import asyncio
import time

import redis
from telegram import Message
from telegram.error import TelegramError

from pkbrokers_redis.bot.ask import Ask
from pkbrokers_redis.bot.commands.quote import quote_text
from pkbrokers_redis.bot.registry import Command
from pkbrokers_redis.bot.symbols import resolve_words
from pkbrokers_redis.bot.text import duration
from pkbrokers_redis.bot.usage import UsageError

SYMBOLS_MAX = 5
WATCHES_A_CHAT_MAX = 3
EVERY_SECONDS = 5.0  # 12 edits a minute: Telegram allows a group 20 messages
FOR_SECONDS = 900.0
STOP = (("Stop", "stop:"),)


async def watch(ask: Ask) -> None:
    if not ask.words:
        raise UsageError("which symbol?", "send /watch INFY")
    running = [name for name in ask.services.background if name.startswith(f"watch {ask.chat_id} ")]
    if len(running) >= WATCHES_A_CHAT_MAX:
        raise UsageError(f"this chat watches {WATCHES_A_CHAT_MAX} messages already", "stop one of them")
    tokens = await ask.read(resolve_words, ask.services.store, ask.words)
    text = await _text(ask, tokens)
    message = await ask.reply(text, STOP)
    name = f"watch {ask.chat_id} {message.message_id}"
    if not ask.services.start(name, _follow(ask, tokens, message, text)):
        await ask.edit(message, f"{text}\n\n<i>not watched: too much runs here, try again in a minute</i>")


async def _text(ask: Ask, tokens: list[tuple[int, str]]) -> str:
    store = ask.services.store
    return await ask.read(
        lambda: "\n\n".join(quote_text(symbol, store.get_quote(token)) for token, symbol in tokens)
    )


async def _follow(ask: Ask, tokens: list[tuple[int, str]], message: Message, shown: str) -> None:
    began = time.monotonic()
    try:
        while time.monotonic() - began < FOR_SECONDS:
            await asyncio.sleep(EVERY_SECONDS)
            try:
                text = await _text(ask, tokens)
                if text != shown:
                    await ask.edit(message, text, STOP)
                    shown = text
            except (redis.RedisError, TelegramError):
                continue  # the next look
    finally:
        # Without its button: nothing changes this message any more.
        await asyncio.shield(
            ask.edit(message, f"{shown}\n\n<i>watched for {duration(time.monotonic() - began)}</i>")
        )


COMMAND = Command(
    "watch", "a quote that updates itself for 15 minutes", watch, "SYMBOL…", words_max=SYMBOLS_MAX
)
