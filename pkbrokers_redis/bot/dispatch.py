"""From an update to an answer: who may, how often, which command, what went wrong in words.

Commands of one chat are carried out one after the other, chats beside each other; slow ones (files) run in
the background, one at a time a chat.
"""

from __future__ import annotations

import asyncio
import shlex
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

import redis
from telegram import CallbackQuery, Chat, Message, Update
from telegram.error import TelegramError
from telegram.ext import ExtBot

from pkbrokers_redis import logs
from pkbrokers_redis.bot import confirm
from pkbrokers_redis.bot.access import (
    COMMANDS_A_MINUTE,
    COMMANDS_BURST,
    REFUSAL,
    REFUSAL_EVERY_SECONDS,
    SLOW_DOWN,
    Pace,
    Remembered,
)
from pkbrokers_redis.bot.ask import Ask
from pkbrokers_redis.bot.registry import Command, commands
from pkbrokers_redis.bot.services import Services
from pkbrokers_redis.bot.text import escape
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.store.connect import describe, explain

log = logs.get("bot")

IN_FLIGHT_MAX = 64  # updates worked on at once; then no further ones are asked for
CHATS_MAX = 1_000  # whose order is remembered
WORDS_MAX, WORD_CHARS_MAX = 60, 100
CANCEL_WATCH = "stop"

ADMINS_ONLY = "That is for the bot's operators."
EXPIRED = "This button has expired. Send the command again."
NOT_YOURS = "This button is for whoever asked."


