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
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import redis
from telegram import BotCommand
from telegram.error import InvalidToken, TelegramError
from telegram.ext import ExtBot

from pkbrokers_redis import logs
from pkbrokers_redis.bot.alerts.store import Outbox
from pkbrokers_redis.bot.alerts.worker import AlertWorker
from pkbrokers_redis.bot.application import CommandRouter, build_application
from pkbrokers_redis.bot.commands import COMMANDS
from pkbrokers_redis.bot.context import Services, access_of
from pkbrokers_redis.bot.operators import OperatorMonitor
from pkbrokers_redis.bot.telegram_client import (
    FIRST_WAIT_SECONDS,
    LONGEST_WAIT_SECONDS,
    UpdatePoller,
    make_bot,
    with_retries,
)
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.clock import Backoff
from pkbrokers_redis.errors import PkbError, SettingsError
from pkbrokers_redis.runtime.roles import keep_heartbeat, open_store, worker_id
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import connect, describe
from pkbrokers_redis.store.functions import load_functions
from pkbrokers_redis.store.leases import LeaderLease
from pkbrokers_redis.store.meta import adopt_meta

log = logs.get("bot")

LEASE_SECONDS = 10.0
RENEW_EVERY_SECONDS = 2.0
STOP_BEFORE_END_SECONDS = 4.0  # of a lease that is not renewed: this process stops before another starts
TRY_EVERY_SECONDS = 1.0  # of a process that waits for the lease
DRAIN_SECONDS_MAX = 5.0  # for answers in progress, and for alerts in the outbox
STOP_POLL_SECONDS = 0.1
REDIS_SECONDS_MAX = 10.0  # a Redis that does not answer in this time counts as unavailable


def bot(settings: Settings, stop: threading.Event) -> None:
    """Answer in Telegram until `stop` is set. Raise SettingsError for a refused token or a malformed id."""
    if settings.telegram_token is None:
        raise SettingsError("there is no bot token", "set PKB_TELEGRAM_TOKEN (from @BotFather)")
    access_of(settings)
    client = open_store(settings)
    load_functions(client)
    settings = adopt_meta(client, settings)
    asyncio.run(_BotProcess(settings, client).run(stop))


class _BotProcess:
    """One process of the role. The lease decides whether it answers."""

    def __init__(self, settings: Settings, client: redis.Redis) -> None:
        self._settings, self._client = settings, client
        self._name = worker_id("bot")
        self._bot: ExtBot[Any] = make_bot(settings)
        self._lease = LeaderLease(client, settings.keys.bot_lease(), self._name, LEASE_SECONDS)
        self._figures: Callable[[], dict[str, Any]] = dict

    async def run(self, stop: threading.Event) -> None:
        """Answer while this process holds the lease, until `stop`."""
        log.info("started", store=describe(self._settings), api=self._settings.telegram_api_url)
        beats = asyncio.create_task(
            keep_heartbeat(self._client, self._settings.keys, "bot", self._name, lambda: self._figures())
        )
        answers = asyncio.create_task(self._answer_in_turn())
        while not stop.is_set() and not answers.done():
            await asyncio.wait({answers}, timeout=STOP_POLL_SECONDS)
        for task in (answers, beats):
            task.cancel()
        ended, _ = await asyncio.gather(answers, beats, return_exceptions=True)
        with suppress(redis.RedisError):
            await asyncio.to_thread(self._lease.release)
        with suppress(Exception):
            await self._bot.shutdown()
        if isinstance(ended, Exception):
            raise ended
        log.info("stopped", **self._figures())

    async def _answer_in_turn(self) -> None:
        """Wait for the lease and answer while it is held, again and again, until cancelled."""
        await self._initialize()
        while True:
            try:
                is_held = await asyncio.to_thread(self._lease.acquire)
            except (redis.RedisError, PkbError) as error:
                log.warning("redis_unavailable", reason=type(error).__name__)
                is_held = False
            if is_held:
                await self._answer()
            else:
                await asyncio.sleep(TRY_EVERY_SECONDS)

    async def _initialize(self) -> None:
        """Call getMe until Telegram answers. Raise SettingsError for a refused token."""
        backoff = Backoff(FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS)
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
            await asyncio.sleep(backoff.next())

    async def _answer(self) -> None:
        """Do everything that only the lease's holder does; return when the lease is lost."""
        log.info("lease_acquired", bot=self._bot.username)
        settings, loop = self._settings, asyncio.get_running_loop()
        reader = await asyncio.to_thread(
            connect, settings, for_reading=True, socket_timeout_seconds=REDIS_SECONDS_MAX
        )
        outbox = Outbox(self._bot, self._client, settings.keys, access_of(settings).chats)
        worker = AlertWorker(
            lambda: connect(settings, for_reading=False, socket_timeout_seconds=REDIS_SECONDS_MAX),
            settings,
            on_fired=lambda: loop.call_soon_threadsafe(outbox.wake),
        )
        services = Services(settings, self._client, CandleStore(settings, reader))
        router = CommandRouter(services)
        application = build_application(self._bot, router)
        await application.initialize()
        await application.start()
        poller = UpdatePoller(application, self._client, settings.keys)
        self._figures = lambda: {
            "telegram": "up" if poller.is_available else "unavailable",
            **poller.counts,
            **router.counts,
            **worker.counts,
        }
        works = [self._keep_lease(), poller.run(), outbox.run()]
        if services.access.admins:
            works.append(OperatorMonitor(self._bot, services, worker.feed).run())
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(work) for work in works]
        # Telegram's apps show it as a menu; everything works without it.
        menu = [BotCommand(command.name, command.does[:256]) for command in COMMANDS.values()]
        published = asyncio.create_task(self._bot.set_my_commands(menu))
        worker.start()
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            tasks.append(published)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with suppress(TimeoutError):  # then the answers in progress have been cancelled
                await asyncio.wait_for(application.stop(), DRAIN_SECONDS_MAX)
            await asyncio.to_thread(worker.stop)
            with suppress(TelegramError, redis.RedisError, TimeoutError):
                await asyncio.wait_for(outbox.flush(), DRAIN_SECONDS_MAX)
            await services.close()
            reader.close()
        log.info("lease_released")

    async def _keep_lease(self) -> None:
        """Renew the lease; return when another process has it, or when it is about to expire."""
        while self._lease.remaining_seconds > STOP_BEFORE_END_SECONDS:
            await asyncio.sleep(RENEW_EVERY_SECONDS)
            try:
                if not await asyncio.to_thread(self._lease.acquire):
                    break
            except (redis.RedisError, PkbError) as error:
                log.warning("redis_unavailable", reason=type(error).__name__)
        log.warning("lease_lost", remaining_seconds=round(self._lease.remaining_seconds, 1))
