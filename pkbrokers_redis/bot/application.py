"""From an update to an answer, as handlers of python-telegram-bot's Application.

The Application matches updates to handlers, runs UPDATES_AT_ONCE_MAX at once, limits the send rate and
reports what a handler raises. `CommandRouter` adds what is this bot's own: who gets answers, flood limits,
the order of one chat's commands, confirmation by a button, and errors as one line in the chat.

    P:{bot}:confirm:<nonce>   string, TTL   a command that waits for its button
"""

from __future__ import annotations

import asyncio
import secrets
import shlex
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from difflib import get_close_matches
from typing import Any, cast

import msgspec
import redis
from telegram import CallbackQuery, Chat, Message, Update
from telegram.error import TelegramError
from telegram.ext import (
    Application,
    ApplicationBuilder,
    CallbackQueryHandler,
    CommandHandler,
    ExtBot,
    MessageHandler,
    filters,
)

from pkbrokers_redis import logs
from pkbrokers_redis.bot.commands import COMMANDS
from pkbrokers_redis.bot.context import (
    COMMANDS_BURST,
    COMMANDS_PER_MINUTE,
    REFUSAL,
    REFUSAL_EVERY_SECONDS,
    SLOW_DOWN,
    SLOW_DOWN_EVERY_SECONDS,
    Command,
    CommandContext,
    FloodLimit,
    Services,
    Throttle,
)
from pkbrokers_redis.bot.text import escape
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.connect import describe, explain

log = logs.get("bot")

UPDATES_AT_ONCE_MAX = 64  # the poller fetches no more while so many are in progress
CHATS_MAX = 1_000  # whose command order is kept in memory
WORDS_MAX, WORD_CHARS_MAX = 60, 100
CONFIRM_SECONDS = 60
CONFIRM, CANCEL, STOP_WATCH = "yes", "no", "stop"  # what a button sends, before the ":"

ADMINS_ONLY = "That is for the bot's operators."
EXPIRED = "This button has expired. Send the command again."
OTHER_USER = "Only the user who sent the command can confirm it."
STILL_RUNNING = "Your previous command is still running; please wait for it."
INTERNAL_ERROR = "Sorry, that went wrong here. It is in the bot's log."


class PendingCommand(msgspec.Struct, frozen=True):
    """A command that waits for its button."""

    user_id: int
    chat_id: int
    name: str
    words: list[str]


def build_application(bot: ExtBot[Any], router: CommandRouter) -> Application[Any, Any, Any, Any, Any, Any]:
    """Return the Application that answers with `router`. It has no Updater: see `UpdatePoller`."""
    builder: Any = ApplicationBuilder().bot(bot).updater(None).concurrent_updates(UPDATES_AT_ONCE_MAX)
    application: Application[Any, Any, Any, Any, Any, Any] = builder.build()
    application.add_handler(CommandHandler(list(COMMANDS), router.on_command))
    application.add_handler(MessageHandler(filters.COMMAND, router.on_command))  # unknown commands
    application.add_handler(CallbackQueryHandler(router.on_button))
    application.add_error_handler(router.on_error)
    return application


