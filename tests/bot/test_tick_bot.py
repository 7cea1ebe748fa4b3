"""`PKTickBot` under upstream's names."""

from __future__ import annotations

import inspect
import threading

import pytest
import redis

from pkbrokers_redis import PKTickBot
from pkbrokers_redis.settings import Settings
from tests.bot.telegram import BOB, TOKEN, Telegram
from tests.bot.test_commands import put_day
from tests.client.contract import INFY

pytestmark = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)

UPSTREAM = [
    "start", "help_command", "send_refreshed_token", "send_token", "test_ticks", "restart_watcher",
    "send_zipped_ticks", "send_zipped_db", "send_zipped_instrument_history", "top_ticks", "status",
    "send_daily_pkl", "send_intraday_pkl", "request_data", "handle_document_received", "send_candles",
]  # fmt: skip


def test_upstreams_handlers_exist_with_their_arguments(server_kind: str) -> None:
    for name in UPSTREAM:
        method = getattr(PKTickBot, name)
        assert list(inspect.signature(method).parameters)[1:] == ["update", "context"], name
        assert method.__doc__
    assert list(inspect.signature(PKTickBot.__init__).parameters)[1:5] == [
        "bot_token", "ticks_file_path", "chat_id", "shared_stats",
    ]  # fmt: skip


def test_it_runs_and_answers_in_its_group(bot_settings: Settings, telegram: Telegram) -> None:
    bot = PKTickBot(TOKEN, "/tmp/ticks.json", chat_id="4242", settings=bot_settings)
    assert (bot.chat_id, bot.ticks_db_path) == ("-4242", "/tmp/ticks.db")
    thread = threading.Thread(target=bot.run)
    thread.start()
    try:
        assert "market" in telegram.ask(-4242, "/start", user_id=BOB).text
    finally:
        bot.stop()
        thread.join(20)
    assert not thread.is_alive()


def test_the_top_table_is_html(bot_settings: Settings, client: redis.Redis) -> None:
    bot = PKTickBot(TOKEN, settings=bot_settings)
    assert bot.get_top_ticks_formatted() is None
    put_day(client, bot_settings, INFY, 110.0, ticks=7)
    assert "INFY" in (bot.get_top_ticks_formatted(limit=5) or "")
