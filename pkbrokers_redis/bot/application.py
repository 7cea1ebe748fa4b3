"""From an update to an answer, as handlers of python-telegram-bot's Application.

The Application matches updates to handlers, runs UPDATES_AT_ONCE_MAX at once, limits the send rate and
reports what a handler raises. `CommandRouter` adds what is this bot's own: who gets answers, flood limits,
the order of one chat's commands, confirmation by a button, and errors as one line in the chat.
"""

from __future__ import annotations

import asyncio
import shlex
import time
from collections import OrderedDict, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from difflib import get_close_matches
from typing import Any, NamedTuple, cast

import redis
from telegram import CallbackQuery, Chat, Message, Update
from telegram.error import TelegramError
from telegram.ext import (
    Application,
    ApplicationBuilder,
    CallbackQueryHandler,
    ExtBot,
    MessageHandler,
    filters,
)

from pkbrokers_redis import logs
from pkbrokers_redis.bot.commands import COMMANDS
from pkbrokers_redis.bot.context import Command, CommandContext, Services
from pkbrokers_redis.bot.text import escape
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.store.connect import describe, explain

log = logs.get("bot")

UPDATES_AT_ONCE_MAX = 64  # the poller fetches no more while so many are in progress
COMMANDS_BURST = 10  # at once, per chat
COMMANDS_PER_MINUTE = 30  # on average, per chat
CHATS_MAX = 10_000  # whose limits are kept in memory
WORDS_MAX, WORD_CHARS_MAX = 60, 100
CONFIRM_SECONDS = 60
CONFIRM, CANCEL, STOP_WATCH = "yes", "no", "stop"  # what a button sends
CONFIRM_BUTTONS = (("Yes", CONFIRM), ("No", CANCEL))

REFUSAL = "This bot serves a closed group. Please contact its operator."
SLOW_DOWN = "Too many commands at once: some were skipped. Please send them again more slowly."
ADMINS_ONLY = "That is for the bot's operators."
EXPIRED = "This button has expired. Send the command again."
OTHER_USER = "Only the user who sent the command can confirm it."
STILL_RUNNING = "Your previous command is still running; please wait for it."
INTERNAL_ERROR = "Sorry, that went wrong here. It is in the bot's log."


def build_application(bot: ExtBot[Any], router: CommandRouter) -> Application[Any, Any, Any, Any, Any, Any]:
    """Return the Application that answers with `router`. It has no Updater: see `UpdatePoller`."""
    builder: Any = ApplicationBuilder().bot(bot).updater(None).concurrent_updates(UPDATES_AT_ONCE_MAX)
    application: Application[Any, Any, Any, Any, Any, Any] = builder.build()
    application.add_handler(MessageHandler(filters.COMMAND, router.on_command))
    application.add_handler(CallbackQueryHandler(router.on_button))
    return application


class FloodLimit:
    """A token bucket per chat: `burst` events at once, `per_minute` on average."""

    def __init__(self, burst: int, per_minute: float) -> None:
        self._burst, self._per_second = float(burst), per_minute / 60
        self._buckets: OrderedDict[int, tuple[float, float]] = OrderedDict()  # tokens, at second

    def accept(self, chat_id: int, now_s: float) -> bool:
        """Return whether one more event of this chat is within the limit."""
        tokens, at = self._buckets.pop(chat_id, (self._burst, now_s))
        tokens = min(self._burst, tokens + max(now_s - at, 0.0) * self._per_second)
        is_accepted = tokens >= 1
        self._buckets[chat_id] = (tokens - is_accepted, now_s)
        if len(self._buckets) > CHATS_MAX:
            self._buckets.popitem(last=False)
        return is_accepted


class PendingCommand(NamedTuple):
    """A command that waits for its button."""

    user_id: int
    command: Command
    words: list[str]
    expires_at: float  # seconds of `now_s`


