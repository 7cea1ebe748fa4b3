"""A bot on a local Telegram, with the data that the client tests use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import redis

from pkbrokers_redis.bot.runner import bot
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.functions import load_functions
from pkbrokers_redis.store.meta import ensure_meta
from tests.bot.telegram import ALICE, BOB, GROUP, TOKEN, Telegram
from tests.client.contract import write_master
from tests.support import wait_until


@pytest.fixture
def telegram() -> Iterator[Telegram]:
    with Telegram() as server:
        yield server


@pytest.fixture
def bot_settings(make_settings: Callable[..., Settings], telegram: Telegram, client: redis.Redis) -> Settings:
    """ALICE is an operator; BOB and GROUP are allowed chats."""
    settings = make_settings(
        telegram_token=TOKEN,
        telegram_chats=f"{BOB}, {GROUP}",
        telegram_admins=str(ALICE),
        telegram_api_url=telegram.url,
        sessions="always",
    )
    load_functions(client)
    ensure_meta(client, settings, "2026-01-05T09:00:00+05:30")
    write_master(client, settings.keys)
    return settings


@contextmanager
def running_bot(settings: Settings) -> Iterator[threading.Thread]:
    """Run the role in a thread until the end of the block; raise what it raises."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            bot(settings, stop)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="bot")
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive(), "the bot did not stop"
    if failures:
        raise failures[0]


@pytest.fixture
def running(bot_settings: Settings, telegram: Telegram, client: redis.Redis) -> Iterator[Any]:
    """A bot that answers."""
    with ExitStack() as stack:
        stack.enter_context(running_bot(bot_settings))
        wait_until(lambda: any(method == "getUpdates" for method, _ in telegram.calls), what="the first poll")
        wait_until(lambda: client.exists(bot_settings.keys.bot_position()), what="the alerts' reader")
        yield
