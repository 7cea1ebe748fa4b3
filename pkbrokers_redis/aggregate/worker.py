"""Which stocks have futures or options: from 2026-08-03 they trade by other hours (closing auction).

The instrument master says so, and changes with each day's sync. A book learns it when it is loaded.

The aggregator: tick streams in, candles out, one atomic commit per batch and shard.

    share   renew the leases, load the shards that are newly ours, drop those that are not (pipeline.shards)
    repair  the entries of the repair streams, in commits of their own (pipeline.repair)
    read    XREAD from each shard's cursor, whatever is there
    apply   repeats of a source's retry skipped, rows decoded at once, rules applied (core.book)
    close   candles whose end + grace has passed
    commit  FCALL pkb_commit for every shard that changed, in one pipeline; then the next round

Batches form by themselves: under low load a tick is a batch, under high load many ticks of an
instrument become one write. A commit that Redis refuses costs that shard's book, a Redis that went away all
of them: they are thrown away and loaded again, and the streams are read from where the last commit stands.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import redis
from redis.exceptions import ResponseError

from pkbrokers_redis import logs
from pkbrokers_redis.aggregate.leases import ROLE, ShardLeases
from pkbrokers_redis.aggregate.repairs import REPAIR_COUNTS, Repairs
from pkbrokers_redis.aggregate.shard import (
    EVIDENCE_BYTES,
    Applied,
    EntryDecoder,
    Names,
    ShardWorker,
    book_counts,
    settle_late,
)
from pkbrokers_redis.candles.calendar import Sessions, load_sessions
from pkbrokers_redis.candles.changeset import Changes, Scratch
from pkbrokers_redis.candles.state import ShardState
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.errors import CommitRefused, PkbError, RedisUnavailable, WrongKeyType
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.runtime.heartbeat import Heartbeat
from pkbrokers_redis.runtime.roles import now_ms as wall_ms
from pkbrokers_redis.runtime.roles import open_store, worker_id
from pkbrokers_redis.runtime.warmup import settle_heap, warm_up
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.cluster import Pipe
from pkbrokers_redis.store.commit import (
    Move,
    commit_args,
    ensure_groups,
    load_book,
    queue_commit,
    read_position,
    settle_commit,
)
from pkbrokers_redis.store.connect import connect, describe
from pkbrokers_redis.store.errors import is_function_missing, is_transient, is_wrong_type
from pkbrokers_redis.store.functions import load_functions
from pkbrokers_redis.store.instruments import load_derivative_tokens
from pkbrokers_redis.store.streams import StreamReader, trim

LOOK_SECONDS = 60.0


class Derivatives:
    """`tokens` as of the last look."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._due = 0.0
        self.tokens: frozenset[int] = frozenset()

    def look(self, client: redis.Redis) -> bool:
        """Read them; True when they are others than before. A foreign hand's key counts as no master."""
        self._due = time.monotonic() + LOOK_SECONDS
        try:
            tokens = frozenset(load_derivative_tokens(client, self._keys))
        except ResponseError as error:
            if not is_wrong_type(error):
                raise
            tokens = frozenset()
        changed = tokens != self.tokens
        self.tokens = tokens
        return changed

    def look_if_due(self, client: redis.Redis) -> bool:
        """`look` once a minute."""
        return time.monotonic() >= self._due and self.look(client)


log = logs.get("aggregate")

ENTRIES_MAX = 512  # of one shard a read; ~1 MB at 40 ticks an entry
ODD_TICKS = ("invalid", "future_clamped")  # of the book's counts
DIRTY_MAX = 500  # instruments a commit, so that Redis never stalls for long …
BEHIND_MS, DIRTY_BEHIND_MAX = 1_000, 2_000  # … unless we lag so much: larger batches conflate more ticks
CLOSE_MAX = 32  # instruments closed a round and shard: the minute's end must not hold up the ticks
BLOCK_MS_MAX = 200  # how long a read waits for ticks, unless a candle closes or a lease wants renewal sooner
DRAIN_SECONDS_MAX = 5.0
TRIM_EVERY_MS = WRONG_TYPE_RETRY_MS = 2_000
PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 0.1, 1.0  # between tries while Redis is away

