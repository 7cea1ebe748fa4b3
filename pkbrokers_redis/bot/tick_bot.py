"""`PKTickBot` under upstream's constructor and method names, on the bot of this package.

Upstream's handlers are called by telegram.ext with an update and a context, synchronously and for one owner.
Here they are coroutines with the same names and arguments, for whoever registers them with an Application of
his own; `run` needs none of that.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import redis
from pydantic import SecretStr
from telegram import Update

from pkbrokers_redis.bot.access import access_of
from pkbrokers_redis.bot.alerts.book import AlertBook
from pkbrokers_redis.bot.charts import ChartPool
from pkbrokers_redis.bot.dispatch import Dispatcher
from pkbrokers_redis.bot.movers import Movers
from pkbrokers_redis.bot.runner import bot
from pkbrokers_redis.bot.services import Services
from pkbrokers_redis.bot.text import clock_time, money, table
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.connect import connect

Handler = Callable[["PKTickBot", Update, Any], Awaitable[None]]


def _as_upstream(*names: str) -> Handler:
    """A coroutine method that lets the dispatcher answer an update; `names` are its commands."""

    async def handler(self: PKTickBot, update: Update, context: Any) -> None:
        await self._answer(update, context)

    handler.__doc__ = f"Answer {' and '.join('/' + name for name in names)}."
    return handler


class PKTickBot:
    """The bot as upstream's programs start it: `PKTickBot(token, "ticks.json", chat_id).run()`.

    `ticks_file_path` names where upstream kept its files; ours come from Redis and PKB_DATA_DIR, and the
    path is only remembered. `chat_id` joins PKB_TELEGRAM_CHATS. `shared_stats` is not needed and kept.
    """

    MAX_FILE_SIZE = 50 * 1024 * 1024

    def __init__(
        self,
        bot_token: str,
        ticks_file_path: str = "ticks.json",
        chat_id: str | None = None,
        shared_stats: dict[str, Any] | None = None,
        *,
        settings: Settings | None = None,
    ) -> None:
        self.bot_token = bot_token
        self.ticks_file_path = ticks_file_path
        self.ticks_db_path = ticks_file_path.replace(".json", ".db")
        self.chat_id = (
            None if not chat_id else str(chat_id) if str(chat_id).startswith("-") else f"-{chat_id}"
        )
        self.shared_stats = {} if shared_stats is None else shared_stats
        self.conflict_detected = False
        self.parent: Any = None
        self._stop = threading.Event()
        given = settings or load_settings()
        # As upstream reads it: a chat id without a sign is a group's. Its owner in person is an admin here.
        chats = ",".join(filter(None, [given.telegram_chats, self.chat_id]))
        self._settings = given.model_copy(
            update={"telegram_token": SecretStr(bot_token), "telegram_chats": chats}
        )

    def run(self, parent: Any = None) -> None:
        """Answer until `stop`. Blocks; raises what `pkb bot` tells in one line."""
        if parent is not None:
            self.parent = parent
        self.run_bot()

    def run_bot(self) -> None:
        """The same."""
        bot(self._settings, self._stop)

    def stop(self) -> None:
        """End `run`, from another thread."""
        self._stop.set()

    start = _as_upstream("start")
    help_command = _as_upstream("help")
    status = _as_upstream("status")
    top_ticks = _as_upstream("top")
    send_token = _as_upstream("token")
    send_refreshed_token = _as_upstream("refresh_token")
    restart_watcher = _as_upstream("restart")
    test_ticks = _as_upstream("test_ticks")
    send_zipped_ticks = _as_upstream("ticks")
    send_zipped_db = _as_upstream("db")
    send_zipped_instrument_history = _as_upstream("instrument_history")
    send_daily_pkl = _as_upstream("daily_pkl")
    send_intraday_pkl = _as_upstream("intraday_pkl")
    send_candles = _as_upstream("candles")
    request_data = _as_upstream("request_data")

    async def handle_document_received(self, update: Update, context: Any) -> None:
        """Nothing: files that strangers send are not even downloaded."""

    def get_top_ticks_formatted(self, limit: int = 20) -> str | None:
        """The table of /top as HTML; None where nothing has been traded."""
        with CandleStore(self._settings) as store:
            busiest = sorted(Movers(store).all(), key=lambda each: each.ticks, reverse=True)[:limit]
        if not busiest:
            return None
        rows = [(each.symbol.removeprefix("NSE:"), str(each.ticks), money(each.price)) for each in busiest]
        updated = clock_time(market_clock(self._settings)() / 1000)
        return f"Last Update: {updated}\n{table(('Symbol', 'Tick', 'Price'), rows)}"

    def find_part_files(self, base_path: str) -> list[str]:
        """Files beside `base_path` that are parts of it."""
        path = Path(base_path)
        return sorted(str(each) for each in path.parent.glob(f"{path.name}.part*"))

    async def _answer(self, update: Update, context: Any) -> None:
        if self._dispatcher is None:
            self._dispatcher = Dispatcher(context.bot, self._services)
        await self._dispatcher.submit(update)
        await self._dispatcher.drain(60.0)

    _dispatcher: Dispatcher | None = None

    @cached_property
    def _services(self) -> Services:
        client: redis.Redis = connect(self._settings)
        store = CandleStore(self._settings, client)
        settings = store.settings
        return Services(
            settings,
            client,
            store,
            access_of(settings),
            market_clock(settings),
            AlertBook(client, settings.keys),
            ChartPool(),
        )
