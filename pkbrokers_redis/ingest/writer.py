"""Parse numbered frames into tick batches and quotes; `store.tick_writer` writes them.

frame → parse_frame → float64[n, 10] ──► tick batch (JSON rows on the way to the stream)
                └─ offsets, tokens ────► newest packet per instrument → quote hash
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import redis

from pkbrokers_redis import logs
from pkbrokers_redis.ingest.buffer import Frame, FrameBuffer
from pkbrokers_redis.ingest.watchdog import TickActivity
from pkbrokers_redis.kite.protocol import ParsedFrame, parse_frame, quote_fields
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.tick_writer import PendingQuotes, TickBatch, TickWriter

log = logs.get("ingest")

FRAMES_PER_WRITE = 64
IDLE_SECONDS = 0.2  # how long to wait for a frame
QUOTES_WAIT_SECONDS = 0.005  # the same while quotes wait
EVIDENCE_BYTES = 64  # of a malformed frame, for the log
EVIDENCE_TOKENS = 5  # of unknown instruments, for the log


class FrameWriter(TickWriter):
    """A tick writer that takes Kite's frames. Used by one thread; `add_symbols` by any."""

    def __init__(
        self,
        connect: Callable[[], redis.Redis],
        settings: Settings,
        symbols: Mapping[int, str],
        *,
        source: str | None = None,
        only_known: bool = False,
        activity: TickActivity | None = None,
    ) -> None:
        """Prepare a writer; `only_known`: ticks of tokens without a symbol are dropped and counted."""
        self.quotes = PendingQuotes(settings.keys, symbols, quote_fields)
        super().__init__(connect, settings, source=source, quotes=self.quotes)
        self._known = frozenset(symbols) if only_known else None
        self._activity = activity
        self.counts = self.counts | dict.fromkeys(
            ("frames", "unknown_packets", "truncated_frames", "trailing_bytes", "unknown_tokens"), 0
        )

    def add_symbols(self, symbols: Mapping[int, str]) -> None:
        """Accept more instruments. Those that left stay accepted: frames with them may be on the way."""
        if self._known is not None:
            self._known = self._known.union(symbols)
        self.quotes.add_symbols(symbols)

    def parse_new(self, frames: Sequence[tuple[bytes, int]]) -> list[TickBatch]:
        """Number frames `(bytes, at_ms)` that come from no buffer, and parse them."""
        first = self.seq + 1
        self.seq += len(frames)
        return self.parse(
            Frame(self.source, first + n, at_ms, data) for n, (data, at_ms) in enumerate(frames)
        )

    def parse(self, frames: Iterable[Frame]) -> list[TickBatch]:
        """Return the batches of numbered frames; malformed bytes are counted and give what can be read."""
        batches: list[TickBatch] = []
        for source, seq, at_ms, frame in frames:
            parsed = parse_frame(frame, at_ms)
            self.counts["frames"] += 1
            if parsed.unknown or parsed.truncated or parsed.trailing:
                self._count_malformed(frame, parsed)
            if source == self.source:  # another process may stream a dead one's instruments by now
                tokens = parsed.tokens.tolist()
                if self._known is not None and not self._known.issuperset(tokens):
                    parsed = self._without_unknown(parsed)
                    tokens = parsed.tokens.tolist()
                self.quotes.add(frame, tokens, parsed.offsets, parsed.lengths, at_ms)
                if self._activity is not None:
                    self._activity.note(parsed.tokens, parsed.ticks, at_ms)
            if len(parsed.ticks):
                self.counts["ticks"] += len(parsed.ticks)
                batches.append(TickBatch(source, seq, at_ms, parsed.ticks))
        return batches

    def _without_unknown(self, parsed: ParsedFrame) -> ParsedFrame:
        known = [token in (self._known or ()) for token in parsed.tokens.tolist()]
        unknown = parsed.tokens[np.logical_not(known)].tolist()
        self.counts["unknown_tokens"] += len(unknown)
        if self._once.first("unknown tokens"):
            log.warning("unknown_tokens", tokens=str(unknown[:EVIDENCE_TOKENS]), packets=len(unknown))
        return parsed._replace(
            ticks=parsed.ticks[known],
            tokens=parsed.tokens[known],
            offsets=[offset for offset, keep in zip(parsed.offsets, known, strict=True) if keep],
            lengths=[length for length, keep in zip(parsed.lengths, known, strict=True) if keep],
        )

    def _count_malformed(self, frame: bytes, parsed: ParsedFrame) -> None:
        self.counts["unknown_packets"] += parsed.unknown
        self.counts["truncated_frames"] += parsed.truncated
        self.counts["trailing_bytes"] += parsed.trailing
        if self._once.first(("malformed", bool(parsed.unknown), parsed.truncated, bool(parsed.trailing))):
            log.warning(
                "malformed_frame", size_bytes=len(frame), unknown_packets=parsed.unknown,
                truncated=parsed.truncated, trailing_bytes=parsed.trailing,
                starts_with=frame[:EVIDENCE_BYTES].hex(),
            )  # fmt: skip


def forward(
    buffer: FrameBuffer, writer: FrameWriter, stop: threading.Event, wait_seconds: float
) -> int | None:
    """Write the oldest frames; return how many, or None when stopped and Redis does not take them."""
    frames = buffer.peek(FRAMES_PER_WRITE, wait_seconds)
    if not writer.write(writer.parse(frames), int(time.time() * 1000), stop):
        return None
    buffer.acknowledge(frames)
    return len(frames)


def forward_all(buffer: FrameBuffer, writer: FrameWriter, stop: threading.Event) -> bool:
    """Forward frames until `stop` is set. Returns whether Redis took the last ones."""
    written: int | None = 0
    while not stop.is_set():
        wait_seconds = QUOTES_WAIT_SECONDS if len(writer.quotes) else IDLE_SECONDS
        written = forward(buffer, writer, stop, wait_seconds)
    return written is not None
