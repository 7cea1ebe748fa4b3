"""Judge each feed twice a second, and act when it is mute.

| state          | observed                                            | action                         |
|----------------|-----------------------------------------------------|--------------------------------|
| `ok`           | ticks arrive; some instruments may be illiquid      | none                           |
| `quiet`        | its markets are closed, or in the closing auction   | none                           |
| `mute`         | no ticks while its market is open: heartbeats only, | reconnect, with growing pauses |
|                | or connections that end in silence                  |                                |
| `partly_mute`  | active instruments are silent while others tick     | resubscribe, then reconnect    |
| `expired`      | Kite answers 403                                    | the socket renews the session  |
| `rate_limited` | Kite answers 429                                    | the socket waits               |
| `disconnected` | there is no connection                              | the socket tries again         |

Active instruments are the indices and the 20 that tick most often. A new subscription brings each
instrument's last tick again, hours old perhaps: it proves nothing. All times are market time, epoch ms.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from pkbrokers_redis import logs
from pkbrokers_redis.candles.calendar import IST_MS, UNKNOWN, Sessions
from pkbrokers_redis.candles.model import LAST_PRICE, LAST_QUANTITY, SEGMENT_INDICES, VOLUME, TickArray
from pkbrokers_redis.ingest.connections import Connections, FeedConnection, Outage
from pkbrokers_redis.ingest.feeds import Feed
from pkbrokers_redis.ingest.outages import Outages

State = Literal["ok", "quiet", "mute", "partly_mute", "expired", "rate_limited", "disconnected"]
Action = Literal["none", "reconnect", "resubscribe", "renew", "wait"]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

log = logs.get("watchdog")

CHECK_SECONDS = 0.5
MUTE_MS_MIN = 15_000.0  # Kite sends a picture a second: fifteen are missing
UNKNOWN_MUTE_MS_MIN = 60_000.0  # of a feed without an active instrument, or with an unknown rhythm
MUTE_MS_MAX = 1_800_000.0  # between reconnects of a feed that stays mute: a holiday the calendar lacks
SILENT_MS_MIN = 15_000.0  # of an active instrument
ILLIQUID_MS = 600_000.0  # without a tick in an open market
TRIAL_MS = 15_000.0  # the time that a resubscription or a new connection is given
RESENT_MS = 5_000.0  # ticks so soon after a connect may be the last ones again
RECOVERED_MS = 60_000.0  # an instrument that ticks for so long after an attempt is well
MACHINE_MS_MIN = 2_000.0  # no limit is below this on the machine's clock, at any speed of a rehearsal
ATTEMPTS_MAX = 3  # a resubscription and two more; then the instrument counts as halted …
HALTED_MS = 300_000.0  # … and is subscribed again so often: Kite may have dropped it
RECONNECT_SHARE = 0.5  # so large a part of the active instruments is worth a reconnect

LEARNING_RATE = 0.1  # weight of the latest interval in the usual one
INTERVAL_MS_MAX = 600_000  # a longer one is a night or an outage, not the instrument's rhythm
ACTIVE_MAX = 20  # most active instruments of a feed, next to its indices
ACTIVE_INTERVAL_MS_MAX = 5_000  # an instrument with a longer usual interval is not active
ACTIVE_TICKS_MIN = 20  # before that its rhythm is unknown
SILENT_INTERVALS = 10  # an active instrument is silent after so many of its usual intervals

NAMES_MAX = 5  # instruments named in a log line
DAY_MS = 86_400_000
# Windows of the calendar in which no tick is missing: orders are collected, or the hours are not known.
SILENT_WINDOWS = ("closing_auction", UNKNOWN)
ALARMS = {"mute", "partly_mute", "expired", "rate_limited"}


class Observation(NamedTuple):
    """What is seen of one feed."""

    socket: str
    connected_ms: float
    ticked_ms: float
    mute_ms: float  # a longer silence is unusual for this feed
    opened_ms: float | None  # since when one of its markets trades continuously, None if none does
    instruments: int
    active: int = 0
    silent: tuple[int, ...] = ()  # those of the active instruments that do not tick


class Verdict(NamedTuple):
    """A feed's state, what to do now, why, and the instruments concerned."""

    state: State
    action: Action
    reason: str
    tokens: tuple[int, ...] = ()


