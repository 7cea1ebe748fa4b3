"""Alerts from the tick stream to the chat, through restarts, kills and competing readers."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace
from typing import Any

import pytest
import redis

from pkbrokers_redis.bot.alerts.rules import FORMS, Alert, Kind, Watch
from pkbrokers_redis.bot.alerts.store import ALERTS_PER_CHAT_MAX, AlertStore, Notification
from pkbrokers_redis.bot.alerts.worker import AlertWorker, FeedMonitor
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import connect
from tests.bot.conftest import running_bot
from tests.bot.telegram import ALICE, BOB, GROUP, Telegram
from tests.client.contract import INFY, RELIANCE
from tests.support import running_python, settings_env, wait_until

pytestmark = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)

T0 = 1_767_584_700_000
ticks_sent = itertools.count(1)


def tick(client: redis.Redis, settings: Settings, price: float, token: int = INFY, ahead_ms: int = 0) -> None:
    """One frame with one tick, a second after the one before, and half a second before it is received."""
    n = next(ticks_sent)
    row = [token, price, 1, n, None, None, None, None, T0 + n * 1000 + ahead_ms]
    fields: dict[Any, Any] = {
        "src": "t",
        "seq": n,
        "at": T0 + n * 1000 + 500,
        "n": 1,
        "ticks": json.dumps([row]),
    }
    client.xadd(settings.keys.ticks(settings.keys.shard_of(token)), fields)


def add(
    client: redis.Redis, settings: Settings, kind: Kind, value: float, chat: int = BOB, **more: Any
) -> Alert:
    cells = {"token": INFY, "symbol": "NSE:INFY", "once": False, **more}
    alert = Alert(0, chat, chat, cells["token"], cells["symbol"], kind, value, cells["once"], 0.0)
    return AlertStore(client, settings.keys).add(alert, [])


def outbox(client: redis.Redis, settings: Settings) -> list[str]:
    return [fields[b"text"].decode() for _, fields in client.xrange(settings.keys.bot_outbox())]


def armed(client: redis.Redis, settings: Settings, number: int) -> Any:
    text = client.hget(settings.keys.bot_alert_state(), str(number))
    return None if text is None else json.loads(text)


class Reader:
    """An AlertWorker for a block."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.worker = AlertWorker(lambda: connect(settings), settings, on_fired=lambda: None)

    def __enter__(self) -> AlertWorker:
        self.worker.start()
        with connect(self._settings) as client:
            wait_until(
                lambda: client.hexists(self._settings.keys.bot_position(), "0"), what="the first commit"
            )
        return self.worker

    def __exit__(self, *_: object) -> None:
        self.worker.stop()


def test_each_crossing_is_one_line_in_the_chat(
    running: None, telegram: Telegram, client: redis.Redis, bot_settings: Settings
) -> None:
    assert "Alert 1: <b>NSE:INFY</b> above 1,600.00" in telegram.ask(BOB, "/alert INFY above 1600").text
    for price in (1599.0, 1600.05, 1601.0, 1599.5, 1602.0):
        tick(client, bot_settings, price)
    telegram.wait(lambda m: "1,602.00" in m.text)
    lines = "\n".join(m.text for m in telegram.messages(BOB)[1:]).splitlines()
    assert [line.partition(" (")[0] for line in lines] == [
        "🔔 <b>NSE:INFY</b> rose to 1,600.05, above 1,600.00",
        "🔔 <b>NSE:INFY</b> rose to 1,602.00, above 1,600.00",
    ]
    wait_until(lambda: not client.xlen(bot_settings.keys.bot_outbox()))


def test_the_current_quote_is_the_first_tick_and_once_removes_the_alert(
    running: None, telegram: Telegram, client: redis.Redis, bot_settings: Settings
) -> None:
    cells = {"last_price": "1599.0", "volume": "0", "last_trade_time": "2026-01-05T09:15:00+05:30"}
    client.hset(bot_settings.keys.quote(INFY), mapping=cells)
    telegram.ask(BOB, "/alert INFY above 1600 once")
    tick(client, bot_settings, 1605.0)
    assert "now removed" in telegram.wait(lambda m: "rose to" in m.text).text
    assert "no alerts" in telegram.ask(BOB, "/alert").text


