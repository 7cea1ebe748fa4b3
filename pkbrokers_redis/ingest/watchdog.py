"""What ails a feed, and what to do about it. Pure: signs in, a verdict out.

| state          | seen                                               | action                      |
|----------------|----------------------------------------------------|-----------------------------|
| `ok`           | ticks come; some instruments may be illiquid       | none                        |
| `quiet`        | its markets are closed, or in the closing auction  | none                        |
| `mute`         | heartbeats but no ticks while its market is open   | reconnect, ever more seldom |
| `partly_mute`  | instruments that always tick do not, others do     | resubscribe, then reconnect |
| `expired`      | Kite answers 403                                   | renew the session           |
| `rate_limited` | Kite answers 429                                   | wait                        |
| `away`         | there is no connection                             | none, the socket tries on   |

A new subscription brings each instrument's last tick again, hours old perhaps: it mends nothing. All times
are market time; `speed` (of a rehearsal) keeps a limit from being shorter than the machine can hear.

When each instrument last ticked, and how often it usually does: that tells a mute from an illiquid one.

One row per instrument in numpy arrays, which the writer alone fills with what it parses, ~20 µs per frame.
As parsed frames are the measure of time here, a writer that waits for Redis makes nobody look silent.

Looks at each feed that is read, twice a second, has the feed doctor judge it, and acts on the verdict.

A line is logged when a verdict changes, not while it lasts; `feed_state` in the heartbeat has the last ones.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from pkbrokers_redis import logs
from pkbrokers_redis.candles.calendar import IST_MS, Sessions
from pkbrokers_redis.candles.model import (
    LAST_PRICE,
    LAST_QUANTITY,
    SEGMENT_INDICES,
    TOKEN,
    VOLUME,
    TickArray,
)
from pkbrokers_redis.ingest.connections import Reading
from pkbrokers_redis.ingest.feeds import Feed
from pkbrokers_redis.ingest.liveness import Outage

State = Literal["ok", "quiet", "mute", "partly_mute", "expired", "rate_limited", "away"]
Action = Literal["none", "reconnect", "resubscribe", "renew", "wait"]

MUTE_MS_MIN = 15_000.0  # a picture comes every second: fifteen are missing
UNKNOWN_MUTE_MS_MIN = 60_000.0  # of a feed without a lively instrument, or whose ways we do not know yet
MUTE_MS_MAX = 1_800_000.0  # between reconnects of a feed that stays mute: a holiday the calendar lacks
SILENT_MS_MIN = 15_000.0  # of a canary
ILLIQUID_MS = 600_000.0  # without a tick in an open market
MENDING_MS = 15_000.0  # what a resubscription or a new connection is given
RESENT_MS = 5_000.0  # ticks so soon after a connect may be the last ones again
MENDED_MS = 60_000.0  # a feed that ticks for so long after a remedy is well
MACHINE_MS_MIN = 2_000.0  # no limit is below this on the machine's clock
REMEDIES_MAX = 3  # a resubscription and two connections; then those instruments are halted, not mute
MOST = 0.5  # so large a part of the canaries is worth a reconnect, which all others pay for


class Signs(NamedTuple):
    """What is seen of one feed.

    `opened_ms`: since when a market of its trades continuously; None: none does.
    """

    socket: str  # the socket's state
    connected_ms: float
    ticked_ms: float
    mute_ms: float  # such a silence is not this feed's way (`FeedLife.mute_ms`)
    opened_ms: float | None
    instruments: int
    canaries: int = 0
    silent: tuple[int, ...] = ()  # of the canaries


class Verdict(NamedTuple):
    """What the feed has, what is to be done now, and why. `tokens`: the instruments meant."""

    state: State
    action: Action
    why: str
    tokens: tuple[int, ...] = ()


class FeedDoctor:
    """One feed's doctor: remembers what was tried. `look` is called again and again, twice a second or so."""

    def __init__(self, speed: float = 1.0) -> None:
        self._floor_ms = MACHINE_MS_MIN * speed
        self._reconnects = 0  # in a row, without a tick after them
        self._mute_from_ms: float | None = None  # the last tick when it fell mute
        self._remedies: dict[int, tuple[int, float]] = {}  # silent instrument → remedies tried, the last when

    @property
    def silent_ms_min(self) -> float:
        """So long a canary must be silent, at least."""
        return max(SILENT_MS_MIN, self._floor_ms)

    def look(self, signs: Signs, now_ms: float) -> Verdict:
        """The verdict. An action other than `none` is to be taken once for each time it is returned."""
        if signs.socket == "forbidden":
            return Verdict("expired", "renew", "Kite answers 403: the session is dead")
        if signs.socket == "throttled":
            return Verdict("rate_limited", "wait", "Kite answers 429: too many connections or requests")
        resent_ms = signs.connected_ms + max(RESENT_MS, self._floor_ms)
        if self._mute_from_ms is not None and signs.ticked_ms > max(self._mute_from_ms, resent_ms):
            self._mute_from_ms, self._reconnects = None, 0
        if signs.opened_ms is None or not signs.instruments:
            self._mute_from_ms, self._reconnects = None, 0
            return Verdict("quiet", "none", "its markets are closed, or in the closing auction")
        if signs.socket != "connected":
            if self._mute_from_ms is not None:
                return Verdict("mute", "none", "on its way to a new connection")
            return Verdict("away", "none", "no connection; the socket tries again")
        silent_ms = now_ms - max(signs.ticked_ms, signs.opened_ms, signs.connected_ms)
        if silent_ms > self._mute_limit_ms(signs):
            self._mute_from_ms = signs.ticked_ms
            self._reconnects += 1
            return Verdict("mute", "reconnect", f"heartbeats but no tick for {silent_ms / 1000:.0f} s")
        if self._mute_from_ms is not None:
            return Verdict("mute", "none", "connected anew, no tick yet")
        return self._look_at_canaries(signs, now_ms)

    def _mute_limit_ms(self, signs: Signs) -> float:
        usual = MUTE_MS_MIN if signs.canaries else UNKNOWN_MUTE_MS_MIN
        least = max(usual, self._floor_ms, signs.mute_ms)
        return min(least * 2.0 ** min(self._reconnects, 16), max(least, MUTE_MS_MAX))

    def _look_at_canaries(self, signs: Signs, now_ms: float) -> Verdict:
        self._forget_the_well(signs, now_ms)
        halted = {token for token, (n, _) in self._remedies.items() if n >= REMEDIES_MAX}
        silent = tuple(token for token in signs.silent if token not in halted)
        if not silent:
            why = f"{len(halted)} lively instruments are halted" if halted else "ticks come"
            return Verdict("ok", "none", why)
        seen = f"{len(silent)} of {signs.canaries} lively instruments are silent while others tick"
        fresh = tuple(token for token in silent if token not in self._remedies)
        if fresh:
            self._note(fresh, now_ms)
            return Verdict("partly_mute", "resubscribe", seen, fresh)
        if now_ms - max(self._remedies[token][1] for token in silent) <= max(MENDING_MS, self._floor_ms):
            return Verdict("partly_mute", "none", seen, silent)
        self._note(silent, now_ms)
        if len(silent) >= MOST * signs.canaries:
            return Verdict("partly_mute", "reconnect", f"{seen}, though subscribed anew", silent)
        return Verdict("partly_mute", "resubscribe", seen, silent)

    def _forget_the_well(self, signs: Signs, now_ms: float) -> None:
        for token, (_, tried_ms) in tuple(self._remedies.items()):
            if token not in signs.silent and now_ms - tried_ms > max(MENDED_MS, self._floor_ms):
                del self._remedies[token]

    def _note(self, tokens: tuple[int, ...], now_ms: float) -> None:
        for token in tokens:
            self._remedies[token] = (self._remedies.get(token, (0, 0.0))[0] + 1, now_ms)


Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

