"""One shard in its aggregator: stream entries → ticks → `ShardState` → the changes of one commit.

EntryDecoder   entries of a tick stream → ticks, a whole read decoded at once
ShardWorker    the shard's state, its cursor, and the entries read but not applied yet
collect        the changes of one commit, late ticks amended
SymbolCache    token → symbol, for announcements of closed candles
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from zlib import crc32

import msgspec
import numpy as np
import redis
from redis.exceptions import ResponseError

from pkbrokers_redis.candles import codec
from pkbrokers_redis.candles.amend import amend_rows
from pkbrokers_redis.candles.codec import Changes, read_tick_entries, recover_ticks
from pkbrokers_redis.candles.model import AT_MS, FLAG_NAMES, TickArray, bucket_end_s
from pkbrokers_redis.candles.rows import flag_for, start_of
from pkbrokers_redis.candles.rules import apply_ticks
from pkbrokers_redis.candles.state import LateTick, ShardState
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.cluster import Pipe
from pkbrokers_redis.store.commit import CursorMove, ShardCursor
from pkbrokers_redis.store.streams import id_order, is_count

EVIDENCE_BYTES = 120  # of malformed input, in a log line
TICKS_MAX = 50_000  # applied a commit and shard, ~20 ms; the rest waits for the next round
SOURCES_MAX = 256  # producers whose last seq the cursor keeps; a source is one run of an ingest worker
SETTLED_ENTRIES = 10_000  # applied since the shard was loaded: by then every live source has sent an entry
REVISIONS_MAX = 64  # remembered of an instrument's evicted candles …
OLDER = "*"  # … and the highest revision of those forgotten, from which all others count on

Log = Callable[..., None]
"""Logs a kind of problem once a place: `log(event, place, **evidence)`."""

_revisions_decoder = msgspec.json.Decoder(dict[str, int])


class PendingEntry(NamedTuple):
    """A stream entry that was read and not applied yet. `source` is empty if the entry is malformed."""

    id: bytes
    source: bytes
    seq: int
    ticks: TickArray


class EntryDecoder:
    """Decodes stream entries; counts `malformed_entries` and `malformed_rows` in `counts`.

    An entry that another writer made by other rules is logged, and counts as an entry without ticks.
    """

    def __init__(self, counts: dict[str, int], log: Log) -> None:
        self._counts = counts
        self._log = log

    def decode(self, key: str, entries: Sequence[tuple[bytes, Any]]) -> list[PendingEntry]:
        """Return the entries of one stream, ids and fields as XREAD gives them, in order."""
        heads: list[tuple[bytes, bytes, int, float]] = []
        texts: list[bytes] = []
        for entry_id, cells in entries:
            fields = fields_of(cells)
            source, seq, at = fields.get(b"src", b""), fields.get(b"seq", b""), fields.get(b"at", b"")
            text = fields.get(b"ticks")
            if text is None or not source or not is_count(seq):
                self._counts["malformed_entries"] += 1
                evidence = repr(cells)[:EVIDENCE_BYTES]
                missing = "src, seq or ticks"
                self._log("malformed_entry", key, id=entry_id.decode(), missing=missing, evidence=evidence)
                text, source, seq = b"[]", b"", b"0"
            texts.append(text)
            heads.append((entry_id, source, int(seq), float(at) if is_count(at) else 0.0))
        if not texts:
            return []
        ticks, counts, malformed = read_tick_entries(texts)
        pending: list[PendingEntry] = []
        first = 0
        for n, (entry_id, source, number, at_ms) in enumerate(heads):
            rows = ticks[first : first + counts[n]]
            first += counts[n]
            if n in malformed:
                rows, refused = recover_ticks(texts[n])
                if refused:
                    self._counts["malformed_rows"] += refused
                    evidence = repr(texts[n][:EVIDENCE_BYTES])
                    self._log("malformed_rows", key, id=entry_id.decode(), rows=refused, evidence=evidence)
            rows[:, AT_MS] = at_ms
            pending.append(PendingEntry(entry_id, source, number, rows))
        return pending


def fields_of(cells: Any) -> dict[bytes, bytes]:
    """Return the fields of a stream entry as a mapping; RESP2 gives flat lists, RESP3 maps."""
    if isinstance(cells, dict):
        return cells
    return dict(zip(cells[::2], cells[1::2], strict=False)) if cells else {}


class SymbolCache:
    """Symbols of tokens, from the instrument master; one round trip per unknown token.

    A token without a symbol is cached too, for a shorter time: reading it at each announcement would hold up
    the ticks.
    """

    KNOWN_SECONDS = 3600.0  # then a renamed instrument gets its new symbol
    UNKNOWN_SECONDS = 30.0

    def __init__(self, keys: Keys, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._keys = keys
        self._monotonic = monotonic
        self._symbols: dict[int, tuple[bytes, float]] = {}  # token → symbol, when to read it again

    def load(self, client: redis.Redis, tokens: Sequence[int]) -> None:
        """Read the symbols of `tokens` in one pipeline."""
        pipe = Pipe(client)
        for token in tokens:
            pipe.add("HMGET", self._keys.instrument(token), "exchange", "tradingsymbol")
        now = self._monotonic()
        for token, reply in zip(tokens, pipe.execute(), strict=True):
            if isinstance(reply, Exception) and not isinstance(reply, ResponseError):
                raise reply
            exchange, name = (None, None) if isinstance(reply, Exception) else reply
            if name:
                symbol = (exchange or b"NSE").strip().upper() + b":" + name.strip()
                self._symbols[token] = symbol, now + self.KNOWN_SECONDS
            else:  # no master row, another type, or no permission to read it
                self._symbols[token] = b"%d" % token, now + self.UNKNOWN_SECONDS

    def symbol_of(self, client: redis.Redis, token: int) -> bytes:
        """Return `NSE:INFY`; the token itself where the master has no row of it."""
        found = self._symbols.get(token)
        if found is None or self._monotonic() >= found[1]:
            self.load(client, [token])
            found = self._symbols[token]
        return found[0]

    def forget(self, token: int) -> None:
        """Drop a token: another instrument has it now."""
        self._symbols.pop(token, None)


class Revisions:
    """Revision numbers of candles that left the state: token → "5m 1762745700" → rev. They only rise."""

    def __init__(self, fields: Mapping[bytes, bytes]) -> None:
        """Read the `<token>:revs` fields of `P:{S}:state`; malformed ones are skipped."""
        self._revisions: dict[int, dict[str, int]] = {}
        self._changed: set[int] = set()
        for name, value in fields.items():
            try:
                self._revisions[int(name.removesuffix(b":revs"))] = _revisions_decoder.decode(value)
            except (msgspec.DecodeError, ValueError):
                continue

    def next(self, token: int, interval: str, start: int) -> int:
        """Return the revision with which to announce a row, and remember it."""
        known = self._revisions.get(token, {})
        revision = max(known.get(f"{interval} {start}", 0), known.get(OLDER, 0)) + 1
        self.remember(token, interval, start, revision)
        return revision

    def remember(self, token: int, interval: str, start: int, revision: int) -> None:
        """Remember a revision that was announced."""
        known = self._revisions.setdefault(token, {})
        name = f"{interval} {start}"
        known.pop(name, None)  # to the end: the oldest are forgotten first
        known[name] = revision
        self._changed.add(token)

    def forget(self, token: int) -> None:
        """Drop a token: another instrument has it now."""
        self._revisions.pop(token, None)
        self._changed.discard(token)

    def collect(self) -> dict[bytes, bytes]:
        """Return the state fields that changed since the last call."""
        fields: dict[bytes, bytes] = {}
        for token in self._changed:
            known = self._revisions[token]
            for oldest in [name for name in known if name != OLDER][:-REVISIONS_MAX]:
                known[OLDER] = max(known.get(OLDER, 0), known.pop(oldest))
            fields[b"%d:revs" % token] = msgspec.json.encode(known)
        self._changed.clear()
        return fields


class ChangesetBuilder:
    """Adds to changes of the state rows that left it: they amend their list and are announced again."""

    def __init__(self, state: ShardState, revisions: Revisions, changes: Changes) -> None:
        self._state, self._revisions = state, revisions
        self._ops = list(changes.ops)
        self._text = [changes.text]
        self._size = len(changes.text)
        self._lists = list(changes.lists)

    def add_row(
        self, i: int, k: int, start: int, row: bytes, *, put: bool = True, is_new: bool = False
    ) -> None:
        """Add one row and its announcement.

        Without `put` only the announcement: the list is replaced as a whole. A candle that was never
        announced (`is_new`) has revision 0.
        """
        first, self._size = self._size, self._size + len(row)
        self._text.append(row)
        if put:
            self._ops.append([codec.PUT, i, k, first, self._size, 0])
        token, interval = int(self._state.tokens[i]), self._state.intervals[k].name
        revision = 0 if is_new else self._revisions.next(token, interval, start)
        self._ops.append([codec.CLOSED, i, k, first, self._size, revision])

    def replace_list(self, i: int, k: int, rows: list[bytes]) -> None:
        """Replace a whole list."""
        self._lists.append((i, k, rows))

    def changes(self) -> Changes:
        """Return all changes."""
        return Changes(self._ops, b"".join(self._text), self._lists)


def collect(client: redis.Redis, keys: Keys, state: ShardState, revisions: Revisions) -> Changes:
    """Return the changes since the last commit. Late ticks beyond the window amend their rows.

    Their rows are read from Redis, and what this commit writes is laid over them.
    """
    changes = state.collect()
    tokens = state.tokens
    for op in changes.ops:
        if op[0] == codec.REVISION:
            revisions.remember(int(tokens[op[1]]), state.intervals[op[2]].name, op[3], op[5])
    ticks = list(state.late_ticks())
    if not ticks:
        return changes
    builder = ChangesetBuilder(state, revisions, changes)
    lists: dict[tuple[int, int], dict[int, bytes]] = {}
    for tick in ticks:
        interval = state.intervals[tick.interval]
        place = tick.token, tick.interval
        if place not in lists:
            lists[place] = _stored_rows(client, keys, state, tick, changes)
        rows = lists[place]
        i, is_day = state.index(tick.token), interval.seconds == 0
        day = state.sessions.day(int(state.arrays.schedule[i]), tick.start * 1000)
        end = bucket_end_s(day, interval.seconds, tick.start)
        flag = "" if is_day else FLAG_NAMES[flag_for(state, i, tick.start, end)]
        texts = [rows[start] for start in sorted(rows)]
        for start, row, is_new in amend_rows(texts, tick, is_day, keep=interval.keep, flag=flag):
            rows[start] = row
            builder.add_row(i, tick.interval, start, row, is_new=is_new)
    return builder.changes()


def _stored_rows(
    client: redis.Redis, keys: Keys, state: ShardState, tick: LateTick, changes: Changes
) -> dict[int, bytes]:
    """Return start → row of the tick's list, as it is after `changes`."""
    try:
        stored: Any = client.lrange(keys.candles(tick.token, state.intervals[tick.interval].name), 0, -1)
    except ResponseError:
        stored = []  # a key of another type: the commit reports it
    place = state.index(tick.token), tick.interval
    puts = (op for op in changes.ops if op[0] == codec.PUT and (op[1], op[2]) == place)
    put = [changes.text[op[3] : op[4]] for op in puts]
    return {start: row for row in (*stored, *put) if (start := start_of(row)) is not None}


