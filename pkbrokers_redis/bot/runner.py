"""The role `bot` as a process: hold the lease, then poll, answer, watch alerts, tell the operators.

    P:{bot}:lease   string, TTL   one process answers; the others wait, and take over when it is gone

Telegram that is away is waited for; Redis that is away pauses the bot (an update that cannot be taken stays
with Telegram). Neither touches the tick path: the bot only reads the streams, and holds nothing up.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import redis
from telegram import BotCommand
from telegram.error import InvalidToken, TelegramError
from telegram.ext import ExtBot

from pkbrokers_redis import logs
from pkbrokers_redis.bot.access import access_of
from pkbrokers_redis.bot.alerts.book import AlertBook
from pkbrokers_redis.bot.alerts.outbox import Outbox
from pkbrokers_redis.bot.alerts.worker import AlertWorker
from pkbrokers_redis.bot.charts import ChartPool
from pkbrokers_redis.bot.dispatch import Dispatcher
from pkbrokers_redis.bot.operators import Monitor
from pkbrokers_redis.bot.polling import LONGEST_WAIT_SECONDS, Poller
from pkbrokers_redis.bot.registry import commands
from pkbrokers_redis.bot.sending import insist, make_bot
from pkbrokers_redis.bot.services import Services
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.errors import PkbError, SettingsError
from pkbrokers_redis.runtime.heartbeat import Heartbeat
from pkbrokers_redis.runtime.roles import now_ms, open_store, worker_id
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import connect, describe
from pkbrokers_redis.store.functions import load_functions
from pkbrokers_redis.store.leases import LeaderLease, announce, leave
from pkbrokers_redis.store.meta import adopt_meta

log = logs.get("bot")

LEASE_SECONDS = 10.0
HOLD_EVERY_SECONDS = 2.0
STALE_PART = 0.6  # of it without an answer of Redis: we stop before another may begin
DRAIN_SECONDS_MAX = 5.0
STOP_LOOK_SECONDS = 0.1
REDIS_SECONDS_MAX = 10.0  # a Redis that hangs is one that is away


def bot(settings: Settings, stop: threading.Event) -> None:
    """Answer in Telegram until `stop` is set. Raises SettingsError without a token, or for a refused one."""
    if settings.telegram_token is None:
        raise SettingsError("there is no bot token", "set PKB_TELEGRAM_TOKEN (from @BotFather)")
    access_of(settings)  # a wrong id is said at once
    client = open_store(settings)
    load_functions(client)
    settings = adopt_meta(client, settings)
    asyncio.run(_Runner(settings, client).run(stop))


class _Runner:
    """One process's bot."""

    def __init__(self, settings: Settings, client: redis.Redis) -> None:
        self._settings = settings
        self._name = worker_id("bot")
        self._client = client  # leases, claims, the heartbeat
        self._heart = Heartbeat(settings.keys, "bot", self._name, now_ms())
        self._bot: ExtBot[Any] = make_bot(settings)
        self._lease = LeaderLease(client, settings.keys.bot_lease(), self._name, LEASE_SECONDS)
        self._figures: dict[str, Any] = {"answers": 0}
        self._poller: Poller | None = None
        self._dispatcher: Dispatcher | None = None

    async def run(self, stop: threading.Event) -> None:
        """Until `stop`."""
        log.info("started", store=describe(self._settings), api=self._settings.telegram_api_url)
        ended = asyncio.create_task(_until(stop))
        beats = asyncio.create_task(self._beat())
        try:
            if not await self._first_of(ended, self._initialize()):
                return
            while not ended.done():
                if await self._hold():
                    await self._first_of(ended, self._serve())
                else:
                    await asyncio.wait({ended}, timeout=1.0)
        finally:
            for task in (beats, ended):
                task.cancel()
            await asyncio.gather(beats, ended, return_exceptions=True)
            with suppress(redis.RedisError):
                await asyncio.to_thread(self._leave)
            with suppress(Exception):
                await self._bot.shutdown()
        log.info("stopped", **self._figures)

    async def _initialize(self) -> bool:
        """getMe, as long as it takes."""
        wait_seconds = 0.5
        while True:
            try:
                await insist(self._bot.initialize)
                return True
            except InvalidToken:
                # The library's own text holds the token.
                raise SettingsError(
                    "Telegram refuses PKB_TELEGRAM_TOKEN", "copy it again from @BotFather"
                ) from None
            except TelegramError as error:
                log.warning("telegram_away", error=type(error).__name__)
            await asyncio.sleep(wait_seconds)
            wait_seconds = min(wait_seconds * 2, LONGEST_WAIT_SECONDS)

    async def _first_of(self, ended: asyncio.Task[None], work: Coroutine[Any, Any, Any]) -> bool:
        """Work until it is done (True) or we are told to stop (False). Raises what the work raises."""
        task = asyncio.create_task(work)
        await asyncio.wait({ended, task}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return not ended.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return False

    async def _serve(self) -> None:
        """All that only the holder of the lease does; returns when it is lost."""
        log.info("answering", bot=self._bot.username)
        settings = self._settings
        reader = await asyncio.to_thread(_reader, settings)
        store = CandleStore(settings, reader)
        loop = asyncio.get_running_loop()
        access = access_of(settings)
        outbox = Outbox(self._bot, self._client, settings.keys, access.chats)
        worker = AlertWorker(
            lambda: connect(settings, for_reading=False, socket_timeout_seconds=REDIS_SECONDS_MAX),
            settings,
            on_fired=lambda: loop.call_soon_threadsafe(outbox.wake),
        )
        services = Services(
            settings,
            self._client,
            store,
            access,
            market_clock(settings),
            AlertBook(self._client, settings.keys),
            ChartPool(),
            worker.reload,
        )
        dispatcher = self._dispatcher = Dispatcher(self._bot, services)
        poller = self._poller = Poller(self._bot, self._client, settings.keys, dispatcher.submit)
        monitor = Monitor(self._bot, services, worker)
        tasks = [
            asyncio.create_task(work)
            for work in (
                self._keep_lease(), self._publish_commands(), poller.run(), outbox.run(), monitor.run()
            )
        ]  # fmt: skip
        keeper = tasks[0]
        worker.start()
        try:
            await asyncio.wait([keeper, *tasks[2:]], return_when=asyncio.FIRST_COMPLETED)
            for task in tasks[2:]:
                if task.done() and task.exception() is not None:
                    log.error("failed", what="bot", exc_info=task.exception())
        finally:
            # No further updates, then what was begun, then the rest: a stop must not cut an answer short.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await dispatcher.drain(DRAIN_SECONDS_MAX)
            await asyncio.to_thread(worker.stop)
            with suppress(TelegramError, redis.RedisError, TimeoutError):
                await asyncio.wait_for(outbox.flush(), DRAIN_SECONDS_MAX)
            await services.close()
            self._note_figures(worker)
            self._poller = self._dispatcher = None
            store.close()
            reader.close()
        log.info("lease_let_go")

    async def _hold(self) -> bool:
        """Take or renew the lease. False: another process has it, or Redis is away."""
        try:
            return await asyncio.to_thread(self._lease.acquire)
        except (redis.RedisError, PkbError) as error:
            log.warning("redis_away", error=type(error).__name__)
            return False

    async def _keep_lease(self) -> None:
        """Returns when the lease is another's, or could not be renewed for as long as it lives."""
        while True:
            await asyncio.sleep(HOLD_EVERY_SECONDS)
            if await self._hold():
                continue
            is_stale = self._lease.remaining_seconds < (1 - STALE_PART) * LEASE_SECONDS
            if is_stale or await asyncio.to_thread(self._is_anothers):
                log.warning("lease_lost")
                return

    def _is_anothers(self) -> bool:
        try:
            holder: Any = self._client.get(self._settings.keys.bot_lease())
        except redis.RedisError:
            return False
        return holder is not None and holder != self._name.encode()

    async def _publish_commands(self) -> None:
        """The menu that Telegram's apps show. A comfort: without it everything works."""
        with suppress(TelegramError):
            menu = [BotCommand(each.name, each.does[:256]) for each in commands().values()]
            await self._bot.set_my_commands(menu)

    async def _beat(self) -> None:
        while True:
            with suppress(redis.RedisError):
                await asyncio.to_thread(self._beat_once)
            await asyncio.sleep(HOLD_EVERY_SECONDS)

    def _beat_once(self) -> None:
        self._note_figures()
        announce(self._client, self._settings.keys, "bot", self._name)
        self._heart.beat(self._client, now_ms(), 0, self._figures)

    def _note_figures(self, worker: AlertWorker | None = None) -> None:
        figures: dict[str, Any] = {"answers": int(self._poller is not None)}
        if self._poller is not None:
            figures |= self._poller.counts
            figures["telegram"] = "away" if self._poller.away_since is not None else "up"
        if self._dispatcher is not None:
            figures |= self._dispatcher.counts
        if worker is not None:
            figures |= worker.counts
        self._figures = figures

    def _leave(self) -> None:
        self._lease.release()
        leave(self._client, self._settings.keys, "bot", self._name)
        self._heart.end(self._client)


def _reader(settings: Settings) -> redis.Redis:
    return connect(settings, for_reading=True, socket_timeout_seconds=REDIS_SECONDS_MAX)


async def _until(stop: threading.Event) -> None:
    while not stop.is_set():  # noqa: ASYNC110  a signal handler sets it, in whichever thread
        await asyncio.sleep(STOP_LOOK_SECONDS)
