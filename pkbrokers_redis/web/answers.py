"""Answers: JSON, one line for an error, and large or endless bodies that no slow reader can pile up here."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import msgspec
from aiohttp import web

from pkbrokers_redis.candles.model import CANDLE_FIELDS, Candle
from pkbrokers_redis.errors import (
    PkbError,
    RedisUnavailable,
    RedisUnsuitable,
    UnknownInterval,
    UnknownSymbol,
)
from pkbrokers_redis.web.questions import Mistake
from pkbrokers_redis.web.reading import REDIS_ERRORS, Busy
from pkbrokers_redis.web.services import Services

WRITE_SECONDS_MAX = 10.0  # a reader that takes nothing for so long is dropped
SEND_BUFFER_BYTES = 256 * 1024  # in the kernel, a client; asyncio keeps 64 KiB more
CHUNK_BYTES = 128 * 1024


class TooSlow(Exception):
    """Raised when a client did not read for WRITE_SECONDS_MAX; its connection is gone."""


def json_answer(value: Any, status: int = 200) -> web.Response:
    """msgspec's JSON; a NaN is null."""
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json", charset="utf-8"
    )


def row_of(candle: Candle) -> list[Any]:
    """As it stands in Redis: `[start, open, high, low, close, volume, oi, ticks(, flag)]`."""
    return list(candle if candle.flag else candle[: len(CANDLE_FIELDS)])


def error_answer(error: BaseException, services: Services) -> web.Response:
    """One line, by kind: 404 names the nearest symbols, 400 is the asker's, 503 will pass, 500 will not."""
    told = error
    if isinstance(error, REDIS_ERRORS):
        told = services.explain(error)
        status = 503
    elif isinstance(error, UnknownSymbol):
        found = {"error": error.message, "symbol": error.symbol, "nearest": error.nearest}
        return json_answer(found, 404)
    elif isinstance(error, (Mistake, UnknownInterval)):
        status = 400
    else:
        status = 503 if isinstance(error, (Busy, RedisUnavailable, RedisUnsuitable)) else 500
    line = str(told) if isinstance(told, PkbError) else "something went wrong here: see the log"
    answer = json_answer({"error": " ".join(line.split())}, status)
    if status == 503:
        answer.headers["Retry-After"] = "1"
    return answer


class Stream:
    """A body that is sent as its reader takes it. What waits here for one client is SEND_BUFFER_BYTES."""

    def __init__(self, request: web.Request, content_type: str, length: int | None = None) -> None:
        self._request = request
        self._response = web.StreamResponse(headers={"Content-Type": content_type})
        self._response.content_length = length

    async def start(self) -> None:
        transport = self._request.transport
        peer = transport.get_extra_info("socket") if transport is not None else None
        if peer is not None:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        await self._response.prepare(self._request)

    async def send(self, data: bytes) -> None:
        """Returns when most of it is on its way. Raises TooSlow, and ConnectionError when nobody is there."""
        try:
            async with asyncio.timeout(WRITE_SECONDS_MAX):
                await self._response.write(data)
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise TooSlow from None

    @property
    def response(self) -> web.StreamResponse:
        return self._response


async def send_whole(request: web.Request, services: Services, body: bytes, content_type: str) -> Any:
    """A large body, piece by piece."""
    stream = Stream(request, content_type, len(body))
    await stream.start()
    try:
        for first in range(0, len(body), CHUNK_BYTES):
            await stream.send(body[first : first + CHUNK_BYTES])
    except TooSlow:
        services.counts["streams_dropped"] += 1
    except ConnectionError:
        pass  # the reader has gone
    return stream.response
