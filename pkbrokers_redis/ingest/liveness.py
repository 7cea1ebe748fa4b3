"""Outages of a feed: when it was last heard, when again, and what of that the market was open for. Pure.

    last sign of life ─┐                     ┌─ first tick frame after it
    ───●───●───●───●───[      outage         )●───●───      [ , ) is the notice, cut to session hours

A sign of life is any frame, heartbeats too. But where ticks have been missing for far longer than usual (the
socket was mute), the last tick counts: heartbeats prove a connection, not a subscription. A frame that could
not be kept (memory and disk full) was not heard. All times are market time, epoch ms.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from pkbrokers_redis.candles.calendar import Sessions

# Kite sends a picture a second: an outage below two of them hides at most one, whose volume and day's
# extremes the next one carries.
GAP_MS_MIN = 2_000
GAP_MS_MAX = 7 * 86_400_000  # older rows have left the lists of all but the day's candles
MUTE_MS_MIN = 5_000  # heartbeats alone for less are no silence
USUAL_TIMES = 4  # … nor for less than so many times the feed's usual silence
USUAL_HALF_LIFE_MS = 60_000
USUAL_MS_MAX = 600_000  # longer ones are nights and outages, not the feed's habit
OUTAGES_MAX = 1_000  # a feed's, not yet taken; then the last ones are united


class Outage(NamedTuple):
    """A feed was not heard in [from_ms, to_ms)."""

    from_ms: int
    to_ms: int


class Notice(NamedTuple):
    """Instruments that were not heard in [from_ms, to_ms), which begins and ends in session hours."""

    tokens: tuple[int, ...]
    from_ms: int
    to_ms: int


class FeedLife:
    """One feed as its reader hears it. One thread tells, others may ask.

    `heard_ms`: when the feed's last reader, maybe another process, had heard it; None: nobody ever has.
    """

    def __init__(self, heard_ms: float | None = None) -> None:
        self._down_ms = heard_ms  # since when an outage lasts; None: none does
        self._heard_ms = 0.0
        self._outages: deque[Outage] = deque()
        self.ticked_ms = 0.0  # the last tick frame
        self.usual_ms = 0.0  # the longest silence between tick frames lately
        self.is_heard = False  # whether ticks have come since we read, or since the last loss

    def tick(self, at_ms: float, is_kept: bool = True) -> None:
        """A frame with ticks came; `is_kept`: it will reach Redis."""
        if not is_kept:
            self.lost()
            return
        if self._down_ms is not None:
            self._add(Outage(int(self._down_ms), int(at_ms)))
            self._down_ms = None
        elif self.ticked_ms:
            gap_ms = at_ms - self.ticked_ms
            if 0 <= gap_ms < USUAL_MS_MAX:
                self.usual_ms = max(gap_ms, self.usual_ms * 0.5 ** (gap_ms / USUAL_HALF_LIFE_MS))
        self.is_heard = True
        self._heard_ms = self.ticked_ms = at_ms

    def heartbeat(self, at_ms: float) -> None:
        """A heartbeat came."""
        if self._down_ms is None:
            self._heard_ms = at_ms

    def lost(self) -> None:
        """The connection is gone, or a frame was: an outage begins, unless one lasts already."""
        self.is_heard = False
        if self._down_ms is None and self._heard_ms:
            self._down_ms = self.heard_ms

    @property
    def heard_ms(self) -> float:
        """Until when we know that we heard everything; 0: never."""
        if self._down_ms is not None:
            return self._down_ms
        silent_ms = self._heard_ms - self.ticked_ms
        return self.ticked_ms if silent_ms > self.mute_ms else self._heard_ms

    @property
    def mute_ms(self) -> float:
        """So long without ticks is not this feed's way."""
        return max(MUTE_MS_MIN, USUAL_TIMES * self.usual_ms)

    def _add(self, outage: Outage) -> None:
        if len(self._outages) >= OUTAGES_MAX:
            outage = Outage(self._outages.pop().from_ms, outage.to_ms)
        self._outages.append(outage)

    @property
    def first_outage(self) -> Outage | None:
        """The oldest outage that is over and not yet `settle`d."""
        return self._outages[0] if self._outages else None

    def settle(self) -> None:
        """The first outage has been told."""
        self._outages.popleft()


def notices(
    sessions: Sessions, schedule_of: Callable[[int], int], tokens: Iterable[int], outage: Outage
) -> list[Notice]:
    """What of an outage the instruments' markets were open for: one notice for those of the same hours.

    None for a night, a holiday, or less than GAP_MS_MIN of open market.
    """
    of_schedule: dict[int, list[int]] = defaultdict(list)
    for token in tokens:
        of_schedule[schedule_of(token)].append(token)
    of_span: dict[tuple[int, int], list[int]] = defaultdict(list)
    for schedule, some in of_schedule.items():
        span = open_span(sessions, schedule, outage)
        if span is not None:
            of_span[span] += some
    return [Notice(tuple(sorted(some)), *span) for span, some in sorted(of_span.items())]


def open_span(sessions: Sessions, schedule: int, outage: Outage) -> tuple[int, int] | None:
    """The outage without closed hours at its ends; None where too little is left."""
    to_ms = outage.to_ms
    from_ms = max(outage.from_ms, to_ms - GAP_MS_MAX)
    first = last = None
    open_ms = 0
    day_ms = from_ms
    while day_ms < to_ms:
        day = sessions.day(schedule, day_ms)
        for opened, closed in day.windows:
            begin, end = max(opened, from_ms), min(closed, to_ms)
            if begin < end:
                first = begin if first is None else first
                last = end
                open_ms += end - begin
        day_ms = day.day_end_ms
    if first is None or last is None or open_ms < GAP_MS_MIN:
        return None
    return first, last
