"""Who gets answers: nobody, unless PKB_TELEGRAM_CHATS names the chat or PKB_TELEGRAM_ADMINS the user.

Pure decisions; the time is an argument.

What a command is, and what its handler gets: the sender, the words, and ways to read and to answer.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

import redis
from telegram import InlineKeyboardButton, InlineKeyboardMarkup, LinkPreviewOptions, Message
from telegram.constants import ParseMode
from telegram.error import BadRequest

from pkbrokers_redis import logs
from pkbrokers_redis.bot.telegram_client import with_retries
from pkbrokers_redis.bot.text import MESSAGE_CHARS_MAX
from pkbrokers_redis.candles.model import find_interval
from pkbrokers_redis.errors import PkbError, SettingsError, UnknownSymbol
from pkbrokers_redis.settings import Settings

if TYPE_CHECKING:
    from telegram.ext import ExtBot

    from pkbrokers_redis.bot.alerts.store import AlertStore
    from pkbrokers_redis.bot.charts import ChartPool
    from pkbrokers_redis.bot.commands_market import Movers
    from pkbrokers_redis.client.store import CandleStore
    from pkbrokers_redis.clock import Clock
    from pkbrokers_redis.keys import Keys
    from pkbrokers_redis.settings import Settings

K = TypeVar("K")

REFUSAL = "This bot serves a closed group. Please contact its operator."
REFUSAL_EVERY_SECONDS = 3600.0
SLOW_DOWN = "Too many commands at once: some were skipped. Please send them again more slowly."
SLOW_DOWN_EVERY_SECONDS = 60.0  # a flood is not answered by a flood
COMMANDS_BURST = 10  # at once, per chat
COMMANDS_PER_MINUTE = 30  # on average, per chat
CHATS_MAX = 10_000  # whose limits are kept in memory


@dataclass(frozen=True, slots=True)
class Access:
    """The allow-list of chats and operators.

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
    return Access(
        _ids("PKB_TELEGRAM_CHATS", settings.telegram_chats),
        _ids("PKB_TELEGRAM_ADMINS", settings.telegram_admins),
    )


def _ids(name: str, text: str) -> frozenset[int]:
    words = [word for word in re.split(r"[\s,]+", text) if word]
    if invalid := [word for word in words if not re.fullmatch(r"-?\d{1,18}", word)]:
        raise SettingsError(
            f"{name} holds {invalid[0][:40]!r}, which is not an id", "give numbers, comma-separated"
        )
    return frozenset(map(int, words))


class Throttle(Generic[K]):
    """Remembers when something last happened, by key. Beyond `keys_max` keys the oldest are forgotten."""

    def __init__(self, keys_max: int = CHATS_MAX) -> None:
        self._at: OrderedDict[K, float] = OrderedDict()
        self._keys_max = keys_max

    def is_due(self, key: K, now_s: float, every_seconds: float) -> bool:
        """Return True at most once per `every_seconds` and key."""
        if now_s - self._at.get(key, float("-inf")) < every_seconds:
            return False
        self._at[key] = now_s
        self._at.move_to_end(key)
        while len(self._at) > self._keys_max:
            self._at.popitem(last=False)
        return True


class FloodLimit:
    """A token bucket per chat: `burst` commands at once, `per_minute` on average."""

    def __init__(self, burst: int, per_minute: float) -> None:
        self._burst, self._per_second = float(burst), per_minute / 60
        self._buckets: OrderedDict[int, tuple[float, float]] = OrderedDict()  # tokens, at second

    def accept(self, chat_id: int, now_s: float) -> bool:
        """Return whether one more command of this chat is answered."""
        tokens, at = self._buckets.pop(chat_id, (self._burst, now_s))
        tokens = min(self._burst, tokens + max(now_s - at, 0.0) * self._per_second)
        is_accepted = tokens >= 1
        self._buckets[chat_id] = (tokens - is_accepted, now_s)
        while len(self._buckets) > CHATS_MAX:
            self._buckets.popitem(last=False)
        return is_accepted


log = logs.get("bot")

P = ParamSpec("P")
T = TypeVar("T")

BACKGROUND_MAX = 200  # background tasks of all chats; beyond it a command is refused
Buttons = Sequence[tuple[str, str]]  # label, and the data that a press sends (64 bytes at most)


class UsageError(PkbError):
    """Raised when a command gets arguments that it does not understand."""


class NotFound(PkbError):
    """Raised for an unknown symbol; the hint names the nearest ones."""


@dataclass
class Services:
    """What all commands share. `store`, `client` and `alerts` block: use `CommandContext.read`."""

    settings: Settings
    client: redis.Redis
    store: CandleStore
    access: Access
    market: Clock
    alerts: AlertStore
    charts: ChartPool
    movers: Movers
    alerts_changed: Callable[[], None] = lambda: None
    jobs_client: redis.Redis | None = None  # for PKB_RQ_REDIS_URL
    background: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    @property
    def keys(self) -> Keys:
        """Return the store's key names."""
        return self.settings.keys

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
        """Cancel all background tasks and end the drawing process."""
        tasks = list(self.background.values())
        self.stop("")
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self.charts.close)

    def _finished(self, task: asyncio.Task[None]) -> None:
        del self.background[task.get_name()]
        if not task.cancelled() and task.exception() is not None:
            log.error("background_failed", task=task.get_name().partition(" ")[0], exc_info=task.exception())


