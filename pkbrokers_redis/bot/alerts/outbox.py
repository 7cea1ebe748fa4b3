"""From `P:{bot}:outbox` to Telegram: what waits for a chat goes out as one message, several lines if need be.

A message leaves the outbox when Telegram has taken it. Only a crash between those two instants can show one
twice; none is lost while fewer than OUTBOX_MAX wait. What Telegram will never take is dropped and logged.
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
from pkbrokers_redis.bot.alerts.commit import OUTBOX_MAX
from pkbrokers_redis.bot.sending import insist
from pkbrokers_redis.bot.text import MESSAGE_CHARS_MAX
from pkbrokers_redis.keys import Keys

log = logs.get("bot")

LOOK_EVERY_SECONDS = 5.0  # without a wake-up: what another process left
MESSAGES_A_READ = 2 * OUTBOX_MAX  # all, of every chat: Redis trims by whole nodes, a little later
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 30.0


class _Letter(NamedTuple):
    ids: list[bytes]
    chat_id: int
    html: str


class Outbox:
    """Sends until cancelled. `wake` when something was put in. `chats` are those that are answered."""

    def __init__(self, bot: ExtBot[Any], client: redis.Redis, keys: Keys, chats: Collection[int]) -> None:
        self._bot, self._client, self._key, self._chats = bot, client, keys.bot_outbox(), chats
        self._news = asyncio.Event()

    def wake(self) -> None:
        """There is something to send. Call it in the loop's thread."""
        self._news.set()

    async def run(self) -> None:
        wait_seconds = FIRST_WAIT_SECONDS
        while True:
            try:
                async with asyncio.timeout(LOOK_EVERY_SECONDS):
                    await self._news.wait()
            except TimeoutError:
                pass
            self._news.clear()
            try:
                await self.flush()
                wait_seconds = FIRST_WAIT_SECONDS
            except (TelegramError, redis.RedisError) as error:
                log.warning("alerts_wait", error=type(error).__name__)
                await asyncio.sleep(wait_seconds)
                wait_seconds = min(wait_seconds * 2, LONGEST_WAIT_SECONDS)
                self._news.set()

    async def flush(self) -> None:
        """Send all that is there, chats beside each other; one that fails holds up no other.

        Raises what Telegram or Redis raised, when all that could be sent is.
        """
        failed: dict[int, BaseException] = {}
        while letters := await asyncio.to_thread(self._read, frozenset(failed)):
            results = await asyncio.gather(*map(self._send, letters), return_exceptions=True)
            failed |= {
                letter.chat_id: result
                for letter, result in zip(letters, results, strict=True)
                if isinstance(result, BaseException)
            }
        for error in failed.values():
            raise error

    def _read(self, without: Collection[int]) -> list[_Letter]:
        """What waits for chats but these, a letter a chat."""
        entries: Any = self._client.xrange(self._key, count=MESSAGES_A_READ)
        letters: dict[int, _Letter] = {}
        full = set(without)  # the rest of a full letter's chat keeps its order for the next round
        for entry_id, fields in entries:
            try:
                chat_id, html = int(fields[b"chat"]), fields[b"text"].decode()
            except (KeyError, ValueError):
                self._client.xdel(self._key, entry_id)  # a foreign hand's
                continue
            letter = letters.get(chat_id, _Letter([], chat_id, ""))
            joined = f"{letter.html}\n{html}" if letter.html else html
            if chat_id in full or (letter.ids and len(joined) > MESSAGE_CHARS_MAX):
                full.add(chat_id)
                continue
            letters[chat_id] = _Letter([*letter.ids, entry_id], chat_id, joined)
        return list(letters.values())

    async def _send(self, letter: _Letter) -> None:
        try:
            try:
                await self._post(letter.chat_id, letter.html)
            except ChatMigrated as error:
                if error.new_chat_id not in self._chats:
                    raise
                await self._post(error.new_chat_id, letter.html)
        except (BadRequest, ChatMigrated, Forbidden) as error:
            # Blocked, gone, or moved to an id that the settings do not name: it would be refused for ever.
            log.warning("alert_refused", chat=letter.chat_id, error=f"{type(error).__name__}: {error}")
        await asyncio.to_thread(self._client.xdel, self._key, *letter.ids)

    async def _post(self, chat_id: int, html: str) -> None:
        await insist(
            lambda: self._bot.send_message(chat_id, html[:MESSAGE_CHARS_MAX], parse_mode=ParseMode.HTML)
        )
