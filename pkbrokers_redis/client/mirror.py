"""A mirror: a copy in this process of the rows a consumer needs, filled in one read and kept current.

    fill      one bulk read of the chosen instruments and intervals → row buffers
    follow    the closed streams: every completed or amended candle is added to its buffer
    current   the candle being formed: read in batches, of the instruments that callers read lately
    resync    after a loss (Redis unavailable, announcements trimmed unread, store recreated): fill again

A thread does that (`start`), or the caller (`poll`). Reads come from memory and need no Redis; `lag_ms` is
how old their data may be. A completed candle appears when it is announced, at its end + grace. One that was
read while it formed stays visible in between.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterable, Sequence

import redis

from pkbrokers_redis import logs
from pkbrokers_redis.candles.model import Candle, find_interval
from pkbrokers_redis.client.bulk import Bulk, candles_of
from pkbrokers_redis.client.follow import Follower
from pkbrokers_redis.client.mirror_rows import NO_ROWS, BufferKey, Floats, MirrorRows, RowBuffer
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.clock import Backoff
from pkbrokers_redis.errors import PkbError

log = logs.get("mirror")

BLOCK_SECONDS = 0.25  # how long the thread waits for announcements, and so the lag of a current mirror
ACTIVE_SECONDS = 10.0  # how long a current candle is refreshed after it was last read
REFRESH_MAX = 500  # current candles refreshed at once: a mirror costs Redis 2,000 reads a second at most
CURRENT_SECONDS = 0.5  # how old a current candle may be
REFRESH_WAIT_SECONDS = 0.5  # how long a read waits for its current candle behind other work
NAMES_SECONDS = 30.0  # how often to look whether the master gave a name to another token
BYTES_MAX = 2**30  # of rows; 2,000 instruments × 10 intervals × 100 rows take 160 MB
RETRY_SECONDS_MIN, RETRY_SECONDS_MAX = 0.1, 5.0  # between attempts while Redis is unavailable


class _ProcessState:
    """What does not survive a fork: locks, the thread, the reader of the streams."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.work = threading.RLock()  # held while the mirror fills, applies, refreshes
        self.reading = threading.Lock()  # held while one caller waits for the streams
        self.follower: Follower | None = None
        self.stop = threading.Event()
        self.thread: threading.Thread | None = None
        self.needs_resync = False  # Redis was unavailable since the last fill
        self.complete_at = -math.inf  # when the mirror last had everything announced, monotonic seconds
        self.names_at = time.monotonic()  # when the master was last asked for names


