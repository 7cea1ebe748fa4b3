"""`PKTickBot`: upstream's constructor and method names on this package's bot.

Upstream's handlers are called by telegram.ext with an update and a context. Here they are coroutines with
the same names and arguments, for programs that register them with an Application of their own; `run` needs
none of them.
"""

from __future__ import annotations

import threading
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from telegram import Update

from pkbrokers_redis.bot.application import CommandRouter
from pkbrokers_redis.bot.commands_market import RANKINGS, ranked_movers
from pkbrokers_redis.bot.context import Services
from pkbrokers_redis.bot.runner import bot
from pkbrokers_redis.bot.text import clock_time, money, table
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.connect import connect


class PKTickBot:
    """The bot as upstream's programs start it.

    Args:
        bot_token: The token of @BotFather. ticks_file_path: Where upstream kept its files. It is only
        stored: files come from Redis and PKB_DATA_DIR. chat_id: Joins PKB_TELEGRAM_CHATS; an id without a
        sign is a group's, as in upstream. shared_stats: Stored, and not used. settings: Default: the
        environment's.

    Example:
        >>> PKTickBot(token, "ticks.json", chat_id="-500").run()  # doctest: +SKIP
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
        self.chat_id = f"-{str(chat_id).removeprefix('-')}" if chat_id else None
        self.shared_stats = {} if shared_stats is None else shared_stats
        self.conflict_detected = False
        self.parent: Any = None
        self._stop = threading.Event()
        base = settings or load_settings()
        chats = ",".join(filter(None, [base.telegram_chats, self.chat_id]))
        self._settings = base.model_copy(
            update={"telegram_token": SecretStr(bot_token), "telegram_chats": chats}
        )

    def run(self, parent: Any = None) -> None:
        """Answer until `stop`. Raise PkbError as `pkb bot` does."""
        if parent is not None:
            self.parent = parent
        self.run_bot()

    def run_bot(self) -> None:
        """Answer until `stop`, as `run` does."""
        bot(self._settings, self._stop)

    def stop(self) -> None:
        """End `run`, from another thread."""
        self._stop.set()

    async def start(self, update: Update, context: Any) -> None:
        """Answer the command of an update. Upstream has a handler for each command; here they are one."""
        await self._router.on_command(update, context)

    help_command = status = top_ticks = send_token = send_refreshed_token = restart_watcher = start
    test_ticks = send_zipped_ticks = send_zipped_db = send_zipped_instrument_history = start
    send_daily_pkl = send_intraday_pkl = send_candles = request_data = start

    async def handle_document_received(self, update: Update, context: Any) -> None:
        """Do nothing: received files are not downloaded."""

    def get_top_ticks_formatted(self, limit: int = 20) -> str | None:
        """Return the table of /top as HTML; None when nothing has been traded."""
        with CandleStore(self._settings) as store:
            movers = ranked_movers(store, RANKINGS["top"], limit)
        if not movers:
            return None
        rows = [(mover.symbol.removeprefix("NSE:"), str(mover.ticks), money(mover.price)) for mover in movers]
        updated = clock_time(market_clock(self._settings)() / 1000)
        return f"Last Update: {updated}\n{table(('Symbol', 'Tick', 'Price'), rows)}"

    def find_part_files(self, base_path: str) -> list[str]:
        """Return the files next to `base_path` that are parts of it."""
        path = Path(base_path)
        return sorted(str(part) for part in path.parent.glob(f"{path.name}.part*"))

    @cached_property
    def _router(self) -> CommandRouter:
        client = connect(self._settings)
        store = CandleStore(self._settings, client)
        return CommandRouter(Services(store.settings, client, store))