NOT_CONNECTED = Verdict("disconnected", "none", "no connection; the socket tries again")


class FeedDiagnosis:
    """Judges one feed and remembers what was tried. Pure: observations in, verdicts out."""

    def __init__(self, speed: float = 1.0) -> None:
        """Prepare; `speed` is the market's time per machine time (of a rehearsal)."""
        self._floor_ms = MACHINE_MS_MIN * speed
        self._reconnects = 0  # in a row, without a tick after them
        self._mute_from_ms: float | None = None  # the last tick when it fell mute
        self._tickless_from_ms: float | None = None  # the first of the connections without a tick
        self.halted: tuple[int, ...] = ()  # silent though subscribed again, by the last verdict
        self._attempts: dict[int, tuple[int, float]] = {}  # silent instrument → how many, the last when

    @property
    def silent_ms_min(self) -> float:
        """The least silence of an active instrument that counts."""
        return max(SILENT_MS_MIN, self._floor_ms)

    def judge(self, seen: Observation, now_ms: float) -> Verdict:
        """Return the verdict; an action other than `none` is to be taken each time it is returned."""
        self.halted = ()
        if seen.socket == "forbidden":
            return Verdict("expired", "renew", "Kite answers 403: the session is dead")
        if seen.socket == "throttled":
            return Verdict("rate_limited", "wait", "Kite answers 429: too many connections or requests")
        resent_ms = seen.connected_ms + max(RESENT_MS, self._floor_ms)
        if self._mute_from_ms is not None and seen.ticked_ms > max(self._mute_from_ms, resent_ms):
            self._mute_from_ms, self._reconnects = None, 0
        if seen.opened_ms is None or not seen.instruments:
            self._mute_from_ms, self._tickless_from_ms, self._reconnects = None, None, 0
            return Verdict("quiet", "none", "its markets are closed, or in the closing auction")
        if self._mute_from_ms is None and self._connections_end_silent(seen, now_ms, resent_ms):
            self._mute_from_ms = seen.ticked_ms
        if seen.socket != "connected":
            if self._mute_from_ms is not None:
                return Verdict("mute", "none", "reconnecting")
            return NOT_CONNECTED
        silent_ms = now_ms - max(seen.ticked_ms, seen.opened_ms, seen.connected_ms)
        usual = max(MUTE_MS_MIN if seen.active else UNKNOWN_MUTE_MS_MIN, self._floor_ms, seen.mute_ms)
        if silent_ms > min(usual * 2.0 ** min(self._reconnects, 16), max(usual, MUTE_MS_MAX)):
            self._mute_from_ms = seen.ticked_ms
            self._reconnects += 1
            return Verdict("mute", "reconnect", f"heartbeats but no tick for {silent_ms / 1000:.0f} s")
        if self._mute_from_ms is not None:
            return Verdict("mute", "none", "reconnected, no tick yet")
        return self._judge_active(seen, now_ms)

    def _connections_end_silent(self, seen: Observation, now_ms: float, resent_ms: float) -> bool:
        """Return whether several connections in a row brought no tick for an unusual time.

        The socket gives up a connection that says nothing at all, heartbeats included, and opens the next
        one: each alone is too young to be judged.
        """
        if seen.ticked_ms > resent_ms:
            self._tickless_from_ms = None
        elif seen.socket == "connected" and self._tickless_from_ms is None:
            self._tickless_from_ms = seen.connected_ms
        from_ms = self._tickless_from_ms
        if from_ms is None or seen.connected_ms <= from_ms or seen.opened_ms is None:
            return False
        return now_ms - max(from_ms, seen.opened_ms) > max(MUTE_MS_MIN, self._floor_ms, seen.mute_ms)

    def _judge_active(self, seen: Observation, now_ms: float) -> Verdict:
        for token, (_, tried_ms) in tuple(self._attempts.items()):
            if token not in seen.silent and now_ms - tried_ms > max(RECOVERED_MS, self._floor_ms):
                del self._attempts[token]
        tried = {token for token, (n, _) in self._attempts.items() if n >= ATTEMPTS_MAX}
        self.halted = tuple(token for token in seen.silent if token in tried)
        silent = tuple(token for token in seen.silent if token not in tried)
        if not silent:
            again = max(HALTED_MS, self._floor_ms)
            if due := tuple(each for each in self.halted if now_ms - self._attempts[each][1] > again):
                self._count_attempt(due, now_ms)
                return Verdict("ok", "resubscribe", f"{len(due)} active instruments are halted", due)
            reason = f"{len(tried)} active instruments are halted" if tried else "ticks arrive"
            return Verdict("ok", "none", reason)
        reason = f"{len(silent)} of {seen.active} active instruments are silent while others tick"
        if untried := tuple(token for token in silent if token not in self._attempts):
            self._count_attempt(untried, now_ms)
            return Verdict("partly_mute", "resubscribe", reason, untried)
        if now_ms - max(self._attempts[token][1] for token in silent) <= max(TRIAL_MS, self._floor_ms):
            return Verdict("partly_mute", "none", reason, silent)
        self._count_attempt(silent, now_ms)
        if len(silent) >= RECONNECT_SHARE * seen.active:
            return Verdict("partly_mute", "reconnect", f"{reason}, though resubscribed", silent)
        return Verdict("partly_mute", "resubscribe", reason, silent)

    def _count_attempt(self, tokens: tuple[int, ...], now_ms: float) -> None:
        for token in tokens:
            self._attempts[token] = (self._attempts.get(token, (0, 0.0))[0] + 1, now_ms)


