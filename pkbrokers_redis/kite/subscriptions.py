"""What one connection is subscribed to: the instruments wanted, and the messages that bring the server there.

    {"a": "subscribe", "v": [408065]}
    {"a": "mode", "v": ["full", [408065]]}      only what is subscribed takes a mode
    {"a": "unsubscribe", "v": [408065]}         tokens are JSON numbers

Source: https://kite.trade/docs/connect/v3/websocket/
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from pkbrokers_redis.core.errors import SettingsError

TOKENS_PER_CONNECTION_MAX = 3000
MODES = ("ltp", "quote", "full")

Message = dict[str, object]


class Subscriptions:
    """Any thread may change them; the one that owns the connection takes the messages and sends them.

    Bounded: at most 3,000 tokens, and `renew` drops what was not sent on an earlier connection.
    """

    def __init__(self, mode: str, batch_size: int) -> None:
        self._mode = known_mode(mode)
        self._batch_size = batch_size
        self._wanted: dict[int, str] = {}  # token → mode; what every new connection subscribes
        self._outbox: list[Message] = []
        self._lock = threading.Lock()  # over both

    def __len__(self) -> int:
        return len(self._wanted)

    @property
    def tokens(self) -> frozenset[int]:
        """The instruments wanted."""
        with self._lock:
            return frozenset(self._wanted)

    def add(self, tokens: Iterable[int], mode: str | None = None) -> None:
        """Want instruments, or change their mode. Raises SettingsError beyond 3,000 or for a strange mode."""
        mode = known_mode(mode or self._mode)
        fresh = [int(token) for token in dict.fromkeys(tokens)]
        with self._lock:
            count = len(self._wanted.keys() | set(fresh))
            if count > TOKENS_PER_CONNECTION_MAX:
                raise SettingsError(
                    f"{count} instruments are too many for one Kite connection",
                    f"give each connection at most {TOKENS_PER_CONNECTION_MAX}",
                )
            self._wanted.update(dict.fromkeys(fresh, mode))
            self._outbox += self._subscribe(fresh, mode)

    def remove(self, tokens: Iterable[int]) -> None:
        """Want them no more; strangers are ignored."""
        with self._lock:
            gone = [token for token in dict.fromkeys(tokens) if self._wanted.pop(token, None)]
            self._outbox += self._unsubscribe(gone)

    def repeat(self, tokens: Iterable[int]) -> None:
        """Unsubscribe and subscribe anew, for instruments that fell silent; strangers are ignored."""
        with self._lock:
            ours = [token for token in dict.fromkeys(tokens) if token in self._wanted]
            self._outbox += self._unsubscribe(ours) + self._by_mode(ours)

    def renew(self) -> None:
        """A new connection knows nothing: everything wanted replaces what waited to be sent."""
        with self._lock:
            self._outbox = self._by_mode(list(self._wanted))

    def take(self) -> list[Message]:
        """The messages to send now."""
        if not self._outbox:  # asked with every frame: no lock where there is nothing
            return []
        with self._lock:
            messages, self._outbox = self._outbox, []
            return messages

    def _by_mode(self, tokens: list[int]) -> list[Message]:
        messages: list[Message] = []
        for mode in MODES:
            messages += self._subscribe([token for token in tokens if self._wanted[token] == mode], mode)
        return messages

    def _subscribe(self, tokens: list[int], mode: str) -> list[Message]:
        messages: list[Message] = []
        for part in self._batches(tokens):
            messages.append({"a": "subscribe", "v": part})
            messages.append({"a": "mode", "v": [mode, part]})
        return messages

    def _unsubscribe(self, tokens: list[int]) -> list[Message]:
        return [{"a": "unsubscribe", "v": part} for part in self._batches(tokens)]

    def _batches(self, tokens: list[int]) -> list[list[int]]:
        return [tokens[start : start + self._batch_size] for start in range(0, len(tokens), self._batch_size)]


def known_mode(mode: str) -> str:
    """`mode` itself. Raises SettingsError for one that Kite does not have."""
    if mode not in MODES:
        raise SettingsError(f"{mode!r} is no Kite mode", "use ltp, quote or full")
    return mode
