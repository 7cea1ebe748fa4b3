"""When each instrument last ticked, and how often it usually does: that tells a mute from an illiquid one.

One row per instrument in numpy arrays, which the writer alone fills with what it parses, ~20 µs per frame.
As parsed frames are the measure of time here, a writer that waits for Redis makes nobody look silent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pkbrokers_redis.core.model import LAST_PRICE, LAST_QUANTITY, SEGMENT_INDICES, TOKEN, VOLUME, TickArray
from pkbrokers_redis.pipeline.cut import Feed

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
