"""Alerts that wait for Telegram: a failing chat does not delay other chats."""

from __future__ import annotations

import pytest
import redis

from pkbrokers_redis.bot.alerts.store import OUTBOX_MAX
from pkbrokers_redis.settings import Settings
from tests.bot.conftest import running_bot
from tests.bot.telegram import BOB, GROUP, Telegram
from tests.support import wait_until

pytestmark = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)

MANY = 1_000  # far more than fit into a message
SUPERGROUP = -1_005_000


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pkbrokers_redis.bot.alerts.store.POLL_SECONDS", 0.05)


def put(client: redis.Redis, settings: Settings, chat: int, *texts: str) -> None:
    """Messages that wait."""
    with client.pipeline() as pipeline:
        for text in texts:
            pipeline.xadd(settings.keys.bot_outbox(), {"chat": chat, "text": text, "tick_ms": 0})
        pipeline.execute()


def is_empty(client: redis.Redis, settings: Settings) -> bool:
    return client.xlen(settings.keys.bot_outbox()) == 0


def test_a_group_that_became_a_supergroup_delays_no_other_chat(
    bot_settings: Settings, telegram: Telegram, client: redis.Redis
) -> None:
    telegram.moved[GROUP] = SUPERGROUP
    put(client, bot_settings, GROUP, *map(str, range(MANY)))
    put(client, bot_settings, BOB, "for Bob")
    with running_bot(bot_settings):
        telegram.wait(lambda m: m.chat_id == BOB and m.text == "for Bob")
        wait_until(lambda: is_empty(client, bot_settings), what="the group's to be dropped")
    assert not telegram.messages(SUPERGROUP), "the settings do not name it"


def test_alerts_follow_a_group_to_an_id_that_the_settings_name(
    bot_settings: Settings, telegram: Telegram, client: redis.Redis
) -> None:
    telegram.moved[GROUP] = SUPERGROUP
    put(client, bot_settings, GROUP, "one", "two")
    with running_bot(bot_settings.model_copy(update={"telegram_chats": f"{BOB} {SUPERGROUP}"})):
        telegram.wait(lambda m: m.chat_id == SUPERGROUP and m.text == "one\ntwo")
        wait_until(lambda: is_empty(client, bot_settings), what="what was sent to leave")
    assert len(telegram.messages(SUPERGROUP)) == 1


def test_a_failing_chat_delays_no_other_chat_and_gets_its_messages_later(
    bot_settings: Settings, telegram: Telegram, client: redis.Redis
) -> None:
    telegram.broken.add(GROUP)
    texts = [f"{n:04d}" for n in range(MANY)]
    put(client, bot_settings, GROUP, *texts)
    put(client, bot_settings, BOB, "for Bob")
    with running_bot(bot_settings):
        telegram.wait(lambda m: m.chat_id == BOB and m.text == "for Bob")
        assert client.xlen(bot_settings.keys.bot_outbox()) >= MANY and not telegram.messages(GROUP)
        telegram.broken.clear()
        wait_until(lambda: is_empty(client, bot_settings), timeout_seconds=40, what="the group's to be sent")
    assert "\n".join(m.text for m in telegram.messages(GROUP)).split() == texts


def test_the_last_message_of_a_full_outbox_does_not_wait_for_a_failing_chat(
    bot_settings: Settings, telegram: Telegram, client: redis.Redis
) -> None:
    telegram.broken.add(GROUP)
    put(client, bot_settings, GROUP, *["x" * 60] * OUTBOX_MAX)
    put(client, bot_settings, BOB, "for Bob")
    with running_bot(bot_settings):
        telegram.wait(lambda m: m.chat_id == BOB and m.text == "for Bob")
    assert not telegram.messages(GROUP)
