"""The role `web` as a process. Any number may run; no other role needs it.

It reads. It writes only its heartbeat, and it also serves when its Redis user may not write even that.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import threading
from contextlib import suppress

import redis
from aiohttp import web

from pkbrokers_redis import logs
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.runtime.heartbeat import Heartbeat
from pkbrokers_redis.runtime.roles import now_ms, worker_id
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import connect, describe
from pkbrokers_redis.store.leases import announce, leave
from pkbrokers_redis.web.executor import Services
from pkbrokers_redis.web.middleware import make_app

log = logs.get("web")

REDIS_SECONDS_MAX = 3.0  # a Redis that does not answer in this time counts as unavailable
BEAT_SECONDS = 2.0
STOP_POLL_SECONDS = 0.1
SHUTDOWN_SECONDS_MAX = 1.0  # for responses in progress; event streams end at once
KEEPALIVE_SECONDS_MAX = 30.0  # an idle connection


def serve(settings: Settings, stop: threading.Event) -> None:
    """Serve on PKB_WEB_HOST and PKB_WEB_PORT until `stop` is set.

    Raises:
        PkbError: The address cannot be listened on.
    """
    client = connect(settings, for_reading=True, socket_timeout_seconds=REDIS_SECONDS_MAX)
    with client:
        asyncio.run(_serve(settings, client, stop))


async def _serve(settings: Settings, client: redis.Redis, stop: threading.Event) -> None:
    services = Services(settings, CandleStore(settings, client))
    app = make_app(services)

    async def end_streams(_: web.Application) -> None:
        await services.end_streams()

    app.on_shutdown.append(end_streams)
    runner = web.AppRunner(
        app,
        access_log=None,  # the middleware logs without queries
        handler_cancellation=True,
        keepalive_timeout=KEEPALIVE_SECONDS_MAX,
        shutdown_timeout=SHUTDOWN_SECONDS_MAX,
    )
    await runner.setup()
    beats: asyncio.Task[None] | None = None
    try:
        url = await _listen(runner, settings)
        log.info("started", store=describe(settings, for_reading=True), url=url)
        if settings.web_token is None and not _is_loopback(settings.web_host):
            log.warning("token_missing", host=settings.web_host, hint="set PKB_WEB_TOKEN")
        beats = asyncio.create_task(_beat(services, client, url))
        while not stop.is_set():  # noqa: ASYNC110  a signal handler sets it, in whichever thread
            await asyncio.sleep(STOP_POLL_SECONDS)
    finally:
        await runner.cleanup()
        if beats is not None:
            beats.cancel()
            await asyncio.gather(beats, return_exceptions=True)
        services.close()
    log.info("stopped", **services.figures())


async def _listen(runner: web.AppRunner, settings: Settings) -> str:
    """Start to listen and return the URL."""
    host, port = settings.web_host, settings.web_port
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        # Not a SettingsError: under `pkb up` the other roles go on, and this one is started again.
        reason = os.strerror(error.errno) if error.errno else str(error)  # asyncio wraps the text in more
        raise PkbError(
            f"cannot listen on {host}:{port} ({reason})",
            "set PKB_WEB_PORT or PKB_WEB_HOST, or stop the program that uses it",
        ) from None
    address = runner.addresses[0]
    shown_host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"http://{shown_host}:{address[1]}"


async def _beat(services: Services, client: redis.Redis, url: str) -> None:
    """Write the heartbeat until cancelled, then delete it."""
    keys, name = services.settings.keys, worker_id("web")
    heart = Heartbeat(keys, "web", name, now_ms())

    def beat() -> None:
        with suppress(redis.ResponseError):  # no worker has loaded the functions yet; the heartbeat suffices
            announce(client, keys, "web", name, may_load=False)
        heart.beat(client, now_ms(), 0, {**services.figures(), "url": url})

    def end() -> None:
        leave(client, keys, "web", name)
        heart.end(client)

    try:
        while True:
            with suppress(PkbError, redis.RedisError):
                await asyncio.to_thread(beat)
            await asyncio.sleep(BEAT_SECONDS)
    finally:
        with suppress(PkbError, redis.RedisError):
            await asyncio.to_thread(end)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
