"""Who is served, how often, and what a button does: over HTTP."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import redis

from pkbrokers_redis.bot import confirm
from pkbrokers_redis.bot.access import REFUSAL, SLOW_DOWN, Access, Pace, Remembered, access_of
from pkbrokers_redis.bot.registry import commands
from pkbrokers_redis.errors import SettingsError
from pkbrokers_redis.settings import Settings, load_settings
from tests.bot.conftest import running_bot
from tests.bot.telegram import ALICE, BOB, GROUP, MALLORY, TOKEN, Telegram
from tests.support import wait_until

valkey = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)


def test_an_admin_is_served_alone_and_in_listed_groups_only() -> None:
    access = Access(frozenset({GROUP}), frozenset({ALICE}))
    assert access.may_ask(ALICE, ALICE, is_private=True)
    assert access.may_ask(GROUP, MALLORY, is_private=False)
    assert not access.may_ask(-77, ALICE, is_private=False), "a group's members all read the answer"
    assert not access.may_ask(MALLORY, MALLORY, is_private=True)


def test_ids_that_are_none_are_a_line_that_names_the_setting() -> None:
    with pytest.raises(SettingsError, match="PKB_TELEGRAM_CHATS holds '@group'"):
        access_of(load_settings(telegram_chats="1, @group"))
    assert access_of(load_settings(telegram_admins="1;2".replace(";", "\n"))).admins == {1, 2}


def test_a_chats_allowance_grows_again() -> None:
    pace = Pace(burst=3, a_minute=60)
    assert [pace.take(1, 0.0) for _ in range(4)] == [True, True, True, False]
    assert pace.take(2, 0.0), "another chat has its own"
    assert pace.take(1, 1.0) and not pace.take(1, 1.0)


def test_what_is_remembered_is_bounded() -> None:
    seen: Remembered[int] = Remembered(keys_max=2)
    assert seen.due(1, 0.0, 10) and not seen.due(1, 9.0, 10) and seen.due(1, 10.0, 10)
    seen.due(2, 11.0, 10)
    seen.due(3, 12.0, 10)
    assert seen.due(1, 12.5, 10), "the oldest was forgotten"


@valkey
def test_a_stranger_gets_one_line_and_no_command_runs(running: None, telegram: Telegram) -> None:
    for command in commands():
        telegram.say(MALLORY, f"/{command} INFY")
    telegram.ask(BOB, "/start")  # behind all of those
    assert [each.text for each in telegram.messages(MALLORY)] == [REFUSAL]


@valkey
def test_nobody_is_served_by_default(
    make_settings: Callable[..., Settings], bot_settings: Settings, telegram: Telegram
) -> None:
    with running_bot(make_settings(telegram_token=TOKEN, telegram_api_url=telegram.url)):
        assert telegram.ask(ALICE, "/quote INFY").text == REFUSAL


@valkey
def test_operators_commands_are_for_operators(running: None, telegram: Telegram) -> None:
    for command in commands().values():
        if command.for_admins:
            assert telegram.ask(BOB, f"/{command.name}").text == "That is for the bot's operators."


@valkey
def test_a_group_member_is_served_where_the_group_is_listed(running: None, telegram: Telegram) -> None:
    assert "market" in telegram.ask(GROUP, "/start@pkb_test_bot", user_id=MALLORY).text
    telegram.say(GROUP, "/start@another_bot", user_id=MALLORY)
    telegram.say(GROUP, "just talk", user_id=MALLORY)
    telegram.say(-77, "/start", user_id=ALICE)
    telegram.ask(BOB, "/start")
    assert len(telegram.messages(GROUP)) == 1
    assert [each.text for each in telegram.messages(-77)] == [REFUSAL]


@valkey
def test_a_flood_is_answered_in_part_and_other_chats_do_not_wait(running: None, telegram: Telegram) -> None:
    for _ in range(60):
        telegram.say(BOB, "/start")
    assert "market" in telegram.ask(ALICE, "/start").text
    texts = [each.text for each in telegram.messages(BOB)]
    assert texts.count(SLOW_DOWN) == 1
    assert 10 <= len(texts) - 1 <= 15


@valkey
def test_uploads_are_ignored_unread(running: None, telegram: Telegram) -> None:
    telegram.upload(BOB, "evil.pkl")
    telegram.upload(MALLORY, "evil.pkl.zip")
    telegram.ask(BOB, "/start")
    assert len(telegram.messages()) == 1
    assert "getFile" not in {method for method, _ in telegram.calls}


@valkey
def test_a_button_works_once_and_only_for_who_asked(
    running: None, telegram: Telegram, client: redis.Redis, bot_settings: Settings
) -> None:
    question = telegram.ask(ALICE, "/restart")
    telegram.press(question, "Yes", user_id=BOB)
    telegram.press(question, "Yes", user_id=MALLORY)
    wait_until(lambda: len(telegram.answered) == 2)
    assert not client.exists(bot_settings.keys.restart("ingest"))
    telegram.press(question, "No")
    telegram.wait(lambda m: "left alone" in m.text)
    telegram.press(question, "Yes")
    wait_until(lambda: any("expired" in each.get("text", "") for each in telegram.answered))
    assert not client.exists(bot_settings.keys.restart("ingest"))


@valkey
def test_a_button_expires(
    running: None, telegram: Telegram, client: redis.Redis, bot_settings: Settings
) -> None:
    question = telegram.ask(ALICE, "/restart")
    [key] = client.keys(bot_settings.keys.bot_confirm("*"))
    assert 0 < client.ttl(key) <= confirm.SECONDS
    client.delete(key)  # as its TTL does
    telegram.press(question, "Yes")
    wait_until(lambda: any("expired" in each.get("text", "") for each in telegram.answered))
    assert not client.exists(bot_settings.keys.restart("ingest"))


@valkey
def test_a_button_of_another_chat_does_nothing(
    running: None, telegram: Telegram, client: redis.Redis, bot_settings: Settings
) -> None:
    question = telegram.ask(ALICE, "/restart")
    question.chat_id = GROUP
    telegram.press(question, "Yes", user_id=ALICE)
    wait_until(lambda: any("expired" in each.get("text", "") for each in telegram.answered))
    assert not client.exists(bot_settings.keys.restart("ingest"))
