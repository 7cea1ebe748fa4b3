"""From `P:{bot}:outbox` to Telegram: what waits for one chat is sent as one message.

A message leaves the outbox after Telegram has accepted it. Only a crash between those two moments can show
it twice; none is lost while fewer than OUTBOX_MAX wait. A message that Telegram refuses for good is dropped
and logged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any, NamedTuple

import redis
from telegram.constants import ParseMode
from telegram.error import BadRequest, ChatMigrated, Forbidden, TelegramError
from telegram.ext import ExtBot

from pkbrokers_redis import logs
from pkbrokers_redis.bot.alerts.store import OUTBOX_MAX
from pkbrokers_redis.bot.telegram_client import with_retries
from pkbrokers_redis.bot.text import MESSAGE_CHARS_MAX
from pkbrokers_redis.keys import Keys

log = logs.get("bot")

POLL_SECONDS = 5.0  # without a wake-up: messages that another process left
MESSAGES_PER_READ = 2 * OUTBOX_MAX  # all of them: Redis trims by whole nodes, so there can be more
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 30.0


class _Message(NamedTuple):
    """The entries of one chat that are sent as one message."""

    entry_ids: list[bytes]
    chat_id: int
    html: str


class Outbox:
    """Sends until cancelled. `chats` are the ids of PKB_TELEGRAM_CHATS."""

    def __init__(self, bot: ExtBot[Any], client: redis.Redis, keys: Keys, chats: Collection[int]) -> None:
        self._bot, self._client, self._key, self._chats = bot, client, keys.bot_outbox(), chats
        self._added = asyncio.Event()

    def wake(self) -> None:
        """Send now. Call it in the event loop's thread."""
        self._added.set()

    async def run(self) -> None:
        """Send what waits, whenever something was added, until cancelled."""
        wait_seconds = FIRST_WAIT_SECONDS
        while True:
            try:
                async with asyncio.timeout(POLL_SECONDS):
                    await self._added.wait()
            except TimeoutError:
                pass
            self._added.clear()
            try:
                await self.flush()
                wait_seconds = FIRST_WAIT_SECONDS
            except (TelegramError, redis.RedisError) as error:
                log.warning("alerts_delayed", reason=type(error).__name__)
                await asyncio.sleep(wait_seconds)
                wait_seconds = min(wait_seconds * 2, LONGEST_WAIT_SECONDS)
                self._added.set()

    async def flush(self) -> None:
        """Send everything, chats in parallel; a chat that fails does not delay other chats.

        Raises:
            TelegramError, redis.RedisError: What one chat's message failed with, after all others were sent.
        """
        failed: dict[int, BaseException] = {}
        while messages := await asyncio.to_thread(self._read, frozenset(failed)):
            results = await asyncio.gather(*map(self._send, messages), return_exceptions=True)
            failed |= {
                message.chat_id: result
                for message, result in zip(messages, results, strict=True)
                if isinstance(result, BaseException)
            }
        for error in failed.values():
            raise error

    def _read(self, excluded_chats: Collection[int]) -> list[_Message]:
        """Return the next message of every chat that is not excluded."""
        entries: Any = self._client.xrange(self._key, count=MESSAGES_PER_READ)
        messages: dict[int, _Message] = {}
        full = set(excluded_chats)  # the rest of a full message keeps its order for the next round
        for entry_id, fields in entries:
            try:
                chat_id, html = int(fields[b"chat"]), fields[b"text"].decode()
            except (KeyError, ValueError):
                self._client.xdel(self._key, entry_id)  # malformed
                continue
            message = messages.get(chat_id, _Message([], chat_id, ""))
            joined = f"{message.html}\n{html}" if message.html else html
            if chat_id in full or (message.entry_ids and len(joined) > MESSAGE_CHARS_MAX):
                full.add(chat_id)
                continue
            messages[chat_id] = _Message([*message.entry_ids, entry_id], chat_id, joined)
        return list(messages.values())

    async def _send(self, message: _Message) -> None:
        try:
            try:
                await self._post(message.chat_id, message.html)
            except ChatMigrated as error:
                if error.new_chat_id not in self._chats:
                    raise
                await self._post(error.new_chat_id, message.html)
        except (BadRequest, ChatMigrated, Forbidden) as error:
            # Blocked, deleted, or moved to an id that the settings do not name: refused forever.
            reason = f"{type(error).__name__}: {error}"
            log.warning("alert_refused", chat=message.chat_id, reason=reason)
        await asyncio.to_thread(self._client.xdel, self._key, *message.entry_ids)

    async def _post(self, chat_id: int, html: str) -> None:
        await with_retries(
            lambda: self._bot.send_message(chat_id, html[:MESSAGE_CHARS_MAX], parse_mode=ParseMode.HTML)
        )