def test_only_its_own_chat_lists_and_removes_an_alert(running: None, telegram: Telegram) -> None:
    telegram.ask(BOB, "/alert INFY above 1600")
    telegram.ask(BOB, "/alert RELIANCE 2%")
    telegram.ask(ALICE, "/alert feed 45")
    listed = telegram.ask(BOB, "/alert").text
    assert "1  <b>NSE:INFY</b> above 1,600.00" in listed and "2  <b>NSE:RELIANCE</b> moves 2 %" in listed
    assert "feed" not in listed
    assert telegram.ask(BOB, "/alert remove 3").text.startswith("0 removed")
    assert telegram.ask(BOB, "/alert remove 1").text == "1 removed."
    assert "RELIANCE" in telegram.ask(BOB, "/alert list").text
    assert telegram.ask(BOB, "/alert remove all").text == "1 removed."
    assert "Which one" in telegram.ask(BOB, "/alert remove x").text


def test_alerts_per_chat_are_limited(client: redis.Redis, bot_settings: Settings) -> None:
    store = AlertStore(client, bot_settings.keys)
    for n in range(ALERTS_PER_CHAT_MAX):
        client.hset(
            bot_settings.keys.bot_alerts(),
            str(n + 100),
            json.dumps({"id": n + 100, "chat_id": BOB, "user_id": BOB, "token": INFY, "symbol": "x",
                        "kind": "above", "value": 1.0, "once": False, "since": 0.0}),
        )  # fmt: skip
    with pytest.raises(PkbError, match="alerts"):
        add(client, bot_settings, "above", 5)
    assert len(store.of_chat(BOB)) == ALERTS_PER_CHAT_MAX
    assert add(client, bot_settings, "above", 5, chat=ALICE).id == 1