Commit = tuple[ShardWorker, Move, Changes]


class Aggregator:
    """Owns its share of the shards of the store that `connect` opens. `step` does one round; `run` loops it.

    `owner` is this process's id in leases and among the workers; no two may have the same.
    """

    def __init__(
        self,
        connect: Callable[[], redis.Redis],
        settings: Settings,
        *,
        now_ms: Callable[[], float],
        machine_ms: Callable[[], float] = lambda: time.time() * 1000,
        owner: str | None = None,
        sessions: Sessions | None = None,
    ) -> None:
        self._connect = connect
        self._client: redis.Redis = None  # type: ignore[assignment]  # start() opens both
        self._reader: StreamReader = None  # type: ignore[assignment]
        self._started = False
        self._settings = settings
        self._keys = settings.keys
        self._now_ms = now_ms
        self._machine_ms = machine_ms  # stream ids are the machine's time, whatever the market's is
        self._speed = float(getattr(now_ms, "speed", 1.0))  # of market time, in a rehearsal
        self._sessions = sessions or load_sessions(settings.sessions, settings.timezone, settings.calendar)
        name = owner or f"{ROLE}-{secrets.token_hex(8)}"
        self.leases = ShardLeases(settings.keys, name, settings.lease_seconds)
        self.workers: dict[int, ShardWorker] = {}
        self._scratch, self._derivatives = Scratch(), Derivatives(settings.keys)
        self._skipped: dict[int, float] = {}  # shard → when to look at its stream again, epoch ms
        self._aside: dict[int, float] = {}  # shard with unusable keys → when to try again
        self._names = Names(settings.keys)
        self.counts = dict.fromkeys(
            ("entries", "repeated_entries", "odd_entries", "odd_rows", "commits", "fenced", "stale",
             "shards_taken", "refused_keys", "trimmed", *REPAIR_COUNTS), 0
        )  # fmt: skip
        self.ticks_total, self._trim_at_ms = 0, 0.0
        self._once = logs.Once()
        self._decoder = EntryDecoder(self.counts, self._tell)
        self._repairs = Repairs(settings.keys, self.counts, self._tell, self._names)

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connect, load the functions, lease what is free within our share, and restore its books."""
        self._disconnect()
        self._client = self._connect()
        self._reader = StreamReader(self._client)
        load_functions(self._client)
        ensure_groups(self._client, self._keys)
        warm_up(self._settings.intervals)  # before others leave us shards that would wait
        self.leases.forget()
        self.leases.closing = False
        self._derivatives.look(self._client)
        self._share()
        self._started = True

    def run(self, stop: threading.Event, on_round: Callable[[int], None] = lambda ticks: None) -> None:
        """`step` until told to stop; wait out a Redis that is away, then load the books again."""
        pause_seconds = PAUSE_SECONDS_MIN
        try:
            while not stop.is_set():
                try:
                    if not self._started:
                        self.start()
                    on_round(self.step())
                    pause_seconds = PAUSE_SECONDS_MIN
                except (redis.RedisError, RedisUnavailable) as error:
                    if isinstance(error, ResponseError) and not _passes(error):
                        raise
                    why = str(error).partition("\n")[0][:200]
                    log.warning("redis_away", why=why, retry_seconds=pause_seconds)
                    self._forget()
                    stop.wait(pause_seconds)
                    pause_seconds = min(pause_seconds * 2, PAUSE_SECONDS_MAX)
            self._drain()
        finally:
            self.close()

    def close(self) -> None:
        """Release the leases, so that others take our shards at once; without Redis they run out."""
        with contextlib.suppress(redis.RedisError, PkbError):
            if self._started:
                self.leases.leave(self._client)
        self._disconnect()
        self._started = False

    def _disconnect(self) -> None:
        if self._client is not None:
            self._reader.close()
            self._client.close()

    def _forget(self) -> None:
        """Throw the books away: the next round loads them again, from where the last commits stand."""
        self.workers.clear()
        self._aside.clear()
        self._started = False

    def _drain(self) -> None:
        """A graceful end: apply what the streams still hold (ingest stops before us), within bounds."""
        self.leases.closing = True
        deadline = time.monotonic() + DRAIN_SECONDS_MAX
        try:
            while self.workers and time.monotonic() < deadline and self.step(block_ms_max=1):
                pass
        except (redis.RedisError, PkbError) as error:
            log.warning("drain_stopped", why=str(error)[:200])  # it waits in the streams for the next owner

    def figures(self) -> dict[str, Any]:
        """What the heartbeat tells: shards owned, lag, counters."""
        return {
            "shards": ",".join(map(str, sorted(self.workers))),
            "instruments": sum(len(worker.book) for worker in self.workers.values()),
            "lag_ms": max((worker.lag_ms for worker in self.workers.values()), default=0.0),
            **self.counts,
            **book_counts(self.workers.values()),
        }

    # -- whose shard -----------------------------------------------------------------------------

    def _share(self) -> None:
        """Look at the leases when it is time. Every book here is committed, so it may go at any moment."""
        if self._derivatives.look_if_due(self._client):
            self.workers.clear()  # loaded again below, with other hours
        if self.leases.due_seconds <= 0:
            self.leases.look(self._client)
            for shard, error in self.leases.refused.items():
                self._set_aside(shard, error)
        epochs = self.leases.epochs
        for shard in [each for each, worker in self.workers.items() if epochs.get(each) != worker.held.epoch]:
            del self.workers[shard]
        if len(self.workers) == len(epochs):
            return
        now_ms = self._now_ms()
        for shard in [each for each in epochs if each not in self.workers]:
            if 0 < self._aside.get(shard, 0.0) - now_ms <= WRONG_TYPE_RETRY_MS:
                continue
            try:
                self._load(shard, epochs[shard])
            except RedisUnavailable:
                raise
            except PkbError as error:
                self._set_aside(shard, error)
            if self.leases.due_seconds <= 0:
                return  # renew before the next one

    def _load(self, shard: int, epoch: int) -> None:
        """Restore a shard's book as the last commit left it."""
        held = read_position(self._client, self._keys, shard, self.leases.owner, epoch)
        book = ShardState(
            self._settings.intervals,
            self._sessions,
            grace_seconds=self._settings.close_grace_seconds,
            event_clock=self._settings.clock == "event",
            derivatives=self._derivatives.tokens,
            scratch=self._scratch,
        )
        revs = load_book(self._client, self._keys, shard, book, self._odd_state)
        self.workers[shard] = ShardWorker(shard, book, held, revs)
        self._aside.pop(shard, None)
        self.counts["shards_taken"] += 1

    def _set_aside(self, shard: int, error: PkbError) -> None:
        """Leave a shard alone for a while whose keys a foreign hand filled; the others go on."""
        self.workers.pop(shard, None)
        self._aside[shard] = self._now_ms() + WRONG_TYPE_RETRY_MS
        self.counts["refused_keys"] += 1
        self._tell("shard_set_aside", self._keys.cursor(shard), why=error.message[:200], hint=error.hint)

    # -- one round -------------------------------------------------------------------------------

    def step(self, block_ms_max: int = BLOCK_MS_MAX) -> int:
        """Share, read, apply, close, commit once. Returns how many ticks were taken in."""
        self._share()
        self._repair()
        if not any(worker.pending for worker in self.workers.values()):
            waits = any(worker.repairs for worker in self.workers.values())
            self._read(self._block_ms(1 if waits else block_ms_max))
        ticks = 0
        commits: list[Commit] = []
        for worker in self.workers.values():
            applied = worker.apply(DIRTY_MAX if worker.lag_ms < BEHIND_MS else DIRTY_BEHIND_MAX)
            ticks += applied.ticks
            self.counts["entries"] += applied.entries
            self.counts["repeated_entries"] += applied.repeated
            self._tell_odd_ticks(worker, applied)
            # Close by the wall clock only what no waiting entry can still change.
            worker.book.close_due(worker.drained_ms, worker.book.dirty + CLOSE_MAX)
            changes = settle_late(self._client, self._keys, worker.book, worker.revs, worker.book.collect())
            if changes.ops or applied.move.id != worker.held.id:
                commits.append((worker, applied.move, changes))
        self.ticks_total += ticks
        if commits:
            self._commit(commits)
        now_ms = self._machine_ms()
        if not self._trim_at_ms - TRIM_EVERY_MS <= now_ms < self._trim_at_ms:
            self._trim_at_ms = now_ms + TRIM_EVERY_MS
            held = {shard: worker.held.id for shard, worker in self.workers.items()}
            trim(self._client, self._keys, held, now_ms, self._settings.stream_retention_seconds)
            self._repairs.trim(self._client, self.workers.values())
        return ticks

    def _repair(self) -> None:
        """Apply and commit repairs by themselves, on books that are as Redis has them."""
        self._repairs.read(self._client, self.workers.values())
        commits: list[Commit] = [
            (worker, *work)
            for worker in self._repairs.ready(self.workers.values())
            if (work := self._repairs.apply(self._client, worker, self._now_ms())) is not None
        ]
        if commits:
            self._commit(commits)

    def _block_ms(self, most: int) -> int:
        """Wait for ticks at most until the next candle must close or the leases want to be renewed."""
        most = max(1, min(most, int(max(self.leases.due_seconds, 0.0) * 1000) + 1))
        if self._settings.clock == "event":
            return most  # an event clock needs no timer
        due = min((worker.book.next_due_ms for worker in self.workers.values()), default=np.inf)
        wait_ms = (due - self._now_ms()) / self._speed
        return max(1, min(most, int(min(wait_ms, 1e9)) + 1))

    def _read(self, block_ms: int) -> None:
        before_ms = self._now_ms()
        worker_of = {
            self._keys.ticks(shard): worker
            for shard, worker in self.workers.items()
            if not 0 < self._skipped.get(shard, 0.0) - before_ms <= WRONG_TYPE_RETRY_MS
        }
        if not worker_of:
            time.sleep(block_ms / 1000)
            return
        positions = {key: worker.read_id for key, worker in worker_of.items()}
        try:
            reply = self._reader.read(positions, ENTRIES_MAX, block_ms)
        except ResponseError as error:
            if not is_wrong_type(error):
                raise
            self._find_wrong_streams(before_ms)
            return
        full: set[str] = set()
        for name, entries in reply:
            key = bytes(name).decode()
            worker_of[key].queue(self._decoder.decode(key, entries))
            if len(entries) >= ENTRIES_MAX:
                full.add(key)
        # An empty reply came after waiting: nothing older than now is left. Otherwise a shard is drained
        # up to the moment before the read.
        drained_ms = before_ms if reply else self._now_ms()
        for key, worker in worker_of.items():
            if key not in full:
                worker.note_read_out(drained_ms)

    def _find_wrong_streams(self, now_ms: float) -> None:
        for worker in self.workers.values():
            key = self._keys.ticks(worker.shard)
            found = bytes(self._client.type(key)).decode()  # type: ignore[arg-type]
            if found not in ("stream", "none"):
                self._skipped[worker.shard] = now_ms + WRONG_TYPE_RETRY_MS
                worker.note_read_out(now_ms)  # nothing waits in what is no stream
                worker.held.read = 0  # for XINFO's lag: a stream there will be a new one
                self.counts["refused_keys"] += 1
                self._tell("wrong_type", key, hint=str(WrongKeyType(key, found, "stream")))

    # -- changes → Redis -------------------------------------------------------------------------

    def _commit(self, commits: list[Commit]) -> None:
        if self.leases.may_be_gone():  # we were stopped, or this round took too long
            self._share()
            commits = [each for each in commits if self.workers.get(each[0].shard) is each[0]]
        pipe = Pipe(self._client)
        for worker, move, changes in commits:
            sections = commit_args(worker.book, changes, self._symbol_of, worker.revs.collect())
            most = self._settings.closed_max_entries
            queue_commit(pipe, self._keys, worker.shard, worker.held, move, most, sections)
            pipe.flush()  # Redis carries it out while we write the next shard's
        for (worker, move, _), reply in zip(commits, pipe.execute(), strict=True):
            try:
                refusals = settle_commit(reply, worker.held, move)
            except CommitRefused as refusal:
                self._drop(worker, refusal)
                continue
            except RedisUnavailable:
                raise
            except PkbError as error:
                self._set_aside(worker.shard, error)
                continue
            for refused in refusals:
                self.counts["refused_keys"] += 1
                key, _, why = refused.partition(" ")
                self._tell("key_refused", key, why=why[:EVIDENCE_BYTES], hint=f"look at it, then `DEL {key}`")
            self.counts["commits"] += 1

    def _drop(self, worker: ShardWorker, refusal: CommitRefused) -> None:
        """Another owns the shard, or Redis is not where we left it: look whose it is, then load it anew."""
        fenced = refusal.message.startswith("FENCED")
        self.counts["fenced" if fenced else "stale"] += 1
        log.warning("fenced" if fenced else "redis_went_back", shard=worker.shard, why=refusal.message[:200])
        del self.workers[worker.shard]
        self.leases.hurry()

    def _symbol_of(self, token: int) -> bytes:
        return self._names.symbol_of(self._client, token, self._now_ms())

    # -- saying things once ----------------------------------------------------------------------

    def _tell(self, event: str, place: str, **evidence: object) -> None:
        """Log a kind of trouble with its evidence, once a place; the counters say how often."""
        if self._once.first((event, place)):
            log.warning(event, place=place, **evidence)

    def _tell_odd_ticks(self, worker: ShardWorker, applied: Applied) -> None:
        """The rules count what they refuse and what they correct; here is its evidence, once a shard."""
        counts = worker.book.counts()
        news = [name for name in ODD_TICKS if counts[name] and name not in worker.told]
        if news and applied.batch is not None:
            for name, tick in worker.book.invalid_ticks(applied.batch).items():
                worker.told.add(name)
                self._tell(f"{name}_tick", self._keys.ticks(worker.shard), tick=str(tick)[:EVIDENCE_BYTES])

    def _odd_state(self, why: str) -> None:
        self.counts["odd_entries"] += 1
        self._tell("odd_state", why, hint="the instrument starts anew with its next tick")


