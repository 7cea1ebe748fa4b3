"""Alerts in Redis: added, listed and removed by the chat's commands.

P:{bot}:alerts   hash   <id> → alert, `next` → the last id given out
P:{bot}:alert_state    hash   <id> → what it remembers (`rules.Watch.state`)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import redis

from pkbrokers_redis import logs
from pkbrokers_redis.bot.alerts.model import Alert
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.keys import Keys

log = logs.get("bot")

ALERTS_A_CHAT_MAX = 250
NEXT = b"next"


class AlertBook:
    """The alerts of all chats."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._client, self._keys = client, keys
        self._odd = logs.Once()

    def all(self) -> list[Alert]:
        """Every alert, by id. One that a foreign hand wrote is logged once and left out."""
        found: Any = self._client.hgetall(self._keys.bot_alerts())
        alerts: list[Alert] = []
        for name, text in found.items():
            if name == NEXT:
                continue
            try:
                alerts.append(msgspec.json.decode(text, type=Alert))
            except msgspec.DecodeError as error:
                if self._odd.first(name):
                    log.warning("odd_alert", id=name.decode(errors="replace"), error=str(error)[:120])
        return sorted(alerts, key=lambda alert: alert.id)

    def of_chat(self, chat_id: int) -> list[Alert]:
        """A chat's alerts, by id."""
        return [alert for alert in self.all() if alert.chat_id == chat_id]

    def add(self, alert: Alert, state: Sequence[Any]) -> Alert:
        """Keep it under a new id. Raises PkbError when the chat has too many."""
        if len(self.of_chat(alert.chat_id)) >= ALERTS_A_CHAT_MAX:
            raise PkbError(
                f"this chat has {ALERTS_A_CHAT_MAX} alerts", "remove one with /alert remove NUMBER"
            )
        number: Any = self._client.hincrby(self._keys.bot_alerts(), "next", 1)
        made = msgspec.structs.replace(alert, id=int(number))
        pipeline = self._client.pipeline(transaction=True)
        if state:
            pipeline.hset(self._keys.bot_alert_state(), str(made.id), msgspec.json.encode(state))
        pipeline.hset(self._keys.bot_alerts(), str(made.id), msgspec.json.encode(made))
        pipeline.execute()
        return made

    def remove(self, ids: Iterable[int]) -> int:
        """Forget alerts; how many there were."""
        names = [str(each) for each in ids]
        if not names:
            return 0
        pipeline = self._client.pipeline(transaction=True)
        pipeline.hdel(self._keys.bot_alerts(), *names)
        pipeline.hdel(self._keys.bot_alert_state(), *names)
        removed, _ = pipeline.execute()
        return int(removed)
