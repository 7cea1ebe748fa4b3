"""A restart on request: workers of a role that began before the request begin anew, in their process.

P:restart:<role>   string, TTL   when it was asked for, epoch ms by Redis's clock
"""

from __future__ import annotations

import threading
from typing import Any

import redis

from pkbrokers_redis.core.keys import Keys
from pkbrokers_redis.pipeline.facts import first_server

REMEMBERED_SECONDS = 600  # a worker that hangs for longer is started anew anyway


def redis_ms(client: redis.Redis) -> float:
    """Redis's clock: hosts' clocks need not agree."""
    seconds, micros = first_server(client, "time")
    return float(seconds * 1000 + micros / 1000)


def ask_restart(client: redis.Redis, keys: Keys, role: str) -> None:
    """Ask all workers of a role to begin anew."""
    client.set(keys.restart(role), int(redis_ms(client)), ex=REMEMBERED_SECONDS)


def is_asked(client: redis.Redis, keys: Keys, role: str, began_ms: float) -> bool:
    """Whether a worker that began then is meant. False while Redis is away."""
    try:
        found: Any = client.get(keys.restart(role))
    except redis.RedisError:
        return False
    return isinstance(found, bytes) and found.isdigit() and float(found) > began_ms


class RoleStop(threading.Event):
    """A role's stop event that knows why it is set: to end, or to begin anew in the same process.

    An end wins: a signal that comes while a role begins anew is not lost.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ended = self._again = False

    def end(self) -> None:
        """Stop for good."""
        self._ended = True
        self.set()

    def ask_again(self) -> None:
        """Stop, and begin anew."""
        self._again = True
        self.set()

    def begins_again(self) -> bool:
        """Once the role has returned: whether it is to be called again."""
        again, self._again = self._again and not self._ended, False
        if again:
            self.clear()
            if self._ended:  # between the two lines above
                self.set()
        return again


def heed(client: redis.Redis, keys: Keys, role: str, began_ms: float, stop: threading.Event) -> None:
    """For a role's heartbeat: stop to begin anew where that was asked for since `began_ms`."""
    if isinstance(stop, RoleStop) and is_asked(client, keys, role, began_ms):
        stop.ask_again()
