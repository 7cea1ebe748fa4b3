"""What of a mirror belongs to its process (locks, thread, reader): a forked child makes its own.

`Mirror`: a copy in this process of what a consumer needs, filled in one read and kept current by itself.

    fill      one bulk read of the chosen instruments and intervals → rings (`ring`)
    follow    the closed streams: every completed or amended candle lands in its ring
    current   the candle that forms: asked for in batches, of those that somebody asked for lately
    resync    after a loss (Redis away, announcements trimmed unread, a store made anew): fill again

Either a thread does that (`start`) or the caller (`poll`). Reads come from memory and need no Redis; `lag_ms`
says how old what they show may be. A completed candle appears when it is announced, its end + grace; one that
was looked at while it formed stays visible in between.
"""

from __future__ import annotations

import heapq
import os
import threading
import time
from collections.abc import Iterable, Sequence

import redis

from pkbrokers_redis import logs
from pkbrokers_redis.candles.model import Candle, find_interval
from pkbrokers_redis.client.bulk import Bulk, read_bulk
from pkbrokers_redis.client.follow import Follower
from pkbrokers_redis.client.mirror_rows import (
    NO_ROWS,
    Floats,
    MirrorRows,
    Ring,
    apply_entries,
    moved_names,
    refresh_currents,
)
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.errors import PkbError


