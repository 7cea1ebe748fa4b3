"""Closed candles as they are announced, as Server-Sent Events.

    id: mc3k2f1a..7d;..0;…                    the position behind this candle, for Last-Event-ID
    event: closed
    data: {"token":408065,"symbol":"NSE:INFY","interval":"1m","row":[…],"rev":0}

    event: ready      at once, with the position to begin from; then every KEEPALIVE_SECONDS a comment
    event: missed     {"missed":12}: announcements that were trimmed before this client came to them
    event: trouble    {"error":"…"}: Redis is away; the stream goes on when it is back

Nothing is queued for a client: each has a read of its own, and the stream in Redis is its queue. One that
does not take what it is sent is dropped, and loses nothing: it comes again with its Last-Event-ID.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from aiohttp import web

from pkbrokers_redis import logs
from pkbrokers_redis.candles.model import find_interval
from pkbrokers_redis.client.follow import AsyncFollower, ClosedCandle
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.cluster import async_client_of
from pkbrokers_redis.web.answers import Stream, TooSlow, row_of
from pkbrokers_redis.web.questions import Mistake, list_of
from pkbrokers_redis.web.reading import REDIS_ERRORS, Busy
from pkbrokers_redis.web.registry import Route
from pkbrokers_redis.web.services import STREAMS_MAX, Services

log = logs.get("web")

KEEPALIVE_SECONDS = 15.0
AWAY_SECONDS = 1.0  # between two tries while Redis is away
COME_AGAIN = b"retry: 2000\n\n"


async def closed(request: web.Request, services: Services) -> web.StreamResponse:
    """`?symbols=INFY,TCS&intervals=1m,5m&position=…`, all of them optional; Last-Event-ID goes before."""
    symbols, intervals = list_of(request, "symbols"), list_of(request, "intervals")
    position = request.headers.get("Last-Event-ID") or request.query.get("position") or None
    keys, tokens, names = await services.quick(_find, services, symbols, intervals)
    if len(services.streams) >= STREAMS_MAX:
        raise Busy("too many followers at once", "ask again in a moment")
    client = async_client_of(services.store.client)
    try:
        follower = AsyncFollower(
            client, keys, tokens=tokens, intervals=names, position=position, block_seconds=KEEPALIVE_SECONDS
        )
    except PkbError as error:  # the position
        await client.aclose()
        raise Mistake(error.message, error.hint) from None
    stream = Stream(request, "text/event-stream; charset=utf-8")
    task = asyncio.create_task(_pump(follower, stream, services))
    services.streams.add(task)
    try:
        # A task of its own: ending it must not end aiohttp's, nor the other way round.
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
        log.error("failed", what="closed", exc_info=failure)
    return stream.response


async def _pump(follower: AsyncFollower, stream: Stream, services: Services) -> None:
    """Until the client goes, or is dropped, or we stop. Raises what happens before the first byte."""
    await follower.__aenter__()  # it begins now; the caller closes it
    await stream.start()
    try:
        await stream.send(COME_AGAIN + event("ready", {"position": follower.position}, follower.position))
        missed, is_away = 0, False
        while True:
            try:
                candle = await anext(follower, None)
                is_away = False
            except (PkbError, *REDIS_ERRORS) as error:
                if not is_away:
                    line = " ".join(str(services.explain(error)).split())
                    await stream.send(event("trouble", {"error": line}))
                is_away = True
                await asyncio.sleep(AWAY_SECONDS)
                continue
            if follower.missed > missed:
                missed = follower.missed
                await stream.send(event("missed", {"missed": missed}))
            if candle is None:
                # An id without data moves the client's Last-Event-ID on and shows it nothing.
                await stream.send(f": nothing closed\nid: {follower.position}\n\n".encode())
            else:
                await stream.send(event("closed", _told(candle), candle.position))
    except TooSlow:
        services.counts["streams_dropped"] += 1
    except ConnectionError:
        pass  # the client has gone


def event(kind: str, data: Any, position: str = "") -> bytes:
    """One event, JSON in one line."""
    where = f"id: {position}\n" if position else ""
    return f"{where}event: {kind}\ndata: ".encode() + msgspec.json.encode(data) + b"\n\n"


def _told(candle: ClosedCandle) -> dict[str, Any]:
    return {
        "token": candle.token,
        "symbol": candle.symbol,
        "interval": candle.interval,
        "row": row_of(candle.candle),
        "rev": candle.rev,
    }


def _find(
    services: Services, symbols: list[str] | None, intervals: list[str] | None
) -> tuple[Keys, list[int] | None, list[str] | None]:
    store = services.store
    tokens = None if symbols is None else [token for token, _ in store.resolve_all(symbols)]
    table = store.settings.intervals
    names = None if intervals is None else [find_interval(table, name).name for name in intervals]
    return store.keys, tokens, names


ROUTES = [Route("/api/closed", closed, "/api/closed?symbols=INFY&intervals=1m", is_long=True)]