class CommandRouter:
    """The handlers. Commands of one chat run one after the other, chats in parallel.

    `counts`: `commands`, `refused` (chat not allowed), `flooded` (over the flood limit), `failed`.
    """

    def __init__(self, services: Services, *, now_s: Callable[[], float] = time.monotonic) -> None:
        self._services, self._now_s = services, now_s
        self._commands = FloodLimit(COMMANDS_BURST, COMMANDS_PER_MINUTE)
        self._warnings = FloodLimit(1, per_minute=1)  # a flood is not answered by a flood
        self._refusals = FloodLimit(1, per_minute=1 / 60)
        self._chat_locks: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)  # of allowed chats only
        self._pending: dict[tuple[int, int], PendingCommand] = {}  # by chat and message
        self.counts = {"commands": 0, "refused": 0, "flooded": 0, "failed": 0}

    async def on_command(self, update: Update, _: object) -> None:
        """Answer a message that starts with a command."""
        message = update.message
        parsed = None if message is None else _parse(message)
        if message is None or parsed is None:
            return
        name, words = parsed
        user_id = 0 if message.from_user is None else message.from_user.id
        context = self._context(message, message.chat, user_id, words)
        if context is None:
            await self._refuse(message)
            return
        if not self._commands.accept(context.chat_id, self._now_s()):
            self.counts["flooded"] += 1
            if self._warnings.accept(context.chat_id, self._now_s()):
                async with self._errors_in_chat(context):
                    await context.reply(SLOW_DOWN)
            return
        self.counts["commands"] += 1
        async with self._chat_locks[context.chat_id], self._errors_in_chat(context):
            await self._start(context, name)

    async def on_button(self, update: Update, _: object) -> None:
        """Answer a press of a button under one of this bot's messages."""
        query = update.callback_query
        if query is None:
            return
        message, text = query.message, ""
        context = None if message is None else self._context(query, message.chat, query.from_user.id, [])
        if context is not None and message is not None:
            if query.data == STOP_WATCH:
                self._services.stop(f"watch {context.chat_id} {message.message_id}")
            else:
                # The lock: a question's message reaches the chat before `_start` has stored the command.
                async with self._chat_locks[context.chat_id], self._errors_in_chat(context):
                    text = await self._confirm(context, message.message_id, query)
        # A button shows a clock until its press is answered; nothing else depends on the answer.
        with suppress(TelegramError):
            await query.get_bot().answer_callback_query(query.id, text or None)

    def _context(
        self, source: Message | CallbackQuery, chat: Chat, user_id: int, words: list[str]
    ) -> CommandContext | None:
        """Return the context of an allowed user; None for everybody else."""
        access = self._services.access
        if not access.is_allowed(chat.id, user_id, chat.type == Chat.PRIVATE):
            return None
        bot = cast("ExtBot[Any]", source.get_bot())
        return CommandContext(bot, self._services, chat.id, user_id, access.is_admin(user_id), words)

    async def _refuse(self, message: Message) -> None:
        self.counts["refused"] += 1
        chat_id = message.chat.id
        if self._refusals.accept(chat_id, self._now_s()):
            log.info("chat_refused", chat=chat_id, hint="add it to PKB_TELEGRAM_CHATS if it may use the bot")
            with suppress(TelegramError):
                await message.get_bot().send_message(chat_id, REFUSAL)

    async def _start(self, context: CommandContext, name: str) -> None:
        """Check the command, then run it or send the question with its buttons."""
        command = COMMANDS.get(name)
        if command is None:
            nearest = get_close_matches(name, list(COMMANDS), 1, 0.6)
            hint = f"Did you mean /{nearest[0]}?" if nearest else "/help lists all commands."
            await context.reply(f"Unknown command /{escape(name)}. {hint}")
        elif command.for_admins and not context.is_admin:
            await context.reply(ADMINS_ONLY)
        else:
            command.check(context.words)
            if not command.question:
                await self._run(context, command)
                return
            question = await context.reply(escape(command.question), CONFIRM_BUTTONS)
            now_s = self._now_s()
            self._pending = {key: each for key, each in self._pending.items() if each.expires_at > now_s}
            self._pending[context.chat_id, question.message_id] = PendingCommand(
                context.user_id, command, context.words, now_s + CONFIRM_SECONDS
            )

    async def _run(self, context: CommandContext, command: Command) -> None:
        if not command.is_slow:
            await command.handler(context)
            return

        async def work() -> None:
            async with self._errors_in_chat(context):
                await command.handler(context)

        if not self._services.start(f"slow {context.chat_id}", work()):
            await context.reply(STILL_RUNNING)

    async def _confirm(self, context: CommandContext, message_id: int, query: CallbackQuery) -> str:
        """Run a pending command once, for the user who sent it. Return why it does not run, or ""."""
        key = (context.chat_id, message_id)
        pending = self._pending.get(key)
        if pending is None or pending.expires_at <= self._now_s():
            return EXPIRED
        if pending.user_id != context.user_id:
            return OTHER_USER
        del self._pending[key]
        is_confirmed = query.data == CONFIRM
        if isinstance(query.message, Message):
            shown = "done" if is_confirmed else "cancelled"
            await context.edit(query.message, f"/{escape(pending.command.name)}: {shown}.")
        if is_confirmed:
            context.words = pending.words
            await self._run(context, pending.command)
        return ""

    @asynccontextmanager
    async def _errors_in_chat(self, context: CommandContext) -> AsyncIterator[None]:
        """Answer an error of the block as one line in the chat."""
        try:
            yield
        except TelegramError as error:
            self.counts["failed"] += 1
            log.warning("answer_failed", chat=context.chat_id, reason=f"{type(error).__name__}: {error}")
        except Exception as error:
            with suppress(TelegramError):
                await context.reply(escape(self._error_text(error)))

    def _error_text(self, error: Exception) -> str:
        if isinstance(error, redis.RedisError):
            text = explain(error, describe(self._services.settings, for_reading=True)).message + "."
        elif isinstance(error, PkbError):
            text = " ".join(str(error).split())
        else:
            self.counts["failed"] += 1
            log.error("command_failed", exc_info=error)
            return INTERNAL_ERROR
        return text[:1].upper() + text[1:]


def _parse(message: Message) -> tuple[str, list[str]] | None:
    """Return `("quote", ["INFY", "NIFTY 50"])` for `/quote@this_bot INFY "NIFTY 50"`; None for other bots."""
    text, length = message.text or "", message.entities[0].length if message.entities else 0
    name, _, addressee = text[1:length].partition("@")
    if not text.startswith("/") or (addressee and addressee.lower() != message.get_bot().username.lower()):
        return None
    try:
        words = shlex.split(text[length:])
    except ValueError:  # an unclosed quote
        words = text[length:].split()
    return name.lower()[:WORD_CHARS_MAX], [word[:WORD_CHARS_MAX] for word in words[:WORDS_MAX]]
