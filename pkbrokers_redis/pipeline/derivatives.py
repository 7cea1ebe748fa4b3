"""Which stocks have futures or options: from 2026-08-03 they trade by other hours (closing auction).

The instrument master says so, and changes with each day's sync. A book learns it when it is loaded.
"""

from __future__ import annotations

import time

import redis
from redis.exceptions import ResponseError

from pkbrokers_redis.core.keys import Keys
from pkbrokers_redis.store.master import load_derivative_tokens

LOOK_SECONDS = 60.0


class Derivatives:
    """`tokens` as of the last look."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._due = 0.0
        self.tokens: frozenset[int] = frozenset()

    def look(self, client: redis.Redis) -> bool:
        """Read them; True when they are others than before. A foreign hand's key counts as no master."""
        self._due = time.monotonic() + LOOK_SECONDS
        try:
            tokens = frozenset(load_derivative_tokens(client, self._keys))
        except ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            tokens = frozenset()
        changed = tokens != self.tokens
        self.tokens = tokens
        return changed

    def look_if_due(self, client: redis.Redis) -> bool:
        """`look` once a minute."""
        return time.monotonic() >= self._due and self.look(client)