class Applied(NamedTuple):
    """What one round applied to the state, and how far that moves the cursor."""

    ticks: int
    entries: int
    repeated: int
    move: CursorMove
    batch: TickArray | None = None


class PendingRepair(NamedTuple):
    """An entry of the shard's repair stream that was read and not applied yet."""

    id: str
    fields: dict[bytes, bytes]
    full_reads: int  # of the tick stream when the repair was read


class ShardWorker:
    """A shard from its loading until it is lost, released, or its state no longer agrees with Redis."""

    def __init__(
        self, shard: int, state: ShardState, cursor: ShardCursor, revisions: dict[bytes, bytes]
    ) -> None:
        self.shard = shard
        self.state = state
        self.cursor = cursor
        self.read_id = cursor.id  # where the next XREAD starts
        self.revisions = Revisions(revisions)
        self.pending: list[PendingEntry] = []  # at most one read
        self.repairs: deque[PendingRepair] = deque()  # at most one read
        self.full_reads = 0  # how often the stream was read to its end
        self.read_until_ms = 0.0  # when it last was, epoch ms
        self.applied_until_ms = 0.0  # … and everything read has been applied
        self.taken_back = 0  # corrections of volume that were logged
        self.logged: set[str] = set()  # kinds of invalid ticks whose evidence was logged
        self._entries = 0

    @property
    def lag_ms(self) -> float:
        """Milliseconds between the newest entry applied and the newest one read."""
        return float(self.read_id.split("-")[0]) - float(self.cursor.id.split("-")[0])

    def is_ready(self, repair: PendingRepair) -> bool:
        """Return whether all ticks are applied that were in the stream before the repair was in its own."""
        if id_order(self.cursor.id)[0] > id_order(repair.id)[0]:
            return True  # the ids of both streams are one server's time in milliseconds
        return not self.pending and self.full_reads > repair.full_reads

    def note_full_read(self, now_ms: float) -> None:
        """Note that nothing older than `now_ms` is left in the stream."""
        self.read_until_ms = now_ms
        self.full_reads += 1

    def queue(self, entries: list[PendingEntry]) -> None:
        """Append entries as they were read."""
        if entries:
            self.pending += entries
            self.read_id = entries[-1].id.decode()

    def apply(self, dirty_max: int) -> Applied:
        """Apply pending entries to the state, until one commit has changed `dirty_max` instruments."""
        cursor = self.cursor
        if not self.pending:
            self.applied_until_ms = self.read_until_ms
            return Applied(0, 0, 0, CursorMove(cursor.id, cursor.read, {}))
        batch: list[TickArray] = []
        repeats: list[bool] = []
        newest: dict[bytes, int] = {}  # source → its last seq in this batch
        size = 0
        for entry in self.pending:
            if size >= TICKS_MAX:
                break
            last_seq = newest.get(entry.source, cursor.sources.get(entry.source, -1))
            repeated = bool(entry.source) and entry.seq <= last_seq
            if entry.source and not repeated:
                newest[entry.source] = entry.seq
            repeats.append(repeated)  # a producer's retry: Redis had the entry already
            batch.append(entry.ticks[:0] if repeated else entry.ticks)
            size += len(entry.ticks)
        ends = np.cumsum([len(rows) for rows in batch])
        rows = np.concatenate(batch)
        sources = np.array([crc32(entry.source) for entry in self.pending[: len(batch)]], np.int64)
        applied = apply_ticks(self.state, rows, 0, ends, dirty_max, sources)
        # `apply` stops where an entry ends: all entries that end there or before are applied.
        done = int(np.searchsorted(ends, applied, side="right"))
        last_seqs = {  # ascending within a source but for its repeats, so that the last one counts
            entry.source: entry.seq
            for entry, repeated in zip(self.pending[:done], repeats, strict=False)
            if entry.source and not repeated
        }
        last_id = self.pending[done - 1].id.decode()
        self.pending = self.pending[done:]
        if not self.pending:
            self.applied_until_ms = self.read_until_ms
        self._entries += done
        move = CursorMove(last_id, cursor.read + done, last_seqs, self._evictable_sources(last_seqs))
        return Applied(applied, done, sum(repeats[:done]), move, rows[:applied])

    def _evictable_sources(self, active: dict[bytes, int]) -> list[bytes]:
        """Return sources whose seq may be dropped: the least recently used beyond SOURCES_MAX.

        `cursor.sources` is in the order of use. After loading it is in the order of Redis' answer, so nothing
        is dropped before the live sources have sent an entry.
        """
        surplus = len(self.cursor.sources) - SOURCES_MAX
        if surplus <= 0 or self._entries < SETTLED_ENTRIES:
            return []
        return [source for source in list(self.cursor.sources)[:surplus] if source not in active]
