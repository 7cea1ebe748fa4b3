"""Quote hashes from Kite's packets: the newest packet of each instrument, a bounded slice at a time.

Writing every changed quote at once stalls the loop that also carries the ticks (a p99 of 250 ms was
measured); 64 per call stay below a millisecond or two. An instrument is written at most every half second: a
newer packet replaces the waiting one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pkbrokers_redis.keys import Keys
from pkbrokers_redis.kite.protocol import ParsedFrame, quote_fields
from pkbrokers_redis.store.cluster import Pipe

QUOTES_PER_CALL = 64
INTERVAL_MS = 500  # between two writes of an instrument's quote

_Packet = tuple[bytes, int, int, int]  # frame, offset, length, receive time (epoch ms)


class PendingQuotes:
    """The packets that wait to be written: at most one per instrument, which is the bound.

    One thread adds packets and queues writes; `confirm` or `retry` follows each `queue`. `add_symbols` may be
    called by any thread.
    """

    def __init__(self, keys: Keys, symbols: Mapping[int, str]) -> None:
        """Prepare an empty board; `symbols` maps tokens to the names that the hashes show."""
        self._keys = keys
        self._symbols = dict(symbols)
        self._newest: dict[int, _Packet] = {}  # arrived since the current slice was made
        self._slice: list[int] = []  # tokens to write, call by call
        self._sent: dict[int, _Packet] = {}  # queued, not yet confirmed
        self._written: dict[int, _Packet] = {}  # what Redis has; copies of single packets
        self._sliced_ms = 0

    def __len__(self) -> int:
        return len(self._newest) + len(self._slice)

    def add_symbols(self, symbols: Mapping[int, str]) -> None:
        """Learn the names of more instruments."""
        self._symbols = {**self._symbols, **symbols}

    def add(self, frame: bytes, parsed: ParsedFrame, at_ms: int) -> None:
        """Keep a frame's packets, received at `at_ms` (epoch ms), as the newest of their instruments."""
        n = len(parsed.offsets)
        packets = zip([frame] * n, parsed.offsets, parsed.lengths, [at_ms] * n, strict=True)
        self._newest.update(zip(parsed.tokens.tolist(), packets, strict=True))

    def queue(self, pipe: Pipe, now_ms: int) -> list[str]:
        """Append the HSETs of the next slice to a pipe; return their keys."""
        if not self._slice and self._newest and not 0 <= now_ms - self._sliced_ms < INTERVAL_MS:
            self._slice = list(self._newest)
            self._sliced_ms = now_ms
        while self._slice and len(self._sent) < QUOTES_PER_CALL:
            token = self._slice.pop()
            packet = self._newest.pop(token, None)
            if packet is None:
                continue
            frame, offset, length, at_ms = packet
            data = frame[offset : offset + length]
            self._sent[token] = (data, 0, length, at_ms)
            symbol = self._symbols.get(token) or str(token)
            cells: list[Any] = []
            for name, value in quote_fields(data, symbol, at_ms).items():
                cells += (name, value)
            pipe.add("HSET", self._keys.quote(token), *cells)
        return [self._keys.quote(token) for token in self._sent]

    def confirm(self) -> None:
        """Record that Redis has what was queued."""
        self._written.update(self._sent)
        self._sent.clear()

    def retry(self) -> None:
        """Let what was queued wait again, unless a newer packet does already."""
        for token, packet in self._sent.items():
            self._newest.setdefault(token, packet)
        self._slice += self._sent
        self._sent.clear()

    def rewrite(self) -> None:
        """Let everything written so far wait again: Redis lost some of it. Newer packets stay."""
        self._newest = self._written | self._newest
        self._written = {}
