"""One shard in its aggregator's hands: its book, its position, the entries read but not yet applied."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pkbrokers_redis.core.book import Book
from pkbrokers_redis.core.model import TickArray
from pkbrokers_redis.pipeline.entries import Pending
from pkbrokers_redis.pipeline.late import read_revisions
from pkbrokers_redis.store.commit import Move, Position

TICKS_MAX = 50_000  # applied a commit and shard, ~20 ms; the rest waits for the next round
SOURCES_MAX = 256  # whose last seq the cursor keeps; a source is one life of an ingest worker
SETTLED_ENTRIES = 10_000  # applied since the shard was taken: by then every source that lives was heard of


class Applied(NamedTuple):
    """What one round fed to the book, and how far that moves the cursor."""

    ticks: int
    entries: int
    repeated: int
    move: Move
    batch: TickArray | None = None


class ShardWorker:
    """Lives from taking a shard over until it is lost, given up, or its book is no longer what Redis has."""

    def __init__(self, shard: int, book: Book, held: Position, revs: dict[bytes, bytes]) -> None:
        self.shard = shard
        self.book = book
        self.held = held
        self.read_id = held.id  # where the next XREAD goes on
        self.revs = read_revisions(revs)
        self.pending: list[Pending] = []  # at most one read, so bounded by it
        self.read_out_ms = 0.0  # when the stream was last read to its end, epoch ms
        self.drained_ms = 0.0  # … and all that was read has been applied
        self.told: set[str] = set()  # kinds of odd ticks whose evidence was logged
        self._entries = 0

    @property
    def lag_ms(self) -> float:
        """Milliseconds between the newest entry applied and the newest one read."""
        return float(self.read_id.split("-")[0]) - float(self.held.id.split("-")[0])

    def queue(self, entries: list[Pending]) -> None:
        """Take entries as they were read."""
        if entries:
            self.pending += entries
            self.read_id = entries[-1].id.decode()

    def apply(self, dirty_max: int) -> Applied:
        """Feed what is pending to the book, as far as one commit may go."""
        held = self.held
        if not self.pending:
            self.drained_ms = self.read_out_ms
            return Applied(0, 0, 0, Move(held.id, held.read, {}))
        seen = dict(held.sources)
        batch: list[TickArray] = []
        repeats: list[bool] = []
        size = 0
        for entry in self.pending:
            if size >= TICKS_MAX:
                break
            repeated = bool(entry.source) and entry.seq <= seen.get(entry.source, -1)
            if entry.source and not repeated:
                seen[entry.source] = entry.seq
            repeats.append(repeated)  # a producer's retry: Redis had it already
            batch.append(entry.ticks[:0] if repeated else entry.ticks)
            size += len(entry.ticks)
        ends = np.cumsum([len(rows) for rows in batch])
        rows = np.concatenate(batch)
        left = self.book.take(rows, 0, ends, dirty_max)
        # `take` stops where an entry ends: all entries that end there or before are applied.
        done = int(np.searchsorted(ends, left, side="right"))
        sources = {  # ascending within a source but for its repeats, so the last one stands
            entry.source: entry.seq
            for entry, repeated in zip(self.pending[:done], repeats, strict=False)
            if entry.source and not repeated
        }
        last_id = self.pending[done - 1].id.decode()
        self.pending = self.pending[done:]
        if not self.pending:
            self.drained_ms = self.read_out_ms
        self._entries += done
        move = Move(last_id, held.read + done, sources, self._silent_sources(sources))
        return Applied(left, done, sum(repeats[:done]), move, rows[:left])

    def _silent_sources(self, heard: dict[bytes, int]) -> list[bytes]:
        """Sources whose numbers may go: unheard of while 256 others were, so that none waits to be resent.

        `held.sources` is in the order in which they were heard of; at first only in that of Redis' answer,
        therefore nobody is forgotten before those that live have shown themselves.
        """
        surplus = len(self.held.sources) - SOURCES_MAX
        if surplus <= 0 or self._entries < SETTLED_ENTRIES:
            return []
        return [source for source in list(self.held.sources)[:surplus] if source not in heard]
