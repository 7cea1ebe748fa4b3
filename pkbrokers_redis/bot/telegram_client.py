"""The client of Telegram's Bot API: how requests are repeated, and how updates are fetched.

429 RetryAfter    python-telegram-bot's rate limiter waits and sends again
5xx, no network   `with_retries` sends again, a few times
400, 403          the request is refused for good
a malformed answer counts as TelegramError
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec, TypeVar

import redis
from telegram import Update
from telegram.error import BadRequest, Conflict, NetworkError, TelegramError, TimedOut
from telegram.ext import AIORateLimiter, Application, ExtBot
from telegram.request import HTTPXRequest
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from pkbrokers_redis import logs
from pkbrokers_redis.clock import Backoff
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.settings import Settings

log = logs.get("bot")

P = ParamSpec("P")
T = TypeVar("T")

TRIES = 4
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.3, 5.0
FLOOD_WAITS_MAX = 5  # 429 in a row before a message is given up
CONNECTIONS_MAX = 32
CONNECT_SECONDS_MAX = 10.0
ANSWER_SECONDS_MAX = 30.0  # generous: a request that is given up may have been carried out
UPLOAD_SECONDS_MAX = 300.0
POLL_SECONDS = 25  # how long Telegram holds a getUpdates without news
CLAIM_SECONDS = 2 * 86_400  # Telegram keeps updates for one day
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 30.0  # between requests while Telegram is unavailable
BUSY_POLL_SECONDS = 0.1
KINDS = ["message", "callback_query"]
# What python-telegram-bot raises for an answer that is not as documented.
MALFORMED_ANSWER = (AttributeError, LookupError, TypeError, ValueError)


def _is_transient(error: BaseException) -> bool:
    """Return whether Telegram surely did not carry out the request, and may do so a moment later.

    A timeout is not: the message may have been sent, and a repetition would show it twice.
    """
    return isinstance(error, NetworkError) and not isinstance(error, (BadRequest, TimedOut))


async def with_retries(request: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return the request's answer, after up to TRIES tries. Raise TelegramError."""
    async for attempt in AsyncRetrying(
        retry=retry_if_exception(_is_transient),
        stop=stop_after_attempt(TRIES),
        wait=wait_random_exponential(multiplier=FIRST_RETRY_SECONDS, max=LONGEST_RETRY_SECONDS),
        reraise=True,
    ):
        with attempt:
            try:
                return await request(*args, **kwargs)
            except MALFORMED_ANSWER as error:
                raise TelegramError(f"malformed answer ({type(error).__name__})") from error
    raise AssertionError("unreachable: the last attempt raises")


def make_bot(settings: Settings) -> ExtBot[Any]:
    """Return the Bot API client of the settings. It sends nothing yet."""
    token = settings.telegram_token
    base_url = settings.telegram_api_url
    return ExtBot(
        token="" if token is None else token.get_secret_value(),
        base_url=base_url,
        base_file_url=base_url.removesuffix("/bot") + "/file/bot",
        request=HTTPXRequest(
            connection_pool_size=CONNECTIONS_MAX,
            connect_timeout=CONNECT_SECONDS_MAX,
            read_timeout=ANSWER_SECONDS_MAX,
            write_timeout=ANSWER_SECONDS_MAX,
            media_write_timeout=UPLOAD_SECONDS_MAX,
            pool_timeout=ANSWER_SECONDS_MAX,
        ),
        get_updates_request=HTTPXRequest(connection_pool_size=1, connect_timeout=CONNECT_SECONDS_MAX),
        rate_limiter=AIORateLimiter(max_retries=FLOOD_WAITS_MAX),
    )


class UpdatePoller:
    """Fetches updates and hands each to the Application, once, across restarts and processes.

    It replaces python-telegram-bot's `Updater`, which loses a whole batch when one update is malformed, and
    confirms updates to Telegram before a process has claimed them:

        P:{bot}:update:<id>   string, NX, TTL   an update that a process has accepted

    An update that cannot be claimed (Redis is unavailable) stays with Telegram. The offset is not stored:
    after a week without updates Telegram may restart its ids at a lower number.

    `counts`: `updates`, `malformed`, `repeated` (accepted before).
    """

    def __init__(
        self, application: Application[Any, Any, Any, Any, Any, Any], client: redis.Redis, keys: Keys
    ) -> None:
        self._application, self._client, self._keys = application, client, keys
        self._offset = 0
        self._logged = logs.Once()
        self.counts = {"updates": 0, "malformed": 0, "repeated": 0}
        self.is_available = True  # whether Telegram answered the last request

    async def run(self) -> None:
        """Poll until cancelled. No answer of Telegram ends it."""
        backoff = Backoff(FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS)
        while True:
            offset = self._offset
            try:
                raw = await self._fetch()
                self._log_availability(None)
                await self._accept_all(raw)
                if raw == [] or self._offset != offset:
                    backoff.reset()
            except (TelegramError, *MALFORMED_ANSWER) as error:
                self._log_availability(error)
            except redis.RedisError as error:
                log.warning("redis_unavailable", reason=type(error).__name__)
            if (
                self._offset == offset
            ):  # nothing was confirmed: the next answer can come at once, and the same
                await asyncio.sleep(backoff.next())

    async def _fetch(self) -> Any:
        """Return the raw updates."""
        arguments = {"offset": self._offset, "timeout": POLL_SECONDS, "allowed_updates": KINDS}
        # Spelt with "_" the library sends it as getUpdates and does not parse the batch as a whole.
        return await self._application.bot.do_api_request(
            "get_Updates", api_kwargs=arguments, read_timeout=POLL_SECONDS + CONNECT_SECONDS_MAX
        )

    async def _accept_all(self, raw: Any) -> None:
        for cells in raw if isinstance(raw, list) else [raw]:
            task = asyncio.ensure_future(self._accept_one(cells))
            try:
                await asyncio.shield(task)
            finally:  # a cancellation waits for the update that is being claimed
                await asyncio.gather(task, return_exceptions=True)

    async def _accept_one(self, cells: Any) -> None:
        update_id = cells.get("update_id") if isinstance(cells, dict) else None
        if type(update_id) is not int:
            self._count_malformed(cells)
            return
        key = self._keys.bot_update(str(update_id))
        if await asyncio.to_thread(self._client.set, key, 1, nx=True, ex=CLAIM_SECONDS):
            self.counts["updates"] += 1
            try:
                update = Update.de_json(cells, self._application.bot)
            except Exception:  # the library raises anything for a malformed update
                self._count_malformed(cells)
            else:
                await self._application.update_queue.put(update)
                busy = self._application.update_processor  # it has a counter and no event
                while busy.current_concurrent_updates >= busy.max_concurrent_updates:  # noqa: ASYNC110
                    await asyncio.sleep(BUSY_POLL_SECONDS)
        else:
            self.counts["repeated"] += 1
        self._offset = update_id + 1

    def _count_malformed(self, cells: Any) -> None:
        self.counts["malformed"] += 1
        names = sorted(map(str, cells))[:10] if isinstance(cells, dict) else type(cells).__name__
        if self._logged.first(str(names)):
            log.warning("update_malformed", fields=names)

    def _log_availability(self, error: Exception | None) -> None:
        """Log when Telegram becomes unavailable, and when it recovers."""
        if self.is_available == (error is None):
            return
        self.is_available = error is None
        if error is None:
            log.info("telegram_recovered")
        elif isinstance(error, Conflict):
            log.warning("telegram_conflict", hint="stop the other bot that uses this token")
        else:
            log.warning("telegram_unavailable", reason=type(error).__name__)
