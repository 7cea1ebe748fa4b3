"""Failures of Telegram, an unavailable Redis, several bots, restarts."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from pkbrokers_redis.bot.runner import bot
from pkbrokers_redis.bot.telegram_client import UpdatePoller
from pkbrokers_redis.errors import SettingsError
from pkbrokers_redis.settings import Settings
from tests.bot.conftest import running_bot
from tests.bot.telegram import ALICE, BOB, TOKEN, Telegram
from tests.support import running_python, running_server, settings_env, wait_until

pytestmark = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)


def polls(telegram: Telegram) -> int:
    return sum(method == "getUpdates" for method, _ in list(telegram.calls))


FROM_ALICE = {"id": ALICE, "is_bot": False, "first_name": "x"}
PRIVATE = {"id": BOB, "type": "private"}
MALFORMED: list[dict[str, Any]] = [
    {"message": {"text": "/start"}},
    {"message": "no message"},
    {"message": None, "callback_query": {"id": "1"}},
    {"callback_query": {"id": "1", "from": FROM_ALICE, "data": "yes:"}},
    {"message": {"message_id": 1, "date": "yesterday", "chat": PRIVATE, "text": "/start"}},
    {"unheard_of": {"a": 1}},
    {},
]


def test_malformed_updates_are_skipped(running: None, telegram: Telegram) -> None:
    for update in MALFORMED:
        telegram.push(update)
        assert "market" in telegram.ask(BOB, "/start").text, update


def test_hostile_text_is_answered_or_ignored(running: None, telegram: Telegram) -> None:
    for text in (
        "/",
        "/ ",
        "/\n",
        "/quote\nINFY",
        "/quote '",
        "/alert \x00 above 5",
        "/chart 5m 5m 5m",
        "/quote " + "A" * 4000,
    ):
        telegram.say(BOB, text)
    assert "market" in telegram.ask(ALICE, "/start").text
    assert not [m for m in telegram.sent if "Sorry" in m.text]


def test_polling_survives_502_html_and_429(running: None, telegram: Telegram) -> None:
    telegram.misbehave("getUpdates", status=502, times=1)
    telegram.misbehave("getUpdates", body="<html>maintenance</html>")
    telegram.misbehave("getUpdates", status=429, retry_after=1)
    telegram.push({"unheard_of": 1})  # ends the poll that is under way
    assert "market" in telegram.ask(BOB, "/start").text


class ScriptedApi:
    """Answers getUpdates at once from a list; then raises Over."""

    class Over(Exception): ...

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    async def do_api_request(self, *_: Any, **__: Any) -> Any:
        if not self.answers:
            raise self.Over
        return self.answers.pop(0)


def test_polling_backs_off_after_answers_that_confirm_nothing(
    client: redis.Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    update = {"update_id": 700}
    api = ScriptedApi(
        [update], {"x": 1}, [5], [[]], [], [update], [{"update_id": 701}], [{"update_id": True}]
    )
    monkeypatch.setattr("pkbrokers_redis.bot.telegram_client.asyncio.sleep", sleep)
    idle = SimpleNamespace(current_concurrent_updates=0, max_concurrent_updates=1)
    application: Any = SimpleNamespace(bot=api, update_queue=asyncio.Queue(), update_processor=idle)
    poller = UpdatePoller(application, client, settings.keys)
    with pytest.raises(ScriptedApi.Over):
        asyncio.run(poller.run())
    first, second, third, nothing, again, none = waits
    assert first < second < third and again > nothing == none == first
    assert poller.counts == {"updates": 2, "malformed": 4, "repeated": 1}


def test_a_malformed_answer_costs_only_its_message(running: None, telegram: Telegram) -> None:
    for body in ('{"ok": true}', '{"ok": true, "result": 5}', '{"ok": true, "result": []}', "[]"):
        telegram.misbehave("sendMessage", body=body)
        telegram.say(BOB, "/start")
        wait_until(lambda: not telegram.faults.get("sendMessage"), what="the malformed answer")
        telegram.ask(ALICE, "/start")
    assert "market" in telegram.ask(BOB, "/start").text
    assert len(telegram.messages(BOB)) == 1


def test_an_answer_survives_5xx_and_429(running: None, telegram: Telegram) -> None:
    telegram.misbehave("sendMessage", status=500)
    telegram.misbehave("sendMessage", status=429, retry_after=1)
    assert "market" in telegram.ask(BOB, "/start").text
    assert len(telegram.messages(BOB)) == 1


def test_a_slow_answer_of_telegram_does_not_delay_other_chats(running: None, telegram: Telegram) -> None:
    telegram.misbehave("sendMessage", seconds=1.0)
    began = time.monotonic()
    telegram.say(BOB, "/start")
    wait_until(lambda: not telegram.faults.get("sendMessage"), what="the slow request to be under way")
    telegram.ask(ALICE, "/start")
    assert not telegram.messages(BOB), f"{time.monotonic() - began:.1f} s"


def test_a_refused_token_is_one_line_without_the_token(
    bot_settings: Settings, telegram: Telegram, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = "999999:another-token-nobody-shall-see-in-a-log"
    settings = bot_settings.model_copy(update={"telegram_token": type(bot_settings.telegram_token)(wrong)})
    with caplog.at_level(logging.DEBUG), pytest.raises(SettingsError) as caught:
        bot(settings, threading.Event())
    assert "PKB_TELEGRAM_TOKEN" in str(caught.value)
    chain: BaseException | None = caught.value
    while chain is not None:
        assert "nobody-shall-see" not in str(chain)
        chain = chain.__cause__


def test_a_missing_token_is_one_line_and_exit_2(bot_settings: Settings) -> None:
    env = settings_env(bot_settings)
    del env["PKB_TELEGRAM_TOKEN"]
    with running_python("-m", "workers.bot", env=env) as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out.startswith("pkb: there is no bot token") and out.count("\n") == 1


def test_the_bot_waits_for_an_unavailable_telegram_at_the_start(
    bot_settings: Settings, telegram: Telegram
) -> None:
    telegram.misbehave("getMe", status=502, times=2)
    telegram.misbehave("getMe", body="{}")
    with running_bot(bot_settings):
        assert "market" in telegram.ask(BOB, "/start").text


def test_a_repeated_update_is_answered_once(running: None, telegram: Telegram) -> None:
    telegram.ask(BOB, "/start")
    [number] = [700]
    message = {
        "message_id": 5,
        "date": int(time.time()),
        "chat": {"id": BOB, "type": "private"},
        "text": "/start",
        "entities": [{"type": "bot_command", "offset": 0, "length": 6}],
    }
    telegram.push(
        {"message": {**message, "from": {"id": BOB, "is_bot": False, "first_name": "x"}}}, update_id=number
    )
    telegram.ask(ALICE, "/start")
    assert len(telegram.messages(BOB)) == 1


def test_a_message_sent_while_no_bot_ran_is_answered_once_by_the_next(
    bot_settings: Settings, telegram: Telegram, client: redis.Redis
) -> None:
    with running_bot(bot_settings):
        telegram.ask(BOB, "/start")
    telegram.say(BOB, "/help")
    for _ in range(2):
        with running_bot(bot_settings):
            telegram.ask(ALICE, "/start")
    texts = [message.text for message in telegram.messages(BOB)]
    assert [text.startswith("📊") for text in texts] == [True, False], "one /start, one /help"


def test_of_two_bots_one_answers_and_the_other_takes_over(
    bot_settings: Settings, telegram: Telegram, client: redis.Redis
) -> None:
    key = bot_settings.keys.bot_lease()
    first, second = running_bot(bot_settings), running_bot(bot_settings)
    with second:
        with first:
            wait_until(
                lambda: len(client.zrange(bot_settings.keys.workers(), 0, -1)) == 2, what="both to live"
            )
            wait_until(lambda: polls(telegram))
            for _ in range(5):
                telegram.ask(BOB, "/start")
            assert len(telegram.messages(BOB)) == 5
            assert telegram.conflicts == 0, "only the holder polls"
            holder = client.get(key)
            client.set(
                key, b"somebody-else", px=2500
            )  # the holder loses it, and later one of the two gets it
            wait_until(lambda: client.get(key) not in (holder, b"somebody-else"), timeout_seconds=30)
            telegram.ask(BOB, "/start")
        telegram.ask(BOB, "/start")
    assert len(telegram.messages(BOB)) == 7
    assert not client.exists(key), "released at the end"


def test_an_unavailable_redis_pauses_the_bot_and_loses_no_message(
    make_settings: Callable[..., Settings], telegram: Telegram, bot_settings: Settings, tmp_path: Path
) -> None:
    with running_server(tmp_path / "own", "--appendonly", "yes") as port:
        settings = bot_settings.model_copy(
            update={"redis_url": type(bot_settings.telegram_token)(f"redis://127.0.0.1:{port}/0")}
        )
        with running_bot(settings):
            assert "market" in telegram.ask(BOB, "/start").text
            with redis.Redis(port=port) as own:
                own.execute_command("CLIENT", "PAUSE", 1500, "WRITE")
            assert "market" in telegram.ask(BOB, "/start").text


def test_a_bot_writes_its_heartbeat(running: None, client: redis.Redis, bot_settings: Settings) -> None:
    keys = client.keys(bot_settings.keys.worker("bot-*"))
    assert client.hget(keys[0], "role") == b"bot"
    assert TOKEN not in str(client.hgetall(keys[0]))


def test_sigterm_ends_the_process_and_releases_the_lease(
    bot_settings: Settings, telegram: Telegram, client: redis.Redis
) -> None:
    with running_python("-m", "workers.bot", env=settings_env(bot_settings)) as process:
        assert "market" in telegram.ask(BOB, "/start").text
        process.terminate()
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 0, out
    assert "Traceback" not in out and TOKEN not in out
    assert not client.exists(bot_settings.keys.bot_lease())