LEARNING = 0.1  # weight of the latest interval in the usual one
INTERVAL_MS_MAX = 600_000  # a longer one is a night or an outage, not the instrument's way
CANARIES_MAX = 20  # most active ones of a feed, beside its indices
CANARY_USUAL_MS_MAX = 5_000  # what ticks more seldom is no canary
CANARY_TICKS_MIN = 20  # before that we do not know its way
SILENT_TIMES = 10  # a canary is silent after so many times its usual interval


@dataclass(frozen=True, slots=True)
class _Table:
    tokens: Floats  # ascending; floats, as in a tick batch, so that nothing is converted a frame
    feed: Ints
    schedule: Ints
    last_ms: Floats  # of the last tick, 0 before any
    usual_ms: Floats  # between ticks, NaN before any
    ticks: Ints
    price: Floats  # of the last tick, as the day's volume
    volume: Floats
    newest_ms: Floats  # by feed number
    schedules: list[frozenset[int]]  # by feed number


@dataclass(frozen=True, slots=True)
class Silence:
    """The instruments of a feed that do not tick: `silent` ones usually do, `illiquid` ones need not."""

    canaries: int = 0
    silent: tuple[tuple[int, float], ...] = ()  # (token, when it last ticked; 0: never)
    illiquid: tuple[int, ...] = ()


