"""The aggregator: tick streams in, candles out, one atomic commit per batch and shard.

    lease    renew the leases, load the shards that are new, drop those that were lost (leases.py)
    repair   apply entries of the repair streams in commits of their own (repairs.py)
    read     XREAD from each shard's position
    apply    decode, skip what a producer sent twice, apply the rules, close what is due (shard.py)
    commit   one FCALL for every shard that changed, in one pipeline

Batches form by themselves: under low load a tick is a batch, under high load many ticks of an instrument
become one write. A commit that Redis refuses costs that shard's state, an outage of Redis the states of all
shards: they are loaded again, and the streams are read from the position of the last commit.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections import Counter
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
    ShardWorker,
    SymbolCache,
    collect,
)
from pkbrokers_redis.candles.calendar import Sessions, load_sessions
from pkbrokers_redis.candles.codec import Changes, Scratch
from pkbrokers_redis.candles.open_candles import close_candles
from pkbrokers_redis.candles.rules import invalid_ticks
from pkbrokers_redis.candles.state import ShardState
from pkbrokers_redis.candles.taken_back import taken_back
from pkbrokers_redis.clock import Backoff, market_clock
from pkbrokers_redis.errors import CommitRefused, PkbError, RedisUnavailable, WrongKeyType
from pkbrokers_redis.runtime.cluster_state import Heartbeat
from pkbrokers_redis.runtime.roles import follow_calendar, keep_store, open_store, worker_id
from pkbrokers_redis.runtime.roles import now_ms as wall_ms
from pkbrokers_redis.runtime.warmup import freeze_heap, warm_up
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.cluster import Pipe
from pkbrokers_redis.store.commit import (
    CursorMove,
    commit_args,
    ensure_groups,
    finish_commit,
    queue_commit,
    read_cursor,
    restore_shard,
)
from pkbrokers_redis.store.connect import connect, describe
from pkbrokers_redis.store.errors import is_function_missing, is_transient, is_wrong_type
from pkbrokers_redis.store.functions import load_functions
from pkbrokers_redis.store.instruments import read_hours
from pkbrokers_redis.store.streams import StreamReader, trim

log = logs.get("aggregate")

ENTRIES_MAX = 512  # of one shard a read; ~1 MB at 40 ticks an entry
INVALID_TICKS = ("invalid", "future_clamped")  # of the state's counts
DIRTY_MAX = 500  # instruments a commit, so that Redis never stalls for long …
BEHIND_MS, DIRTY_BEHIND_MAX = 1_000, 2_000  # … unless the lag is longer: larger batches conflate more ticks
CLOSE_MAX = 32  # instruments closed a round and shard: the minute's end must not delay the ticks
BLOCK_MS_MAX = 200  # how long a read waits for ticks, unless a candle closes or a lease is due sooner
DRAIN_SECONDS_MAX = 5.0
HOURS_SECONDS = 60.0  # between two reads of what the master says of trading hours
CALENDAR_SECONDS = 1.0  # between two looks at PKB_CALENDAR
TRIM_EVERY_MS = 2_000
RETRY_MS = 2_000  # before keys of a wrong type are looked at again
PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 0.1, 1.0  # between attempts while Redis is unavailable

Commit = tuple[ShardWorker, CursorMove, Changes]


class Aggregator:
    """Makes the candles of its share of the shards. `step` runs one round; `run` loops it, in one thread.

    Args:
        connect: Opens the store.
        settings: The worker's settings.
        now_ms: Market time in epoch milliseconds; candles close by it.
        machine_ms: The machine's time in epoch milliseconds, in which Redis counts stream ids.
        owner: This process's id in leases and among the workers; it must be unique.
        sessions: The trading calendar; by default that of the settings.

    Example:
        >>> def candles_until(stop: threading.Event, settings: Settings) -> None:
        ...     Aggregator(lambda: connect(settings), settings, now_ms=market_clock(settings)).run(stop)
    """

    def __init__(
        self,
        connect: Callable[[], redis.Redis],
        settings: Settings,
        *,
        now_ms: Callable[[], float],
        machine_ms: Callable[[], float] = wall_ms,
        owner: str | None = None,
        sessions: Sessions | None = None,
    ) -> None:
        self._connect = connect
        self._client: redis.Redis = None  # type: ignore[assignment]  # start() opens both
        self._reader: StreamReader = None  # type: ignore[assignment]
        self._started = False
        self._settings = settings
        self._keys = settings.keys
        self._host_ms = now_ms
        self._machine_ms = machine_ms
        self._speed = float(getattr(now_ms, "speed", 1.0))  # of market time, in a rehearsal
        self._sessions = sessions or load_sessions(settings.sessions, settings.timezone, settings.calendar)
        name = owner or f"{ROLE}-{secrets.token_hex(8)}"
        self.leases = ShardLeases(settings.keys, name, settings.lease_seconds)
        self.workers: dict[int, ShardWorker] = {}
        self.counts = dict.fromkeys(
            ("entries", "repeated_entries", "malformed_entries", "malformed_rows", "commits", "fenced",
             "stale", "shards_loaded", "refused_keys", *REPAIR_COUNTS), 0
        )  # fmt: skip
        self.ticks_total = 0
        self._scratch = Scratch()
        self._hours_due_at = self._calendar_due_at = float("-inf")
        self._unreadable: dict[int, float] = {}  # shard whose stream has another type → retry, market ms
        self._quarantined: dict[int, float] = {}  # shard with malformed keys → retry, market ms
        self._trim_due_ms = float("-inf")
        self._symbols = SymbolCache(settings.keys)
        self._once = logs.Once()
        self._decoder = EntryDecoder(self.counts, self._log_once)
        self._repairs = Repairs(settings.keys, self.counts, self._log_once, self._symbols)

    def _now_ms(self) -> float:
        """Return market time; where this host's clock is wrong, by the exchange's."""
        return self._host_ms() - self._repairs.progress.clock_offset_ms

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connect, load the functions, lease the free shards within the share, and load their states."""
        self._disconnect()
        self._client = self._connect()
        self._reader = StreamReader(self._client)
        load_functions(self._client)
        ensure_groups(self._client, self._keys)
        warm_up(self._settings.intervals)  # before it takes shards, which would wait meanwhile
        self.leases.invalidate()
        self.leases.closing = False
        self._renew_leases()
        self._started = True

    def run(self, stop: threading.Event, on_round: Callable[[int], None] = lambda ticks: None) -> None:
        """Call `step` until `stop` is set, then drain; after an outage of Redis start again.

        `on_round` is called after each round with the ticks that it applied.
        """
        backoff = Backoff(PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX)
        try:
            while not stop.is_set():
                try:
                    if not self._started:
                        self.start()
                    on_round(self.step())
                    backoff.reset()
                except (redis.RedisError, RedisUnavailable) as error:
                    if isinstance(error, ResponseError) and not _may_pass(error):
                        raise
                    reason = str(error).partition("\n")[0][:200]
                    pause_seconds = backoff.next()
                    log.warning("redis_unavailable", reason=reason, retry_seconds=pause_seconds)
                    self._discard_states()
                    stop.wait(pause_seconds)
            self._drain()
        finally:
            self.close()

    def close(self) -> None:
        """Release the leases, so that other aggregators take over at once; without Redis they run out."""
        with contextlib.suppress(redis.RedisError, PkbError):
            if self._started:
                self.leases.leave(self._client)
        self._disconnect()
        self._started = False

    def _disconnect(self) -> None:
        if self._client is not None:
            self._reader.close()
            self._client.close()

    def _discard_states(self) -> None:
        """Drop all states; the next round loads them again from the last commits."""
        self.workers.clear()
        self._quarantined.clear()
        self._started = False

    def _drain(self) -> None:
        """Apply what the streams still hold, for a limited time: ingest stops before the aggregators."""
        self.leases.closing = True
        deadline = time.monotonic() + DRAIN_SECONDS_MAX
        try:
            while self.workers and time.monotonic() < deadline and self.step(block_ms_max=1):
                pass
        except (redis.RedisError, PkbError) as error:
            # Nothing is lost: it waits in the streams for the next owner.
            log.warning("drain_stopped", reason=str(error)[:200])

    def figures(self) -> dict[str, Any]:
        """Return what the heartbeat reports: shards owned, lag, counters."""
        counts: Counter[str] = Counter()
        for worker in self.workers.values():
            counts.update(worker.state.counts())
        return {
            "shards": ",".join(map(str, sorted(self.workers))),
            "instruments": sum(len(worker.state) for worker in self.workers.values()),
            "lag_ms": max((worker.lag_ms for worker in self.workers.values()), default=0.0),
            **self.counts,
            **counts,
        }

    # -- one round -------------------------------------------------------------------------------

    def step(self, block_ms_max: int = BLOCK_MS_MAX) -> int:
        """Run one round: lease, repair, read, apply, commit. Return how many ticks were applied."""
        self._renew_leases()
        self._apply_repairs()
        if not any(worker.pending for worker in self.workers.values()):
            waits = any(worker.repairs for worker in self.workers.values())
            self._read(self._block_ms(1 if waits else block_ms_max))
        commits: list[Commit] = []
        ticks = sum(self._apply(worker, commits) for worker in self.workers.values())
        self.ticks_total += ticks
        self._commit(commits)
        self._trim_if_due()
        return ticks

    def _apply(self, worker: ShardWorker, commits: list[Commit]) -> int:
        """Apply a shard's pending entries and close what is due; append its changes to `commits`."""
        applied = worker.apply(DIRTY_MAX if worker.lag_ms < BEHIND_MS else DIRTY_BEHIND_MAX)
        self.counts["entries"] += applied.entries
        self.counts["repeated_entries"] += applied.repeated
        self._log_invalid_ticks(worker, applied)
        # Close by the wall clock only what no waiting entry can still change.
        if worker.state.is_due(worker.applied_until_ms):
            dirty_max = worker.state.dirty + CLOSE_MAX
            close_candles(worker.state, worker.applied_until_ms, dirty_max, self._speed)
        changes = collect(self._client, self._keys, worker.state, worker.revisions)
        if changes.ops or applied.move.id != worker.cursor.id:
            commits.append((worker, applied.move, changes))
        return applied.ticks

    def _apply_repairs(self) -> None:
        """Apply and commit repairs by themselves, on states without uncommitted changes."""
        current = self._repairs.read(self._client, self.workers.values())
        commits: list[Commit] = [
            (worker, *changes)
            for worker in self._repairs.ready(self.workers.values())
            if (changes := self._repairs.apply(self._client, worker, self._now_ms())) is not None
        ]
        self._commit(commits)
        self._repairs.note_progress(each for each in current if self.workers.get(each.shard) is each)

    def _block_ms(self, most: int) -> int:
        """Return how long to wait for ticks: at most until the next candle closes or a lease is due."""
        most = max(1, min(most, int(max(self.leases.due_seconds, 0.0) * 1000) + 1))
        if self._settings.clock == "event":
            return most  # an event clock needs no timer
        due = min((worker.state.next_due_ms for worker in self.workers.values()), default=np.inf)
        wait_ms = (due - self._now_ms()) / self._speed
        return max(1, min(most, int(min(wait_ms, 1e9)) + 1))

    def _trim_if_due(self) -> None:
        """Trim the streams every two seconds; at once after the clock was set back."""
        now_ms = self._machine_ms()
        if self._trim_due_ms - TRIM_EVERY_MS <= now_ms < self._trim_due_ms:
            return
        self._trim_due_ms = now_ms + TRIM_EVERY_MS
        positions = {shard: worker.cursor.id for shard, worker in self.workers.items()}
        trim(self._client, self._keys, positions, now_ms, self._settings.stream_retention_seconds)
        self._repairs.trim(self._client, self.workers.values())

    # -- shards ----------------------------------------------------------------------------------

    def _renew_leases(self) -> None:
        """Renew the leases when due, and load or drop shards. All states here are committed."""
        self._refresh_calendar_if_due()
        self._read_hours_if_due()
        if self.leases.due_seconds <= 0:
            self.leases.renew(self._client)
            for shard, error in self.leases.refused.items():
                self._quarantine(shard, error)
        epochs = self.leases.epochs
        for shard in [
            each for each, worker in self.workers.items() if epochs.get(each) != worker.cursor.epoch
        ]:
            del self.workers[shard]
        if len(self.workers) == len(epochs):
            return
        for shard in [each for each in epochs if each not in self.workers]:
            if self._waits(self._quarantined, shard):
                continue
            try:
                self._load(shard, epochs[shard])
            except RedisUnavailable:
                raise
            except PkbError as error:
                self._quarantine(shard, error)
            if self.leases.due_seconds <= 0:
                return  # renew before the next one

    def _refresh_calendar_if_due(self) -> None:
        """Follow PKB_CALENDAR: a session that nobody announced, a holiday declared at noon."""
        if time.monotonic() < self._calendar_due_at:
            return
        self._calendar_due_at = time.monotonic() + CALENDAR_SECONDS
        if follow_calendar(self._sessions):
            self.workers.clear()  # they are loaded again, with other hours

    def _read_hours_if_due(self) -> None:
        """Read once a minute which instruments have other hours than their token says."""
        if time.monotonic() < self._hours_due_at:
            return
        self._hours_due_at = time.monotonic() + HOURS_SECONDS
        if read_hours(self._client, self._keys, self._sessions):
            self.workers.clear()  # they are loaded again, with other hours

    def _waits(self, retries: dict[int, float], shard: int) -> bool:
        """Return whether a shard's next attempt is in the future; not if the clock was set back."""
        return 0 < retries.get(shard, 0.0) - self._now_ms() <= RETRY_MS

    def _load(self, shard: int, epoch: int) -> None:
        """Load a shard's state as the last commit left it."""
        cursor = read_cursor(self._client, self._keys, shard, self.leases.owner, epoch)
        state = ShardState(
            self._settings.intervals,
            self._sessions,
            grace_seconds=self._settings.close_grace_seconds,
            event_clock=self._settings.clock == "event",
            scratch=self._scratch,
        )
        revisions = restore_shard(self._client, self._keys, shard, state, self._log_malformed_state)
        self._symbols.load(self._client, state.tokens.tolist())
        self.workers[shard] = ShardWorker(shard, state, cursor, revisions)
        self._quarantined.pop(shard, None)
        self._repairs.read_now()
        self.counts["shards_loaded"] += 1

    def _quarantine(self, shard: int, error: PkbError) -> None:
        """Leave a shard alone for a while whose keys another writer changed; the other shards continue."""
        self.workers.pop(shard, None)
        self._quarantined[shard] = self._now_ms() + RETRY_MS
        self.counts["refused_keys"] += 1
        key = self._keys.cursor(shard)
        self._log_once("shard_quarantined", key, reason=error.message[:200], hint=error.hint)

    # -- streams → states ------------------------------------------------------------------------

    def _read(self, block_ms: int) -> None:
        """Read further entries of every shard into its worker."""
        before_ms = self._now_ms()
        worker_of = {
            self._keys.ticks(shard): worker
            for shard, worker in self.workers.items()
            if not self._waits(self._unreadable, shard)
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
            self._find_unreadable_streams(before_ms)
            return
        full: set[str] = set()
        for name, entries in reply:
            key = bytes(name).decode()
            worker_of[key].queue(self._decoder.decode(key, entries))
            if len(entries) >= ENTRIES_MAX:
                full.add(key)
        # An empty reply came after waiting: nothing older than now is left. Otherwise a stream is read to its
        # end up to the moment before the read.
        until_ms = before_ms if reply else self._now_ms()
        for key, worker in worker_of.items():
            if key not in full:
                worker.note_full_read(until_ms)

    def _find_unreadable_streams(self, now_ms: float) -> None:
        for worker in self.workers.values():
            key = self._keys.ticks(worker.shard)
            kind = bytes(self._client.type(key)).decode()  # type: ignore[arg-type]
            if kind not in ("stream", "none"):
                self._unreadable[worker.shard] = now_ms + RETRY_MS
                worker.note_full_read(now_ms)  # no entry waits in what is not a stream
                worker.cursor.read = 0  # for XINFO's lag: the next stream is a new one
                self.counts["refused_keys"] += 1
                self._log_once("wrong_type", key, hint=str(WrongKeyType(key, kind, "stream")))

    # -- states → Redis --------------------------------------------------------------------------

    def _commit(self, commits: list[Commit]) -> None:
        """Write the changes of all shards in one pipeline, one atomic commit a shard."""
        if not commits:
            return
        if self.leases.may_have_expired():  # the process was suspended, or the round took too long
            self._renew_leases()
            commits = [each for each in commits if self.workers.get(each[0].shard) is each[0]]
        closed_max = self._settings.closed_max_entries
        pipe = Pipe(self._client)
        for worker, move, changes in commits:
            sections = commit_args(worker.state, changes, self._symbol_of, worker.revisions.collect())
            queue_commit(pipe, self._keys, worker.shard, worker.cursor, move, closed_max, sections)
            pipe.flush()  # Redis runs it while the next shard's is written
        for (worker, move, _), reply in zip(commits, pipe.execute(), strict=True):
            try:
                refusals = finish_commit(reply, worker.cursor, move)
            except CommitRefused as refusal:
                self._drop(worker, refusal)
                continue
            except RedisUnavailable:
                raise
            except PkbError as error:
                self._quarantine(worker.shard, error)
                continue
            for refused in refusals:
                self.counts["refused_keys"] += 1
                key, _, reason = refused.partition(" ")
                hint = f"look at it, then `DEL {key}`"
                self._log_once("key_refused", key, reason=reason[:EVIDENCE_BYTES], hint=hint)
            self.counts["commits"] += 1

    def _drop(self, worker: ShardWorker, refusal: CommitRefused) -> None:
        """Drop a shard that another aggregator owns, or whose cursor Redis has lost: load it again."""
        fenced = refusal.message.startswith("FENCED")
        self.counts["fenced" if fenced else "stale"] += 1
        event = "shard_fenced" if fenced else "redis_rolled_back"
        log.warning(event, shard=worker.shard, reason=refusal.message[:200])
        del self.workers[worker.shard]
        self.leases.renew_now()

    def _symbol_of(self, token: int) -> bytes:
        return self._symbols.symbol_of(self._client, token)

    # -- logging ---------------------------------------------------------------------------------

    def _log_once(self, event: str, place: str, **evidence: object) -> None:
        """Log a kind of problem with its evidence once a place; the counters say how often it occurs."""
        if self._once.first((event, place)):
            log.warning(event, place=place, **evidence)

    def _log_invalid_ticks(self, worker: ShardWorker, applied: Applied) -> None:
        """Log an example of the ticks that the rules refuse or correct, once a shard and kind."""
        counts = worker.state.counts()
        if counts["volumes_taken_back"] > worker.taken_back:
            worker.taken_back = counts["volumes_taken_back"]
            for token in taken_back(worker.state):
                reason = "three packets agree on a lower volume than an earlier one"
                log.warning("volume_taken_back", symbol=self._symbol_of(token).decode(), reason=reason)
        news = [name for name in INVALID_TICKS if counts[name] and name not in worker.logged]
        if news and applied.batch is not None:
            for name, tick in invalid_ticks(worker.state, applied.batch).items():
                worker.logged.add(name)
                place = self._keys.ticks(worker.shard)
                self._log_once(f"{name}_tick", place, tick=str(tick)[:EVIDENCE_BYTES])

    def _log_malformed_state(self, reason: str) -> None:
        self.counts["malformed_entries"] += 1
        self._log_once("malformed_state", reason, hint="the instrument starts again with its next tick")


def _may_pass(error: ResponseError) -> bool:
    """Return whether a refusal may pass: Redis cannot now, or has lost our functions, which start() loads."""
    return is_transient(error) or is_function_missing(error)


def run_aggregate(settings: Settings, stop: threading.Event) -> None:
    """Run an aggregator until `stop` is set; several aggregators share the shards.

    Raises:
        PkbError: Redis is unavailable at the start, or `P:meta` was written with other settings.
    """
    client = open_store(settings)
    name = worker_id(ROLE)
    silence_seconds_max = max(2 * settings.lease_seconds, 5.0)  # of Redis, before it is connected again
    aggregator = Aggregator(
        lambda: connect(settings, socket_timeout_seconds=silence_seconds_max),
        settings,
        now_ms=market_clock(settings),
        owner=name,
    )
    heart = Heartbeat(settings.keys, ROLE, name, wall_ms())

    def beat(_ticks: int) -> None:
        if heart.due(at := wall_ms()):
            shards = sorted(aggregator.workers)
            keep_store(client, settings)
            heart.beat(client, at, aggregator.ticks_total, aggregator.figures(), shards)
            if aggregator.ticks_total:  # every kernel has run by now
                freeze_heap()

    log.info("started", store=describe(settings), shards=settings.shards, clock=settings.clock)
    try:
        aggregator.run(stop, beat)
    finally:
        heart.end(client)
    log.info("stopped", **aggregator.counts)
