"""Updates from Telegram, each taken once, whatever restarts and however many processes ask.

getUpdates returns an update again until a later call's offset confirms it. We confirm what was *taken*:

    P:{bot}:update:<id>   string, NX, TTL 2 days (Telegram keeps updates for one)

The offset itself is not kept: after a silent week Telegram starts its ids anew, perhaps lower, and an old
offset would then hide every update.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import redis
from telegram import Update
from telegram.error import Conflict, RetryAfter, TelegramError
from telegram.ext import ExtBot

from pkbrokers_redis import logs
from pkbrokers_redis.keys import Keys

log = logs.get("bot")

POLL_SECONDS = 25
ANSWER_SECONDS_MAX = POLL_SECONDS + 10.0
TAKEN_SECONDS = 2 * 86_400
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 30.0
KINDS = [
    "message",
    "callback_query",
]  # uploads come as messages and have no handler; the rest is not asked for


class Poller:
    """Asks for updates until cancelled and hands each to `on_update`. Survives whatever Telegram sends.

    `counts`: `updates`, `malformed` (no update by Telegram's own rules), `repeated` (taken before).
    """

    def __init__(
        self,
        bot: ExtBot[Any],
        client: redis.Redis,
        keys: Keys,
        on_update: Callable[[Update], Awaitable[None]],
    ) -> None:
        self._bot, self._client, self._keys, self._on_update = bot, client, keys, on_update
        self._offset = 0
        self._odd = logs.Once()
        self.counts = {"updates": 0, "malformed": 0, "repeated": 0}
        self.away_since: float | None = None  # loop time at which Telegram stopped to answer

    async def run(self) -> None:
        wait_seconds = FIRST_WAIT_SECONDS
        while True:
            try:
                raw = await self._ask()
                if self.away_since is not None:
                    log.info("telegram_back")
                    self.away_since = None
                offset = self._offset
                for each in raw if isinstance(raw, list) else [raw]:
                    await self._take(each)
                if self._offset != offset or raw == []:
                    wait_seconds = FIRST_WAIT_SECONDS
                if self._offset != offset:
                    continue  # else nothing was confirmed, and the next answer may come at once
            except RetryAfter as error:
                after: Any = error.retry_after  # seconds, or a timedelta by a switch of the library's
                wait_seconds = after.total_seconds() if isinstance(after, timedelta) else float(after)
            except (TelegramError, KeyError, TypeError) as error:  # KeyError: an answer without a result
                self._note_away(error)
                if isinstance(error, Conflict):
                    wait_seconds = max(wait_seconds, 2.0)
            except redis.RedisError as error:
                # Untaken, the update comes again.
                log.warning("redis_away", error=type(error).__name__)
            await asyncio.sleep(wait_seconds)
            wait_seconds = min(wait_seconds * 2, LONGEST_WAIT_SECONDS)

    def _note_away(self, error: Exception) -> None:
        if self.away_since is None:
            self.away_since = asyncio.get_running_loop().time()
            what = "another_bot_polls" if isinstance(error, Conflict) else "telegram_away"
            log.warning(what, error=type(error).__name__)

    async def _ask(self) -> Any:
        """Raw updates: one that python-telegram-bot cannot read must not cost the others of its batch."""
        arguments = {"offset": self._offset, "timeout": POLL_SECONDS, "allowed_updates": KINDS}
        # Spelt so that it is sent as getUpdates and not mistaken for the method that reads the batch as one.
        return await self._bot.do_api_request(
            "get_Updates", api_kwargs=arguments, read_timeout=ANSWER_SECONDS_MAX
        )

    async def _take(self, raw: Any) -> None:
        update_id = raw.get("update_id") if isinstance(raw, dict) else None
        if type(update_id) is not int:
            self._refuse(raw)
            return
        if not await asyncio.to_thread(self._claim, update_id):
            self.counts["repeated"] += 1
        else:
            self.counts["updates"] += 1
            try:
                update = Update.de_json(raw, self._bot)
            except Exception:  # whatever its reader stumbles over
                self._refuse(raw)
            else:
                await self._on_update(update)
        self._offset = update_id + 1

    def _claim(self, update_id: int) -> bool:
        key = self._keys.bot_update(str(update_id))
        return bool(self._client.set(key, 1, nx=True, ex=TAKEN_SECONDS))

    def _refuse(self, raw: Any) -> None:
        self.counts["malformed"] += 1
        names = sorted(map(str, raw))[:10] if isinstance(raw, dict) else type(raw).__name__
        if self._odd.first(str(names)):
            log.warning("malformed_update", fields=names)