class Mirror:
    """The last `count` candles of chosen instruments and intervals, in memory.

    One mirror serves all threads of a process, and continues in a forked child process. Reads take no lock
    that a slow Redis can hold.

    Args:
        store: Where to read from.
        symbols: Instruments; None mirrors every instrument, also those that appear later; `()` none yet.
        intervals: Intervals to mirror.
        count: Rows kept of each instrument and interval.
        current_seconds: How old the candle being formed may be when it is read.
        bytes_max: Bound on the memory of all rows.

    Raises:
        UnknownSymbol, UnknownInterval: A name does not exist.
        PkbError: The rows would exceed `bytes_max`.

    Example:
        >>> with Mirror(store, ["INFY"], ["5m"], count=50) as mirror:
        ...     mirror.rows("INFY", "5m", include_current=True).shape[1]
        8
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
        self.resyncs = 0  # how often the mirror filled itself again
        self.memory = MirrorRows(store, bytes_max)
        self._active: dict[BufferKey, float] = {}  # (token, interval) → last read, monotonic seconds
        self._missed_before = 0  # by followers that were replaced
        self._wants_thread = False
        self._process = _ProcessState()
        chosen = None if symbols is None else list(symbols)
        for interval in intervals:
            self.add(chosen, interval, count)

    # -- reading: from memory --------------------------------------------------------------------

    def rows(
        self, symbol: str | int, interval: str, count: int = 100, include_current: bool = False
    ) -> Floats:
        """Return the last rows: float64[≤ count, 8], newest last, columns as in CANDLE_FIELDS.

        The array never changes; completed rows are a view, without a copy. `include_current` adds the candle
        being formed. Raises PkbError if the instrument or interval is not mirrored.
        """
        buffer = self._buffer(symbol, interval, include_current)
        return NO_ROWS if buffer is None else buffer.last(count, include_current)[0]

    def many_rows(
        self, symbols: Sequence[str], interval: str, count: int = 100, include_current: bool = False
    ) -> list[tuple[str, Floats]]:
        """Return `rows` of each symbol; all their current candles are read from Redis at once."""
        name = self._interval(interval)
        tokens = [self._token(symbol) for symbol in symbols]
        if include_current:
            self._refresh([(token, name) for token in tokens])
        buffers = self.memory.buffers[name]
        return [
            (symbol, buffers[token].last(count, include_current)[0] if token in buffers else NO_ROWS)
            for symbol, token in zip(symbols, tokens, strict=True)
        ]

    def candles(
        self, symbol: str | int, interval: str, count: int = 100, include_current: bool = False
    ) -> list[Candle]:
        """Return what `CandleStore.get_candles` returns."""
        buffer = self._buffer(symbol, interval, include_current)
        return [] if buffer is None else candles_of(*buffer.last(count, include_current))

    def bulk(
        self,
        symbols: Sequence[str | int] | None = None,
        interval: str = "5m",
        count: int = 100,
        include_current: bool = False,
    ) -> Bulk:
        """Return what `CandleStore.bulk` returns; the same object again if nothing has changed.

        `symbols` None selects every mirrored instrument that has rows.
        """
        name = self._interval(interval)
        if symbols is None:
            tokens = sorted(self.memory.buffers[name])
        else:
            tokens = list(dict.fromkeys(map(self._token, symbols)))
        if include_current:
            self._refresh([(token, name) for token in tokens])
        bulk = self.memory.bulk(tokens, name, count, include_current)
        return bulk.with_rows_only() if symbols is None else bulk

    def has(self, symbol: str | int, interval: str, count: int = 1) -> bool:
        """Return whether `count` rows of it are mirrored, or all that exist."""
        return self.memory.has(symbol, interval, count)

    @property
    def symbols(self) -> list[str]:
        """Return the mirrored instruments' names (`NSE:INFY`), sorted."""
        tokens = {token for buffers in list(self.memory.buffers.values()) for token in list(buffers)}
        return sorted(symbol for _, symbol in self.memory.named(tokens))

    @property
    def lag_ms(self) -> float:
        """Return how long ago the mirror last had everything announced; infinite before the first fill."""
        return (time.monotonic() - self._process.complete_at) * 1000

    @property
    def missed(self) -> int:
        """Return how many announcements were trimmed unread; the mirror filled itself again each time."""
        follower = self._process.follower
        return self._missed_before + (follower.missed if follower else 0)

    @property
    def rows_refused(self) -> int:
        """Return how many rows and announcements were malformed."""
        return self.store.rows_refused

    @property
    def size_bytes(self) -> int:
        """Return the memory of the rows."""
        return self.memory.size_bytes

    # -- keeping current -------------------------------------------------------------------------

    def add(self, symbols: Iterable[str | int] | None, interval: str, count: int = 100) -> None:
        """Mirror more instruments or rows (arguments as of the class), in one bulk read.

        On an error nothing changes: the class's errors, or redis.RedisError.
        """
        name = find_interval(self.store.settings.intervals, interval).name
        texts = None if symbols is None else list(symbols)
        named = self.store.instruments() if texts is None else self.store.resolve_all(texts)
        process, memory = self._process_state(), self.memory
        with process.work:
            if process.follower is None:
                self._follow(process)
            mirrored, keep = memory.buffers.get(name, {}), memory.keep.get(name, 0)
            if count > keep:
                to_read = [*memory.named(mirrored), *named]
            else:
                to_read = [pair for pair in named if pair[0] not in mirrored]
            self._fill(name, to_read, max(count, keep))
            if texts is None:
                memory.all_instruments.add(name)
            else:
                memory.tokens.update(zip(texts, (token for token, _ in named), strict=True))

    def poll(self, block_seconds: float = 0.0) -> int:
        """Wait so long for announcements, apply them and return how many; call it if no thread runs.

        Raises redis.RedisError or OSError if Redis is unavailable. The mirror keeps its rows and the next
        poll fills it again.
        """
        process = self._process_state()
        if not self.memory.buffers:
            return 0
        with process.reading:
            try:
                return self._poll(process, block_seconds)
            except (redis.RedisError, OSError):
                process.needs_resync = True
                raise

    def start(self) -> Mirror:
        """Keep current in a thread from now on; return the mirror."""
        self._wants_thread = True
        process = self._process_state()
        if process.thread is None or not process.thread.is_alive():
            process.stop.clear()
            process.thread = threading.Thread(
                target=self._run, args=(process,), name="pkb-mirror", daemon=True
            )
            process.thread.start()
        return self

    def close(self) -> None:
        """End the thread. The rows stay readable and grow old."""
        self._wants_thread = False
        self._process.stop.set()
        if self._process.thread is not None:
            self._process.thread.join(timeout=10)
            self._process.thread = None

    def __enter__(self) -> Mirror:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- inside ----------------------------------------------------------------------------------

    def _run(self, process: _ProcessState) -> None:
        backoff = Backoff(RETRY_SECONDS_MIN, RETRY_SECONDS_MAX)
        while not process.stop.is_set():
            try:
                self.poll(BLOCK_SECONDS)
                if not self.memory.buffers:
                    process.stop.wait(BLOCK_SECONDS)
                backoff.reset()
            except (redis.RedisError, OSError, PkbError) as error:
                reason = str(error).partition("\n")[0][:200]
                retry_seconds = backoff.next()
                log.warning("mirror_not_current", reason=reason, retry_seconds=retry_seconds)
                process.stop.wait(retry_seconds)

    def _poll(self, process: _ProcessState, block_seconds: float) -> int:
        follower = process.follower
        if process.needs_resync or follower is None:
            follower = self._resync(process)
        began = time.monotonic()
        losses = follower.missed + follower.restarts
        entries, has_caught_up = follower.read_entries(block_seconds)  # without the lock: it may wait
        if follower.missed + follower.restarts != losses:
            self._resync(process)
            return len(entries)
        with process.work:
            applied = self.memory.apply(entries)
            self._refresh_active()
            if began - process.names_at > NAMES_SECONDS:
                process.names_at = began
                self.memory.follow_names()
            if has_caught_up:  # the read returned everything announced before it began
                process.complete_at = max(process.complete_at, began)
        return applied

    def _follow(self, process: _ProcessState) -> Follower:
        if process.follower is not None:
            self._missed_before += process.follower.missed
            process.follower.close()
        process.follower = Follower(self.store.client, self.store.keys)
        return process.follower

    def _resync(self, process: _ProcessState) -> Follower:
        """Fill again. The position is taken first: rows announced during the fill are applied twice."""
        with process.work:
            follower = self._follow(process)
            self.resyncs += 1
            for name, buffers in list(self.memory.buffers.items()):
                known = self.store.instruments() if name in self.memory.all_instruments else []
                self._fill(name, [*self.memory.named(buffers), *known], self.memory.keep[name])
            process.needs_resync = False
            return follower

    def _fill(self, name: str, instruments: list[tuple[int, str]], keep: int) -> None:
        began = time.monotonic()
        self.memory.fill(name, instruments, keep)
        if self._process.complete_at == -math.inf:
            self._process.complete_at = began

    def _interval(self, interval: str) -> str:
        if interval not in self.memory.buffers:
            interval = find_interval(self.store.settings.intervals, interval).name
            if interval not in self.memory.buffers:
                raise PkbError(f"{interval} is not mirrored", "call `mirror.add(symbols, interval)` first")
        return interval

    def _token(self, symbol: str | int) -> int:
        token = self.memory.tokens.get(symbol)
        if token is None:
            token = self.memory.tokens[symbol] = self.store.resolve(symbol)[0]
        return token

    def _buffer(self, symbol: str | int, interval: str, include_current: bool) -> RowBuffer | None:
        name = self._interval(interval)
        token = self._token(symbol)
        buffer = self.memory.buffers[name].get(token)
        if buffer is None and name not in self.memory.all_instruments:
            raise PkbError(f"{symbol} {name} is not mirrored", "call `mirror.add([symbol], interval)` first")
        if include_current:
            self._refresh([(token, name)])
        return buffer

    def _refresh(self, keys: list[BufferKey]) -> None:
        """Read the current candles of these that are older than `current_seconds`."""
        now = time.monotonic()
        old: list[BufferKey] = []
        for token, interval in keys:
            self._active[token, interval] = now
            buffer = self.memory.buffers[interval].get(token)
            if buffer is not None and now - buffer.current_at > self.current_seconds:
                old.append((token, interval))
        process = self._process_state() if old else self._process
        if not old or process.needs_resync or not process.work.acquire(timeout=REFRESH_WAIT_SECONDS):
            return  # Redis is unavailable or a large fill runs: an old candle is better than a late answer
        try:
            self.memory.refresh(old)
        except (redis.RedisError, OSError):
            process.needs_resync = True  # the read returns what memory holds; `lag_ms` shows its age
        finally:
            process.work.release()

    def _refresh_active(self) -> None:
        """Read the current candles that callers read lately, before a reader finds them too old."""
        now = time.monotonic()
        due: list[tuple[float, BufferKey]] = []
        for key, read_at in list(self._active.items()):
            buffer = self.memory.buffers.get(key[1], {}).get(key[0])
            if buffer is None or now - read_at > ACTIVE_SECONDS:
                self._active.pop(key, None)
            elif now - buffer.current_at > self.current_seconds / 2:
                due.append((buffer.current_at, key))
        if due:  # the oldest first; the rest is read when a caller needs it
            self.memory.refresh([key for _, key in sorted(due)[:REFRESH_MAX]])

    def _process_state(self) -> _ProcessState:
        """Return this process' state; a forked child creates its own and fills again."""
        if self._process.pid != os.getpid():
            self._process = _ProcessState()
            self._process.needs_resync = True
            if self._wants_thread:
                self.start()
        return self._process
