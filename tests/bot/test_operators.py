"""Messages to operators: one when a problem begins, one when it ends."""

from __future__ import annotations

import time

import pytest
import redis

from pkbrokers_redis.bot import operators
from pkbrokers_redis.runtime.cluster_state import Heartbeat
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.leases import announce
from tests.bot.conftest import running_bot
from tests.bot.telegram import ALICE, BOB, Telegram
from tests.support import wait_until

pytestmark = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "CHECK_EVERY_SECONDS", 0.05)


def beat(client: redis.Redis, settings: Settings, role: str) -> None:
    announce(client, settings.keys, role, f"{role}-1")
    Heartbeat(settings.keys, role, f"{role}-1", time.time() * 1000).beat(client, time.time() * 1000, 0, {})


def test_a_dead_worker_and_its_replacement_are_reported_once(
    bot_settings: Settings, telegram: Telegram, client: redis.Redis
) -> None:
    with running_bot(bot_settings):
        report = telegram.wait(lambda m: "no worker reads Kite" in m.text)
        assert report.chat_id == ALICE and report.text.startswith("❌")
        for trouble in ("ingest", "session"):  # reported and stored
            wait_until(lambda trouble=trouble: client.hexists(bot_settings.keys.bot_troubles(), trouble))
    with running_bot(bot_settings):  # a restart of the bot is no news
        beat(client, bot_settings, "ingest")
        telegram.wait(lambda m: "<b>ingest</b>: recovered after" in m.text)
    texts = [m.text for m in telegram.messages()]
    assert sum("no worker reads Kite" in text for text in texts) == 1
    assert sum("<b>session</b>: there is no Kite session" in text for text in texts) == 1
    assert {m.chat_id for m in telegram.messages()} == {ALICE}, "nobody else is notified"


def test_a_late_heartbeat_of_one_of_several_workers_is_reported(
    bot_settings: Settings, telegram: Telegram, client: redis.Redis
) -> None:
    for role in ("ingest", "aggregate", "jobs"):
        beat(client, bot_settings, role)
    with running_bot(bot_settings):
        for number, role in enumerate(("aggregate", "jobs"), 2):
            announce(client, bot_settings.keys, role, f"{role}-{number}")
            key = bot_settings.keys.worker(f"{role}-{number}")
            client.hset(key, "role", role)
            client.pexpire(key, 3_500)  # its last beat was 6.5 s ago
            assert telegram.wait(lambda m, role=role: f"{role}-" in m.text and "beat" in m.text)  # type: ignore[misc]
            client.delete(key)
            assert telegram.wait(lambda m, role=role: f"<b>{role}</b>: recovered" in m.text)  # type: ignore[misc]


def test_a_failed_job_and_a_full_disk_are_reported(
    bot_settings: Settings, telegram: Telegram, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.zadd("rq:failed:pkb", {"repair_gap-1": 1})
    monkeypatch.setattr(operators, "DISK_PART_MAX", 0.0)
    monkeypatch.setattr(operators, "DISK_FREE_BYTES_MIN", 2**60)
    with running_bot(bot_settings):
        assert telegram.wait(lambda m: "<b>jobs</b>: 1 have failed" in m.text)
        assert telegram.wait(lambda m: "<b>disk</b>" in m.text and m.text.startswith("❌"))
        client.delete("rq:failed:pkb")
        assert telegram.wait(lambda m: "<b>jobs</b>: recovered" in m.text)


def test_a_refused_session_is_reported_as_expired(
    bot_settings: Settings, telegram: Telegram, client: redis.Redis
) -> None:
    client.hset(
        bot_settings.keys.auth(), mapping={"id": "a", "refused": "a", "access_token": "secret-of-kite"}
    )
    with running_bot(bot_settings):
        telegram.wait(lambda m: "the Kite session has expired" in m.text)
    assert not any("secret-of-kite" in m.text for m in telegram.sent)


def test_a_silent_feed_is_reported_while_the_market_is_open(
    bot_settings: Settings, telegram: Telegram, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "SILENT_SECONDS_MAX", 0.2)
    with running_bot(bot_settings):
        assert telegram.wait(lambda m: "<b>feed</b>: no tick came" in m.text)


def test_a_report_that_telegram_refused_is_sent_later(
    bot_settings: Settings, telegram: Telegram, client: redis.Redis
) -> None:
    telegram.misbehave("sendMessage", status=403, times=6)
    with running_bot(bot_settings):
        assert telegram.wait(lambda m: "no worker reads Kite" in m.text)
    assert not telegram.faults.get("sendMessage"), "all six refusals came first"


def test_without_operators_nothing_is_reported(bot_settings: Settings, telegram: Telegram) -> None:
    with running_bot(bot_settings.model_copy(update={"telegram_admins": ""})):
        telegram.ask(BOB, "/status")
        telegram.ask(BOB, "/status")
    assert {m.chat_id for m in telegram.messages()} == {BOB}
