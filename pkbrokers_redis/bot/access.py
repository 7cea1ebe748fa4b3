"""Who may ask: nobody, unless the settings name the chat (PKB_TELEGRAM_CHATS) or the user
(PKB_TELEGRAM_ADMINS). Decides only; time is an argument."""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

from pkbrokers_redis.errors import SettingsError
from pkbrokers_redis.settings import Settings

K = TypeVar("K")

REFUSAL = "This bot serves a closed group. Please ask its operator."
REFUSAL_EVERY_SECONDS = 3600.0
SLOW_DOWN = "Slow down, please: some of that went unread."
COMMANDS_BURST = 10  # of a chat at once
COMMANDS_A_MINUTE = 30  # of a chat in the long run
CHATS_REMEMBERED_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Access:
    """The allow-list. An admin is served in a private chat; in a group only if the group is on the list too,
    because all its members read the answer."""

    chats: frozenset[int]
    admins: frozenset[int]

    def is_admin(self, user_id: int) -> bool:
        return user_id in self.admins

    def may_ask(self, chat_id: int, user_id: int, is_private: bool) -> bool:
        """Whether this user gets answers in this chat."""
        return chat_id in self.chats or (is_private and user_id in self.admins)


def access_of(settings: Settings) -> Access:
    """Raises SettingsError for what is no number."""
    return Access(
        _ids("PKB_TELEGRAM_CHATS", settings.telegram_chats),
        _ids("PKB_TELEGRAM_ADMINS", settings.telegram_admins),
    )


def _ids(name: str, text: str) -> frozenset[int]:
    words = [word for word in re.split(r"[\s,]+", text) if word]
    if wrong := [word for word in words if not re.fullmatch(r"-?\d{1,18}", word)]:
        raise SettingsError(
            f"{name} holds {wrong[0][:40]!r}, which is no id", "give numbers, comma-separated"
        )
    return frozenset(map(int, words))


class Remembered(Generic[K]):
    """When something last happened, by key; the oldest keys are forgotten first."""

    def __init__(self, keys_max: int = CHATS_REMEMBERED_MAX) -> None:
        self._at: OrderedDict[K, float] = OrderedDict()
        self._keys_max = keys_max

    def due(self, key: K, now_s: float, every_seconds: float) -> bool:
        """True at most once in `every_seconds` a key."""
        if now_s - self._at.get(key, float("-inf")) < every_seconds:
            return False
        self._at[key] = now_s
        self._at.move_to_end(key)
        while len(self._at) > self._keys_max:
            self._at.popitem(last=False)
        return True


class Pace:
    """A token bucket a chat: `burst` at once, `a_minute` in the long run."""

    def __init__(self, burst: int, a_minute: float) -> None:
        self._burst, self._a_second = float(burst), a_minute / 60
        self._buckets: OrderedDict[int, tuple[float, float]] = OrderedDict()  # left, as of
        self._told: Remembered[int] = Remembered()

    def take(self, chat_id: int, now_s: float) -> bool:
        """Whether one more command of this chat is served."""
        left, at = self._buckets.pop(chat_id, (self._burst, now_s))
        left = min(self._burst, left + max(now_s - at, 0.0) * self._a_second)
        served = left >= 1
        self._buckets[chat_id] = (left - served, now_s)
        while len(self._buckets) > CHATS_REMEMBERED_MAX:
            self._buckets.popitem(last=False)
        return served

    def may_tell(self, chat_id: int, now_s: float) -> bool:
        """Whether to say so: once a minute, a flood is not answered by a flood."""
        return self._told.due(chat_id, now_s, 60.0)