LAST_MS, INTERVAL_MS, TICKS, PRICE, QUANTITY, DAY_VOLUME = range(6)  # rows of a table's `state`


@dataclass(frozen=True, slots=True)
class _Table:
    tokens: Ints  # ascending
    feed: Ints
    schedule: Ints
    state: Floats  # 6 rows, a column per instrument; NaN where nothing is known
    newest_ms: Floats  # by feed number
    schedules: list[frozenset[int]]  # by feed number


class LastTick(NamedTuple):
    """An instrument's last tick: `at_ms` is its receive time, 0 before any."""

    at_ms: float
    price: float
    quantity: float
    volume: float

    def has_missed(self, later: LastTick) -> bool:
        """Return whether something was traded between this tick and a later one besides its own trade."""
        if np.isnan(self.volume) or np.isnan(later.volume):  # an index, or a mode without volume
            return bool(later.price != self.price)
        return bool(later.volume - np.nan_to_num(later.quantity) > self.volume)


class Silence(NamedTuple):
    """How many instruments of a feed are active, which of those are silent, and which others are illiquid."""

    active: int = 0
    silent: tuple[int, ...] = ()
    illiquid: tuple[int, ...] = ()


class TickActivity:
    """When each instrument last ticked, and its usual interval.

    The writer's thread calls `note` with what it parses (~20 µs a frame), the watchdog reads. Parsed frames
    are the measure of time, so a writer that waits for Redis makes no instrument look silent.
    """

    def __init__(self, schedule_of: Callable[[int], int]) -> None:
        """Prepare; `schedule_of` returns a token's schedule id in the calendar."""
        self._schedule_of = schedule_of
        self._table = self._make([])

    def _make(self, feeds: Sequence[Feed]) -> _Table:
        pairs = sorted((token, feed.number) for feed in feeds for token in feed.tokens)
        schedule = {token: self._schedule_of(token) for token, _ in pairs}
        state = np.full((6, len(pairs)), np.nan)
        state[[LAST_MS, TICKS]] = 0.0
        return _Table(
            np.array([token for token, _ in pairs], np.int64),
            np.array([number for _, number in pairs], np.int64),
            np.array(list(schedule.values()), np.int64),
            state,
            np.zeros(len(feeds)),
            [frozenset(map(schedule.__getitem__, feed.tokens)) for feed in feeds],
        )

    def follow(self, feeds: Sequence[Feed]) -> None:
        """Watch these feeds from now on; instruments that stay keep what is known of them."""
        old, table = self._table, self._make(feeds)
        _, new_rows, old_rows = np.intersect1d(
            table.tokens, old.tokens, assume_unique=True, return_indices=True
        )
        table.state[:, new_rows] = old.state[:, old_rows]
        shared = min(len(table.newest_ms), len(old.newest_ms))
        table.newest_ms[:shared] = old.newest_ms[:shared]
        self._table = table

    def note(self, tokens: Ints, ticks: TickArray, at_ms: int) -> None:
        """Record ticks received at `at_ms`; unknown tokens are ignored."""
        table = self._table
        if not len(table.tokens):
            return
        rows = np.searchsorted(table.tokens[:-1], tokens)  # within the table, whatever the token
        is_known = table.tokens[rows] == tokens
        if not is_known.all():
            rows, ticks = rows[is_known], ticks[is_known]
        last, usual = table.state[LAST_MS], table.state[INTERVAL_MS]
        before = usual[rows]
        interval = at_ms - last[rows]
        learnt = before + LEARNING_RATE * (interval - before)
        np.copyto(learnt, interval, where=np.isnan(learnt))
        np.copyto(learnt, before, where=(interval >= INTERVAL_MS_MAX) | (interval < 0))  # < 0: clock set back
        usual[rows] = learnt
        table.state[TICKS][rows] += 1
        table.state[PRICE][rows] = ticks[:, LAST_PRICE]
        table.state[QUANTITY][rows] = ticks[:, LAST_QUANTITY]
        table.state[DAY_VOLUME][rows] = ticks[:, VOLUME]
        last[rows] = at_ms
        table.newest_ms[table.feed[rows]] = at_ms

    def last_tick(self, token: int) -> LastTick:
        """Return an instrument's last tick."""
        table = self._table
        row = int(np.searchsorted(table.tokens, token))
        if row == len(table.tokens) or table.tokens[row] != token:
            return LastTick(0.0, np.nan, np.nan, np.nan)
        return LastTick(*table.state[[LAST_MS, PRICE, QUANTITY, DAY_VOLUME], row].tolist())

    def schedules(self, feed: int) -> frozenset[int]:
        """Return the schedules by which a feed's instruments trade."""
        schedules = self._table.schedules
        return schedules[feed] if feed < len(schedules) else frozenset()

    def silence(
        self, feed: int, opened_ms: Sequence[float | None], connected_ms: float, silent_ms_min: float
    ) -> Silence:
        """Return which instruments of a feed are silent, measured against the feed's own newest tick.

        `opened_ms`: by schedule id, since when it trades continuously; None if it does not.
        """
        table = self._table
        if feed >= len(table.newest_ms):
            return Silence()
        opened = np.array([np.nan if at_ms is None else at_ms for at_ms in opened_ms])[table.schedule]
        rows = np.flatnonzero((table.feed == feed) & ~np.isnan(opened))
        if not rows.size:
            return Silence()
        last, usual, ticks = table.state[[LAST_MS, INTERVAL_MS, TICKS]][:, rows]
        silent_ms = table.newest_ms[feed] - np.maximum(np.maximum(last, opened[rows]), connected_ms)
        often = np.flatnonzero((usual <= ACTIVE_INTERVAL_MS_MAX) & (ticks >= ACTIVE_TICKS_MIN))  # NaN: no
        is_index = table.tokens[rows[often]] % 256 == SEGMENT_INDICES
        most_active = often[np.argsort(usual[often], kind="stable")[:ACTIVE_MAX]]
        active = np.union1d(often[is_index], most_active)
        silent = active[silent_ms[active] > np.maximum(silent_ms_min, SILENT_INTERVALS * usual[active])]
        illiquid = np.setdiff1d(np.flatnonzero(silent_ms > ILLIQUID_MS), active)
        names = table.tokens[rows]
        return Silence(len(active), tuple(names[silent].tolist()), tuple(names[illiquid].tolist()))


