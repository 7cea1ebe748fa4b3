"""The role `bot` as a process: hold the lease, then poll, answer, watch alerts, report to operators.

    P:{bot}:lease   string, TTL   the process that answers; the others wait and replace it when it dies

While Telegram is unavailable the bot waits. While Redis is unavailable it pauses: an update that cannot be
claimed stays with Telegram. Neither affects the pipeline, because the bot only reads its streams.

Threads: the event loop runs everything but the alerts' reader (`AlertWorker`) and blocking calls
(`to_thread`).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import redis
from telegram import BotCommand
from telegram.error import InvalidToken, TelegramError
from telegram.ext import Application, ExtBot

from pkbrokers_redis import logs
from pkbrokers_redis.bot.alerts.store import AlertStore, Outbox
from pkbrokers_redis.bot.alerts.worker import AlertWorker
from pkbrokers_redis.bot.application import UPDATES_AT_ONCE_MAX, CommandRouter, build_application
from pkbrokers_redis.bot.charts import ChartPool
from pkbrokers_redis.bot.commands import COMMANDS
from pkbrokers_redis.bot.commands_market import Movers
from pkbrokers_redis.bot.context import Services, access_of
from pkbrokers_redis.bot.operators import OperatorMonitor
from pkbrokers_redis.bot.telegram_client import LONGEST_WAIT_SECONDS, UpdatePoller, make_bot, with_retries
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.errors import PkbError, SettingsError
from pkbrokers_redis.runtime.cluster_state import Heartbeat
from pkbrokers_redis.runtime.roles import now_ms, open_store, worker_id
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import connect, describe
from pkbrokers_redis.store.functions import load_functions
from pkbrokers_redis.store.leases import LeaderLease, announce, leave
from pkbrokers_redis.store.meta import adopt_meta

log = logs.get("bot")

LEASE_SECONDS = 10.0
RENEW_EVERY_SECONDS = 2.0
STALE_PART = 0.6  # of the lease time without a renewal: this process stops before another may start
DRAIN_SECONDS_MAX = 5.0  # for answers in progress, and for alerts in the outbox
STOP_POLL_SECONDS = 0.1
REDIS_SECONDS_MAX = 10.0  # a Redis that does not answer in this time counts as unavailable


def bot(settings: Settings, stop: threading.Event) -> None:
    """Answer in Telegram until `stop` is set.

    Raises:
        SettingsError: There is no token, Telegram refuses it, or a chat id is malformed.
    """
    if settings.telegram_token is None:
        raise SettingsError("there is no bot token", "set PKB_TELEGRAM_TOKEN (from @BotFather)")
    access_of(settings)
    client = open_store(settings)
    load_functions(client)
    settings = adopt_meta(client, settings)
    asyncio.run(_BotProcess(settings, client).run(stop))


def make_services(
    settings: Settings,
    client: redis.Redis,
    store: CandleStore,
    alerts_changed: Callable[[], None] = lambda: None,
) -> Services:
    """Return what commands work with. `alerts_changed` is called after a chat changed its alerts."""
    return Services(
        settings,
        client,
        store,
        access_of(settings),
        market_clock(settings),
        AlertStore(client, settings.keys),
        ChartPool(),
        Movers(store),
        alerts_changed,
    )


class _BotProcess:
    """One process of the role. `_hold_lease` decides whether it answers."""

    def __init__(self, settings: Settings, client: redis.Redis) -> None:
        self._settings, self._client = settings, client
        self._name = worker_id("bot")
        self._heart = Heartbeat(settings.keys, "bot", self._name, now_ms())
        self._bot: ExtBot[Any] = make_bot(settings)
        self._lease = LeaderLease(client, settings.keys.bot_lease(), self._name, LEASE_SECONDS)
        self._figures: dict[str, Any] = {"answers": 0}
        self._read_figures: Callable[[], dict[str, Any]] = dict

    async def run(self, stop: threading.Event) -> None:
        """Wait for the lease, and answer while this process holds it, until `stop`."""
        log.info("started", store=describe(self._settings), api=self._settings.telegram_api_url)
        stopped = asyncio.create_task(_wait_for(stop))
        beats = asyncio.create_task(self._beat())
        try:
            await self._until(stopped, self._initialize())
            while not stopped.done():
                if await self._hold_lease():
                    await self._until(stopped, self._answer())
                else:
                    await asyncio.wait({stopped}, timeout=1.0)
        finally:
            for task in (beats, stopped):
                task.cancel()
            await asyncio.gather(beats, stopped, return_exceptions=True)
            with suppress(redis.RedisError):
                await asyncio.to_thread(self._leave)
            with suppress(Exception):
                await self._bot.shutdown()
        log.info("stopped", **self._figures)

    async def _until(self, stopped: asyncio.Task[None], work: Coroutine[Any, Any, None]) -> None:
        """Run `work` until it ends or the process is stopped. Raise what it raises."""
        task = asyncio.create_task(work)
        await asyncio.wait({stopped, task}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def _initialize(self) -> None:
        """Call getMe until Telegram answers. Raise SettingsError for a refused token."""
        wait_seconds = 0.5
        while True:
            try:
                await with_retries(self._bot.initialize)
                return
            except InvalidToken:
                # `from None`: the library's text holds the token.
                raise SettingsError(
                    "Telegram refuses PKB_TELEGRAM_TOKEN", "copy it again from @BotFather"
                ) from None
            except TelegramError as error:
                log.warning("telegram_unavailable", reason=type(error).__name__)
            await asyncio.sleep(wait_seconds)
            wait_seconds = min(wait_seconds * 2, LONGEST_WAIT_SECONDS)

    async def _answer(self) -> None:
        """Do everything that only the lease's holder does; return when the lease is lost."""
        log.info("lease_acquired", bot=self._bot.username)
        settings, loop = self._settings, asyncio.get_running_loop()
        reader = await asyncio.to_thread(
            connect, settings, for_reading=True, socket_timeout_seconds=REDIS_SECONDS_MAX
        )
        store = CandleStore(settings, reader)
        outbox = Outbox(self._bot, self._client, settings.keys, access_of(settings).chats)
        worker = AlertWorker(
            lambda: connect(settings, for_reading=False, socket_timeout_seconds=REDIS_SECONDS_MAX),
            settings,
            on_fired=lambda: loop.call_soon_threadsafe(outbox.wake),
        )
        services = make_services(settings, self._client, store, worker.reload)
        router = CommandRouter(services)
        application = build_application(self._bot, router)
        await application.initialize()
        await application.start()
        poller = UpdatePoller(self._bot, self._client, settings.keys, _accept_into(application))
        monitor = OperatorMonitor(self._bot, services, worker)
        self._read_figures = lambda: {
            "answers": 1,
            "telegram": "up" if poller.is_available else "unavailable",
            **poller.counts,
            **router.counts,
            **worker.counts,
        }
        tasks = [
            asyncio.create_task(work)
            for work in (self._keep_lease(), poller.run(), outbox.run(), monitor.run())
        ]
        menu = asyncio.create_task(self._publish_menu())
        worker.start()
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task.exception() is not None:
                    log.error("bot_failed", exc_info=task.exception())
        finally:
            # First no further updates, then the answers in progress, then the rest.
            for task in (*tasks, menu):
                task.cancel()
            await asyncio.gather(*tasks, menu, return_exceptions=True)
            stopping = asyncio.create_task(application.stop())
            if not (await asyncio.wait({stopping}, timeout=DRAIN_SECONDS_MAX))[0]:
                router.cancel()
            await asyncio.gather(stopping, return_exceptions=True)
            await asyncio.to_thread(worker.stop)
            with suppress(TelegramError, redis.RedisError, TimeoutError):
                await asyncio.wait_for(outbox.flush(), DRAIN_SECONDS_MAX)
            await services.close()
            self._figures, self._read_figures = self._read_figures(), dict
            store.close()
            reader.close()
        log.info("lease_released")

    async def _hold_lease(self) -> bool:
        """Take or renew the lease. Return False when another process has it or Redis is unavailable."""
        try:
            return await asyncio.to_thread(self._lease.acquire)
        except (redis.RedisError, PkbError) as error:
            log.warning("redis_unavailable", reason=type(error).__name__)
            return False

    async def _keep_lease(self) -> None:
        """Renew the lease; return when another process has it, or when it is about to expire."""
        while True:
            await asyncio.sleep(RENEW_EVERY_SECONDS)
            if await self._hold_lease():
                continue
            is_stale = self._lease.remaining_seconds < (1 - STALE_PART) * LEASE_SECONDS
            if is_stale or await asyncio.to_thread(self._has_other_holder):
                log.warning("lease_lost", reason="not renewed in time" if is_stale else "taken by another")
                return

    def _has_other_holder(self) -> bool:
        try:
            holder: Any = self._client.get(self._settings.keys.bot_lease())
        except redis.RedisError:
            return False
        return holder is not None and holder != self._name.encode()

    async def _publish_menu(self) -> None:
        """Publish the menu of commands that Telegram's apps show. Everything works without it."""
        with suppress(TelegramError):
            await self._bot.set_my_commands(
                [BotCommand(command.name, command.does[:256]) for command in COMMANDS.values()]
            )

    async def _beat(self) -> None:
        """Write the heartbeat until cancelled."""
        while True:
            with suppress(redis.RedisError):
                await asyncio.to_thread(self._beat_once)
            await asyncio.sleep(RENEW_EVERY_SECONDS)

    def _beat_once(self) -> None:
        self._figures = self._read_figures() or {"answers": 0}
        announce(self._client, self._settings.keys, "bot", self._name)
        self._heart.beat(self._client, now_ms(), 0, self._figures)

    def _leave(self) -> None:
        self._lease.release()
        leave(self._client, self._settings.keys, "bot", self._name)
        self._heart.end(self._client)


def _accept_into(application: Application[Any, Any, Any, Any, Any, Any]) -> Callable[[object], Any]:
    """Return a function that queues an update and waits while too many are being answered."""

    async def accept(update: object) -> None:
        await application.update_queue.put(update)
        # The library has a counter and no event for it.
        while application.update_processor.current_concurrent_updates >= UPDATES_AT_ONCE_MAX:  # noqa: ASYNC110
            await asyncio.sleep(STOP_POLL_SECONDS)

    return accept


async def _wait_for(stop: threading.Event) -> None:
    while not stop.is_set():  # noqa: ASYNC110  a signal handler sets it, in whichever thread
        await asyncio.sleep(STOP_POLL_SECONDS)
