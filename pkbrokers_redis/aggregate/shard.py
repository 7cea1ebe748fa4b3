"""The symbols that stand beside the tokens in announcements.

Stream entries → ticks, a whole read decoded at once. What a foreign hand wrote is told and gives none.

What a commit needs beyond the book: rows that are in no slot any more, and their revisions.

One shard in its aggregator's hands: its book, its position, the entries read but not yet applied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import redis
from redis.exceptions import ResponseError

from pkbrokers_redis.candles import changeset as ch
from pkbrokers_redis.candles.amend import amend_rows
from pkbrokers_redis.candles.changeset import Changes
from pkbrokers_redis.candles.codec import read_tick_entries, recover_ticks
from pkbrokers_redis.candles.model import AT_MS, FLAG_NAMES, TickArray, bucket_end_s
from pkbrokers_redis.candles.rows import flag_for, start_of
from pkbrokers_redis.candles.state import LateTick, ShardState
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.commit import Move, Position
from pkbrokers_redis.store.streams import id_order, is_count
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


EVIDENCE_BYTES = 120  # of bad input, in a log line


class Pending(NamedTuple):
    """One entry, read and not yet applied. `source` is empty where a foreign hand wrote it."""

    id: bytes
    source: bytes
    seq: int
    ticks: TickArray


class EntryDecoder:
    """Counts `odd_entries` and `odd_rows` in `counts`; `tell(event, place, **evidence)` hears of both."""

    def __init__(self, counts: dict[str, int], tell: Callable[..., None]) -> None:
        self._counts = counts
        self._tell = tell

    def decode(self, key: str, entries: Sequence[tuple[bytes, Any]]) -> list[Pending]:
        """The entries of one stream (`XREAD`'s: id and fields) in order."""
        heads: list[tuple[bytes, bytes, int, float]] = []
        texts: list[bytes] = []
        for entry_id, cells in entries:
            fields = fields_of(cells)
            source, seq, at = fields.get(b"src", b""), fields.get(b"seq", b""), fields.get(b"at", b"")
            text = fields.get(b"ticks")
            if text is None or not source or not is_count(seq):
                self._counts["odd_entries"] += 1
                evidence = repr(cells)[:EVIDENCE_BYTES]
                self._tell(
                    "foreign_entry", key, id=entry_id.decode(), lacks="src, seq or ticks", evidence=evidence
                )
                text, source, seq = b"[]", b"", b"0"
            texts.append(text)
            heads.append((entry_id, source, int(seq), float(at) if is_count(at) else 0.0))
        if not texts:
            return []
        ticks, counts, odd = read_tick_entries(texts)
        pending: list[Pending] = []
        first = 0
        for n, (entry_id, source, number, at_ms) in enumerate(heads):
            rows = ticks[first : first + counts[n]]
            first += counts[n]
            if n in odd:
                rows = self._salvage(key, entry_id, texts[n])
            rows[:, AT_MS] = at_ms
            pending.append(Pending(entry_id, source, number, rows))
        return pending

    def _salvage(self, key: str, entry_id: bytes, text: bytes) -> TickArray:
        """The rows of an entry that is not whole, as far as they are ticks."""
        rows, refused = recover_ticks(text)
        if refused:
            self._counts["odd_rows"] += refused
            evidence = repr(text[:EVIDENCE_BYTES])
            self._tell("odd_rows", key, id=entry_id.decode(), rows=refused, evidence=evidence)
        return rows


def fields_of(cells: Any) -> dict[bytes, bytes]:
    """The fields of a stream entry as a mapping, whichever way the client gave them."""
    if isinstance(cells, dict):
        return cells
    return dict(zip(cells[::2], cells[1::2], strict=False)) if cells else {}


REVS_MAX = 64  # revisions remembered of an instrument's candles that left the book …
FLOOR = "*"  # … and the highest of those forgotten, which all others count on from

_revs_decoder = msgspec.json.Decoder(dict[str, int])


class Revisions:
    """Of the candles that left the book: token → "5m 1762745700" → rev. A candle's only ever rise."""

    def __init__(self, fields: Mapping[bytes, bytes]) -> None:
        """`<token>:revs` fields of `P:{S}:state`; what a foreign hand left there is passed over."""
        self._revs: dict[int, dict[str, int]] = {}
        self._changed: set[int] = set()
        for name, value in fields.items():
            try:
                self._revs[int(name.removesuffix(b":revs"))] = _revs_decoder.decode(value)
            except (msgspec.DecodeError, ValueError):
                continue

    def next(self, token: int, interval: str, start: int) -> int:
        """The revision to announce a row with; remembered."""
        revs = self._revs.get(token, {})
        rev = max(revs.get(f"{interval} {start}", 0), revs.get(FLOOR, 0)) + 1
        self.note(token, interval, start, rev)
        return rev

    def note(self, token: int, interval: str, start: int, rev: int) -> None:
        """Remember a revision that was announced."""
        revs = self._revs.setdefault(token, {})
        name = f"{interval} {start}"
        revs.pop(name, None)  # to the end: forgotten last
        revs[name] = rev
        self._changed.add(token)

    def forget(self, token: int) -> None:
        """An instrument that is another one from now on."""
        self._revs.pop(token, None)
        self._changed.discard(token)

    def collect(self) -> dict[bytes, bytes]:
        """State fields of what changed since the last collect."""
        fields: dict[bytes, bytes] = {}
        for token in self._changed:
            revs = self._revs[token]
            for oldest in [name for name in revs if name != FLOOR][:-REVS_MAX]:
                revs[FLOOR] = max(revs.get(FLOOR, 0), revs.pop(oldest))
            fields[b"%d:revs" % token] = msgspec.json.encode(revs)
        self._changed.clear()
        return fields


class Addenda:
    """Changes with rows added that are in no slot: put into their list, and announced again."""

    def __init__(self, book: ShardState, revs: Revisions, changes: Changes) -> None:
        self._book, self._revs = book, revs
        self._ops = list(changes.ops)
        self._text = [changes.text]
        self._size = len(changes.text)
        self._lists = list(changes.lists)

    def add(
        self, i: int, k: int, start: int, row: bytes, *, put: bool = True, first_told: bool = False
    ) -> None:
        """One row, announced with a raised revision, or with 0 where nobody was told of its candle before
        (`first_told`); `put` False where its list is replaced as a whole."""
        first, self._size = self._size, self._size + len(row)
        self._text.append(row)
        if put:
            self._ops.append([ch.PUT, i, k, first, self._size, 0])
        token, interval = int(self._book.tokens[i]), self._book.intervals[k].name
        rev = 0 if first_told else self._revs.next(token, interval, start)
        self._ops.append([ch.CLOSED, i, k, first, self._size, rev])

    def replace(self, i: int, k: int, rows: list[bytes]) -> None:
        """A whole list."""
        self._lists.append((i, k, rows))

    def changes(self) -> Changes:
        """All of it."""
        return Changes(self._ops, b"".join(self._text), self._lists)


def settle_late(
    client: redis.Redis, keys: Keys, book: ShardState, revs: Revisions, changes: Changes
) -> Changes:
    """Complete a book's changes: very late ticks amend their rows, in the same commit.

    Their rows are read from Redis (with what this commit will put laid over them). `revs` is updated.
    """
    tokens = book.tokens
    for op in changes.ops:
        if op[0] == ch.REVISION:
            revs.note(int(tokens[op[1]]), book.intervals[op[2]].name, op[3], op[5])
    ticks = list(book.late_ticks())
    if not ticks:
        return changes
    addenda = Addenda(book, revs, changes)
    lists: dict[tuple[int, int], dict[int, bytes]] = {}
    for tick in ticks:
        interval = book.intervals[tick.interval]
        place = tick.token, tick.interval
        if place not in lists:
            lists[place] = _rows(client, keys, book, tick, interval.name, changes)
        rows = lists[place]
        i, is_day = book.index(tick.token), interval.seconds == 0
        day = book.sessions.day(int(book.arrays.schedule[i]), tick.start * 1000)
        end = bucket_end_s(day, interval.seconds, tick.start)
        flag = "" if is_day else FLAG_NAMES[flag_for(book, i, tick.start, end)]
        texts = [rows[start] for start in sorted(rows)]
        for start, row, is_new in amend_rows(texts, tick, is_day, keep=interval.keep, flag=flag):
            rows[start] = row
            addenda.add(i, tick.interval, start, row, first_told=is_new)
    return addenda.changes()


def _rows(
    client: redis.Redis, keys: Keys, book: ShardState, tick: LateTick, interval: str, changes: Changes
) -> dict[int, bytes]:
    try:
        stored: Any = client.lrange(keys.candles(tick.token, interval), 0, -1)
    except ResponseError:
        stored = []  # a foreign hand's key: the commit will say so
    i = book.index(tick.token)
    put = [
        changes.text[op[3] : op[4]]
        for op in changes.ops
        if op[0] == ch.PUT and op[1] == i and op[2] == tick.interval
    ]
    return {start: row for row in (*stored, *put) if (start := start_of(row)) is not None}


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

    def __init__(self, shard: int, book: ShardState, held: Position, revs: dict[bytes, bytes]) -> None:
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
        left = self.book.apply(rows, 0, ends, dirty_max)
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
