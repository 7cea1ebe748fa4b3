"""The aggregator's side of the repair streams: read, apply to a clean book, hand out one commit.

A repair waits until every tick is applied that was in the shard's stream before it, so that nothing which is
under way to a row can fall on what history said. Its effects and the cursor's field `repair` are one commit:
killed before it, the successor applies the entry again, from the same rows; killed after it, not at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import redis

from pkbrokers_redis import logs
from pkbrokers_redis.aggregate.shard import (
    EVIDENCE_BYTES,
    Addenda,
    Names,
    Repair,
    ShardWorker,
    fields_of,
    settle_late,
)
from pkbrokers_redis.candles.amend import (
    HistoryRows,
    ListIndex,
    Outage,
    apply_history,
    flag_lists,
    flag_outage,
    lists_in_reach,
)
from pkbrokers_redis.candles.changeset import Changes
from pkbrokers_redis.candles.model import find_interval
from pkbrokers_redis.candles.rows import CandleList
from pkbrokers_redis.errors import UnknownInterval
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.cluster import Pipe
from pkbrokers_redis.store.commit import Move
from pkbrokers_redis.store.errors import is_wrong_type
from pkbrokers_redis.store.repairs import Forget, Gap, Rows, is_forget, read_repair
from pkbrokers_redis.store.streams import id_order

ROUND_SECONDS = 0.1  # for the repairs of all shards; then ticks have their turn
READ_EVERY_SECONDS = 0.25  # a look at all streams: repairs are rare, and not worth a wait for ticks
ENTRIES_MAX = 8  # of one shard a look, at most 8 MB
ROWS_A_COMMIT = 4_000  # changed; then the rest waits for the next round, ~30 ms of Redis' time
LISTS_AT_ONCE = 200  # of an old outage: ~4 MB of replies
PUTS_MAX = 8  # changed rows of a list; with more, the list is written as a whole
WRONG_TYPE_RETRY_SECONDS = 2.0

REPAIR_COUNTS = ("repairs", "repaired_rows", "gap_marks", "odd_repairs", "forming_repairs", "forgotten")

log = logs.get("aggregate")


class Repairs:
    """Reads and applies. Counts in `counts`; `tell(event, place, **evidence)` hears of what is odd."""

    def __init__(self, keys: Keys, counts: dict[str, int], tell: Callable[..., None], names: Names) -> None:
        self._keys, self._counts, self._tell, self._names = keys, counts, tell, names
        self._read_at = 0.0
        self._round_ends_at = 0.0
        self._skipped: dict[int, float] = {}  # shard → when to look at its key again
        self._trimmed: dict[int, str] = {}

    def read(self, client: redis.Redis, workers: Iterable[ShardWorker]) -> None:
        """Look for entries behind those applied, of every shard that has none waiting; now and then."""
        now = time.monotonic()
        self._round_ends_at = now + ROUND_SECONDS
        if now < self._read_at:
            return
        self._read_at = now + READ_EVERY_SECONDS
        idle = [each for each in workers if not each.repairs and self._skipped.get(each.shard, 0.0) <= now]
        pipe = Pipe(client)
        for worker in idle:
            key = self._keys.repairs(worker.shard)
            pipe.add("XREAD", "COUNT", ENTRIES_MAX, "STREAMS", key, worker.held.repair)
        for worker, reply in zip(idle, pipe.execute(), strict=True):
            if is_wrong_type(reply):
                key = self._keys.repairs(worker.shard)
                self._skipped[worker.shard] = now + WRONG_TYPE_RETRY_SECONDS
                self._counts["refused_keys"] += 1
                self._tell("wrong_type", key, hint=f"look at it, then `DEL {key}`")
            elif isinstance(reply, Exception):
                raise reply
            else:
                worker.repairs.extend(
                    Repair(entry_id.decode(), fields_of(cells), worker.reads_out)
                    for entry_id, cells in _entries(reply)
                )

    def ready(self, workers: Iterable[ShardWorker]) -> list[ShardWorker]:
        """The shards whose next repair can be applied, the longest waiting first."""
        waiting = [each for each in workers if each.repairs and each.is_ready(each.repairs[0])]
        return sorted(waiting, key=lambda each: id_order(each.repairs[0].id))

    def apply(self, client: redis.Redis, worker: ShardWorker, now_ms: float) -> tuple[Move, Changes] | None:
        """Apply what is ready to the worker's book, which must be as Redis has it; None when the round's time
        is up.

        `now_ms` is market time: of what forms by then, history is not believed.
        """
        if time.monotonic() > self._round_ends_at:
            return None
        batch = _Batch(client, self._keys, worker, now_ms)
        last = ""
        while worker.repairs and batch.has_room and worker.is_ready(worker.repairs[0]):
            if last and (time.monotonic() > self._round_ends_at or is_forget(worker.repairs[0].fields)):
                break  # what is forgotten is a commit of its own: no row of the batch may outlive it
            entry = worker.repairs.popleft()
            last = entry.id
            try:
                batch.take(read_repair(entry.fields))
                self._counts["repairs"] += 1
            except (ValueError, UnknownInterval) as error:
                self._odd(worker, entry, str(error))
                continue
            if batch.odd_rows:
                self._odd(worker, entry, f"{batch.odd_rows} rows are no candles of the instrument")
                batch.odd_rows = 0
        self._counts["repaired_rows"] += batch.rows
        self._counts["gap_marks"] += batch.marks
        self._counts["forming_repairs"] += batch.forming
        if batch.forgotten:
            self._forget(worker, batch.forgotten, now_ms)
        held = worker.held
        return Move(held.id, held.read, {}, repair=last, forgotten=batch.forgotten), batch.changes()

    def _forget(self, worker: ShardWorker, tokens: Iterable[int], now_ms: float) -> None:
        known = set(worker.book.tokens.tolist()).intersection(tokens)
        for token in known:
            worker.book.forget(token)
            worker.revs.forget(token)
            self._names.forget(token, now_ms)
        self._counts["forgotten"] += len(known)
        log.info("forgotten", shard=worker.shard, instruments=len(known))

    def trim(self, client: redis.Redis, workers: Iterable[ShardWorker]) -> None:
        """Drop applied entries. The last one stays: a Redis that does not know it has gone back in time."""
        pipe = Pipe(client)
        for worker in workers:
            applied = worker.held.repair
            if applied != "0-0" and self._trimmed.get(worker.shard) != applied:
                self._trimmed[worker.shard] = applied
                pipe.add("XTRIM", self._keys.repairs(worker.shard), "MINID", applied)
        pipe.execute()

    def _odd(self, worker: ShardWorker, entry: Repair, why: str) -> None:
        self._counts["odd_repairs"] += 1
        evidence = repr(entry.fields)[:EVIDENCE_BYTES]
        key = self._keys.repairs(worker.shard)
        self._tell("odd_repair", key, id=entry.id, why=why[:EVIDENCE_BYTES], evidence=evidence)


class _Batch:
    """Entries that share one commit."""

    def __init__(self, client: redis.Redis, keys: Keys, worker: ShardWorker, now_ms: float) -> None:
        self._client, self._keys, self._worker, self._now_ms = client, keys, worker, now_ms
        self._book = worker.book
        self._lists: dict[ListIndex, CandleList] = {}  # with what the batch changed in them
        self.rows = self.marks = self.forming = self.odd_rows = 0
        self.forgotten: dict[int, list[str]] = {}  # instrument → its intervals

    @property
    def has_room(self) -> bool:
        """Whether another entry may join. One that moved a candle out of its slot is the last: its row is not
        in the lists before the commit."""
        return self.rows + self.marks < ROWS_A_COMMIT and not self._book.evicted and not self.forgotten

    def take(self, repair: Gap | Rows | Forget) -> None:
        """Apply one entry to the book and the lists. Raises ValueError or UnknownInterval for an odd one."""
        if isinstance(repair, Forget):
            names = [interval.name for interval in self._book.intervals]
            ours = [token for token in repair.tokens if self._keys.shard_of(token) == self._worker.shard]
            self.forgotten = dict.fromkeys(ours, names)
        elif isinstance(repair, Gap):
            self._take_gap(repair)
        else:
            self._take_rows(repair)

    def _take_rows(self, repair: Rows) -> None:
        if self._keys.shard_of(repair.token) != self._worker.shard:
            raise ValueError("the instrument is another shard's")
        intervals = self._book.intervals
        k = intervals.index(find_interval(intervals, repair.interval))
        i = self._book.index(repair.token)
        concerned = range(len(intervals)) if k == self._book.base_interval else (k,)
        self._load([ListIndex(i, each) for each in concerned])
        history = HistoryRows(repair.token, k, repair.from_s, repair.to_s, repair.rows)
        lists = {each: self._lists[ListIndex(i, each)] for each in concerned}
        mended = apply_history(self._book, history, lists, self._now_ms)
        self.rows += mended.rows
        self.forming += mended.forming
        self.odd_rows = mended.malformed

    def _take_gap(self, repair: Gap) -> None:
        outage = Outage(
            [token for token in repair.tokens if self._keys.shard_of(token) == self._worker.shard],
            repair.from_ms,
            repair.to_ms,
        )
        places = iter(list(lists_in_reach(self._book, outage)))
        self.marks += flag_outage(self._book, outage)
        while some := list(islice(places, LISTS_AT_ONCE)):
            before = set(self._lists)
            self._load(some)
            self.marks += flag_lists(self._book, outage, {place: self._lists[place] for place in some})
            for place in some:  # an old outage of many instruments: keep only what changed
                if place not in before and not self._lists[place].changed:
                    del self._lists[place]

    def _load(self, places: Sequence[ListIndex]) -> None:
        missing = [place for place in places if place not in self._lists]
        pipe = Pipe(self._client)
        for i, k in missing:
            name = self._book.intervals[k].name
            pipe.add("LRANGE", self._keys.candles(int(self._book.tokens[i]), name), 0, -1)
        for place, reply in zip(missing, pipe.execute(), strict=True):
            if isinstance(reply, Exception) and not is_wrong_type(reply):
                raise reply
            texts = [] if isinstance(reply, Exception) else reply  # a foreign hand's key: the commit says so
            self._lists[place] = CandleList(texts, self._book.intervals[place.k].keep)

    def changes(self) -> Changes:
        """What the slots and the lists gained, for one commit."""
        worker = self._worker
        changes = settle_late(self._client, self._keys, self._book, worker.revs, self._book.collect())
        addenda = Addenda(self._book, worker.revs, changes)
        for (i, k), rows in self._lists.items():
            whole = len(rows.changed) > PUTS_MAX
            if whole:
                addenda.replace(i, k, rows.texts())
            for start in rows.changed:
                addenda.add(i, k, start, rows.text(start), put=not whole)
        return addenda.changes()


def _entries(reply: Any) -> list[tuple[bytes, Any]]:
    """The entries of an XREAD of one stream, whichever protocol it came by."""
    if not reply:
        return []
    if isinstance(reply, dict):
        return [each for entries in reply.values() for each in entries]
    return [each for _, entries in reply for each in entries]
