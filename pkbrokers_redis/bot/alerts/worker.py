"""The reader behind the alerts: all shards' tick streams, from a position of its own, in a thread.

    read what is there → ticks with alerts (one vectorised look-up) → rules → commit → wake the sender

Nothing waits for it: it is no consumer group, so that streams are trimmed as if it were not there. Ticks that
were trimmed while it was away are lost to it, but not what they led to: an armed alert fires at the first
tick it sees beyond its level.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import redis

from pkbrokers_redis import logs
from pkbrokers_redis.aggregate.shard import EntryDecoder
from pkbrokers_redis.bot.alerts.book import AlertBook
from pkbrokers_redis.bot.alerts.commit import Picture, Told, commit, load_armed, load_picture
from pkbrokers_redis.bot.alerts.feed import FeedWatch
from pkbrokers_redis.bot.alerts.model import Alert
from pkbrokers_redis.bot.alerts.rules import Watch, trade_time, watch_of
from pkbrokers_redis.bot.text import clock_time, escape
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
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.streams import Batch, StreamReader

log = logs.get("alerts")

ENTRIES_A_READ = 500  # a stream and read
BLOCK_MS = 200
PACE_SECONDS = 0.1  # between two reads: a busy feed is read in batches, not entry by entry
COMMIT_EVERY_SECONDS = 1.0  # without a crossing: what is read again after a crash
RELOAD_EVERY_SECONDS = 5.0  # alerts that another process set
RETRY_SECONDS = 1.0
JOIN_SECONDS_MAX = 10.0

COLUMNS = [LAST_PRICE, VOLUME, DAY_HIGH, DAY_LOW, TIME_MS, AT_MS]


class AlertWorker:
    """`start`, `stop`; `reload` when alerts changed. `on_fired` is called in its thread after a commit.

    `counts`: `alert_ticks` (of instruments with alerts), `alerts_fired`, `malformed_entries`,
    `malformed_rows`.
    `silent_seconds` is how long no tick came.
    """

    def __init__(
        self,
        connect: Callable[[], redis.Redis],
        settings: Settings,
        *,
        on_fired: Callable[[], object],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connect, self._settings, self._keys = connect, settings, settings.keys
        self._on_fired, self._monotonic = on_fired, monotonic
        self.counts = {"alert_ticks": 0, "alerts_fired": 0, "malformed_entries": 0, "malformed_rows": 0}
        self._by_wall_clock = settings.clock == "wall"  # else a tick's own time is believed
        self._odd = logs.Once()
        self._decoder = EntryDecoder(self.counts, self._tell_odd)
        self._feed = FeedWatch(settings, monotonic)
        self._stop = threading.Event()
        self._changed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="alerts", daemon=True)

    @property
    def silent_seconds(self) -> float:
        return self._feed.silent_seconds

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Commit where it stands, and end."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(JOIN_SECONDS_MAX)

    def reload(self) -> None:
        """The set of alerts changed: look before the next read."""
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
                log.warning("begins_anew", error=f"{type(error).__name__}: {error}"[:200])
                self._stop.wait(RETRY_SECONDS)
            except Exception:
                log.exception("failed")
                self._stop.wait(RETRY_SECONDS)

    def _follow(self, client: redis.Redis, reader: StreamReader) -> None:
        """From what the last commit left, until stopped or refused."""
        book = AlertBook(client, self._keys)
        state = _State(self._keys, load_picture(client, self._keys), self._ends(client))
        self._changed.set()
        loaded_at = self._monotonic()
        committed_at = float("-inf")  # where we begin is kept at once: ticks from now on are not lost
        while True:
            stopping = self._stop.is_set()
            batches = [] if stopping else self._read(reader, state)
            # Between read and look: whoever was told "Alert 3" is sure of every tick after that.
            if self._changed.is_set() or self._monotonic() - loaded_at > RELOAD_EVERY_SECONDS:
                self._changed.clear()
                alerts = book.all()
                state.remember(load_armed(client, self._keys, state.strangers(alerts)))
                state.take(alerts)
                loaded_at = self._monotonic()
            told = self._look_at(batches, state)
            told += self._feed.look(state.feed_alerts, state.feed_down)
            state.gone |= {
                each.id for each in state.feed_alerts if each.once and state.feed_down.get(each.id)
            }
            if told or stopping or self._monotonic() - committed_at > COMMIT_EVERY_SECONDS:
                if not state.commit(client, told):
                    log.warning("refused", why="another process has committed")
                    return
                committed_at = self._monotonic()
                if told:
                    self.counts["alerts_fired"] += len(told)
                    self._on_fired()
            if stopping:
                return
            if not state.is_behind:
                self._stop.wait(PACE_SECONDS)

    def _ends(self, client: redis.Redis) -> dict[int, str]:
        """Each stream's last id: where a reader without a position begins."""
        pipeline = client.pipeline(transaction=False)
        for shard in range(self._keys.shards):
            pipeline.xrevrange(self._keys.ticks(shard), count=1)
        replies = pipeline.execute(raise_on_error=False)
        return {
            shard: reply[0][0].decode() if isinstance(reply, list) and reply else "0-0"
            for shard, reply in enumerate(replies)
        }

    def _read(self, reader: StreamReader, state: _State) -> list[Batch]:
        if not state.is_read:  # the first round only looks where it stands
            state.is_read = True
            return []
        positions = {self._keys.ticks(shard): at for shard, at in state.positions.items()}
        batches = reader.read(positions, ENTRIES_A_READ, BLOCK_MS)
        state.is_behind = any(len(entries) == ENTRIES_A_READ for _, entries in batches)
        if batches:
            self._feed.heard()
        return batches

    def _look_at(self, batches: list[Batch], state: _State) -> list[Told]:
        shard_of = {self._keys.ticks(shard).encode(): shard for shard in state.positions}
        told: list[Told] = []
        for key, entries in batches:
            shard = shard_of[key]
            state.positions[shard] = entries[-1][0].decode()
            if shard in state.shards:
                pending = self._decoder.decode(key.decode(), entries)
                told += self._ask(np.concatenate([each.ticks for each in pending]), state)
        return told

    def _ask(self, ticks: TickArray, state: _State) -> list[Told]:
        """Ticks → what fired. One that the aggregator would not take fires nothing and is not remembered."""
        places = np.searchsorted(state.tokens, ticks[:, TOKEN])
        places[places == len(state.tokens)] = 0
        mine = np.flatnonzero(state.tokens[places] == ticks[:, TOKEN])
        mine = mine[np.array([not is_invalid(tick) for tick in ticks[mine]], bool)]
        rows = ticks[mine][:, COLUMNS].tolist()
        self.counts["alert_ticks"] += len(rows)
        told: list[Told] = []
        for place, (price, volume, high, low, time_ms, at_ms) in zip(
            places[mine].tolist(), rows, strict=True
        ):
            if self._by_wall_clock:
                time_ms = trade_time(time_ms, at_ms)
            for watch in state.watches[place]:
                what = watch.tick(price, volume, high, low, time_ms)
                if what is not None and watch.alert.id not in state.gone:
                    told.append(Told(watch.alert.chat_id, _sentence(watch.alert, what, time_ms), at_ms))
                    if watch.alert.once:
                        state.gone.add(watch.alert.id)
        return told

    def _tell_odd(self, event: str, place: str, **evidence: Any) -> None:
        if self._odd.first((event, place)):
            log.warning(event, place=place, **evidence)