@dataclass
class CommandContext:
    """One command of one user in one chat; `words` are its arguments.

    Example:
        async def spread(context: CommandContext) -> None:
            store = context.services.store
            token, symbol = await context.read(resolve_word, store, context.words[0])
            quote = await context.read(store.get_quote, token)
            await context.reply(f"{escape(symbol)} {money(quote['high'] - quote['low'])}")
    """

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
            lambda: self.bot.send_message(
                self.chat_id,
                html[:MESSAGE_CHARS_MAX],
                parse_mode=ParseMode.HTML,
                reply_markup=_keyboard(buttons),
                link_preview_options=LinkPreviewOptions(is_disabled=True),
            )
        )

    async def edit(self, message: Message, html: str, buttons: Buttons = ()) -> None:
        """Replace the text of a message that this bot sent."""
        # BadRequest: somebody deleted the message, or it has this text already.
        with suppress(BadRequest):
            await with_retries(
                lambda: self.bot.edit_message_text(
                    html[:MESSAGE_CHARS_MAX],
                    chat_id=self.chat_id,
                    message_id=message.message_id,
                    parse_mode=ParseMode.HTML,
                    reply_markup=_keyboard(buttons),
                )
            )

    async def photo(self, png: bytes, caption: str) -> Message:
        """Send a picture with a caption of HTML."""
        return await with_retries(
            lambda: self.bot.send_photo(self.chat_id, png, caption=caption, parse_mode=ParseMode.HTML)
        )


@dataclass(frozen=True, slots=True)
class Command:
    """One row of the command table.

    Attributes:
        does: What it does, for /help and for Telegram's menu.
        arguments: The arguments as /help shows them. More words than `words_max` are refused.
        for_admins: Only PKB_TELEGRAM_ADMINS may use it.
        question: What the user must confirm by a button first; "" for none.
        is_slow: It runs in the background, one at a time per chat, while the chat's other commands go on.
    """

    name: str
    does: str
    handler: Callable[[CommandContext], Awaitable[None]]
    arguments: str = ""
    words_max: int = 0
    for_admins: bool = False
    question: str = ""
    is_slow: bool = False

    @property
    def usage(self) -> str:
        """Return `/chart SYMBOL [INTERVAL]`."""
        return f"/{self.name} {self.arguments}".strip()

    def check(self, words: list[str]) -> None:
        """Raise UsageError for more words than the command takes."""
        if len(words) > self.words_max:
            reason = "does not understand all of that" if self.words_max else "takes no arguments"
            raise UsageError(f"/{self.name} {reason}", f"send {self.usage}")


def resolve_words(store: CandleStore, words: Sequence[str]) -> list[tuple[int, str]]:
    """Return `(token, symbol)` of each word, or of all words as one symbol (`NIFTY 50`). Raise NotFound."""
    try:
        instruments = [resolve_word(store, word) for word in words]
    except NotFound:
        if len(words) < 2:
            raise
        with suppress(UnknownSymbol):
            return [store.resolve(" ".join(words))]
        raise
    return list(dict(instruments).items())


def resolve_word(store: CandleStore, text: str) -> tuple[int, str]:
    """Return `(token, "NSE:INFY")`. Raise NotFound with the nearest symbols."""
    try:
        return store.resolve(text.strip(" ,;").lstrip("$#"))
    except UnknownSymbol as error:
        nearest = " or ".join(name.removeprefix("NSE:") for name in error.nearest)
        raise NotFound(
            f"{text[:40]}?", f"did you mean {nearest}?" if nearest else "there is no such symbol"
        ) from None


def split_interval(store: CandleStore, words: Sequence[str], default: str) -> tuple[list[str], str]:
    """Split `["NIFTY", "50", "5m"]` into `(["NIFTY", "50"], "5m")`; without an interval use the default.

    Raises:
        UnknownInterval: The last word looks like an interval that is not configured.
    """
    last = words[-1].lower() if len(words) > 1 else ""
    looks_like_one = last[:-1].isdigit() and last[-1] in "smhdw"
    if last and (last in store.intervals or last in ("day", "1d", "1h") or looks_like_one):
        return list(words[:-1]), find_interval(store.settings.intervals, last).name
    return list(words), default if default in store.intervals else store.intervals[0]


def _keyboard(buttons: Buttons) -> InlineKeyboardMarkup | None:
    if not buttons:
        return None
    return InlineKeyboardMarkup(
        [[InlineKeyboardButton(label, callback_data=data) for label, data in buttons]]
    )
