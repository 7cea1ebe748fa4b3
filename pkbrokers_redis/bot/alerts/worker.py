"""The thread behind the alerts: it reads all shards' tick streams from a position of its own.

    read entries → ticks of instruments with alerts → rules → one commit in Redis → wake the outbox

The pipeline does not wait for this reader: it is not a consumer group, and trimming ignores it. Ticks that
were trimmed while no bot ran are lost to it, but an armed alert still fires at the first tick beyond its
level.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
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
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.streams import Batch, StreamReader

log = logs.get("alerts")

ENTRIES_PER_READ = 500  # of each stream
BLOCK_MS = 200
PAUSE_SECONDS = 0.1  # between two reads: a busy feed is read in batches, not entry by entry
COMMIT_EVERY_SECONDS = 1.0  # without a crossing; bounds what is read again after a crash
RELOAD_EVERY_SECONDS = 5.0  # finds alerts that another process set
RETRY_SECONDS = 1.0
JOIN_SECONDS_MAX = 10.0
FEED_CHECK_SECONDS = 0.5
EQUITY_TOKEN = 1  # segment NSE: its trading hours decide whether silence is a problem

COLUMNS = [LAST_PRICE, VOLUME, DAY_HIGH, DAY_LOW, TIME_MS, AT_MS]


class FeedMonitor:
    """Tells a silent feed from a closed market. Times are monotonic seconds, scaled by PKB_TIME_SHIFT."""

    def __init__(self, settings: Settings, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._market = market_clock(settings)
        self._sessions = load_sessions(settings.sessions, settings.timezone, settings.calendar)
        self._schedule = self._sessions.schedule_of(EQUITY_TOKEN)
        self._started_at = self._checked_at = monotonic()
        self._tick_at: float | None = None

    @property
    def silent_seconds(self) -> float:
        """Return the seconds since the last tick, or since the start without one."""
        return self._monotonic() - (self._started_at if self._tick_at is None else self._tick_at)

    def received(self) -> None:
        """Record that ticks arrived."""
        self._tick_at = self._monotonic()

    def open_seconds(self) -> float:
        """Return for how long the market has been open; 0 while it is closed."""
        now_ms = int(self._market())
        for opens, closes in self._sessions.day(self._schedule, now_ms).windows:
            if opens <= now_ms < closes:
                return self._market.real_seconds(now_ms - opens)
        return 0.0

    def check(self, watches: list[Watch]) -> list[Notification]:
        """Return messages for `/alert feed` watches whose feed became silent or recovered."""
        now = self._monotonic()
        if not watches or now - self._checked_at < FEED_CHECK_SECONDS:
            return []
        self._checked_at = now
        silent, is_open_for = self.silent_seconds, self.open_seconds()
        notifications: list[Notification] = []
        for watch in watches:
            alert, memory = watch.alert, watch.memory
            if not isinstance(memory, FeedSilence):
                continue
            has_recovered = memory.is_reported and self._tick_at is not None and silent < alert.value
            is_silent = not memory.is_reported and min(silent, is_open_for) >= alert.value
            if not (has_recovered or is_silent):
                continue
            memory.is_reported, watch.is_dirty = is_silent, True
            text = "✅ Ticks come again"
            if is_silent:
                text = f"🔔 No tick for {duration(silent)} in an open market"
            when = clock_time(self._market() / 1000)
            notifications.append(Notification(alert.chat_id, f"{text} ({when}, alert {alert.id})", 0))
        return notifications


class AlertWorker:
    """Reads the streams in a thread of its own, from `start` until `stop`.

    `reload` and `stop` may be called from any thread. `on_fired` runs in the worker's thread after a commit
    with messages. `counts` has `alert_ticks` (of instruments with alerts), `alerts_fired`, and the
    decoder's counters.
    """

    def __init__(
        self,
        connect: Callable[[], redis.Redis],
        settings: Settings,
        *,
        on_fired: Callable[[], object],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connect, self._keys = connect, settings.keys
        self._on_fired, self._monotonic = on_fired, monotonic
        self._trusts_tick_time = settings.clock != "wall"
        self.counts: Counter[str] = Counter(alert_ticks=0, alerts_fired=0)
        self._logged = logs.Once()
        self._decoder = EntryDecoder(self.counts, self._log_malformed)
        self._feed = FeedMonitor(settings, monotonic)
        self._stop = threading.Event()
        self._changed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="alerts", daemon=True)

    @property
    def silent_seconds(self) -> float:
        """Return the seconds since the last tick of any instrument."""
        return self._feed.silent_seconds

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Commit the current position and end the thread."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(JOIN_SECONDS_MAX)

    def reload(self) -> None:
        """Load the alerts again before the next ticks are evaluated."""
        self._changed.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                client = self._connect()
                reader = StreamReader(client)
                try:
                    self._follow(client, reader)
                finally:
                    reader.close()
                    client.close()
            except (redis.RedisError, PkbError, OSError) as error:
                log.warning("alerts_interrupted", reason=f"{type(error).__name__}: {error}"[:200])
                self._stop.wait(RETRY_SECONDS)
            except Exception:
                log.exception("alerts_failed")
                self._stop.wait(RETRY_SECONDS)

    def _follow(self, client: redis.Redis, reader: StreamReader) -> None:
        """Read from the last checkpoint until `stop`, or until another process commits."""
        store = AlertStore(client, self._keys)
        # The ends come first: an alert that is set after them misses no tick.
        ends = _stream_ends(client, self._keys)
        watches = _Watches(self._keys, store.load(), ends)
        loaded_at = self._monotonic()
        committed_at = float("-inf")  # the start position is committed at once
        batches: list[Batch] = []
        while True:
            is_last = self._stop.is_set()
            # After the read and before the evaluation: a chat that got "Alert 3" gets every tick after that.
            if self._changed.is_set() or self._monotonic() - loaded_at > RELOAD_EVERY_SECONDS:
                self._changed.clear()
                watches.update(store.load())
                loaded_at = self._monotonic()
            notifications = self._evaluate(batches, watches)
            notifications += self._feed.check(watches.of_feed)
            watches.delete_fired_feed()
            if notifications or is_last or self._monotonic() - committed_at > COMMIT_EVERY_SECONDS:
                if not watches.commit(store, notifications):
                    log.warning("commit_refused", reason="another process has committed")
                    return
                committed_at = self._monotonic()
                if notifications:
                    self.counts["alerts_fired"] += len(notifications)
                    self._on_fired()
            if is_last:
                return
            if not any(len(entries) == ENTRIES_PER_READ for _, entries in batches):
                self._stop.wait(PAUSE_SECONDS)
            positions = {self._keys.ticks(shard): entry for shard, entry in watches.positions.items()}
            batches = reader.read(positions, ENTRIES_PER_READ, BLOCK_MS)
            if batches:
                self._feed.received()

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
        places = np.searchsorted(watches.tokens, ticks[:, TOKEN])
        places[places == len(watches.tokens)] = 0
        chosen = np.flatnonzero(watches.tokens[places] == ticks[:, TOKEN])
        chosen = chosen[np.array([not is_invalid(tick) for tick in ticks[chosen]], bool)]
        rows = ticks[chosen][:, COLUMNS].tolist()
        self.counts["alert_ticks"] += len(rows)
        notifications: list[Notification] = []
        for place, (price, volume, high, low, time_ms, at_ms) in zip(
            places[chosen].tolist(), rows, strict=True
        ):
            tick_ms = time_ms if self._trusts_tick_time else trade_time(time_ms, at_ms)
            for watch in watches.by_place[place]:
                event = watch.tick(price, volume, high, low, tick_ms)
                alert = watch.alert
                if event is not None and alert.id not in watches.deleted:
                    notifications.append(Notification(alert.chat_id, _sentence(alert, event, tick_ms), at_ms))
                    if alert.once:
                        watches.deleted.add(alert.id)
        return notifications

    def _log_malformed(self, event: str, place: str, **evidence: Any) -> None:
        if self._logged.first((event, place)):
            log.warning(event, place=place, **evidence)


class _Watches:
    """The alerts in memory, indexed by instrument, and the position in each stream."""

    def __init__(self, keys: Keys, checkpoint: Checkpoint, ends: dict[int, str]) -> None:
        self._keys, self._rev = keys, checkpoint.rev
        self._written = checkpoint.positions
        self.positions = {shard: checkpoint.positions.get(shard, end) for shard, end in ends.items()}
        self.deleted: set[int] = set()  # alert ids to delete with the next commit
        self._by_id: dict[int, Watch] = {}
        self.update(checkpoint)

    def update(self, checkpoint: Checkpoint) -> None:
        """Take over the current set of alerts; known ones keep what they remember in memory."""
        alerts = {alert.id: alert for alert in checkpoint.alerts if alert.id not in self.deleted}
        # A state without an alert: the chat removed it while a commit was under way.
        self.deleted |= checkpoint.states.keys() - alerts.keys()
        self._by_id = {
            number: self._by_id.get(number) or Watch(alert, checkpoint.states.get(number, ()))
            for number, alert in alerts.items()
        }
        self._index()

    def _index(self) -> None:
        by_token: dict[int, list[Watch]] = {}
        for watch in self._by_id.values():
            by_token.setdefault(watch.alert.token, []).append(watch)
        self.of_feed = by_token.pop(0, [])
        self.tokens = np.array(sorted(by_token), np.float64)  # as ticks have them
        self.by_place = [by_token[token] for token in sorted(by_token)]
        self.shards = {self._keys.shard_of(token) for token in by_token}

    def delete_fired_feed(self) -> None:
        """Delete `/alert feed … once` after it fired."""
        for watch in self.of_feed:
            if watch.alert.once and isinstance(watch.memory, FeedSilence) and watch.memory.is_reported:
                self.deleted.add(watch.alert.id)

    def commit(self, store: AlertStore, notifications: list[Notification]) -> bool:
        """Write what changed since the last commit. Return False when another process has committed."""
        changed = {n: watch for n, watch in self._by_id.items() if watch.is_dirty and n not in self.deleted}
        states: dict[int, list[Any] | None] = {n: watch.state() for n, watch in changed.items()}
        states |= dict.fromkeys(self.deleted)
        moved = {s: entry for s, entry in self.positions.items() if self._written.get(s) != entry}
        if not (states or moved or notifications):
            return True
        if not store.commit(self._rev, moved, states, notifications):
            return False
        self._rev += 1
        self._written = dict(self.positions)
        for watch in changed.values():
            watch.is_dirty = False
        if self.deleted:
            for number in self.deleted:
                self._by_id.pop(number, None)
            self.deleted = set()
            self._index()
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