class _State:
    """The alerts in memory, by instrument, and where the reader stands."""

    def __init__(self, keys: Keys, picture: Picture, ends: dict[int, str]) -> None:
        self._keys, self._rev = keys, picture.rev
        self._armed = picture.armed  # as Redis has it
        self._written = picture.positions
        self.positions = {shard: picture.positions.get(shard, end) for shard, end in ends.items()}
        self._by_id: dict[int, Watch] = {}
        self.tokens = np.empty(0)  # float64, ascending, as the ticks have them
        self.watches: list[list[Watch]] = []  # by place in `tokens`
        self.shards: set[int] = set()  # with alerts; the others' entries are not even decoded
        self.feed_alerts: list[Alert] = []
        self.feed_down: dict[int, bool] = {
            number: bool(cells and cells[0]) for number, cells in picture.armed.items()
        }
        self._feed_written = dict(self.feed_down)
        self.gone: set[int] = set()  # `once` and fired, not committed yet
        self.is_behind = self.is_read = False
        self._orphans: set[int] = set()

    def strangers(self, alerts: list[Alert]) -> list[int]:
        """Those whose memory we have not read."""
        return [alert.id for alert in alerts if alert.id not in self._armed]

    def remember(self, armed: dict[int, list[Any]]) -> None:
        """What Redis has of them."""
        self._armed |= armed

    def take(self, alerts: list[Alert]) -> None:
        """The set as it is now; those we had keep what they remember."""
        known = {alert.id: alert for alert in alerts if alert.id not in self.gone}
        self.feed_alerts = [alert for alert in known.values() if alert.kind == "feed"]
        self._by_id = {
            number: self._by_id.get(number) or watch_of(alert, self._armed.get(number, ()))
            for number, alert in known.items()
            if alert.kind != "feed"
        }
        by_token: dict[int, list[Watch]] = {}
        for watch in self._by_id.values():
            by_token.setdefault(watch.alert.token, []).append(watch)
        self.tokens = np.array(sorted(by_token), np.float64)
        self.watches = [by_token[token] for token in sorted(by_token)]
        self.shards = {self._keys.shard_of(token) for token in by_token}
        self.feed_down = {alert.id: self.feed_down.get(alert.id, False) for alert in self.feed_alerts}
        self._orphans = self._armed.keys() - known.keys()

    def commit(self, client: redis.Redis, told: list[Told]) -> bool:
        """Write what changed since the last time."""
        states: dict[int, list[Any] | None] = {
            number: watch.state() for number, watch in self._by_id.items() if watch.dirty
        }
        states |= {
            number: [down]
            for number, down in self.feed_down.items()
            if self._feed_written.get(number) != down
        }
        states |= dict.fromkeys(self.gone | self._orphans)
        positions = {s: at for s, at in self.positions.items() if self._written.get(s) != at}
        if not (states or positions or told):
            return True
        if not commit(client, self._keys, self._rev, positions, states, told):
            return False
        self._rev += 1
        self._written = dict(self.positions)
        self._feed_written = dict(self.feed_down)
        for number, cells in states.items():
            if cells is None:
                self._armed.pop(number, None)
            else:
                self._armed[number] = cells
                if number in self._by_id:
                    self._by_id[number].dirty = False
        gone, self.gone, self._orphans = self.gone, set(), set()
        if gone:
            kept = [watch.alert for watch in self._by_id.values()] + self.feed_alerts
            self.take([alert for alert in kept if alert.id not in gone])
        return True


def _sentence(alert: Alert, what: str, time_ms: float) -> str:
    """`🔔 NSE:INFY rose to 1,600.05, above 1,600.00 (10:31:07, alert 3)`"""
    end = f"alert {alert.id}" + (", now removed" if alert.once else "")
    return f"🔔 <b>{escape(alert.symbol)}</b> {escape(what)} ({clock_time(time_ms / 1000)}, {end})"
