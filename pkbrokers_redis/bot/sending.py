"""Requests to Telegram that are worth another try, and what its errors mean to us.

429 RetryAfter   the rate limiter waits as told and sends again (`AIORateLimiter`)
5xx, no network  tried again here, a few times
400, 403         the message itself is refused: no other try would help
200, and no sense in it: TelegramError, as for any other answer that cannot be read
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from telegram.error import BadRequest, NetworkError, TelegramError, TimedOut
from telegram.request import HTTPXRequest
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from pkbrokers_redis.settings import Settings

if TYPE_CHECKING:
    from telegram.ext import ExtBot

T = TypeVar("T")

TRIES = 4
FIRST_WAIT_SECONDS = 0.3
LONGEST_WAIT_SECONDS = 5.0
FLOOD_WAITS_MAX = 5  # 429s in a row before a message is given up
CONNECTIONS_MAX = 32
CONNECT_SECONDS_MAX = 10.0
ANSWER_SECONDS_MAX = 30.0  # generous: a request given up may have been carried out
UPLOAD_SECONDS_MAX = 300.0
NONSENSE = (AttributeError, LookupError, TypeError, ValueError)  # by the library's readers of answers


def may_heal(error: BaseException) -> bool:
    """Whether Telegram surely did not take the message and may take it a moment later.

    Not after a timeout: it may have arrived, and nobody wants an answer twice.
    """
    return isinstance(error, NetworkError) and not isinstance(error, (BadRequest, TimedOut))


async def insist(request: Callable[[], Awaitable[T]]) -> T:
    """The request's answer, after a few more tries where it may heal. Raises TelegramError."""
    async for attempt in AsyncRetrying(
        retry=retry_if_exception(may_heal),
        stop=stop_after_attempt(TRIES),
        wait=wait_random_exponential(multiplier=FIRST_WAIT_SECONDS, max=LONGEST_WAIT_SECONDS),
        reraise=True,
    ):
        with attempt:
            try:
                return await request()
            except NONSENSE as error:
                raise TelegramError(f"an answer without sense ({type(error).__name__})") from error
    raise AssertionError("unreachable: the last attempt raises")


def make_bot(settings: Settings) -> ExtBot[Any]:
    """The client of the Bot API that the settings name. Sends nothing yet."""
    from telegram.ext import AIORateLimiter, ExtBot

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
