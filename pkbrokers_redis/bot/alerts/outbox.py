"""From `P:{bot}:outbox` to Telegram: what waits for a chat goes out as one message, several lines if need be.

A message leaves the outbox when Telegram has taken it. Only a crash between those two instants can show one
twice; none is lost while fewer than OUTBOX_MAX wait.
"""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

import redis
from telegram.constants import ParseMode
from telegram.error import BadRequest, Forbidden, TelegramError
from telegram.ext import ExtBot

from pkbrokers_redis import logs
from pkbrokers_redis.bot.sending import insist
from pkbrokers_redis.bot.text import MESSAGE_CHARS_MAX
from pkbrokers_redis.core.keys import Keys

log = logs.get("bot")

LOOK_EVERY_SECONDS = 5.0  # without a wake-up: what another process left
MESSAGES_A_READ = 200
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 30.0


class _Letter(NamedTuple):
    ids: list[bytes]
    chat_id: int
    html: str


class Outbox:
    """Sends until cancelled. `wake` when something was put in."""

    def __init__(self, bot: ExtBot[Any], client: redis.Redis, keys: Keys) -> None:
        self._bot, self._client, self._key = bot, client, keys.bot_outbox()
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
        """Send all that is there, chats beside each other. Raises what Telegram or Redis raise."""
        while letters := await asyncio.to_thread(self._read):
            results = await asyncio.gather(*map(self._send, letters), return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException):
                    raise result

    def _read(self) -> list[_Letter]:
        """What waits, a letter a chat."""
        entries: Any = self._client.xrange(self._key, count=MESSAGES_A_READ)
        letters: dict[int, _Letter] = {}
        full: set[int] = set()  # the rest of these chats' messages keeps its order for the next round
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
            await insist(
                lambda: self._bot.send_message(
                    letter.chat_id, letter.html[:MESSAGE_CHARS_MAX], parse_mode=ParseMode.HTML
                )
            )
        except (BadRequest, Forbidden) as error:
            # Blocked, or the chat is gone: it would be refused for ever.
            log.warning("alert_refused", chat=letter.chat_id, error=f"{type(error).__name__}: {error}")
        await asyncio.to_thread(self._client.xdel, self._key, *letter.ids)
