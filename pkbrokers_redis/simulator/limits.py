"""Kite's request limits: so many in any second, for each app and kind of request."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

PER_SECOND: Final = {"historical": 3, "quote": 1, "other": 10}
# A client that spaces its requests by a second over the network may see them come a little closer.
WINDOW_SECONDS: Final = 0.98
REQUESTS_KEPT: Final = 10_000
CLIENTS_MAX: Final = 1000


class RequestSeen(NamedTuple):
    """One REST request: monotonic seconds, what limit it falls under, path, HTTP status."""

    at_s: float
    kind: str
    path: str
    status: int


def kind_of(path: str) -> str:
    """`historical`, `quote` or `other`."""
    if "/instruments/historical/" in path:
        return "historical"
    return "quote" if "/quote" in path else "other"


class Limits:
    """Counts requests; refuses those beyond the limit while `enforced`. `seen` is the log, bounded."""

    def __init__(self, enforced: bool, now_s: Callable[[], float] = time.monotonic) -> None:
        self.enforced = enforced
        self.seen: deque[RequestSeen] = deque(maxlen=REQUESTS_KEPT)
        self._now_s = now_s
        self._allowed: dict[tuple[str, str], deque[float]] = {}

    def allow(self, client: str, path: str) -> bool:
        """Whether this request may pass."""
        kind, now = kind_of(path), self._now_s()
        if (client, kind) not in self._allowed and len(self._allowed) >= CLIENTS_MAX:
            self._allowed.clear()
        times = self._allowed.setdefault((client, kind), deque(maxlen=PER_SECOND[kind]))
        full = len(times) == PER_SECOND[kind] and now - times[0] < WINDOW_SECONDS
        if full and self.enforced:
            return False
        times.append(now)
        return True

    def note(self, path: str, status: int) -> None:
        """Remember a request that was answered."""
        self.seen.append(RequestSeen(self._now_s(), kind_of(path), path, status))