class CommandRouter:
    """The handlers. Commands of one chat run one after the other, chats in parallel.

    `counts`: `commands`, `refused` (chat not allowed), `flooded` (over the flood limit), `failed`.
    """

    def __init__(self, services: Services, *, now_s: Callable[[], float] = time.monotonic) -> None:
        self._services, self._now_s = services, now_s
        self._flood_limit = FloodLimit(COMMANDS_BURST, COMMANDS_PER_MINUTE)
        self._refusals: Throttle[int] = Throttle()
        self._warnings: Throttle[int] = Throttle()
        self._chat_locks: OrderedDict[int, asyncio.Lock] = OrderedDict()
        self._running: set[asyncio.Task[Any]] = set()
        self.counts = {"commands": 0, "refused": 0, "flooded": 0, "failed": 0}

    async def on_command(self, update: Update, _: object) -> None:
        """Answer a message that starts with a command."""
        message = update.message
        parsed = None if message is None else _parse(message)
        if message is None or parsed is None:
            return
        self._track()
        name, words = parsed
        user_id = 0 if message.from_user is None else message.from_user.id
        context = self._context(message, message.chat, user_id, words)
        if context is None:
            await self._refuse(message)
            return
        now_s = self._now_s()
        if not self._flood_limit.accept(context.chat_id, now_s):
            self.counts["flooded"] += 1
            if self._warnings.is_due(context.chat_id, now_s, SLOW_DOWN_EVERY_SECONDS):
                await self._report_errors(context, lambda: context.reply(SLOW_DOWN))
            return
        self.counts["commands"] += 1
        async with self._chat_lock(context.chat_id):
            await self._report_errors(context, lambda: self._start(context, name))

    async def on_button(self, update: Update, _: object) -> None:
        """Answer a press of a button under one of this bot's messages."""
        query = update.callback_query
        if query is None:
            return
        self._track()
        action, _, nonce = (query.data or "").partition(":")
        message = query.message
        context = None if message is None else self._context(query, message.chat, query.from_user.id, [])
        if context is None or message is None:
            await _acknowledge(query)
        elif action == STOP_WATCH:
            await _acknowledge(query)
            self._services.stop(f"watch {context.chat_id} {message.message_id}")
        elif action in (CONFIRM, CANCEL):
            await self._report_errors(context, lambda: self._confirm(context, query, action, nonce))
        else:
            await _acknowledge(query, EXPIRED)

    async def on_error(self, _: object, context: Any) -> None:
        """Log what a handler raised. A command's own error is answered in the chat instead."""
        self.counts["failed"] += 1
        log.error("update_failed", exc_info=context.error)

    def cancel(self) -> None:
        """Cancel the handlers that still run."""
        for task in self._running:
            task.cancel()

    def _track(self) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._running.add(task)
            task.add_done_callback(self._running.discard)

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
        if self._refusals.is_due(chat_id, self._now_s(), REFUSAL_EVERY_SECONDS):
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
            return
        if command.for_admins and not context.is_admin:
            await context.reply(ADMINS_ONLY)
            return
        command.check(context.words)
        if not command.question:
            await self._run(context, command)
            return
        pending = PendingCommand(context.user_id, context.chat_id, name, context.words)
        nonce = await context.read(_save_pending, self._services.client, self._services.keys, pending)
        buttons = (("Yes", f"{CONFIRM}:{nonce}"), ("No", f"{CANCEL}:{nonce}"))
        await context.reply(escape(command.question), buttons)

    async def _run(self, context: CommandContext, command: Command) -> None:
        if not command.is_slow:
            await command.handler(context)
            return
        work = self._report_errors(context, lambda: command.handler(context))
        if not self._services.start(f"slow {context.chat_id}", work):
            await context.reply(STILL_RUNNING)

    async def _confirm(self, context: CommandContext, query: CallbackQuery, action: str, nonce: str) -> None:
        """Run a pending command once, for the user who sent it, in its chat."""
        client, key = self._services.client, self._services.keys.bot_confirm(nonce)
        pending = await context.read(_load_pending, client, key)
        if pending is None or pending.chat_id != context.chat_id:
            await _acknowledge(query, EXPIRED)
            return
        if pending.user_id != context.user_id:
            await _acknowledge(query, OTHER_USER)
            return
        if await context.read(client.delete, key) != 1:  # another press was faster
            await _acknowledge(query, EXPIRED)
            return
        await _acknowledge(query)
        shown = "done" if action == CONFIRM else "cancelled"
        if isinstance(query.message, Message):
            await context.edit(query.message, f"/{escape(pending.name)}: {shown}.")
        command = COMMANDS.get(pending.name)
        # The settings may have changed with a restart since the question.
        if action == CONFIRM and command is not None and context.is_admin:
            context.words = pending.words
            async with self._chat_lock(context.chat_id):
                await self._run(context, command)

    async def _report_errors(self, context: CommandContext, work: Callable[[], Awaitable[object]]) -> None:
        """Run `work`; an error becomes one line in the chat."""
        try:
            await work()
        except TelegramError as error:
            self.counts["failed"] += 1
            log.warning("answer_failed", chat=context.chat_id, reason=f"{type(error).__name__}: {error}")
        except Exception as error:
            with suppress(TelegramError):
                await context.reply(escape(self._error_text(error)))

    def _error_text(self, error: Exception) -> str:
        if isinstance(error, redis.RedisError):
            error = explain(error, describe(self._services.settings, for_reading=True))
            return error.message[:1].upper() + error.message[1:] + "."
        if isinstance(error, PkbError):
            text = " ".join(str(error).split())
            return text[:1].upper() + text[1:]
        self.counts["failed"] += 1
        log.error("command_failed", exc_info=error)
        return INTERNAL_ERROR

    def _chat_lock(self, chat_id: int) -> asyncio.Lock:
        lock = self._chat_locks.pop(chat_id, None) or asyncio.Lock()
        self._chat_locks[chat_id] = lock
        if len(self._chat_locks) > CHATS_MAX:
            idle = next((key for key, held in self._chat_locks.items() if not held.locked()), chat_id)
            if idle != chat_id:
                del self._chat_locks[idle]
        return lock


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


async def _acknowledge(query: CallbackQuery, text: str = "") -> None:
    """Answer a press, because its button shows a clock until then."""
    with suppress(TelegramError):  # too old, or Telegram is unavailable: nothing depends on it
        await query.get_bot().answer_callback_query(query.id, text or None)


def _save_pending(client: redis.Redis, keys: Keys, pending: PendingCommand) -> str:
    """Store a pending command and return its nonce."""
    nonce = secrets.token_urlsafe(12)
    client.set(keys.bot_confirm(nonce), msgspec.json.encode(pending), ex=CONFIRM_SECONDS)
    return nonce


def _load_pending(client: redis.Redis, key: str) -> PendingCommand | None:
    """Return the pending command; None when it expired or was used."""
    stored = client.get(key)
    if not isinstance(stored, bytes):
        return None
    try:
        return msgspec.json.decode(stored, type=PendingCommand)
    except msgspec.DecodeError:
        return None
