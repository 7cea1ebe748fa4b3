"""What a command is, and what its handler gets: who asked, the words, and ways to read and to answer."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import redis
from telegram import InlineKeyboardButton, InlineKeyboardMarkup, LinkPreviewOptions, Message
from telegram.constants import ParseMode
from telegram.error import BadRequest
from telegram.ext import ExtBot

from pkbrokers_redis import logs
from pkbrokers_redis.bot.alerts.store import AlertStore
from pkbrokers_redis.bot.telegram_client import with_retries
from pkbrokers_redis.bot.text import MESSAGE_CHARS_MAX
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.errors import PkbError, SettingsError, UnknownSymbol
from pkbrokers_redis.settings import Settings

log = logs.get("bot")

P = ParamSpec("P")
T = TypeVar("T")

BACKGROUND_MAX = 200  # background tasks of all chats; beyond it a command is refused
Buttons = Sequence[tuple[str, str]]  # label, and the data that a press sends (64 bytes at most)


@dataclass(frozen=True, slots=True)
class Access:
    """Who gets answers: nobody, unless PKB_TELEGRAM_CHATS names the chat or PKB_TELEGRAM_ADMINS the user.

    An operator gets answers in a private chat. In a group only if the group is listed too, because all
    members read the answer.
    """

    chats: frozenset[int]
    admins: frozenset[int]

    def is_admin(self, user_id: int) -> bool:
        """Return whether the user is an operator."""
        return user_id in self.admins

    def is_allowed(self, chat_id: int, user_id: int, is_private: bool) -> bool:
        """Return whether this user gets answers in this chat."""
        return chat_id in self.chats or (is_private and user_id in self.admins)


def access_of(settings: Settings) -> Access:
    """Return the allow-list of the settings. Raise SettingsError for a malformed id."""
    chats = _ids("PKB_TELEGRAM_CHATS", settings.telegram_chats)
    return Access(chats, _ids("PKB_TELEGRAM_ADMINS", settings.telegram_admins))


def _ids(name: str, text: str) -> frozenset[int]:
    words = text.replace(",", " ").split()
    for word in words:
        if not re.fullmatch(r"-?\d{1,18}", word):
            message = f"{name} holds {word[:40]!r}, which is not an id"
            raise SettingsError(message, "give numbers, comma-separated")
    return frozenset(map(int, words))


class Services:
    """What all commands share. `store`, `client` and `alerts` block: use `CommandContext.read`."""

    def __init__(self, settings: Settings, client: redis.Redis, store: CandleStore) -> None:
        self.settings, self.keys = settings, settings.keys
        self.client, self.store = client, store
        self.access = access_of(settings)
        self.market = market_clock(settings)
        self.alerts = AlertStore(client, settings.keys)
        self.jobs_client: redis.Redis | None = None  # connected when first used
        self.background: dict[str, asyncio.Task[None]] = {}

    def start(self, name: str, work: Coroutine[Any, Any, None]) -> bool:
        """Run a background task. Return False when one of that name, or BACKGROUND_MAX tasks, run already."""
        if name in self.background or len(self.background) >= BACKGROUND_MAX:
            work.close()
            return False
        task = asyncio.get_running_loop().create_task(work, name=name)
        self.background[name] = task
        task.add_done_callback(self._finished)
        return True

    def stop(self, prefix: str) -> None:
        """Cancel the background tasks whose names start with `prefix`."""
        for name, task in self.background.items():
            if name.startswith(prefix):
                task.cancel()

    async def close(self) -> None:
        """Cancel all background tasks."""
        tasks = list(self.background.values())
        self.stop("")
        await asyncio.gather(*tasks, return_exceptions=True)

    def _finished(self, task: asyncio.Task[None]) -> None:
        del self.background[task.get_name()]
        if not task.cancelled() and task.exception() is not None:
            log.error("background_failed", task=task.get_name().partition(" ")[0], exc_info=task.exception())


@dataclass
class CommandContext:
    """One command of one user in one chat; `words` are its arguments."""

    bot: ExtBot[Any]
    services: Services
    chat_id: int
    user_id: int
    is_admin: bool
    words: list[str] = field(default_factory=list)

    async def read(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking function in a thread, so that the event loop never waits for Redis or a disk."""
        return await asyncio.to_thread(function, *args, **kwargs)

    async def reply(self, html: str, buttons: Buttons = ()) -> Message:
        """Send a message. Data in `html` must be escaped (`text.escape`)."""
        return await with_retries(
            self.bot.send_message,
            self.chat_id,
            html[:MESSAGE_CHARS_MAX],
            parse_mode=ParseMode.HTML,
            reply_markup=_keyboard(buttons),
            link_preview_options=LinkPreviewOptions(is_disabled=True),
        )

    async def edit(self, message: Message, html: str, buttons: Buttons = ()) -> None:
        """Replace the text of a message that this bot sent."""
        with suppress(BadRequest):  # somebody deleted the message, or it has this text already
            await with_retries(
                self.bot.edit_message_text,
                html[:MESSAGE_CHARS_MAX],
                chat_id=self.chat_id,
                message_id=message.message_id,
                parse_mode=ParseMode.HTML,
                reply_markup=_keyboard(buttons),
            )


