"""Who gets answers, how often, and what a button does: over HTTP."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import redis

from pkbrokers_redis.bot import application
from pkbrokers_redis.bot.application import REFUSAL, SLOW_DOWN, FloodLimit
from pkbrokers_redis.bot.commands import COMMANDS
from pkbrokers_redis.bot.context import Access, access_of
from pkbrokers_redis.errors import SettingsError
from pkbrokers_redis.settings import Settings, load_settings
from tests.bot.conftest import running_bot
from tests.bot.telegram import ALICE, BOB, GROUP, MALLORY, TOKEN, Telegram
from tests.support import wait_until

valkey = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)


def test_an_operator_gets_answers_in_private_and_in_listed_groups_only() -> None:
    access = Access(frozenset({GROUP}), frozenset({ALICE}))
    assert access.is_allowed(ALICE, ALICE, is_private=True)
    assert access.is_allowed(GROUP, MALLORY, is_private=False)
    assert not access.is_allowed(-77, ALICE, is_private=False), "a group's members all read the answer"
    assert not access.is_allowed(MALLORY, MALLORY, is_private=True)


def test_a_malformed_id_is_an_error_that_names_the_setting() -> None:
    with pytest.raises(SettingsError, match="PKB_TELEGRAM_CHATS holds '@group'"):
        access_of(load_settings(telegram_chats="1, @group"))
    assert access_of(load_settings(telegram_admins="1;2".replace(";", "\n"))).admins == {1, 2}


def test_a_chats_flood_limit_refills_with_time() -> None:
    limit = FloodLimit(burst=3, per_minute=60)
    assert [limit.accept(1, 0.0) for _ in range(4)] == [True, True, True, False]
    assert limit.accept(2, 0.0), "another chat has its own"
    assert limit.accept(1, 1.0) and not limit.accept(1, 1.0)


def test_a_flood_limit_forgets_its_oldest_chats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(application, "CHATS_MAX", 2)
    limit = FloodLimit(burst=1, per_minute=1)
    assert limit.accept(1, 0.0) and not limit.accept(1, 1.0)
    assert limit.accept(2, 2.0) and limit.accept(3, 3.0)
    assert limit.accept(1, 4.0), "the oldest chat was forgotten"


@valkey
def test_an_unknown_chat_gets_one_refusal_and_no_command_runs(running: None, telegram: Telegram) -> None:
    for command in COMMANDS:
        telegram.say(MALLORY, f"/{command} INFY")
    telegram.ask(BOB, "/start")  # behind all of those
    assert [message.text for message in telegram.messages(MALLORY)] == [REFUSAL]


@valkey
def test_without_settings_nobody_gets_answers(
    make_settings: Callable[..., Settings], bot_settings: Settings, telegram: Telegram
) -> None:
    with running_bot(make_settings(telegram_token=TOKEN, telegram_api_url=telegram.url)):
        assert telegram.ask(ALICE, "/quote INFY").text == REFUSAL


@valkey
def test_operator_commands_are_refused_to_other_users(running: None, telegram: Telegram) -> None:
    for command in COMMANDS.values():
        if command.for_admins:
            assert telegram.ask(BOB, f"/{command.name}").text == "That is for the bot's operators."


@valkey
def test_a_group_member_gets_answers_in_a_listed_group(running: None, telegram: Telegram) -> None:
    assert "market" in telegram.ask(GROUP, "/start@pkb_test_bot", user_id=MALLORY).text
    telegram.say(GROUP, "/start@another_bot", user_id=MALLORY)
    telegram.say(GROUP, "just talk", user_id=MALLORY)
    telegram.say(-77, "/start", user_id=ALICE)
    telegram.ask(BOB, "/start")
    assert len(telegram.messages(GROUP)) == 1
    assert [message.text for message in telegram.messages(-77)] == [REFUSAL]


@valkey
def test_a_flood_is_limited_with_one_warning_and_other_chats_do_not_wait(
    running: None, telegram: Telegram
) -> None:
    for _ in range(60):
        telegram.say(BOB, "/start")
    assert "market" in telegram.ask(ALICE, "/start").text
    texts = [message.text for message in telegram.messages(BOB)]
    assert texts.count(SLOW_DOWN) == 1
    assert 10 <= len(texts) - 1 <= 15


@valkey
def test_uploads_are_not_downloaded(running: None, telegram: Telegram) -> None:
    telegram.upload(BOB, "evil.pkl")
    telegram.upload(MALLORY, "evil.pkl.zip")
    telegram.ask(BOB, "/start")
    assert len(telegram.messages()) == 1
    assert "getFile" not in {method for method, _ in telegram.calls}


@valkey
def test_a_button_works_once_and_only_for_the_user_who_sent_the_command(
    running: None, telegram: Telegram, client: redis.Redis, bot_settings: Settings
) -> None:
    question = telegram.ask(ALICE, "/restart")
    telegram.press(question, "Yes", user_id=BOB)
    telegram.press(question, "Yes", user_id=MALLORY)
    wait_until(lambda: len(telegram.answered) == 2)
    assert not client.exists(bot_settings.keys.restart("ingest"))
    telegram.press(question, "No")
    telegram.wait(lambda m: "cancelled" in m.text)
    telegram.press(question, "Yes")
    wait_until(lambda: any("expired" in answer.get("text", "") for answer in telegram.answered))
    assert not client.exists(bot_settings.keys.restart("ingest"))


@valkey
def test_a_button_expires(
    running: None,
    telegram: Telegram,
    client: redis.Redis,
    bot_settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert application.CONFIRM_SECONDS == 60
    monkeypatch.setattr(application, "CONFIRM_SECONDS", -1)
    telegram.press(telegram.ask(ALICE, "/restart"), "Yes")
    wait_until(lambda: any("expired" in answer.get("text", "") for answer in telegram.answered))
    assert not client.exists(bot_settings.keys.restart("ingest"))


@valkey
def test_a_button_of_another_chat_does_nothing(
    running: None, telegram: Telegram, client: redis.Redis, bot_settings: Settings
) -> None:
    question = telegram.ask(ALICE, "/restart")
    question.chat_id = GROUP
    telegram.press(question, "Yes", user_id=ALICE)
    wait_until(lambda: any("expired" in answer.get("text", "") for answer in telegram.answered))
    assert not client.exists(bot_settings.keys.restart("ingest"))