def test_a_silent_feed_and_its_recovery_are_reported(
    running: None,
    telegram: Telegram,
    client: redis.Redis,
    bot_settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(FORMS, "feed", replace(FORMS["feed"], minimum=0.5))
    telegram.ask(BOB, "/alert feed 1")
    assert telegram.wait(lambda m: "No tick for" in m.text)
    tick(client, bot_settings, 100.0)
    assert telegram.wait(lambda m: "Ticks come again" in m.text)


def test_a_closed_market_is_not_a_silent_feed(client: redis.Redis, bot_settings: Settings) -> None:
    now = [0.0]
    sunday = time.mktime((2026, 1, 4, 12, 0, 0, 0, 0, 0))
    settings = bot_settings.model_copy(
        update={"sessions": "market", "time_shift": f"{sunday},{time.time()},1.0"}
    )
    closed = FeedMonitor(settings, lambda: now[0])
    now[0] = 500.0
    alert = Alert(1, BOB, BOB, 0, "", "feed", 30.0, False, 0.0)
    assert closed.check(Watch(alert)) is None
    open_ = FeedMonitor(bot_settings, lambda: now[0])
    now[0] = 1000.0
    assert open_.check(Watch(alert))


# --- exactly once


def test_a_restart_neither_repeats_nor_loses_a_crossing(client: redis.Redis, bot_settings: Settings) -> None:
    number = add(client, bot_settings, "above", 100).id
    tick(client, bot_settings, 90.0)
    with Reader(bot_settings):
        tick(client, bot_settings, 99.0)
        tick(client, bot_settings, 101.0)
        wait_until(lambda: len(outbox(client, bot_settings)) == 1)
        tick(client, bot_settings, 98.0)
        wait_until(lambda: (armed(client, bot_settings, number) or [0, 0, False])[2], what="armed to be kept")
    tick(client, bot_settings, 102.0)  # while no bot runs
    tick(client, bot_settings, 99.0)
    for _ in range(2):
        with Reader(bot_settings) as worker:
            wait_until(lambda worker=worker: worker.counts["alert_ticks"])  # type: ignore[misc]
        tick(client, bot_settings, 99.0)
    assert ["102.00" in text for text in outbox(client, bot_settings)] == [False, True]


def test_a_future_trade_time_counts_at_its_receive_time(client: redis.Redis, bot_settings: Settings) -> None:
    number = add(client, bot_settings, "above", 100).id
    with Reader(bot_settings):
        for price, ahead_ms in ((99.0, 0), (98.0, 400 * 86_400_000), (101.0, 0)):
            tick(client, bot_settings, price, ahead_ms=ahead_ms)
        wait_until(lambda: len(outbox(client, bot_settings)) == 1)
        tick(client, bot_settings, 97.0, ahead_ms=400 * 86_400_000)
        wait_until(lambda: armed(client, bot_settings, number)[2], what="armed to be kept")
    with Reader(bot_settings):
        tick(client, bot_settings, 102.0)
        wait_until(lambda: len(outbox(client, bot_settings)) == 2)
    assert ["102.00" in text for text in outbox(client, bot_settings)] == [False, True]


def test_uncommitted_ticks_are_read_again_with_the_same_result(
    client: redis.Redis, bot_settings: Settings
) -> None:
    """As after kill -9: positions and states are those of the last commit."""
    number = add(client, bot_settings, "cross", 100).id
    keys = bot_settings.keys
    with Reader(bot_settings):
        for price in (99.0, 101.0):
            tick(client, bot_settings, price)
        wait_until(lambda: len(outbox(client, bot_settings)) == 1)
    position, memory = client.hgetall(keys.bot_position()), client.hgetall(keys.bot_alert_state())
    with Reader(bot_settings):
        tick(client, bot_settings, 98.0)
        wait_until(lambda: len(outbox(client, bot_settings)) == 2)
    # Redis as the commit before had it, outbox too: the same message comes again, once.
    client.delete(keys.bot_position(), keys.bot_alert_state())
    client.hset(keys.bot_position(), mapping=position)
    client.hset(keys.bot_alert_state(), mapping=memory)
    last = client.xrevrange(keys.bot_outbox(), count=1)[0][0]
    client.xdel(keys.bot_outbox(), last)
    with Reader(bot_settings):
        wait_until(lambda: len(outbox(client, bot_settings)) == 2)
        wait_until(lambda: armed(client, bot_settings, number)[2], what="below it, armed upwards")
    assert "98.00" in outbox(client, bot_settings)[1]


def test_a_commit_based_on_an_older_checkpoint_is_refused_as_a_whole(
    client: redis.Redis, bot_settings: Settings
) -> None:
    store = AlertStore(client, bot_settings.keys)
    assert store.commit(0, {0: "5-0"}, {3: [1, 2]}, [Notification(BOB, "one", 7.0)])
    assert not store.commit(0, {0: "9-0"}, {3: None}, [Notification(BOB, "two", 7.0)])
    checkpoint = store.load()
    assert (checkpoint.rev, checkpoint.positions, checkpoint.states) == (1, {0: "5-0"}, {3: [1, 2]})
    assert outbox(client, bot_settings) == ["one"]


def test_a_commit_is_refused_after_a_chat_added_or_removed_an_alert(
    client: redis.Redis, bot_settings: Settings
) -> None:
    """The worker then reads the ticks since its checkpoint again, with the new set of alerts."""
    store = AlertStore(client, bot_settings.keys)
    before = store.load().rev
    number = add(client, bot_settings, "above", 100).id
    added = store.load().rev
    assert not store.commit(before, {0: "5-0"}, {}, [])
    store.remove([number])
    assert not store.commit(added, {}, {number: [1, 2]}, [Notification(BOB, "removed", 7.0)])
    assert store.load().states == {} and outbox(client, bot_settings) == []


def test_two_readers_at_once_report_a_crossing_once(client: redis.Redis, bot_settings: Settings) -> None:
    """One lost its lease without noticing: the second commit is refused, and it resumes from Redis."""
    add(client, bot_settings, "above", 100)
    tick(client, bot_settings, 99.0)
    with Reader(bot_settings) as one, Reader(bot_settings) as two:
        for price in (99.0, 101.0, 99.0, 102.0, 99.0):
            tick(client, bot_settings, price)
            time.sleep(0.05)  # so that both are awake between the ticks; nothing depends on it
        wait_until(lambda: len(outbox(client, bot_settings)) >= 2)
        wait_until(lambda: one.counts["alert_ticks"] and two.counts["alert_ticks"])
        tick(client, bot_settings, 103.0)
        wait_until(lambda: any("103.00" in text for text in outbox(client, bot_settings)))
    assert len(outbox(client, bot_settings)) == 3


def test_killed_processes_report_every_crossing_once(
    client: redis.Redis, bot_settings: Settings, telegram: Telegram
) -> None:
    add(client, bot_settings, "above", 100)
    levels = [101.0, 102.0, 103.0, 104.0]
    for prices in (levels[:2], levels[2:]):
        with running_python("-m", "workers.bot", env=settings_env(bot_settings)):
            wait_until(lambda: client.hexists(bot_settings.keys.bot_position(), "0"), timeout_seconds=40)
            for price in prices:
                tick(client, bot_settings, 99.0)
                tick(client, bot_settings, price)
            last = f"{prices[-1]:.2f}"
            telegram.wait(lambda m, last=last: last in m.text, timeout_seconds=40)  # type: ignore[misc]
            wait_until(lambda: not client.xlen(bot_settings.keys.bot_outbox()))
        # Killed by now.
        client.delete(bot_settings.keys.bot_lease())  # rather than wait for it to run out
    text = "\n".join(m.text for m in telegram.messages(BOB))
    assert [text.count(f"rose to {price:.2f}") for price in levels] == [1] * 4


# --- failures of Telegram


def test_alerts_wait_while_telegram_is_unavailable_and_are_sent_once(
    running: None, telegram: Telegram, client: redis.Redis, bot_settings: Settings
) -> None:
    telegram.ask(BOB, "/alert INFY above 100")
    telegram.misbehave("sendMessage", status=502, times=6)
    for price in (99.0, 101.0, 99.0, 102.0):
        tick(client, bot_settings, price)
    telegram.wait(lambda m: "102.00" in m.text, timeout_seconds=40)
    text = "\n".join(m.text for m in telegram.messages(BOB))
    assert (text.count("101.00"), text.count("102.00")) == (1, 1)


def test_a_chat_that_blocked_the_bot_does_not_delay_other_chats(
    running: None, telegram: Telegram, client: redis.Redis, bot_settings: Settings
) -> None:
    add(client, bot_settings, "above", 100, chat=-99)
    telegram.ask(BOB, "/alert RELIANCE above 100")
    telegram.misbehave("sendMessage", status=403)
    for price in (99.0, 101.0):
        tick(client, bot_settings, price)
    wait_until(lambda: not telegram.faults.get("sendMessage"), what="the refusal")
    for price in (99.0, 101.0):
        tick(client, bot_settings, price, RELIANCE)
    telegram.wait(lambda m: m.chat_id == BOB and "rose to" in m.text)
    wait_until(lambda: not client.xlen(bot_settings.keys.bot_outbox()))


def test_malformed_stream_entries_and_hash_fields_are_skipped(
    client: redis.Redis, bot_settings: Settings
) -> None:
    keys = bot_settings.keys
    add(client, bot_settings, "above", 100)
    client.hset(keys.bot_alerts(), "77", "no alert")
    client.hset(keys.bot_alert_state(), "77", "no state")
    client.xadd(keys.bot_outbox(), {"chat": "x"})
    with Reader(bot_settings) as worker:
        tick(client, bot_settings, 99.0)
        client.xadd(keys.ticks(keys.shard_of(INFY)), {"hello": "world"})
        client.xadd(keys.ticks(keys.shard_of(INFY)), {"src": "t", "seq": 1, "ticks": "[[408065,1],[408065"})
        for price, time_ms in ((99, "null"), ("null", T0 + 999_000), (0, T0 + 999_000), (99, 2**52)):
            row = f"[[{INFY},{price},1,999,null,null,null,null,{time_ms}]]"
            client.xadd(keys.ticks(keys.shard_of(INFY)), {"src": "t", "seq": 1, "ticks": row})
        tick(client, bot_settings, 101.0)
        wait_until(lambda: worker.counts["alerts_fired"])
        assert worker.counts["malformed_entries"] == 1


def test_a_full_message_is_split_in_order(
    bot_settings: Settings, telegram: Telegram, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pkbrokers_redis.bot.alerts.store.POLL_SECONDS", 0.05)
    for n in range(100):
        client.xadd(
            bot_settings.keys.bot_outbox(), {"chat": GROUP, "text": f"{n:03d} " + "x" * 96, "tick_ms": 0}
        )
    with running_bot(bot_settings):
        telegram.wait(lambda m: "099" in m.text)
    text = "\n".join(m.text for m in telegram.messages(GROUP))
    assert [line[:3] for line in text.splitlines()] == [f"{n:03d}" for n in range(100)]
    assert all(len(m.text) <= 4096 for m in telegram.messages(GROUP))