Handler = Callable[[CommandContext], Awaitable[None]]


@dataclass
class Command:
    """One command; it decorates its handler, which adds it to COMMANDS.

    Attributes:
        does: What it does, for /help and for Telegram's menu.
        arguments: The arguments as /help shows them. More words than `words_max` are refused.
        for_admins: Only PKB_TELEGRAM_ADMINS may use it.
        question: What the user must confirm by a button first; "" for none.
        is_slow: It runs in the background, one at a time per chat, while the chat's other commands go on.
    """

    name: str
    does: str
    arguments: str = ""
    words_max: int = 0
    for_admins: bool = False
    question: str = ""
    is_slow: bool = False
    handler: Handler = field(init=False)

    def __call__(self, handler: Handler) -> Handler:
        self.handler = handler
        COMMANDS[self.name] = self
        return handler

    @property
    def usage(self) -> str:
        """Return `/chart SYMBOL [INTERVAL]`."""
        return f"/{self.name} {self.arguments}".strip()

    def check(self, words: list[str]) -> None:
        """Raise PkbError for more words than the command takes."""
        if len(words) > self.words_max:
            reason = "does not understand all of that" if self.words_max else "takes no arguments"
            raise PkbError(f"/{self.name} {reason}", f"send {self.usage}")


COMMANDS: dict[str, Command] = {}  # of all imported modules, in the order of /help


def resolve_words(store: CandleStore, words: Sequence[str]) -> list[tuple[int, str]]:
    """Return `(token, symbol)` of each word, or of all words as one symbol (`NIFTY 50`)."""
    try:
        instruments = [resolve_word(store, word) for word in words]
    except PkbError:
        with suppress(UnknownSymbol):
            return [store.resolve(" ".join(words))]
        raise
    return list(dict(instruments).items())


def resolve_word(store: CandleStore, text: str) -> tuple[int, str]:
    """Return `(token, "NSE:INFY")`. Raise PkbError with the nearest symbols."""
    try:
        return store.resolve(text.strip(" ,;").lstrip("$#"))
    except UnknownSymbol as error:
        nearest = " or ".join(name.removeprefix("NSE:") for name in error.nearest)
        hint = f"did you mean {nearest}?" if nearest else "there is no such symbol"
        raise PkbError(f"{text[:40]}?", hint) from None


def _keyboard(buttons: Buttons) -> InlineKeyboardMarkup | None:
    row = [InlineKeyboardButton(label, callback_data=data) for label, data in buttons]
    return InlineKeyboardMarkup([row]) if row else None
