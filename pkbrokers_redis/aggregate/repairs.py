"""The repair streams: outages to flag, rows of Kite's history, instruments to forget.

A repair waits until every tick is applied that was in the shard's stream before it. So no older tick can
change a row after history corrected it. The effects of a repair and the cursor's field `repair` are one
commit: if the aggregator dies before it, the successor applies the entry again to the same rows; if it dies
after it, the entry is not applied again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import redis

from pkbrokers_redis import logs
from pkbrokers_redis.aggregate.feed_progress import FeedProgress
from pkbrokers_redis.aggregate.shard import (
    EVIDENCE_BYTES,
    ChangesetBuilder,
    Log,
    PendingRepair,
    ShardWorker,
    SymbolCache,
    collect,
    fields_of,
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
from pkbrokers_redis.candles.codec import Changes
from pkbrokers_redis.candles.model import find_interval
from pkbrokers_redis.candles.open_candles import clear_heard
from pkbrokers_redis.candles.rows import CandleList
from pkbrokers_redis.errors import UnknownInterval
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.cluster import Pipe
from pkbrokers_redis.store.commit import CursorMove
from pkbrokers_redis.store.errors import is_wrong_type
from pkbrokers_redis.store.repairs import Forget, Gap, Rows, is_forget, read_repair
from pkbrokers_redis.store.streams import id_order

ROUND_SECONDS = 0.1  # for the repairs of all shards; then ticks are applied
READ_EVERY_SECONDS = 0.25  # repairs are rare: reading them must not delay ticks
ENTRIES_MAX = 8  # of one shard a read, at most 8 MB
ROWS_A_COMMIT = 4_000  # changed; the rest waits for the next round, ~30 ms of Redis' time
LISTS_AT_ONCE = 200  # of a long outage: ~4 MB of replies
PUTS_MAX = 8  # changed rows of a list; with more, the list is written as a whole
WRONG_TYPE_RETRY_SECONDS = 2.0
NEVER = float("-inf")

REPAIR_COUNTS = (
    "repairs", "repaired_rows", "gap_marks", "malformed_repairs", "forming_repairs", "forgotten"
)  # fmt: skip

log = logs.get("aggregate")


class Repairs:
    """Reads the repair streams and applies their entries. Counts in `counts`."""

    def __init__(self, keys: Keys, counts: dict[str, int], log: Log, symbols: SymbolCache) -> None:
        self._keys, self._counts, self._log, self._symbols = keys, counts, log, symbols
        self.progress = FeedProgress(keys)
        self._read_at = NEVER
        self._round_ends_at = NEVER
        self._skipped: dict[int, float] = {}  # shard → when to look at its key again, monotonic seconds

    def read(self, client: redis.Redis, workers: Iterable[ShardWorker]) -> list[ShardWorker]:
        """Read further entries of every shard that has none pending, at most every READ_EVERY_SECONDS.

        Return the shards that were looked at: the feeds' progress was read before, and an outage is reported
        before the progress beyond it. So what they have pending now is all that concerns that progress.
        """
        now = time.monotonic()
        self._round_ends_at = now + ROUND_SECONDS
        if now < self._read_at + READ_EVERY_SECONDS:
            return []
        self._read_at = now
        self.progress.read(client)
        idle = [each for each in workers if not each.repairs and self._skipped.get(each.shard, NEVER) <= now]
        pipe = Pipe(client)
        for worker in idle:
            key = self._keys.repairs(worker.shard)
            pipe.add("XREAD", "COUNT", ENTRIES_MAX, "STREAMS", key, worker.cursor.repair)
        for worker, reply in zip(idle, pipe.execute(), strict=True):
            if is_wrong_type(reply):
                key = self._keys.repairs(worker.shard)
                self._skipped[worker.shard] = now + WRONG_TYPE_RETRY_SECONDS
                self._counts["refused_keys"] += 1
                self._log("wrong_type", key, hint=f"look at it, then `DEL {key}`")
            elif isinstance(reply, Exception):
                raise reply
            else:
                worker.repairs.extend(
                    PendingRepair(entry_id.decode(), fields_of(cells), worker.full_reads)
                    for entry_id, cells in _entries(reply)
                )
        return idle

    def read_now(self) -> None:
        """Let the next `read` read: a shard was loaded."""
        self._read_at = NEVER

    def note_progress(self, workers: Iterable[ShardWorker]) -> None:
        """Note the feeds' progress in shards that `read` returned and whose repairs are all applied."""
        for worker in workers:
            if not worker.repairs:
                self.progress.note(worker.state)
                if worker.state.unheard:
                    clear_heard(worker.state)

    def ready(self, workers: Iterable[ShardWorker]) -> list[ShardWorker]:
        """Return the shards whose next repair can be applied, the longest waiting first."""
        waiting = [each for each in workers if each.repairs and each.is_ready(each.repairs[0])]
        return sorted(waiting, key=lambda each: id_order(each.repairs[0].id))

    def apply(
        self, client: redis.Redis, worker: ShardWorker, now_ms: float
    ) -> tuple[CursorMove, Changes] | None:
        """Apply a shard's repairs that are ready. Return one commit, or None when the round's time is up.

        The shard has no uncommitted changes. At market time `now_ms` history is not applied to candles that
        still form.
        """
        if time.monotonic() > self._round_ends_at:
            return None
        batch = _Batch(client, self._keys, worker, now_ms)
        last = ""
        while worker.repairs and batch.has_room and worker.is_ready(worker.repairs[0]):
            if last and (time.monotonic() > self._round_ends_at or is_forget(worker.repairs[0].fields)):
                break  # to forget an instrument is a commit of its own: no row of the batch may outlive it
            entry = worker.repairs.popleft()
            last = entry.id
            try:
                batch.apply(read_repair(entry.fields))
                self._counts["repairs"] += 1
            except (ValueError, UnknownInterval) as error:
                self._log_malformed(worker, entry, str(error))
                continue
            if batch.malformed_rows:
                reason = f"{batch.malformed_rows} rows are no candles of the instrument"
                self._log_malformed(worker, entry, reason)
                batch.malformed_rows = 0
        self._counts["repaired_rows"] += batch.rows
        self._counts["gap_marks"] += batch.flagged
        self._counts["forming_repairs"] += batch.forming
        if batch.forgotten:
            self._forget(worker, batch.forgotten)
        cursor = worker.cursor
        return CursorMove(cursor.id, cursor.read, {}, repair=last, forgotten=batch.forgotten), batch.changes()

    def _forget(self, worker: ShardWorker, tokens: Iterable[int]) -> None:
        known = set(worker.state.tokens.tolist()).intersection(tokens)
        for token in known:
            worker.state.forget(token)
            worker.revisions.forget(token)
            self._symbols.forget(token)
        self._counts["forgotten"] += len(known)
        log.info("instruments_forgotten", shard=worker.shard, instruments=len(known))

    def trim(self, client: redis.Redis, workers: Iterable[ShardWorker]) -> None:
        """Delete applied entries except the last: a Redis that lacks it was rolled back."""
        pipe = Pipe(client)
        for worker in workers:
            if worker.cursor.repair != "0-0":
                pipe.add("XTRIM", self._keys.repairs(worker.shard), "MINID", worker.cursor.repair)
        pipe.execute()

    def _log_malformed(self, worker: ShardWorker, entry: PendingRepair, reason: str) -> None:
        self._counts["malformed_repairs"] += 1
        evidence = repr(entry.fields)[:EVIDENCE_BYTES]
        key = self._keys.repairs(worker.shard)
        self._log("malformed_repair", key, id=entry.id, reason=reason[:EVIDENCE_BYTES], evidence=evidence)