class Dispatcher:
    """Takes updates; `counts` says what became of them."""

    def __init__(
        self, bot: ExtBot[Any], services: Services, *, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._bot, self._services, self._now_s = bot, services, now_s
        self._pace = Pace(COMMANDS_BURST, COMMANDS_A_MINUTE)
        self._refused: Remembered[int] = Remembered()
        self._room = asyncio.Semaphore(IN_FLIGHT_MAX)
        self._order: OrderedDict[int, asyncio.Lock] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self.counts = {"commands": 0, "refused": 0, "flooded": 0, "failed": 0}

    async def submit(self, update: Update) -> None:
        """Begin with an update; waits only while too many others are worked on."""
        await self._room.acquire()
        task = asyncio.get_running_loop().create_task(self._handle(update))
        self._tasks.add(task)
        task.add_done_callback(self._done)

    async def drain(self, seconds: float) -> None:
        """Wait for what has begun, then cancel the rest."""
        if self._tasks:
            _, late = await asyncio.wait(set(self._tasks), timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._room.release()
        if not task.cancelled() and task.exception() is not None:
            self.counts["failed"] += 1
            log.error("failed", what="update", exc_info=task.exception())

    async def _handle(self, update: Update) -> None:
        if update.callback_query is not None:
            await self._pressed(update.callback_query)
        elif update.message is not None:
            await self._said(update.message)

    async def _said(self, message: Message) -> None:
        parsed = self._command_of(message)
        if parsed is None:
            return  # talk, uploads, commands for another bot
        name, words = parsed
        user_id = 0 if message.from_user is None else message.from_user.id
        ask = self._ask(message.chat, user_id, words)
        if ask is None:
            await self._refuse(message.chat)
            return
        if not self._pace.take(ask.chat_id, self._now_s()):
            self.counts["flooded"] += 1
            if self._pace.may_tell(ask.chat_id, self._now_s()):
                await self._safely(ask, lambda: ask.reply(SLOW_DOWN))
            return
        self.counts["commands"] += 1
        async with self._turn(ask.chat_id):
            await self._safely(ask, lambda: self._begin(ask, name))

    async def _begin(self, ask: Ask, name: str) -> None:
        """Check and carry out, or ask for the button first."""
        command = commands().get(name)
        if command is None:
            near = get_close_matches(name, list(commands()), 1, 0.6)
            hint = f"Did you mean /{near[0]}?" if near else "/help lists what I know."
            await ask.reply(f"I do not know /{escape(name)}. {hint}")
            return
        if command.for_admins and not ask.is_admin:
            await ask.reply(ADMINS_ONLY)
            return
        command.check(ask.words)
        if command.question:
            pending = confirm.Pending(ask.user_id, ask.chat_id, name, ask.words)
            buttons = await ask.read(confirm.ask_for, self._services.client, self._services.keys, pending)
            await ask.reply(escape(command.question), buttons)
            return
        await self._carry_out(ask, command)

    async def _carry_out(self, ask: Ask, command: Command) -> None:
        if not command.is_slow:
            await command.handler(ask)
        elif not self._services.start(f"slow {ask.chat_id}", self._safely(ask, lambda: command.handler(ask))):
            await ask.reply("Still at work on what you asked for before; please wait for it.")

    async def _pressed(self, query: CallbackQuery) -> None:
        action, _, nonce = (query.data or "").partition(":")
        message = query.message
        chat = None if message is None else message.chat
        ask = None if chat is None else self._ask(chat, query.from_user.id, [])
        if ask is None or message is None:
            await self._answer(query, "")
        elif action == CANCEL_WATCH:
            await self._answer(query, "")
            self._services.stop(f"watch {ask.chat_id} {message.message_id}")
        elif action in (confirm.YES, confirm.NO):
            await self._safely(ask, lambda: self._confirmed(ask, query, action, nonce))
        else:
            await self._answer(query, EXPIRED)

    async def _confirmed(self, ask: Ask, query: CallbackQuery, action: str, nonce: str) -> None:
        client, keys = self._services.client, self._services.keys
        pending = await ask.read(confirm.peek, client, keys, nonce)
        if pending is None or pending.chat_id != ask.chat_id:
            await self._answer(query, EXPIRED)
            return
        if pending.user_id != ask.user_id:
            await self._answer(query, NOT_YOURS)
            return
        if not await ask.read(confirm.use, client, keys, nonce):
            await self._answer(query, EXPIRED)
            return
        await self._answer(query, "")
        shown = "done" if action == confirm.YES else "left alone"
        if isinstance(query.message, Message):
            await ask.edit(query.message, f"/{escape(pending.name)}: {shown}.")
        command = commands().get(pending.name)
        # Asked for a minute ago: the settings may have changed with a restart.
        if action == confirm.YES and command is not None and ask.is_admin:
            ask.words = pending.words
            async with self._turn(ask.chat_id):
                await self._carry_out(ask, command)

    def _ask(self, chat: Chat, user_id: int, words: list[str]) -> Ask | None:
        """The asker with what he may; None for who gets no answers here."""
        access = self._services.access
        if not access.may_ask(chat.id, user_id, chat.type == Chat.PRIVATE):
            return None
        return Ask(self._bot, self._services, chat.id, user_id, access.is_admin(user_id), words)

    async def _refuse(self, chat: Chat) -> None:
        self.counts["refused"] += 1
        if self._refused.due(chat.id, self._now_s(), REFUSAL_EVERY_SECONDS):
            log.info("refused", chat=chat.id)
            with suppress(TelegramError):
                await self._bot.send_message(chat.id, REFUSAL)

    async def _answer(self, query: CallbackQuery, text: str) -> None:
        """Every press is answered: its button shows a clock until then."""
        with suppress(TelegramError):  # too old, or Telegram is away: nothing depends on it
            await self._bot.answer_callback_query(query.id, text or None)

    async def _safely(self, ask: Ask, work: Callable[[], Awaitable[object]]) -> None:
        """Run it; an error becomes a line in the chat, and in the log where it is ours."""
        try:
            await work()
        except TelegramError as error:
            self.counts["failed"] += 1
            log.warning("not_sent", chat=ask.chat_id, error=f"{type(error).__name__}: {error}")
        except Exception as error:
            with suppress(TelegramError):
                await ask.reply(escape(self._words_for(error)))

    def _words_for(self, error: Exception) -> str:
        if isinstance(error, redis.RedisError):
            error = explain(error, describe(self._services.settings, for_reading=True))
            return error.message[:1].upper() + error.message[1:] + "."
        if isinstance(error, PkbError):
            text = " ".join(str(error).split())
            return text[:1].upper() + text[1:]
        self.counts["failed"] += 1
        log.error("failed", what="command", exc_info=error)
        return "Sorry, that went wrong here. It is in the bot's log."

    def _turn(self, chat_id: int) -> asyncio.Lock:
        lock = self._order.pop(chat_id, None) or asyncio.Lock()
        self._order[chat_id] = lock
        if len(self._order) > CHATS_MAX:
            idle = next((key for key, each in self._order.items() if not each.locked()), None)
            if idle is not None and idle != chat_id:
                del self._order[idle]
        return lock

    def _command_of(self, message: Message) -> tuple[str, list[str]] | None:
        """`/quote@our_bot INFY "NIFTY 50"` → `("quote", ["INFY", "NIFTY 50"])`."""
        text = message.text or ""
        if not text.startswith("/"):
            return None
        head, _, rest = text[1:].partition("\n" if "\n" in text.split(" ")[0] else " ")
        name, _, whom = head.partition("@")
        if whom and whom.lower() != str(self._bot.username or "").lower():
            return None
        try:
            words = shlex.split(rest)
        except ValueError:  # a quote that is not closed
            words = rest.split()
        return name.strip().lower()[:WORD_CHARS_MAX], [word[:WORD_CHARS_MAX] for word in words[:WORDS_MAX]]