@dataclass(eq=False)
class _WatchedFeed:
    connection: FeedConnection
    diagnosis: FeedDiagnosis
    verdict: Verdict = NOT_CONNECTED
    silenced: dict[int, LastTick] = field(default_factory=dict)  # active instrument → its tick before
    illiquid_day: int = 0  # of the last log line about illiquid instruments


class Watchdog:
    """Judges all feeds that are being read, and acts on the verdicts. `run` has a thread of its own.

    A line is logged when a verdict changes; the heartbeat's `feed_state` holds the latest ones.
    """

    def __init__(
        self,
        calendar: Sessions,
        activity: TickActivity,
        connections: Connections,
        outages: Outages,
        *,
        now_ms: Callable[[], float],
        speed: float = 1.0,
    ) -> None:
        """Prepare; `now_ms` is market time, `speed` its pace per machine time."""
        self._calendar = calendar
        self._activity = activity
        self._connections = connections
        self._outages = outages
        self._now_ms = now_ms
        self._speed = speed
        self._watched: dict[int, _WatchedFeed] = {}
        self._checked_ms = float("-inf")
        self._counts: Counter[str] = Counter()

    def run(self, stop: threading.Event) -> None:
        """Check twice a second until `stop` is set."""
        while not stop.wait(CHECK_SECONDS):
            self.check()

    def check(self) -> None:
        """Judge each feed once, and act."""
        now_ms = self._now_ms()
        connections = {each.feed.number: each for each in self._connections.all()}
        if now_ms < self._checked_ms:  # the clock was set back: forget what lies in the future
            self._watched = {}
            for connection in connections.values():
                connection.connected_ms = min(connection.connected_ms, now_ms)
                connection.liveness.ticked_ms = min(connection.liveness.ticked_ms, now_ms)
        self._checked_ms = now_ms
        watched: dict[int, _WatchedFeed] = {}
        for number, connection in connections.items():
            feed = self._watched.get(number)
            if feed is None or feed.connection is not connection:
                feed = _WatchedFeed(connection, FeedDiagnosis(self._speed))
            watched[number] = feed
        self._watched = watched
        opened_ms = [self._opened_ms(schedule, now_ms) for schedule in range(len(self._calendar.schedules))]
        for feed in watched.values():
            self._check_feed(feed, opened_ms, now_ms)

    def figures(self) -> dict[str, object]:
        """Return `feed_state` (`0:ok,1:mute`) and how often each trouble began and was treated."""
        states = sorted((number, feed.verdict.state) for number, feed in self._watched.items())
        counts = {f"watchdog_{name}": count for name, count in sorted(self._counts.items())}
        return {"feed_state": ",".join(f"{number}:{state}" for number, state in states), **counts}

    def halted(self) -> list[int]:
        """Return the active instruments that stay silent though they were subscribed again."""
        return sorted(token for feed in tuple(self._watched.values()) for token in feed.diagnosis.halted)

    def _opened_ms(self, schedule: int, now_ms: float) -> float | None:
        """Return since when a schedule trades continuously; None if it does not."""
        windows = self._calendar.named_windows(schedule, self._calendar.date_of(int(now_ms)))
        for name, opened, closed in windows:
            if opened <= now_ms < closed and name not in SILENT_WINDOWS:
                return float(opened)
        return None

    def _check_feed(self, feed: _WatchedFeed, opened_ms: list[float | None], now_ms: float) -> None:
        connection, number = feed.connection, feed.connection.feed.number
        silence = Silence()
        if connection.socket.state == "connected":
            silent_ms_min = feed.diagnosis.silent_ms_min
            silence = self._activity.silence(number, opened_ms, connection.connected_ms, silent_ms_min)
        opened = [opened_ms[schedule] for schedule in self._activity.schedules(number)]
        seen = Observation(
            connection.socket.state,
            connection.connected_ms,
            connection.liveness.ticked_ms,
            connection.liveness.mute_ms,
            min((at_ms for at_ms in opened if at_ms is not None), default=None),
            len(connection.feed.tokens),
            silence.active,
            silence.silent,
        )
        before, feed.verdict = feed.verdict, feed.diagnosis.judge(seen, now_ms)
        self._log_change(number, before, feed.verdict)
        self._end_silences(feed)
        self._act(connection, feed.verdict)
        self._log_illiquid(feed, silence.illiquid, now_ms)

    def _log_change(self, number: int, before: Verdict, verdict: Verdict) -> None:
        is_new = verdict.state != before.state
        if not is_new and (verdict.action == "none" or verdict.action == before.action):
            return
        is_alarm = verdict.state in ALARMS
        self._counts[verdict.state] += is_new and is_alarm
        fields = {"tokens": _names(verdict.tokens)} if verdict.tokens else {}
        write = log.warning if is_alarm else log.info
        write(f"feed_{verdict.state}", feed=number, action=verdict.action, reason=verdict.reason, **fields)

    def _act(self, connection: FeedConnection, verdict: Verdict) -> None:
        if verdict.action not in ("reconnect", "resubscribe"):
            return  # the socket renews and waits by itself
        self._counts[verdict.action] += 1
        if verdict.action == "resubscribe":
            connection.socket.resubscribe(verdict.tokens)
        elif verdict.state == "mute":
            connection.is_mute = True  # the socket asks for it
        else:
            connection.socket.reconnect("some instruments are silent")

    def _end_silences(self, feed: _WatchedFeed) -> None:
        """Report an outage for active instruments that tick again, if they were traded meanwhile."""
        if feed.verdict.state == "quiet":
            feed.silenced.clear()
        missed: list[tuple[int, float, float]] = []
        for token, before in tuple(feed.silenced.items()):
            last = self._activity.last_tick(token)
            if last.at_ms > before.at_ms:
                del feed.silenced[token]
                if before.has_missed(last):
                    missed.append((token, before.at_ms, last.at_ms))
        if missed:
            tokens, since, until = zip(*missed, strict=True)
            self._outages.add("silent", tuple(sorted(tokens)), Outage(int(min(since)), int(max(until))))
        if feed.verdict.state == "partly_mute":
            for token in feed.verdict.tokens:
                last = self._activity.last_tick(token)
                if last.at_ms:
                    feed.silenced.setdefault(token, last)

    def _log_illiquid(self, feed: _WatchedFeed, tokens: tuple[int, ...], now_ms: float) -> None:
        """Name illiquid instruments once a day: they are no fault."""
        today = int(now_ms + IST_MS) // DAY_MS
        if tokens and feed.illiquid_day != today:
            feed.illiquid_day = today
            log.info(
                "instruments_illiquid", feed=feed.connection.feed.number, action="none",
                instruments=len(tokens), tokens=_names(tokens),
                reason=f"no tick for {ILLIQUID_MS / 60_000:.0f} min in an open market, others tick",
            )  # fmt: skip


def _names(tokens: tuple[int, ...]) -> str:
    more = f" and {len(tokens) - NAMES_MAX} more" if len(tokens) > NAMES_MAX else ""
    return ",".join(map(str, tokens[:NAMES_MAX])) + more