class _Batch:
    """Repairs that share one commit."""

    def __init__(self, client: redis.Redis, keys: Keys, worker: ShardWorker, now_ms: float) -> None:
        self._client, self._keys, self._worker, self._now_ms = client, keys, worker, now_ms
        self._state = worker.state
        self._lists: dict[ListIndex, CandleList] = {}  # with what the batch changed in them
        self.rows = self.flagged = self.forming = self.malformed_rows = 0
        self.forgotten: dict[int, list[str]] = {}  # instrument → its intervals

    @property
    def has_room(self) -> bool:
        """Whether another repair may join. One that moved a candle out of the state is the last: before the
        commit its row is not in the lists."""
        return self.rows + self.flagged < ROWS_A_COMMIT and not self._state.evicted and not self.forgotten

    def apply(self, repair: Gap | Rows | Forget) -> None:
        """Apply one repair to the state and the lists. Raises ValueError or UnknownInterval if malformed."""
        if isinstance(repair, Forget):
            names = [interval.name for interval in self._state.intervals]
            self.forgotten = dict.fromkeys(self._of_shard(repair.tokens), names)
        elif isinstance(repair, Gap):
            self._apply_gap(repair)
        else:
            self._apply_rows(repair)

    def _of_shard(self, tokens: Iterable[int]) -> list[int]:
        return [token for token in tokens if self._keys.shard_of(token) == self._worker.shard]

    def _apply_rows(self, repair: Rows) -> None:
        if not self._of_shard([repair.token]):
            raise ValueError("the instrument belongs to another shard")
        intervals = self._state.intervals
        k = intervals.index(find_interval(intervals, repair.interval))
        i = self._state.index(repair.token)
        # Rows of the base interval also correct the longer intervals, which are composed of them.
        concerned = range(len(intervals)) if k == self._state.base_interval else (k,)
        self._load([ListIndex(i, each) for each in concerned])
        history = HistoryRows(repair.token, k, repair.from_s, repair.to_s, repair.rows)
        lists = {each: self._lists[ListIndex(i, each)] for each in concerned}
        result = apply_history(self._state, history, lists, self._now_ms)
        self.rows += result.rows
        self.forming += result.forming
        self.malformed_rows = result.malformed

    def _apply_gap(self, repair: Gap) -> None:
        outage = Outage(self._of_shard(repair.tokens), repair.from_ms, repair.to_ms)
        places = iter(list(lists_in_reach(self._state, outage)))
        self.flagged += flag_outage(self._state, outage)
        while chunk := list(islice(places, LISTS_AT_ONCE)):
            before = set(self._lists)
            self._load(chunk)
            self.flagged += flag_lists(self._state, outage, {place: self._lists[place] for place in chunk})
            for place in chunk:  # a long outage of many instruments: keep only the lists that changed
                if place not in before and not self._lists[place].changed:
                    del self._lists[place]

    def _load(self, places: Sequence[ListIndex]) -> None:
        """Read the lists that the batch does not have yet."""
        missing = [place for place in places if place not in self._lists]
        pipe = Pipe(self._client)
        for i, k in missing:
            name = self._state.intervals[k].name
            pipe.add("LRANGE", self._keys.candles(int(self._state.tokens[i]), name), 0, -1)
        for place, reply in zip(missing, pipe.execute(), strict=True):
            if isinstance(reply, Exception) and not is_wrong_type(reply):
                raise reply
            texts = [] if isinstance(reply, Exception) else reply  # another type: the commit reports it
            self._lists[place] = CandleList(texts, self._state.intervals[place.k].keep)

    def changes(self) -> Changes:
        """Return what the state and the lists gained, for one commit."""
        worker = self._worker
        changes = collect(self._client, self._keys, self._state, worker.revisions)
        builder = ChangesetBuilder(self._state, worker.revisions, changes)
        for (i, k), rows in self._lists.items():
            whole = len(rows.changed) > PUTS_MAX
            if whole:
                builder.replace_list(i, k, rows.texts())
            for start in rows.changed:
                builder.add_row(i, k, start, rows.text(start), put=not whole)
        return builder.changes()


def _entries(reply: Any) -> list[tuple[bytes, Any]]:
    """Return the entries of an XREAD of one stream: RESP2 gives pairs, RESP3 a map."""
    parts = reply.values() if isinstance(reply, dict) else [entries for _, entries in reply or ()]
    return [entry for entries in parts for entry in entries]
