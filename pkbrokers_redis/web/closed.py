"""/api/closed: closed candles as Server-Sent Events.

    id: mc3k2f1a..7d;..0;…                    the position after this candle, for Last-Event-ID
    event: closed
    data: {"token":408065,"symbol":"NSE:INFY","interval":"1m","row":[…],"rev":0}

    event: ready      sent first, with the start position; then a comment every KEEPALIVE_SECONDS
    event: missed     {"missed":12}: announcements that were trimmed before this client read them
    event: trouble    {"error":"…"}: Redis is unavailable; the stream resumes when Redis is back

The server queues nothing for a client: each client has its own read, and the stream in Redis is its queue. A
client that does not read is disconnected and loses nothing, because it reconnects with its Last-Event-ID.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from aiohttp import web

from pkbrokers_redis import logs
from pkbrokers_redis.candles.model import find_interval
from pkbrokers_redis.client.follow import AsyncFollower, FollowOptions
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.web.executor import REDIS_ERRORS, STREAMS_MAX, Route, Services, TooBusy
from pkbrokers_redis.web.http import BadRequest, StreamBody, candle_row, list_param

log = logs.get("web")

KEEPALIVE_SECONDS = 15.0
RETRY_SECONDS = 1.0  # between two reads while Redis is unavailable
RECONNECT_HINT = b"retry: 2000\n\n"  # milliseconds until a browser reconnects


async def closed(request: web.Request, services: Services) -> web.StreamResponse:
    """Answer `?symbols=INFY,TCS&intervals=1m,5m&position=…`, all optional; Last-Event-ID has precedence."""
    symbols, intervals = list_param(request, "symbols"), list_param(request, "intervals")
    position = request.headers.get("Last-Event-ID") or request.query.get("position") or None
    keys, tokens, names = await services.quick(_resolve, services, symbols, intervals)
    if len(services.streams) >= STREAMS_MAX:
        raise TooBusy("too many followers at once", "try again in a moment")
    try:
        options = FollowOptions(tokens, names, position, KEEPALIVE_SECONDS)
        follower = AsyncFollower(services.store.client, keys, options)
    except PkbError as error:  # the position is invalid
        raise BadRequest(error.message, error.hint) from None
    stream = StreamBody(request, services, "text/event-stream; charset=utf-8")
    # A task of its own: cancelling it must not cancel aiohttp's task, nor the other way round.
    task = asyncio.create_task(_send_events(follower, stream, services))
    services.streams.add(task)
    try:
        await asyncio.wait({task})
    finally:
        services.streams.discard(task)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await follower.aclose()
    failure = None if task.cancelled() else task.exception()
    if failure is not None and not stream.response.prepared:
        raise failure
    if failure is not None:
        log.error("stream_failed", path="/api/closed", exc_info=failure)
    return stream.response


async def _send_events(follower: AsyncFollower, stream: StreamBody, services: Services) -> None:
    """Send events until the client disconnects, is too slow, or the server stops."""
    await follower.__aenter__()  # fixes the start position; the caller closes the follower
    await stream.start()
    try:
        ready = _event("ready", {"position": follower.position}, follower.position)
        await stream.send(RECONNECT_HINT + ready)
        missed, is_unavailable = 0, False
        while True:
            try:
                candle = await anext(follower, None)
                is_unavailable = False
            except (PkbError, *REDIS_ERRORS) as error:
                if not is_unavailable:
                    line = " ".join(str(services.explain(error)).split())
                    await stream.send(_event("trouble", {"error": line}))
                is_unavailable = True
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if follower.missed > missed:
                missed = follower.missed
                await stream.send(_event("missed", {"missed": missed}))
            if candle is None:
                # An id without data advances the client's Last-Event-ID and shows nothing.
                await stream.send(f": nothing closed\nid: {follower.position}\n\n".encode())
            else:
                names = ("token", "symbol", "interval", "rev")
                data = {name: getattr(candle, name) for name in names} | {"row": candle_row(candle.candle)}
                await stream.send(_event("closed", data, candle.position))
    except ConnectionError:
        pass  # the client has disconnected


def _event(kind: str, data: Any, position: str = "") -> bytes:
    """Return one event with its JSON in one line."""
    id_line = f"id: {position}\n" if position else ""
    return f"{id_line}event: {kind}\ndata: ".encode() + msgspec.json.encode(data) + b"\n\n"


def _resolve(
    services: Services, symbols: list[str] | None, intervals: list[str] | None
) -> tuple[Keys, set[int] | None, set[str] | None]:
    """Return the keys, the symbols as tokens, and the intervals' names. Raise for unknown ones."""
    store = services.store
    tokens = None if symbols is None else {token for token, _ in store.resolve_all(symbols)}
    table = store.settings.intervals
    names = None if intervals is None else {find_interval(table, name).name for name in intervals}
    return store.keys, tokens, names


ROUTES = [Route("/api/closed", closed, "/api/closed?symbols=INFY&intervals=1m", is_long=True)]
