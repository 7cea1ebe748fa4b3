"""The thread behind the alerts: it reads all shards' tick streams from a position of its own.

    read entries → ticks of instruments with alerts → rules → one commit in Redis → wake the outbox

The pipeline does not wait for this reader: it is not a consumer group, and trimming ignores it. Ticks that
were trimmed while no bot ran are lost to it, but an armed alert still fires at the first tick beyond its
level.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import redis

from pkbrokers_redis import logs
from pkbrokers_redis.aggregate.shard import EntryDecoder
from pkbrokers_redis.bot.alerts.rules import Alert, FeedSilence, Watch, trade_time
from pkbrokers_redis.bot.alerts.store import AlertStore, Checkpoint, Notification
from pkbrokers_redis.bot.text import clock_time, duration, escape
from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.candles.model import (
    AT_MS,
    DAY_HIGH,
    DAY_LOW,
    LAST_PRICE,
    TIME_MS,
    TOKEN,
    VOLUME,
    TickArray,
)
from pkbrokers_redis.candles.rules import is_invalid
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.runtime.roles import follow_calendar
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.streams import Batch, StreamReader

log = logs.get("alerts")

ENTRIES_PER_READ = 500  # of each stream
BLOCK_MS = 200
PAUSE_SECONDS = 0.1  # between two reads: a busy feed is read in batches, not entry by entry
COMMIT_EVERY_SECONDS = 1.0  # without a crossing; bounds what is read again after a crash
RETRY_SECONDS = 1.0
JOIN_SECONDS_MAX = 10.0
EQUITY_TOKEN = 1  # segment NSE: its trading hours decide whether silence is a problem

COLUMNS = [TOKEN, LAST_PRICE, VOLUME, DAY_HIGH, DAY_LOW, TIME_MS, AT_MS]


class FeedMonitor:
    """Tells a silent feed from a closed market. Times are monotonic seconds, scaled by PKB_TIME_SHIFT."""

    def __init__(self, settings: Settings, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._market = market_clock(settings)
        self._sessions = load_sessions(settings.sessions, settings.timezone, settings.calendar)
        self._schedule = self._sessions.schedule_of(EQUITY_TOKEN)
        self._started_at = self._tick_at = monotonic()

    @property
    def silent_seconds(self) -> float:
        """Return the seconds since the last tick, or since the start without one."""
        return self._monotonic() - self._tick_at

    def received(self) -> None:
        """Record that ticks arrived."""
        self._tick_at = self._monotonic()

    def open_seconds(self) -> float:
        """Return for how long the market has been open; 0 while it is closed."""
        follow_calendar(self._sessions)
        now_ms = int(self._market())
        for opens, closes in self._sessions.day(self._schedule, now_ms).windows:
            if opens <= now_ms < closes:
                return self._market.real_seconds(now_ms - opens)
        return 0.0

    def check(self, watch: Watch) -> str | None:
        """Return a sentence when the feed of an `/alert feed` became silent, or recovered."""
        memory, seconds = watch.memory, watch.alert.value
        if not isinstance(memory, FeedSilence):
            return None
        silent = self.silent_seconds
        has_recovered = memory.is_reported and self._tick_at > self._started_at and silent < seconds
        is_silent = not memory.is_reported and min(silent, self.open_seconds()) >= seconds
        if not (has_recovered or is_silent):
            return None
        memory.is_reported, watch.is_dirty = is_silent, True
        text = f"🔔 No tick for {duration(silent)} in an open market" if is_silent else "✅ Ticks come again"
        return f"{text} ({clock_time(self._market() / 1000)}, alert {watch.alert.id})"


class AlertWorker:
    """Reads the streams in a thread of its own, from `start` until `stop`.

    `on_fired` runs in that thread after a commit with messages. `counts` has `alert_ticks` (of instruments
    with alerts), `alerts_fired`, and the decoder's counters.
    """

    def __init__(
        self, connect: Callable[[], redis.Redis], settings: Settings, *, on_fired: Callable[[], object]
    ) -> None:
        self._connect, self._keys, self._on_fired = connect, settings.keys, on_fired
        self._trusts_tick_time = settings.clock != "wall"
        self.counts: Counter[str] = Counter(alert_ticks=0, alerts_fired=0)
        self._logged = logs.Once()
        self._decoder = EntryDecoder(self.counts, self._log_malformed)
        self.feed = FeedMonitor(settings)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="alerts", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Commit the current position and end the thread."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(JOIN_SECONDS_MAX)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with self._connect() as client:
                    reader, store = StreamReader(client), AlertStore(client, self._keys)
                    # The ends come first: an alert that is set after them misses no tick.
                    ends = _stream_ends(client, self._keys)
                    try:
                        while not self._stop.is_set():
                            self._follow(store, reader, ends)
                    finally:
                        reader.close()
            except (redis.RedisError, PkbError, OSError) as error:
                log.warning("alerts_interrupted", reason=f"{type(error).__name__}: {error}"[:200])
                self._stop.wait(RETRY_SECONDS)
            except Exception:
                log.exception("alerts_failed")
                self._stop.wait(RETRY_SECONDS)

    def _follow(self, store: AlertStore, reader: StreamReader, ends: dict[int, str]) -> None:
        """Read from the last checkpoint until `stop`, or until a chat or another process changes something.

        Then the ticks after the checkpoint are read again, with the new set of alerts.
        """
        watches = _Watches(self._keys, store.load(), ends)
        committed_at = float("-inf")  # the start position is committed at once
        batches: list[Batch] = []
        while True:
            is_last = self._stop.is_set()
            notifications = self._evaluate(batches, watches)
            for watch in watches.of_feed:
                if text := self.feed.check(watch):
                    notifications.append(Notification(watch.alert.chat_id, text, 0))
                    watches.fired(watch)
            if notifications or is_last or time.monotonic() - committed_at > COMMIT_EVERY_SECONDS:
                if not watches.commit(store, notifications):
                    return
                committed_at = time.monotonic()
                if notifications:
                    self.counts["alerts_fired"] += len(notifications)
                    self._on_fired()
                if watches.deleted or is_last:
                    return  # in the first case to load the rest
            if not any(len(entries) == ENTRIES_PER_READ for _, entries in batches):
                self._stop.wait(PAUSE_SECONDS)
            positions = {self._keys.ticks(shard): entry for shard, entry in watches.positions.items()}
            batches = reader.read(positions, ENTRIES_PER_READ, BLOCK_MS)
            if batches:
                self.feed.received()

    def _evaluate(self, batches: list[Batch], watches: _Watches) -> list[Notification]:
        """Return what fired. Shards without alerts are not even decoded."""
        shard_of = {self._keys.ticks(shard).encode(): shard for shard in watches.positions}
        notifications: list[Notification] = []
        for key, entries in batches:
            shard = shard_of[key]
            watches.positions[shard] = entries[-1][0].decode()
            if shard in watches.shards:
                pending = self._decoder.decode(key.decode(), entries)
                ticks = np.concatenate([entry.ticks for entry in pending])
                notifications += self._evaluate_ticks(ticks, watches)
        return notifications

    def _evaluate_ticks(self, ticks: TickArray, watches: _Watches) -> list[Notification]:
        """Return what fired. A tick that the aggregator refuses fires nothing and is not remembered."""
        ticks = ticks[np.isin(ticks[:, TOKEN], watches.tokens)]
        ticks = ticks[np.array([not is_invalid(tick) for tick in ticks], bool)]
        self.counts["alert_ticks"] += len(ticks)
        notifications: list[Notification] = []
        for token, price, volume, high, low, time_ms, at_ms in ticks[:, COLUMNS].tolist():
            tick_ms = time_ms if self._trusts_tick_time else trade_time(time_ms, at_ms)
            for watch in watches.by_token[int(token)]:
                event = watch.tick(price, volume, high, low, tick_ms)
                if event is not None and watch.alert.id not in watches.deleted:
                    text = _sentence(watch.alert, event, tick_ms)
                    notifications.append(Notification(watch.alert.chat_id, text, at_ms))
                    watches.fired(watch)
        return notifications

    def _log_malformed(self, event: str, place: str, **evidence: Any) -> None:
        if self._logged.first((event, place)):
            log.warning(event, place=place, **evidence)


class _Watches:
    """The alerts of a checkpoint in memory, by instrument, and the position in each stream."""

    def __init__(self, keys: Keys, checkpoint: Checkpoint, ends: dict[int, str]) -> None:
        """Resume from the checkpoint; a stream that it does not name is read from its end."""
        self._rev, self._committed = checkpoint.rev, checkpoint.positions
        self.positions = ends | checkpoint.positions
        self.deleted: set[int] = set()  # ids of alerts that fired `once`
        self._watches = [Watch(alert, checkpoint.states.get(alert.id, ())) for alert in checkpoint.alerts]
        self.by_token: defaultdict[int, list[Watch]] = defaultdict(list)
        for watch in self._watches:
            self.by_token[watch.alert.token].append(watch)
        self.of_feed = self.by_token.pop(0, [])
        self.tokens = np.array(list(self.by_token), np.float64)  # as ticks have them
        self.shards = {keys.shard_of(token) for token in self.by_token}

    def fired(self, watch: Watch) -> None:
        """Delete an alert that was to fire `once`, with the next commit."""
        if watch.alert.once:
            self.deleted.add(watch.alert.id)

    def commit(self, store: AlertStore, notifications: list[Notification]) -> bool:
        """Write what changed since the last commit. Return False when something else changed in Redis."""
        changed = [watch for watch in self._watches if watch.is_dirty]
        states: dict[int, list[Any] | None] = {watch.alert.id: watch.state() for watch in changed}
        states |= dict.fromkeys(self.deleted)
        moved = dict(self.positions.items() - self._committed.items())
        if not store.commit(self._rev, moved, states, notifications):
            return False
        self._rev += bool(moved or states or notifications)
        self._committed = dict(self.positions)
        for watch in changed:
            watch.is_dirty = False
        return True


def _stream_ends(client: redis.Redis, keys: Keys) -> dict[int, str]:
    """Return each stream's last id, where a reader without a position starts."""
    pipeline = client.pipeline(transaction=False)
    for shard in range(keys.shards):
        pipeline.xrevrange(keys.ticks(shard), count=1)
    replies = pipeline.execute(raise_on_error=False)
    return {
        shard: reply[0][0].decode() if isinstance(reply, list) and reply else "0-0"
        for shard, reply in enumerate(replies)
    }


def _sentence(alert: Alert, event: str, time_ms: float) -> str:
    """Return `🔔 NSE:INFY rose to 1,600.05, above 1,600.00 (10:31:07, alert 3)`."""
    end = f"alert {alert.id}" + (", now removed" if alert.once else "")
    return f"🔔 <b>{escape(alert.symbol)}</b> {escape(event)} ({clock_time(time_ms / 1000)}, {end})"
