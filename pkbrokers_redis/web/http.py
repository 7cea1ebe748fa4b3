"""URL parameters, each checked; responses: JSON, one-line errors, bodies with a bounded buffer per client."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable
from typing import Any

import msgspec
from aiohttp import web

from pkbrokers_redis.candles.model import CANDLE_FIELDS, Candle
from pkbrokers_redis.errors import PkbError, RedisUnavailable, RedisUnsuitable, UnknownInterval, UnknownSymbol
from pkbrokers_redis.web.executor import REDIS_ERRORS, Services, TooBusy

COUNT_MAX = 5_000  # rows per instrument
SYMBOLS_MAX = 500  # per request
TEXT_MAX = 60  # letters of a symbol or of a search text
WRITE_SECONDS_MAX = 10.0  # a client that reads nothing for so long is disconnected
SEND_BUFFER_BYTES = 256 * 1024  # kernel buffer per client; asyncio adds 64 KiB
CHUNK_BYTES = 128 * 1024


class BadRequest(PkbError):
    """Raised when a request has an invalid parameter."""


def int_param(request: web.Request, name: str, default: int, maximum: int = COUNT_MAX) -> int:
    """Return `?name=50` as an integer from 1 to `maximum`. Raise BadRequest."""
    text = request.query.get(name, str(default))
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
    if not 1 <= number <= maximum:
        raise BadRequest(f"{name} is not a number from 1 to {maximum}", f"write {name}={default}")
    return number


def flag_param(request: web.Request, name: str) -> bool:
    """Return `?name=1` as a boolean; 0 and an absent parameter are False. Raise BadRequest."""
    text = request.query.get(name, "0")
    if text not in ("0", "1"):
        raise BadRequest(f"{name} is neither 0 nor 1", f"write {name}=1")
    return text == "1"


def text_param(request: web.Request, name: str, default: str = "") -> str:
    """Return a short word or phrase. Raise BadRequest."""
    return _checked_length(name, request.query.get(name, default).strip())


def list_param(request: web.Request, name: str) -> list[str] | None:
    """Return `?symbols=INFY,TCS` as a list; None when it is absent or empty. Raise BadRequest."""
    return split_list(name, request.query.get(name, "").split(",")) or None


def split_list(name: str, texts: Iterable[str]) -> list[str]:
    """Return the non-empty texts without duplicates. Raise BadRequest for too many or too long ones."""
    values = list(dict.fromkeys(_checked_length(name, text.strip()) for text in texts if text.strip()))
    if len(values) > SYMBOLS_MAX:
        raise BadRequest(f"{len(values)} {name} are too many", f"send at most {SYMBOLS_MAX} at a time")
    return values


def _checked_length(name: str, text: str) -> str:
    if len(text) > TEXT_MAX:
        raise BadRequest(f"{name}: {text[:20]!r}… is too long", f"send at most {TEXT_MAX} letters")
    return text


def json_response(value: Any, status: int = 200) -> web.Response:
    """Return `value` as JSON; NaN becomes null."""
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json", charset="utf-8"
    )


def candle_row(candle: Candle) -> list[Any]:
    """Return the row as Redis has it: `[start, open, high, low, close, volume, oi, ticks(, flag)]`."""
    return list(candle if candle.flag else candle[: len(CANDLE_FIELDS)])


def error_response(error: BaseException, services: Services) -> web.Response:
    """Return `{"error": "one line"}` with the status of the error's kind.

    404 names the nearest symbols, 400 is a bad request, 503 is temporary, 500 is a bug or a damaged key.
    """
    shown = error
    if isinstance(error, REDIS_ERRORS):
        shown, status = services.explain(error), 503
    elif isinstance(error, UnknownSymbol):
        body = {"error": error.message, "symbol": error.symbol, "nearest": error.nearest}
        return json_response(body, 404)
    elif isinstance(error, (BadRequest, UnknownInterval)):
        status = 400
    else:
        status = 503 if isinstance(error, (TooBusy, RedisUnavailable, RedisUnsuitable)) else 500
    line = str(shown) if isinstance(shown, PkbError) else "something went wrong here: see the log"
    response = json_response({"error": " ".join(line.split())}, status)
    if status == 503:
        response.headers["Retry-After"] = "1"
    return response


class StreamBody:
    """A body that is sent as fast as its client reads. At most SEND_BUFFER_BYTES wait per client."""

    def __init__(
        self, request: web.Request, services: Services, content_type: str, length: int | None = None
    ) -> None:
        self._request, self._services = request, services
        self.response = web.StreamResponse(headers={"Content-Type": content_type})
        self.response.content_length = length

    async def start(self) -> None:
        """Send the headers."""
        transport = self._request.transport
        peer = transport.get_extra_info("socket") if transport is not None else None
        if peer is not None:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        await self.response.prepare(self._request)

    async def send(self, data: bytes) -> None:
        """Return when most of `data` is sent. Raise ConnectionError when the client is gone, or too slow."""
        try:
            async with asyncio.timeout(WRITE_SECONDS_MAX):
                await self.response.write(data)
        except TimeoutError:
            self._services.counts["streams_dropped"] += 1
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionError("the client does not read") from None
