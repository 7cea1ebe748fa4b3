"""The symbols that stand beside the tokens in announcements."""

from __future__ import annotations

import redis

from pkbrokers_redis.core.keys import Keys
from pkbrokers_redis.store.symbols import load_symbols

RETRY_MS = 5_000  # between looks for an instrument that has no symbol


class Names:
    """Token → symbol, as `P:symbols` has it; read again when an instrument turns up that is not known."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._symbols: dict[int, bytes] = {}
        self._read_at_ms = float(-RETRY_MS)

    def symbol_of(self, client: redis.Redis, token: int, now_ms: float) -> bytes:
        """The symbol; the token itself where there is none."""
        symbol = self._symbols.get(token)
        if symbol is None and not 0 <= now_ms - self._read_at_ms < RETRY_MS:
            self._read_at_ms = now_ms
            names = load_symbols(client, self._keys)
            self._symbols = {each: name.encode() for each, name in names.items()}
            symbol = self._symbols.get(token)
        return symbol or b"%d" % token

    def forget(self, token: int, now_ms: float) -> None:
        """It is about to get another symbol: a later look will find it."""
        self._symbols.pop(token, None)
        self._read_at_ms = now_ms