class Return(NamedTuple):
    """A silent instrument's first tick again. `missed`: that tick alone does not tell what was traded since.

    A new subscription brings the last tick again: the same volume means that nothing was.
    """

    at_ms: float
    missed: bool


class TickActivity:
    """All instruments this worker may read. `schedule_of` gives a token's schedule id."""

    def __init__(self, schedule_of: Callable[[int], int]) -> None:
        self._schedule_of = schedule_of
        self._table = self._make([])
        self._watched: frozenset[int] = frozenset()
        self._returns: dict[int, Return] = {}

    def _make(self, feeds: Sequence[Feed]) -> _Table:
        pairs = sorted((token, feed.number) for feed in feeds for token in feed.tokens)
        tokens = np.array([token for token, _ in pairs], np.float64)
        schedule = {token: self._schedule_of(token) for token, _ in pairs}
        return _Table(
            tokens,
            np.array([number for _, number in pairs], np.int64),
            np.array(list(schedule.values()), np.int64),
            np.zeros(len(pairs)),
            np.full(len(pairs), np.nan),
            np.zeros(len(pairs), np.int64),
            np.full(len(pairs), np.nan),
            np.full(len(pairs), np.nan),
            np.zeros(len(feeds)),
            [frozenset(map(schedule.__getitem__, feed.tokens)) for feed in feeds],
        )

    def follow(self, feeds: Sequence[Feed]) -> None:
        """These are the feeds now, by their numbers; what is known of instruments that stay is kept."""
        old, table = self._table, self._make(feeds)
        _, here, there = np.intersect1d(table.tokens, old.tokens, assume_unique=True, return_indices=True)
        table.last_ms[here] = old.last_ms[there]
        table.usual_ms[here] = old.usual_ms[there]
        table.ticks[here] = old.ticks[there]
        table.price[here] = old.price[there]
        table.volume[here] = old.volume[there]
        shared = min(len(table.newest_ms), len(old.newest_ms))
        table.newest_ms[:shared] = old.newest_ms[:shared]
        self._table = table

    def note(self, ticks: TickArray, at_ms: int) -> None:
        """These ticks came at `at_ms` (market time). Strangers are ignored."""
        table = self._table
        if not len(table.tokens):
            return
        wanted = np.ascontiguousarray(ticks[:, TOKEN])
        rows = np.searchsorted(table.tokens[:-1], wanted)  # within the table, whatever is looked for
        is_ours = table.tokens[rows] == wanted
        if not is_ours.all():
            rows, ticks = rows[is_ours], ticks[is_ours]
        if self._watched:
            self._note_returns(table, rows, ticks, at_ms)
        usual = table.usual_ms[rows]
        interval = at_ms - table.last_ms[rows]
        learnt = usual + LEARNING * (interval - usual)
        np.copyto(learnt, interval, where=np.isnan(learnt))
        is_odd = (interval >= INTERVAL_MS_MAX) | (interval < 0)  # … or the clock was set back
        np.copyto(learnt, usual, where=is_odd)
        table.usual_ms[rows] = learnt
        table.last_ms[rows] = at_ms
        table.ticks[rows] += 1
        table.price[rows] = ticks[:, LAST_PRICE]
        table.volume[rows] = ticks[:, VOLUME]
        table.newest_ms[table.feed[rows]] = at_ms

    def _note_returns(self, table: _Table, rows: Ints, ticks: TickArray, at_ms: int) -> None:
        for n in np.flatnonzero(np.isin(table.tokens[rows], list(self._watched))).tolist():
            row, tick = rows[n], ticks[n]
            before, volume = table.volume[row], tick[VOLUME]
            if np.isnan(before) or np.isnan(volume):  # an index, or a mode without volume
                missed = bool(tick[LAST_PRICE] != table.price[row])
            else:
                missed = bool(volume - np.nan_to_num(tick[LAST_QUANTITY]) > before)
            self._returns.setdefault(int(table.tokens[row]), Return(at_ms, missed))

    def watch(self, tokens: Collection[int]) -> None:
        """Keep the first tick that comes of each of these from now on, and of no others."""
        watched = frozenset(tokens)
        for token in watched - self._watched:
            self._returns.pop(token, None)  # of an earlier time
        self._watched = watched

    def take_return(self, token: int) -> Return | None:
        """The first tick of one that is watched, once; None while there is none."""
        return self._returns.pop(token, None)

    def schedules(self, feed: int) -> frozenset[int]:
        """The schedules by which a feed's instruments trade."""
        schedules = self._table.schedules
        return schedules[feed] if feed < len(schedules) else frozenset()

    def last_ms(self, token: int) -> float:
        """When an instrument last ticked; 0 before any, or for a stranger."""
        table = self._table
        row = int(np.searchsorted(table.tokens, token))
        return float(table.last_ms[row]) if row < len(table.tokens) and table.tokens[row] == token else 0.0

    def silence(
        self,
        feed: int,
        opened_ms: Sequence[float | None],
        heard_from_ms: float,
        silent_ms_min: float,
        illiquid_ms: float,
    ) -> Silence:
        """Who of a feed is silent, measured against the feed's own newest tick.

        `opened_ms`: by schedule id, since when it is open, None: it is closed. `heard_from_ms`: since when
        the connection could have brought ticks. A canary is silent after `silent_ms_min` at the earliest.
        """
        table = self._table
        if feed >= len(table.newest_ms):
            return Silence()
        opened = np.array([np.nan if each is None else each for each in opened_ms])[table.schedule]
        ours = np.flatnonzero((table.feed == feed) & ~np.isnan(opened))
        if not ours.size:
            return Silence()
        last, usual = table.last_ms[ours], table.usual_ms[ours]
        since = np.maximum(np.maximum(last, opened[ours]), heard_from_ms)
        silent_ms = table.newest_ms[feed] - since
        is_lively = (usual <= CANARY_USUAL_MS_MAX) & (table.ticks[ours] >= CANARY_TICKS_MIN)  # NaN is not
        lively = np.flatnonzero(is_lively)
        is_index = table.tokens[ours[lively]] % 256 == SEGMENT_INDICES
        busiest = lively[np.argsort(usual[lively], kind="stable")[:CANARIES_MAX]]
        canaries = np.union1d(lively[is_index], busiest)
        limit = np.maximum(silent_ms_min, SILENT_TIMES * usual[canaries])
        silent = canaries[silent_ms[canaries] > limit]
        illiquid = np.setdiff1d(np.flatnonzero(silent_ms > illiquid_ms), canaries)
        return Silence(
            len(canaries),
            tuple(zip(map(int, table.tokens[ours[silent]]), last[silent].tolist(), strict=True)),
            tuple(map(int, table.tokens[ours[illiquid]])),
        )


