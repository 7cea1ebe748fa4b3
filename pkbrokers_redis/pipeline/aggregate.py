"""The aggregator: tick streams in, candles out, one atomic commit a batch and shard.

    read    XREAD from each shard's cursor, whatever is there
    apply   repeats of a source's retry skipped, rows decoded at once, rules applied (core.book)
    close   candles whose end + grace has passed
    commit  FCALL pkb_commit for every shard that changed, in one pipeline; then the next read

Batches form by themselves: under low load a tick is a batch, under high load many ticks of an
instrument become one write. A commit that Redis refuses, or a Redis that went away, costs the books:
they are thrown away and loaded again, and the streams are read from where the last commit stands.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import numpy as np
import redis
from redis.exceptions import ResponseError

from pkbrokers_redis import logs
from pkbrokers_redis.core import changes as ch
from pkbrokers_redis.core.book import Book, Changes
from pkbrokers_redis.core.errors import CommitRefused, RedisUnavailable, WrongKeyType
from pkbrokers_redis.core.model import AT_MS, TickArray
from pkbrokers_redis.core.sessions import Sessions, load_sessions
from pkbrokers_redis.core.text import read_odd_ticks, read_tick_entries
from pkbrokers_redis.pipeline.late import settle_late
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.commit import (
    Move,
    Position,
    claim,
    commit_args,
    ensure_groups,
    load_functions,
    queue_commit,
    settle_commit,
)
from pkbrokers_redis.store.load import load_book
from pkbrokers_redis.store.pipe import Pipe
from pkbrokers_redis.store.symbols import load_symbols
from pkbrokers_redis.store.ticks import trim

log = logs.get("aggregate")

ENTRIES_MAX = 512  # of one shard a read; ~1 MB at 40 ticks an entry
TICKS_MAX = 50_000  # applied a commit and shard, ~20 ms; the rest waits for the next round
DIRTY_MAX = 500  # instruments a commit, so that Redis never stalls for long
BLOCK_MS_MAX = 200  # how long a read waits for ticks, unless a candle closes sooner
EVIDENCE_BYTES = 120  # of bad input, in a log line
TRIM_EVERY_MS = 2_000
DRAIN_MS_MAX = 5_000
SYMBOLS_RETRY_MS = 5_000
WRONG_TYPE_RETRY_MS = 2_000
PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 0.1, 5.0  # between tries while Redis is away

Entry = tuple[bytes, list[bytes] | None]


class ShardWorker:
    """One shard: its book, its position, and the entries read but not yet applied."""

    def __init__(self, shard: int, book: Book, held: Position, revs: dict[bytes, bytes]) -> None:
        self.shard = shard
        self.book = book
        self.held = held
        self.read_id = held.id  # where the next XREAD goes on
        self.revs = {int(name[:-5]): msgspec.json.decode(value) for name, value in revs.items()}
        self.pending: list[tuple[bytes, bytes, int, TickArray]] = []  # id, source, seq, ticks
        self.drained_ms = 0.0  # when we last knew that nothing older waits in the stream, epoch ms

    @property
    def lag_ms(self) -> float:
        """Milliseconds between the newest entry applied and the newest one read."""
        return float(self.read_id.split("-")[0]) - float(self.held.id.split("-")[0])


class Aggregator:
    """Owns shards of the store that `connect` opens. `step` does one round; `run` loops it."""

    def __init__(
        self,
        connect: Callable[[], redis.Redis],
        settings: Settings,
        *,
        now_ms: Callable[[], float],
        shards: Iterable[int] | None = None,
        sessions: Sessions | None = None,
    ) -> None:
        self._connect = connect
        self._client: redis.Redis = None  # type: ignore[assignment]  # start() opens it
        self._settings = settings
        self._keys = settings.keys
        self._now_ms = now_ms
        self._sessions = sessions or load_sessions(settings.sessions, settings.timezone, settings.calendar)
        self._shards = list(range(settings.shards) if shards is None else shards)
        self.workers: dict[int, ShardWorker] = {}
        self._skipped: dict[int, float] = {}  # shard → when to look at its stream again, epoch ms
        self._symbols: dict[int, bytes] = {}
        self._symbols_at_ms = float(-SYMBOLS_RETRY_MS)
        self.counts = dict.fromkeys(
            ("entries", "repeated_entries", "odd_entries", "odd_rows", "commits", "refused_keys", "trimmed"),
            0,
        )
        self.ticks_total = 0
        self._draining: dict[int, float] = {}  # shard → when its stream was last read to its end
        self._once = logs.Once()
        self._trim_at_ms = 0.0

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connect, load the functions, become the owner of the shards, and restore their books."""
        self._client = self._connect()
        load_functions(self._client)
        ensure_groups(self._client, self._keys)
        for shard in self._shards:
            self._take(shard)

    def _take(self, shard: int) -> None:
        held = claim(self._client, self._keys, shard)
        book = Book(
            self._settings.intervals,
            self._sessions,
            grace_seconds=self._settings.close_grace_seconds,
            event_clock=self._settings.clock == "event",
        )
        revs = load_book(self._client, self._keys, shard, book, self._odd_state)
        self.workers[shard] = ShardWorker(shard, book, held, revs)

    def figures(self) -> dict[str, Any]:
        """What the heartbeat tells: shards owned, lag, counters."""
        return {
            "shards": ",".join(map(str, self.workers)),
            "instruments": sum(len(worker.book) for worker in self.workers.values()),
            "lag_ms": max((worker.lag_ms for worker in self.workers.values()), default=0.0),
            **self.counts,
            **self._book_counts(),
        }

    def _book_counts(self) -> dict[str, int]:
        totals: dict[str, int] = {}
        for worker in self.workers.values():
            for name, count in worker.book.counts().items():
                totals[name] = totals.get(name, 0) + count
        return totals

    # -- one round -------------------------------------------------------------------------------

    def step(self, block_ms_max: int = BLOCK_MS_MAX) -> int:
        """Read, apply, close, commit once. Returns how many ticks were taken in."""
        if not any(worker.pending for worker in self.workers.values()):
            self._read(self._block_ms(block_ms_max))
        applied = 0
        commits: list[tuple[ShardWorker, Move, list[Any]]] = []
        for worker in self.workers.values():
            ticks, move = self._apply(worker)
            applied += ticks
            # Close by the wall clock only what no waiting entry can still change.
            worker.book.close(worker.drained_ms, DIRTY_MAX)
            changes, extra = settle_late(
                self._client, self._keys, worker.book, worker.revs, worker.book.collect()
            )
            if changes.ops or move.id != worker.held.id:
                sections = commit_args(worker.book, changes, self._symbol_of, extra)
                commits.append((worker, move, sections))
        self._commit(commits)
        now_ms = self._now_ms()
        if now_ms >= self._trim_at_ms:
            self._trim_at_ms = now_ms + TRIM_EVERY_MS
            trim(self._client, self._keys, self._held(), now_ms, self._settings.stream_retention_seconds)
        return applied

    def run(self, stop: threading.Event, on_round: Callable[[int], None] = lambda ticks: None) -> None:
        """`step` until told to stop; wait out a Redis that is away, then load the books again.

        Raises CommitRefused when another aggregator took our shards.
        """
        pause_seconds = PAUSE_SECONDS_MIN
        while not stop.is_set():
            try:
                if not self.workers:
                    self.start()
                on_round(self.step())
                pause_seconds = PAUSE_SECONDS_MIN
            except CommitRefused as refusal:
                if "FENCED" in refusal.message:
                    raise
                log.warning("redis_went_back", why=refusal.message)
                self.workers.clear()
            except (
                redis.ConnectionError,
                redis.TimeoutError,
                redis.ReadOnlyError,
                RedisUnavailable,
            ) as error:
                why = str(error).partition("\n")[0][:200]
                log.warning("redis_away", why=why, retry_seconds=pause_seconds)
                self.workers.clear()
                stop.wait(pause_seconds)
                pause_seconds = min(pause_seconds * 2, PAUSE_SECONDS_MAX)
        self._drain()

    def _drain(self) -> None:
        """A graceful end: apply what the streams still hold (ingest stops before us), within bounds."""
        deadline_ms = self._now_ms() + DRAIN_MS_MAX
        try:
            while self.workers and self._now_ms() < deadline_ms and self.step(block_ms_max=1):
                pass
        except (redis.RedisError, CommitRefused) as error:
            log.warning("drain_stopped", why=str(error)[:200])  # it waits in the streams for the next owner

    def _held(self) -> dict[int, str]:
        return {shard: worker.held.id for shard, worker in self.workers.items()}

    def _block_ms(self, most: int) -> int:
        """Wait for ticks at most until the next candle must close; an event clock needs no timer."""
        if self._settings.clock == "event":
            return most
        due = min((worker.book.next_due_ms for worker in self.workers.values()), default=np.inf)
        return max(1, min(most, int(min(due - self._now_ms(), 1e9)) + 1))

    def _read(self, block_ms: int) -> None:
        before_ms = self._now_ms()
        streams: dict[Any, Any] = {}
        worker_of: dict[bytes, ShardWorker] = {}
        for worker in self.workers.values():
            if self._skipped.get(worker.shard, 0.0) <= before_ms:
                key = self._keys.ticks(worker.shard)
                streams[key] = worker.read_id
                worker_of[key.encode()] = worker
        if not streams:
            return
        try:
            reply: Any = self._client.xread(streams, count=ENTRIES_MAX, block=block_ms)
        except ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            self._find_wrong_streams(before_ms)
            return
        full: set[int] = set()
        for key, entries in reply:
            worker = worker_of[bytes(key)]
            self._decode(worker, entries)
            if len(entries) >= ENTRIES_MAX:
                full.add(worker.shard)
        # An empty reply came after waiting: nothing older than now is left. Otherwise a shard is drained
        # up to the moment before the read.
        drained_ms = before_ms if reply else self._now_ms()
        for worker in worker_of.values():
            if worker.shard not in full:
                self._draining[worker.shard] = drained_ms

    def _find_wrong_streams(self, now_ms: float) -> None:
        for worker in self.workers.values():
            key = self._keys.ticks(worker.shard)
            found = bytes(self._client.type(key)).decode()  # type: ignore[arg-type]
            if found not in ("stream", "none"):
                self._skipped[worker.shard] = now_ms + WRONG_TYPE_RETRY_MS
                self.counts["refused_keys"] += 1
                self._tell("wrong_type", key, mend=str(WrongKeyType(key, found, "stream")))

    # -- entries → ticks -------------------------------------------------------------------------

    def _decode(self, worker: ShardWorker, entries: list[Entry]) -> None:
        """Queue the entries' ticks; entries of a foreign hand are counted and give none."""
        texts: list[bytes] = []
        heads: list[tuple[bytes, bytes, int, float]] = []
        for entry_id, cells in entries:
            fields = _fields(cells)
            source, seq = fields.get(b"src", b""), fields.get(b"seq", b"")
            at = fields.get(b"at", b"")
            text = fields.get(b"ticks")
            if text is None or not source or not _is_count(seq):
                self.counts["odd_entries"] += 1
                self._tell(
                    "foreign_entry", self._keys.ticks(worker.shard),
                    id=entry_id.decode(), lacks="src, seq or ticks", evidence=_evidence(cells),
                )  # fmt: skip
                text, source, seq = b"[]", b"", b"0"
            texts.append(text)
            heads.append((entry_id, source, int(seq), float(at) if _is_count(at) else 0.0))
        if not texts:
            return
        ticks, counts, odd = read_tick_entries(texts)
        first = 0
        for n, (entry_id, src, number, at_ms) in enumerate(heads):
            rows = ticks[first : first + counts[n]]
            first += counts[n]
            if n in odd:
                rows, refused = read_odd_ticks(texts[n])
                if refused:
                    self.counts["odd_rows"] += refused
                    self._tell(
                        "odd_rows", self._keys.ticks(worker.shard),
                        id=entry_id.decode(), rows=refused, evidence=repr(texts[n][:EVIDENCE_BYTES]),
                    )  # fmt: skip
            rows[:, AT_MS] = at_ms
            worker.pending.append((entry_id, src, number, rows))
        worker.read_id = heads[-1][0].decode()

    def _apply(self, worker: ShardWorker) -> tuple[int, Move]:
        """Feed what is pending to the book, as far as one commit may go."""
        held = worker.held
        if not worker.pending:
            worker.drained_ms = self._draining.get(worker.shard, worker.drained_ms)
            return 0, Move(held.id, held.read, {})
        seen = dict(held.sources)
        batch: list[TickArray] = []
        size = 0
        for _, source, seq, rows in worker.pending:
            if size >= TICKS_MAX:
                break
            repeated = bool(source) and seq <= seen.get(source, -1)
            if repeated:
                self.counts["repeated_entries"] += 1  # a producer's retry: Redis had it already
            elif source:
                seen[source] = seq
            batch.append(rows[:0] if repeated else rows)
            size += len(rows)
        ends = np.cumsum([len(rows) for rows in batch])
        ticks = np.concatenate(batch)
        left = worker.book.take(ticks, 0, ends, DIRTY_MAX)
        # `take` stops where an entry ends: all entries that end there or before are applied.
        done = int(np.searchsorted(ends, left, side="right"))
        sources = {  # ascending within a source, so the last one stands
            source: seq
            for _, source, seq, _rows in worker.pending[:done]
            if source and seq > held.sources.get(source, -1)
        }
        move = Move(worker.pending[done - 1][0].decode(), held.read + done, sources)
        worker.pending = worker.pending[done:]
        if not worker.pending:
            worker.drained_ms = self._draining.get(worker.shard, worker.drained_ms)
        self.counts["entries"] += done
        self.ticks_total += left
        return left, move

    # -- changes → Redis -------------------------------------------------------------------------

    def _commit(self, commits: list[tuple[ShardWorker, Move, list[Any]]]) -> None:
        if not commits:
            return
        pipe = Pipe(self._client)
        for worker, move, sections in commits:
            most = self._settings.closed_max_entries
            queue_commit(pipe, self._keys, worker.shard, worker.held, move, most, sections)
        replies = pipe.execute()
        for (worker, move, _), reply in zip(commits, replies, strict=True):
            for refused in settle_commit(reply, worker.held, move):
                self.counts["refused_keys"] += 1
                key, _, why = refused.partition(" ")
                self._tell("key_refused", key, why=why[:EVIDENCE_BYTES], mend=f"look at it, then `DEL {key}`")
            self.counts["commits"] += 1

    def _symbol_of(self, token: int) -> bytes:
        """The symbol for the closed stream; the list is read again when a new instrument has none."""
        symbol = self._symbols.get(token)
        if symbol is None:
            now_ms = self._now_ms()
            if now_ms - self._symbols_at_ms >= SYMBOLS_RETRY_MS:
                self._symbols_at_ms = now_ms
                names = load_symbols(self._client, self._keys)
                self._symbols = {each: name.encode() for each, name in names.items()}
            symbol = self._symbols.get(token) or b"%d" % token
        return symbol

    # -- saying things once ----------------------------------------------------------------------

    def _tell(self, event: str, place: str, **evidence: object) -> None:
        """Log a kind of trouble with its evidence, once a place; the counters say how often."""
        if self._once.first((event, place)):
            log.warning(event, place=place, **evidence)

    def _odd_state(self, why: str) -> None:
        self.counts["odd_entries"] += 1
        self._tell("odd_state", why, mend="the instrument starts anew with its next tick")


def _fields(cells: Any) -> dict[bytes, bytes]:
    """The fields of a stream entry as a dict, whichever way the client gave them."""
    if isinstance(cells, dict):
        return cells
    return dict(zip(cells[::2], cells[1::2], strict=False)) if cells else {}


def _is_count(text: bytes) -> bool:
    return text.isdigit() and len(text) <= 18


def _evidence(cells: Any) -> str:
    return repr(cells)[:EVIDENCE_BYTES]