class Machinery:
    """Locks, the thread, the reader of the streams: what does not survive a fork."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.work = threading.RLock()  # one at a time fills, applies, refreshes
        self.reading = threading.Lock()  # one at a time waits for the streams
        self.follower: Follower | None = None
        self.stop = threading.Event()
        self.thread: threading.Thread | None = None
        self.is_broken = False  # Redis was away since the last fill
        self.complete_at = 0.0  # when we last had everything, monotonic seconds
        self.named_at = time.monotonic()  # when the master was last asked who has which name


log = logs.get("mirror")

BLOCK_SECONDS = 0.25  # the thread's wait for news, and so the lag of a mirror that has all
HOT_SECONDS = 10.0  # a current candle nobody asked for in so long is no longer refreshed
HOT_A_ROUND = 500  # refreshed at once, so that one mirror costs Redis 2,000 reads a second at most
CURRENT_SECONDS = 0.5  # how old a current candle may be
FRESHEN_SECONDS_MAX = 0.5  # how long a read waits for its current candle behind other work
NAMES_SECONDS = 30.0  # how often the master is asked whether a name has moved to another token
BYTES_MAX = 2**30  # of rows; 2,000 instruments × 10 intervals × 100 rows take 160 MB
PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 0.1, 5.0  # between tries while Redis is away


class Mirror:
    """The last `count` candles of chosen instruments and intervals, in memory.

    `symbols` None is every instrument of the store, also those that appear later; `()` none until `add`. One
    mirror serves all threads of a process, and goes on in a forked child. Bounded by `bytes_max`.

    `resyncs` is how often it filled itself again.
    """

    def __init__(
        self,
        store: CandleStore,
        symbols: Iterable[str | int] | None = None,
        intervals: Sequence[str] = (),
        count: int = 100,
        *,
        current_seconds: float = CURRENT_SECONDS,
        bytes_max: int = BYTES_MAX,
    ) -> None:
        self.store = store
        self.current_seconds = current_seconds
        self.resyncs = 0
        self.memory = MirrorRows(bytes_max)
        self._hot: dict[tuple[int, str], float] = {}  # (token, interval) → asked for at, monotonic seconds
        self._missed = 0  # of followers that are gone
        self._wants_thread = False
        self._now = Machinery()
        chosen = None if symbols is None else list(symbols)
        for interval in intervals:
            self.add(chosen, interval, count)

    # -- reading: from memory --------------------------------------------------------------------

    def rows(
        self, symbol: str | int, interval: str, count: int = 100, include_current: bool = False
    ) -> Floats:
        """float64[≤ count, 8], newest last, columns as in CANDLE_FIELDS: a view, nothing is copied.

        Its rows stand, but for the one that forms (`include_current`) and rows that are amended: copy what
        must not change. Empty for an instrument without candles. Raises PkbError for what is not mirrored.
        """
        ring = self._ring(symbol, interval, include_current)
        return NO_ROWS if ring is None else ring.view(count, include_current)

    def many_rows(
        self, symbols: Sequence[str], interval: str, count: int = 100, include_current: bool = False
    ) -> list[tuple[str, Floats]]:
        """`rows` of each symbol, all current candles asked for at once."""
        name = self._interval(interval)
        tokens = [self._token(symbol) for symbol in symbols]
        if include_current:
            self._freshen([(token, name) for token in tokens])
        with self.memory.lock:
            rings = self.memory.rings[name]
            found = [rings.get(token) for token in tokens]
            return [
                (symbol, NO_ROWS if ring is None else ring.view(count, include_current))
                for symbol, ring in zip(symbols, found, strict=True)
            ]

    def candles(
        self, symbol: str | int, interval: str, count: int = 100, include_current: bool = False
    ) -> list[Candle]:
        """The same as `CandleStore.get_candles` gives."""
        ring = self._ring(symbol, interval, include_current)
        if ring is None:
            return []
        return self.memory.candles(ring, count, include_current)

    def bulk(
        self,
        symbols: Sequence[str | int] | None = None,
        interval: str = "5m",
        count: int = 100,
        include_current: bool = False,
    ) -> Bulk:
        """The same as `CandleStore.bulk` gives, copied once in memory; not even that if nothing has changed.

        `symbols` None is every mirrored instrument that has rows.
        """
        name = self._interval(interval)
        rings = self.memory.rings[name]
        tokens = sorted(rings) if symbols is None else list(dict.fromkeys(map(self._token, symbols)))
        if include_current:
            self._freshen([(token, name) for token in tokens])
        bulk = self.memory.bulk(tokens, name, count, include_current)
        return bulk.with_rows_only() if symbols is None else bulk

    def has(self, symbol: str | int, interval: str, count: int = 1) -> bool:
        """Whether `count` rows of it are mirrored, or all there are."""
        return self.memory.has(symbol, interval, count)

    @property
    def symbols(self) -> list[str]:
        """The mirrored instruments' names (`NSE:INFY`), sorted."""
        tokens = {token for rings in self.memory.rings.values() for token in rings}
        return sorted(symbol for _, symbol in self.memory.named(tokens))

    @property
    def lag_ms(self) -> float:
        """How long ago this mirror last had everything that was announced; infinite before the first fill."""
        at = self._now.complete_at
        return (time.monotonic() - at) * 1000 if at else float("inf")

    @property
    def missed(self) -> int:
        """Announcements trimmed before this mirror read them; it then filled itself again."""
        return self._missed + (self._now.follower.missed if self._now.follower else 0)

    @property
    def rows_refused(self) -> int:
        """Rows and announcements that were none."""
        return self.store.rows_refused

    @property
    def size_bytes(self) -> int:
        """Memory of the rows."""
        return self.memory.size_bytes()

    # -- keeping current -------------------------------------------------------------------------

    def add(self, symbols: Iterable[str | int] | None, interval: str, count: int = 100) -> None:
        """Mirror these too, in one bulk read; at least `count` rows are then kept of the whole interval.

        What cannot be added changes nothing.

        Raises UnknownSymbol, UnknownInterval, redis-py's errors, and PkbError beyond `bytes_max`.
        """
        name = find_interval(self.store.settings.intervals, interval).name
        texts = None if symbols is None else list(symbols)
        named = self.store.instruments() if texts is None else self.store.resolve_all(texts)
        now, memory = self._machinery(), self.memory
        with now.work:
            if now.follower is None:
                self._follow(now)
            there, keep = memory.rings.get(name, {}), memory.keep.get(name, 0)
            if count > keep:
                fresh = [*memory.named(there), *named]  # more rows of those that are there
            else:
                fresh = [pair for pair in named if pair[0] not in there]
            self._fill(now, name, fresh, max(count, keep))
            if texts is None:
                memory.whole.add(name)
            else:
                memory.tokens.update(zip(texts, (token for token, _ in named), strict=True))

    def poll(self, block_seconds: float = 0.0) -> int:
        """Take in what is new; returns how many announcements. For those who start no thread.

        Raises redis-py's errors; the mirror keeps what it has, and the next poll fills it again.
        """
        now = self._machinery()
        if not self.memory.rings:
            return 0
        with now.reading:
            try:
                return self._poll(now, block_seconds)
            except (redis.RedisError, OSError):
                now.is_broken = True
                raise

    def start(self) -> Mirror:
        """Keep current in a thread from now on."""
        self._wants_thread = True
        now = self._machinery()
        if now.thread is None or not now.thread.is_alive():
            now.stop.clear()
            now.thread = threading.Thread(target=self._run, args=(now,), name="pkb-mirror", daemon=True)
            now.thread.start()
        return self

    def close(self) -> None:
        """End the thread. What is mirrored stays readable and grows old."""
        self._wants_thread = False
        self._now.stop.set()
        if self._now.thread is not None:
            self._now.thread.join(timeout=10)
            self._now.thread = None

    def __enter__(self) -> Mirror:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- inside ----------------------------------------------------------------------------------

    def _run(self, now: Machinery) -> None:
        pause_seconds = PAUSE_SECONDS_MIN
        while not now.stop.is_set():
            try:
                self.poll(BLOCK_SECONDS)
                if not self.memory.rings:
                    now.stop.wait(BLOCK_SECONDS)
                pause_seconds = PAUSE_SECONDS_MIN
            except (redis.RedisError, OSError, PkbError) as error:
                why = str(error).partition("\n")[0][:200]
                log.warning("mirror_behind", why=why, retry_seconds=pause_seconds)
                now.stop.wait(pause_seconds)
                pause_seconds = min(pause_seconds * 2, PAUSE_SECONDS_MAX)

    def _poll(self, now: Machinery, block_seconds: float) -> int:
        follower = now.follower
        if now.is_broken or follower is None:
            follower = self._resync(now)
        began = time.monotonic()
        lost = follower.missed + follower.restarts
        entries, has_all = follower.read_entries(block_seconds)  # not locked: it may wait
        with now.work:
            if follower.missed + follower.restarts != lost:
                self._resync(now)
                return len(entries)
            taken = apply_entries(self.store, self.memory, entries)
            self._refresh_hot()
            if began - now.named_at > NAMES_SECONDS:
                now.named_at = began
                self._follow_names(now)
            if has_all:
                # What was announced before the read began is in it: it ended with nothing behind it.
                now.complete_at = max(now.complete_at, began)
        return taken

    def _follow(self, now: Machinery) -> Follower:
        if now.follower is not None:
            self._missed += now.follower.missed
            now.follower.close()
        now.follower = Follower(self.store.client, self.store.keys)
        return now.follower

    def _resync(self, now: Machinery) -> Follower:
        """Everything again: first the place in the streams, then the rows; what comes between comes twice."""
        with now.work:
            follower = self._follow(now)
            self.resyncs += 1
            for name, rings in list(self.memory.rings.items()):
                known = self.store.instruments() if name in self.memory.whole else []
                self._fill(now, name, [*self.memory.named(rings), *known], self.memory.keep[name])
            now.is_broken = False
            return follower

    def _follow_names(self, now: Machinery) -> None:
        """Names that the master has given to other tokens: these are mirrored where those were."""
        moved = moved_names(self.store, self.memory)
        for name, rings in list(self.memory.rings.items()) if moved else ():
            fresh = [pair for token, pair in moved.items() if token in rings and pair[0] not in rings]
            self._fill(now, name, fresh, self.memory.keep[name])
        self.memory.rename(moved)

    def _fill(self, now: Machinery, name: str, named: list[tuple[int, str]], keep: int) -> None:
        began = time.monotonic()
        instruments = list(dict(named).items())
        self.memory.check_size(name, {token for token, _ in instruments}, keep)
        bulk = read_bulk(self.store.client, self.store.keys, instruments, name, keep)
        self.store.tally.rows_refused += bulk.rows_refused
        self.memory.put_all(bulk, keep)
        now.complete_at = now.complete_at or began

    def _interval(self, interval: str) -> str:
        if interval not in self.memory.rings:
            interval = find_interval(self.store.settings.intervals, interval).name
            if interval not in self.memory.rings:
                raise PkbError(f"{interval} is not mirrored", "call `mirror.add(symbols, interval)` first")
        return interval

    def _token(self, symbol: str | int) -> int:
        token = self.memory.tokens.get(symbol)
        if token is None:
            token = self.memory.tokens[symbol] = self.store.resolve(symbol)[0]
        return token

    def _ring(self, symbol: str | int, interval: str, include_current: bool) -> Ring | None:
        name = self._interval(interval)
        token = self._token(symbol)
        ring = self.memory.rings[name].get(token)
        if ring is None and name not in self.memory.whole:
            raise PkbError(f"{symbol} {name} is not mirrored", "call `mirror.add([symbol], interval)` first")
        if include_current:
            self._freshen([(token, name)])
        return ring

    def _freshen(self, wanted: list[tuple[int, str]]) -> None:
        """The current candles of these, asked for now unless they are young enough."""
        moment = time.monotonic()
        old: list[tuple[int, str]] = []
        for key in wanted:
            self._hot[key] = moment
            ring = self.memory.rings[key[1]].get(key[0])
            if ring is not None and moment - ring.current_at > self.current_seconds:
                old.append(key)
        now = self._machinery() if old else self._now
        if not old or now.is_broken or not now.work.acquire(timeout=FRESHEN_SECONDS_MAX):
            return  # Redis is away, or a large fill is under way: better a little old than late
        try:
            refresh_currents(self.store, self.memory, old)
        except (redis.RedisError, OSError):
            now.is_broken = True  # what we have is what there is; `lag_ms` tells
        finally:
            now.work.release()

    def _refresh_hot(self) -> None:
        moment = time.monotonic()
        half = self.current_seconds / 2  # before a reader finds it too old
        due: list[tuple[float, tuple[int, str]]] = []
        for key, asked_at in list(self._hot.items()):
            ring = self.memory.rings.get(key[1], {}).get(key[0])
            if ring is None or moment - asked_at > HOT_SECONDS:
                self._hot.pop(key, None)
            elif moment - ring.current_at > half:
                due.append((ring.current_at, key))
        if due:
            # The oldest first; those that must wait are asked for when somebody reads them.
            oldest = heapq.nsmallest(HOT_A_ROUND, due)
            refresh_currents(self.store, self.memory, [key for _, key in oldest])

    def _machinery(self) -> Machinery:
        """This process' own; a forked child makes itself one, fills again, and goes on as its parent did."""
        if self._now.pid != os.getpid():
            self._now = Machinery()
            self._now.is_broken = True
            self.memory.lock = threading.RLock()
            if self._wants_thread:
                self.start()
        return self._now