log = logs.get("doctor")

LOOK_SECONDS = 0.5
NAMES_MAX = 5  # instruments named in a line
DAY_MS = 86_400_000
AUCTION = "closing_auction"  # a window of the calendar: orders are collected, and no tick is missing
ALARMING = {"mute", "partly_mute", "expired", "rate_limited"}


class _WatchedFeed:
    """One feed's doctor, and what was said and seen last."""

    def __init__(self, reading: Reading, speed: float) -> None:
        self.reading = reading
        self.doctor = FeedDoctor(speed)
        self.verdict = Verdict("away", "none", "")
        self.silenced: dict[int, float] = {}  # silent canary → its last tick before
        self.illiquid_day = 0  # of the last line about illiquid ones


class FeedMonitor:
    """`look` at all `readings()`; `on_silence_over(tokens, outage)` hears of canaries that tick again.

    Canaries are a feed's most active instruments (`tick_activity.py`): when they fall silent, the feed has.
    """

    def __init__(
        self,
        sessions: Sessions,
        activity: TickActivity,
        *,
        now_ms: Callable[[], float],
        speed: float,
        readings: Callable[[], list[Reading]],
        on_silence_over: Callable[[tuple[int, ...], Outage], None],
    ) -> None:
        self._sessions = sessions
        self._activity = activity
        self._now_ms = now_ms
        self._speed = speed
        self._readings = readings
        self._on_silence_over = on_silence_over
        self._watched: dict[int, _WatchedFeed] = {}
        self._looked_ms = 0.0
        self._counts: Counter[str] = Counter()

    def run(self, stop: threading.Event) -> None:
        """`look` twice a second."""
        while not stop.wait(LOOK_SECONDS):
            self.look()

    def look(self) -> None:
        """One round: a verdict for each feed, and what follows from it."""
        now_ms = self._now_ms()
        readings = {reading.feed.number: reading for reading in self._readings()}
        if now_ms < self._looked_ms:
            self._start_anew(readings.values(), now_ms)
        self._looked_ms = now_ms
        watched: dict[int, _WatchedFeed] = {}
        for number, reading in readings.items():
            known = self._watched.get(number)
            watched[number] = (
                known if known and known.reading is reading else _WatchedFeed(reading, self._speed)
            )
        self._watched = watched
        opened_ms = [self._opened_ms(schedule, now_ms) for schedule in range(len(self._sessions.schedules))]
        for feed in watched.values():
            self._look_at(feed, opened_ms, now_ms)

    def _start_anew(self, readings: Iterable[Reading], now_ms: float) -> None:
        """The clock was set back: what was seen later than now would keep us waiting."""
        self._watched = {}
        for reading in readings:
            reading.connected_ms = min(reading.connected_ms, now_ms)
            reading.life.ticked_ms = min(reading.life.ticked_ms, now_ms)

    def figures(self) -> dict[str, object]:
        """`feed_state`, `0:ok,1:mute`, and how often each trouble began and was treated."""
        states = sorted((number, feed.verdict.state) for number, feed in self._watched.items())
        counts = {f"doctor_{name}": count for name, count in sorted(self._counts.items())}
        return {"feed_state": ",".join(f"{number}:{state}" for number, state in states), **counts}

    def _look_at(self, feed: _WatchedFeed, opened_ms: list[float | None], now_ms: float) -> None:
        reading, life = feed.reading, feed.reading.life
        silence = Silence()
        if reading.socket.state == "connected":
            silent_ms_min = feed.doctor.silent_ms_min
            silence = self._activity.silence(
                reading.feed.number, opened_ms, reading.connected_ms, silent_ms_min, ILLIQUID_MS
            )
        opened = [opened_ms[schedule] for schedule in self._activity.schedules(reading.feed.number)]
        signs = Signs(
            reading.socket.state,
            reading.connected_ms,
            life.ticked_ms,
            life.mute_ms,
            min((at_ms for at_ms in opened if at_ms is not None), default=None),
            len(reading.feed.tokens),
            silence.canaries,
            tuple(token for token, _ in silence.silent),
        )
        verdict = feed.doctor.look(signs, now_ms)
        self._tell(feed, verdict)
        self._follow_silence(feed, verdict, dict(silence.silent))
        self._act(reading, verdict)
        self._mention_illiquid(feed, silence, now_ms)

    def _opened_ms(self, schedule: int, now_ms: float) -> float | None:
        """Since when a schedule trades continuously; None: it does not."""
        windows = self._sessions.named_windows(schedule, self._sessions.date_of(int(now_ms)))
        for name, opened, closed in windows:
            if opened <= now_ms < closed and name != AUCTION:
                return float(opened)
        return None

    def _tell(self, feed: _WatchedFeed, verdict: Verdict) -> None:
        before, feed.verdict = feed.verdict, verdict
        is_new = verdict.state != before.state
        if not is_new and (verdict.action == "none" or verdict.action == before.action):
            return
        if is_new:
            self._counts[verdict.state] += verdict.state in ALARMING
        tell = log.warning if verdict.state in ALARMING else log.info
        tell(
            f"feed_{verdict.state}", feed=feed.reading.feed.number, action=verdict.action, why=verdict.why,
            **({"tokens": _some(verdict.tokens)} if verdict.tokens else {}),
        )  # fmt: skip

    def _act(self, reading: Reading, verdict: Verdict) -> None:
        if verdict.action not in ("reconnect", "resubscribe"):
            return  # the socket renews and waits by itself
        self._counts[verdict.action] += 1
        if verdict.action == "resubscribe":
            reading.socket.resubscribe(verdict.tokens)
        elif verdict.state == "mute":
            reading.is_mute = True  # the socket asks
        else:
            reading.socket.reconnect("some instruments are silent")

    def _follow_silence(self, feed: _WatchedFeed, verdict: Verdict, silent: dict[int, float]) -> None:
        """Canaries that tick again had an outage of their own, if they were traded meanwhile."""
        if verdict.state == "quiet":
            feed.silenced.clear()
        if verdict.state == "partly_mute":
            for token in verdict.tokens:
                if last_ms := silent.get(token):
                    feed.silenced.setdefault(token, last_ms)
        self._activity.watch({token for each in self._watched.values() for token in each.silenced})
        spans = []
        for token in tuple(feed.silenced):
            if (found := self._activity.take_return(token)) is not None:
                since_ms = feed.silenced.pop(token)
                if found.missed:
                    spans.append((token, since_ms, found.at_ms))
        if spans:
            tokens, since, until = zip(*spans, strict=True)
            self._on_silence_over(tuple(sorted(tokens)), Outage(int(min(since)), int(max(until))))

    def _mention_illiquid(self, feed: _WatchedFeed, silence: Silence, now_ms: float) -> None:
        """Once a day: instruments that nobody trades are no fault."""
        today = int(now_ms + IST_MS) // DAY_MS
        if silence.illiquid and feed.illiquid_day != today:
            feed.illiquid_day = today
            log.info(
                "instruments_illiquid", feed=feed.reading.feed.number, action="none",
                instruments=len(silence.illiquid), tokens=_some(silence.illiquid),
                why=f"no tick for {ILLIQUID_MS / 60_000:.0f} min in an open market, others tick",
            )  # fmt: skip


def _some(tokens: tuple[int, ...]) -> str:
    more = f" and {len(tokens) - NAMES_MAX} more" if len(tokens) > NAMES_MAX else ""
    return ",".join(map(str, tokens[:NAMES_MAX])) + more