def _passes(error: ResponseError) -> bool:
    """Whether a refusal will pass: Redis cannot now, or lost our functions, which start() loads."""
    return is_transient(error) or is_function_missing(error)


def run_aggregate(settings: Settings, stop: threading.Event) -> None:
    """Run an aggregator until `stop` is set; several aggregators share the shards.

    Raises:
        PkbError: Redis is unavailable at the start, or `P:meta` was written with other settings.
    """
    client = open_store(settings)
    name = worker_id("aggregate")
    silence_seconds_max = max(2 * settings.lease_seconds, 5.0)  # of Redis, before it is connected again
    aggregator = Aggregator(
        lambda: connect(settings, socket_timeout_seconds=silence_seconds_max),
        settings,
        now_ms=market_clock(settings),
        owner=name,
    )
    heart = Heartbeat(settings.keys, "aggregate", name, wall_ms())

    def beat(_ticks: int) -> None:
        if heart.due(at := wall_ms()):
            shards = sorted(aggregator.workers)
            heart.beat(client, at, aggregator.ticks_total, aggregator.figures(), shards)
            if aggregator.ticks_total:  # every kernel has run by now
                settle_heap()

    log.info("started", store=describe(settings), shards=settings.shards, clock=settings.clock)
    try:
        aggregator.run(stop, beat)
    finally:
        heart.end(client)
    log.info("stopped", **aggregator.counts)
