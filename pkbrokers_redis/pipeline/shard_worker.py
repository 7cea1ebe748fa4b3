"""One shard in its aggregator's hands: its book, its position, the entries read but not yet applied."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from pkbrokers_redis.core.book import Book
from pkbrokers_redis.core.model import TickArray
from pkbrokers_redis.pipeline.entries import Pending
from pkbrokers_redis.pipeline.late import Revisions
from pkbrokers_redis.store.commit import Move, Position
from pkbrokers_redis.store.ids import id_order

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


class Repair(NamedTuple):
    """One entry of the shard's repairs, read and not yet applied."""

    id: str
    fields: dict[bytes, bytes]
    reads_out: int  # of the tick stream when it was read


class ShardWorker:
    """Lives from taking a shard over until it is lost, given up, or its book is no longer what Redis has."""

    def __init__(self, shard: int, book: Book, held: Position, revs: dict[bytes, bytes]) -> None:
        self.shard = shard
        self.book = book
        self.held = held
        self.read_id = held.id  # where the next XREAD goes on
        self.revs = Revisions(revs)
        self.pending: list[Pending] = []  # at most one read, so bounded by it
        self.repairs: deque[Repair] = deque()  # at most one read of that stream
        self.read_out_ms = 0.0  # when the stream was last read to its end, epoch ms
        self.reads_out = 0  # how often it was
        self.drained_ms = 0.0  # … and all that was read has been applied
        self.told: set[str] = set()  # kinds of odd ticks whose evidence was logged
        self._entries = 0

    @property
    def lag_ms(self) -> float:
        """Milliseconds between the newest entry applied and the newest one read."""
        return float(self.read_id.split("-")[0]) - float(self.held.id.split("-")[0])

    def is_ready(self, repair: Repair) -> bool:
        """Whether all ticks are applied that were in the stream before a repair was in its own."""
        if id_order(self.held.id)[0] > id_order(repair.id)[0]:
            return True  # the ids of both streams are the same server's time, to the millisecond
        return not self.pending and self.reads_out > repair.reads_out

    def note_read_out(self, now_ms: float) -> None:
        """The stream was read to its end; nothing older than `now_ms` waits in it."""
        self.read_out_ms = now_ms
        self.reads_out += 1

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


def book_counts(workers: Iterable[ShardWorker]) -> dict[str, int]:
    """What became of the ticks, added up over shards."""
    totals: dict[str, int] = {}
    for worker in workers:
        for name, count in worker.book.counts().items():
            totals[name] = totals.get(name, 0) + count
    return totals
