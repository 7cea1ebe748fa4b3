"""Quote hashes, written beside the ticks: the newest packet of each instrument, a bounded slice at a time.

Writing every changed quote at once stalls the loop that also carries the ticks (a p99 of 250 ms was
measured); 64 per round keep it below a millisecond or two. An instrument is written at most every half
second: a newer packet replaces the waiting one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pkbrokers_redis.keys import Keys
from pkbrokers_redis.kite.protocol import ParsedFrame, parse_frame, quote_fields
from pkbrokers_redis.store.cluster import Pipe

QUOTES_A_ROUND = 64
EVERY_MS = 500

_Waiting = tuple[bytes, int, int, int]  # frame, offset, length, received at


class QuoteBoard:
    """The packets that wait to be written; at most one per instrument, which is its bound."""

    def __init__(self, keys: Keys, symbols: Mapping[int, str]) -> None:
        self._keys = keys
        self._symbols = dict(symbols)
        self._fresh: dict[int, _Waiting] = {}  # arrived since the slice in hand was cut
        self._slice: list[int] = []  # tokens being written, round by round
        self._sent: dict[int, _Waiting] = {}  # queued, and not yet known to be in Redis
        self._cut_ms = 0

    def __len__(self) -> int:
        return len(self._fresh) + len(self._slice)

    def learn(self, symbols: Mapping[int, str]) -> None:
        """The names of more instruments."""
        self._symbols = {**self._symbols, **symbols}

    def note(self, frame: bytes, parsed: ParsedFrame, at_ms: int) -> None:
        """Remember a frame's packets as their instruments' newest."""
        tokens = parsed.ticks[:, 0].astype(int).tolist()
        n = len(tokens)
        packets = zip([frame] * n, parsed.offsets, parsed.lengths, [at_ms] * n, strict=True)
        self._fresh.update(zip(tokens, packets, strict=True))

    def note_again(self, frames: Iterable[tuple[bytes, int]]) -> None:
        """Frames `(bytes, at_ms)` in their order, whose packets may not be in Redis after all.

        What waits already is newer.
        """
        newer, self._fresh = self._fresh, {}
        for frame, at_ms in frames:
            self.note(frame, parse_frame(frame, at_ms), at_ms)
        self._fresh.update(newer)

    def queue(self, pipe: Pipe, now_ms: int, most: int = QUOTES_A_ROUND) -> list[str]:
        """Append the next slice's HSETs to a pipe; returns their keys. `settle` or `put_back` must follow."""
        if not self._slice and self._fresh and not 0 <= now_ms - self._cut_ms < EVERY_MS:
            self._slice = list(self._fresh)
            self._cut_ms = now_ms
        while self._slice and len(self._sent) < most:
            token = self._slice.pop()
            waiting = self._fresh.pop(token, None)
            if waiting is None:
                continue
            self._sent[token] = waiting
            frame, offset, length, at_ms = waiting
            symbol = self._symbols.get(token) or str(token)
            fields = quote_fields(frame[offset : offset + length], symbol, at_ms)
            cells: list[Any] = []
            for name, value in fields.items():
                cells += (name, value)
            pipe.add("HSET", self._keys.quote(token), *cells)
        return [self._keys.quote(token) for token in self._sent]

    def settle(self) -> None:
        """What was queued is in Redis."""
        self._sent.clear()

    def put_back(self) -> None:
        """What was queued may not be in Redis: it waits again, unless a newer packet does already."""
        for token, waiting in self._sent.items():
            self._fresh.setdefault(token, waiting)
        self._slice += self._sent
        self._sent.clear()
