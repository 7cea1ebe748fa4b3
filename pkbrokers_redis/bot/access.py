"""Who gets answers: nobody, unless PKB_TELEGRAM_CHATS names the chat or PKB_TELEGRAM_ADMINS the user.

Pure decisions; the time is an argument.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

from pkbrokers_redis.errors import SettingsError
from pkbrokers_redis.settings import Settings

K = TypeVar("K")

REFUSAL = "This bot serves a closed group. Please contact its operator."
REFUSAL_EVERY_SECONDS = 3600.0
SLOW_DOWN = "Too many commands at once: some were skipped. Please send them again more slowly."
SLOW_DOWN_EVERY_SECONDS = 60.0  # a flood is not answered by a flood
COMMANDS_BURST = 10  # at once, per chat
COMMANDS_PER_MINUTE = 30  # on average, per chat
CHATS_MAX = 10_000  # whose limits are kept in memory


@dataclass(frozen=True, slots=True)
class Access:
    """The allow-list of chats and operators.

    An operator gets answers in a private chat. In a group only if the group is listed too, because all
    members read the answer.
    """

    chats: frozenset[int]
    admins: frozenset[int]

    def is_admin(self, user_id: int) -> bool:
        """Return whether the user is an operator."""
        return user_id in self.admins

    def is_allowed(self, chat_id: int, user_id: int, is_private: bool) -> bool:
        """Return whether this user gets answers in this chat."""
        return chat_id in self.chats or (is_private and user_id in self.admins)


def access_of(settings: Settings) -> Access:
    """Return the allow-list of the settings. Raise SettingsError for a malformed id."""
    return Access(
        _ids("PKB_TELEGRAM_CHATS", settings.telegram_chats),
        _ids("PKB_TELEGRAM_ADMINS", settings.telegram_admins),
    )


def _ids(name: str, text: str) -> frozenset[int]:
    words = [word for word in re.split(r"[\s,]+", text) if word]
    if invalid := [word for word in words if not re.fullmatch(r"-?\d{1,18}", word)]:
        raise SettingsError(
            f"{name} holds {invalid[0][:40]!r}, which is not an id", "give numbers, comma-separated"
        )
    return frozenset(map(int, words))


class Throttle(Generic[K]):
    """Remembers when something last happened, by key. Beyond `keys_max` keys the oldest are forgotten."""

    def __init__(self, keys_max: int = CHATS_MAX) -> None:
        self._at: OrderedDict[K, float] = OrderedDict()
        self._keys_max = keys_max

    def is_due(self, key: K, now_s: float, every_seconds: float) -> bool:
        """Return True at most once per `every_seconds` and key."""
        if now_s - self._at.get(key, float("-inf")) < every_seconds:
            return False
        self._at[key] = now_s
        self._at.move_to_end(key)
        while len(self._at) > self._keys_max:
            self._at.popitem(last=False)
        return True


class FloodLimit:
    """A token bucket per chat: `burst` commands at once, `per_minute` on average."""

    def __init__(self, burst: int, per_minute: float) -> None:
        self._burst, self._per_second = float(burst), per_minute / 60
        self._buckets: OrderedDict[int, tuple[float, float]] = OrderedDict()  # tokens, at second

    def accept(self, chat_id: int, now_s: float) -> bool:
        """Return whether one more command of this chat is answered."""
        tokens, at = self._buckets.pop(chat_id, (self._burst, now_s))
        tokens = min(self._burst, tokens + max(now_s - at, 0.0) * self._per_second)
        is_accepted = tokens >= 1
        self._buckets[chat_id] = (tokens - is_accepted, now_s)
        while len(self._buckets) > CHATS_MAX:
            self._buckets.popitem(last=False)
        return is_accepted
