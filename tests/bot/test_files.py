"""Which file is sent as it is, and which is made again first."""

from __future__ import annotations

import time
from datetime import datetime

import pytest
import redis

from pkbrokers_redis.bot.files import FILE_KINDS, Snapshot, is_fresh
from pkbrokers_redis.candles.calendar import KOLKATA, load_sessions
from pkbrokers_redis.jobs.cron import Plan
from pkbrokers_redis.settings import Settings
from tests.bot.conftest import running_bot
from tests.bot.telegram import BOB, Telegram
from tests.bot.test_commands import put_day, put_file
from tests.client.contract import INFY

NSE, NIFTY_FUTURE, CRUDE = INFY, 256 + 2, 256 + 7  # tokens: the low byte is the segment


def at(text: str) -> float:
    """`20 15:35` is a Friday in November 2026; epoch seconds."""
    day, _, clock = text.partition(" ")
    return datetime.fromisoformat(f"2026-11-{day} {clock}").replace(tzinfo=KOLKATA).timestamp()


@pytest.mark.parametrize(
    ("token", "name", "made", "asked", "is_sent"),
    [
        (NSE, "ticks", "20 10:00:00", "20 10:00:59", True),
        (NSE, "ticks", "20 10:00:00", "20 10:02:00", False),
        (NSE, "daily_pkl", "20 12:00:00", "20 12:30:00", True),
        (NSE, "daily_pkl", "20 12:00:00", "20 15:35:00", False),
        (NSE, "ticks", "20 10:00:00", "20 16:00:00", False),
        (NSE, "ticks", "20 15:30:05", "20 16:00:00", False),  # begun before the last candle was whole
        (NSE, "ticks", "20 15:31:00", "20 16:00:00", True),
        (NSE, "db", "20 15:41:00", "21 03:00:00", True),
        (NSE, "db", "20 15:41:00", "22 12:00:00", False),
        (NSE, "db", "22 20:00:00", "23 07:00:00", True),
        (NIFTY_FUTURE, "ticks", "20 15:31:00", "20 15:36:00", False),  # traded until 15:40
        (CRUDE, "ticks", "20 19:00:00", "20 19:30:00", False),
        (CRUDE, "ticks", "20 19:00:00", "21 00:30:00", False),
        (CRUDE, "ticks", "20 23:56:00", "21 00:30:00", True),
    ],
)
def test_a_file_is_sent_as_it_is_until_its_content_can_have_changed(
    token: int, name: str, made: str, asked: str, is_sent: bool
) -> None:
    sessions = load_sessions("market")
    plan = Plan(sessions, {sessions.schedule_of(NSE), sessions.schedule_of(token)})
    assert is_fresh(Snapshot((), at(made), 1, 1), FILE_KINDS[name], plan, at(asked)) == is_sent


def test_a_market_that_never_closes_is_open() -> None:
    sessions = load_sessions("always")
    midnight = at("21 00:00:00")
    assert is_fresh(Snapshot((), midnight - 59, 1, 1), FILE_KINDS["ticks"], Plan(sessions, {0}), midnight)


@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
@pytest.mark.parametrize(("made_at", "made_again"), [("12:00", ["ticks"]), ("15:31", [])])
def test_after_hours_a_file_of_the_session_is_made_again(
    bot_settings: Settings,
    telegram: Telegram,
    client: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
    made_at: str,
    made_again: list[str],
) -> None:
    made: list[str] = []

    async def run_snapshot(_: Settings, snapshot: str) -> None:
        made.append(snapshot)

    monkeypatch.setattr("pkbrokers_redis.bot.files.run_snapshot", run_snapshot)
    put_day(client, bot_settings, INFY, 110.0)
    put_file(bot_settings, "ticks.json", "ticks", b"x", f"2026-11-20T{made_at}:00+05:30")
    shift = f"{at('20 16:00:00')},{time.time()},1.0"
    with running_bot(bot_settings.model_copy(update={"sessions": "market", "time_shift": shift})):
        telegram.say(BOB, "/ticks")
        telegram.wait(lambda m: m.method == "sendDocument")
    assert made == made_again
