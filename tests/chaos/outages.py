"""Judge the flag `gap` and the outage notices by what the simulated market itself recorded.

    losses     times whose news was never acknowledged: the feeder's record compared with the streams
    notices    the outage notices of ingest (`P:{S}:repairs`)
    flags      the flags of the candles

Lost → reported     A loss of THRESHOLD_MS + GRACE_MS or more is reported for every instrument, except its
                    first GRACE_MS: a frame may wait that long in a socket before ingest stamps it.
Reported → silent   A notice holds a silence of SILENCE_MS. It begins at most PROGRESS_MS before the last
                    frame ahead of it, or earlier only where faults kept ingest from writing its progress.
Reported = marked   A candle of minutes or hours carries `gap` exactly where a notice of its instrument
                    overlaps [its start, its end), without tolerance. `partial` overrides it; day candles
                    use the packet's own day fields.

Shares only the calendar with the pipeline. The stage has one feed.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pkbrokers_redis.candles.calendar import Sessions
from pkbrokers_redis.candles.model import Interval
from pkbrokers_redis.simulator.market import Ints, Market
from tests.chaos.oracle import TOKEN, VOLUME, Entry, Row, Rows

THRESHOLD_MS = 2_000  # of open market; Kite's pictures come every second, and the next one carries the volume
GRACE_MS = 1_000
PROGRESS_MS = 3_000  # `P:feed_progress` is written every second, after the notices
SILENCE_MS = 500  # frames come every 50 ms
BACK_MS = 7_000  # after a fault: the longest wait between two tries is 5 s, then what waits is sent


class Span(NamedTuple):
    """Epoch ms, half-open."""

    from_ms: float
    to_ms: float


class Notice(NamedTuple):
    """Instruments whose feed was down in [from_ms, to_ms)."""

    tokens: frozenset[int]
    from_ms: int
    to_ms: int


class Said(NamedTuple):
    """One market step that had news: each instrument's new volume of the day."""

    at_ms: int
    volumes: list[tuple[int, int]]  # token, volume


class MarketMemory:
    """All news of a market, with or without subscribers: a simulator's `recorder`."""

    def __init__(self, market: Market) -> None:
        self._market = market
        self._volume = market.volume.copy()
        self.steps: list[Said] = []

    def note(self, rows: Ints, now_ms: int) -> None:
        """The rows of one step. An index has no volume to know its news by."""
        news = rows[self._market.volume[rows] > self._volume[rows]]
        self._volume[news] = self._market.volume[news]
        if news.size:
            pairs = zip(self._market.tokens[news].tolist(), self._volume[news].tolist(), strict=True)
            self.steps.append(Said(now_ms, list(pairs)))


def notices_of(entries: Iterable[Entry]) -> list[Notice]:
    """The outages among a repair stream's entries."""
    return [
        Notice(frozenset(json.loads(entry[b"tokens"])), int(entry[b"from"]), int(entry[b"to"]))
        for entry in entries
        if entry[b"kind"] == b"gap"
    ]


def losses(steps: Iterable[Said], ticks: Sequence[tuple[int, Row]]) -> list[Span]:
    """From each first lost step to the next frame received, in what the acknowledged `ticks` span.

    A step is lost when its volume was never acknowledged. The cached tick after a subscribe repeats old news:
    it does not end a loss, the next frame does.
    """
    acknowledged: dict[int, set[int]] = defaultdict(set)
    for _, tick in ticks:
        if tick[VOLUME] is not None:
            acknowledged[tick[TOKEN]].add(tick[VOLUME])
    received = sorted({at_ms for at_ms, _ in ticks})
    spans: list[Span] = []
    for at_ms, volumes in steps:
        if not received or not received[0] <= at_ms < received[-1]:
            continue
        if all(volume in acknowledged[token] for token, volume in volumes):
            continue
        back_ms = received[bisect_right(received, at_ms)]
        if not spans or spans[-1].to_ms != back_ms:
            spans.append(Span(at_ms, back_ms))
    return spans


def unreported(lost: Iterable[Span], notices: Iterable[Notice], tokens: Iterable[int]) -> list[str]:
    """Losses that some instrument's notices do not cover."""
    reported: dict[int, list[Notice]] = defaultdict(list)
    for notice in sorted(notices, key=lambda each: each.from_ms):
        for token in notice.tokens:
            reported[token].append(notice)
    words = []
    for span in lost:
        if span.to_ms - span.from_ms < THRESHOLD_MS + GRACE_MS:
            continue
        from_ms = span.from_ms + GRACE_MS
        bare = [token for token in tokens if not _covers(reported[token], from_ms, span.to_ms)]
        if bare:
            words.append(f"lost and not reported for {len(bare)} instruments: {span}, {reported[bare[0]]}")
    return words


def _covers(notices: Iterable[Notice], from_ms: float, to_ms: float) -> bool:
    for notice in notices:  # by their begin
        if notice.from_ms <= from_ms < notice.to_ms:
            from_ms = notice.to_ms
    return from_ms >= to_ms


def unfounded(notices: Iterable[Notice], received_ms: Iterable[int], faults: Sequence[Span]) -> list[str]:
    """Notices of a time in which nothing was wrong.

    `received_ms`: when the acknowledged frames were received. `faults`: of Redis and ingest workers, each so
    long that `P:feed_progress` may not have been written.
    """
    times = sorted(set(received_ms))
    words = []
    for span in sorted({Span(notice.from_ms, notice.to_ms) for notice in notices}):
        received_ms = _last_silence(times, span)
        if received_ms is None:
            words.append(f"reported although frames arrived all the time: {span}")
        elif span.from_ms < (earliest_ms := _earliest(received_ms, faults)):
            words.append(f"reported from {earliest_ms - span.from_ms:g} ms too early: {span}")
    return words


def _last_silence(times: Sequence[int], span: Span) -> int | None:
    """The frame before the last silence of the span: a worker that had hung may read on behind it, while
    another has taken its feed."""
    for n in range(bisect_left(times, span.to_ms), 0, -1):
        until_ms = min(times[n] if n < len(times) else span.to_ms, span.to_ms)
        if until_ms <= span.from_ms:
            return None
        if until_ms - times[n - 1] >= SILENCE_MS:
            return times[n - 1]
    return None


def _earliest(received_ms: float, faults: Sequence[Span]) -> float:
    """When `P:feed_progress` may have been written last, if frames came until `received_ms`."""
    earliest_ms = received_ms - PROGRESS_MS
    for fault in sorted(faults, key=lambda each: each.from_ms, reverse=True):
        if fault.from_ms <= received_ms and fault.to_ms >= earliest_ms:
            earliest_ms = min(earliest_ms, fault.from_ms - PROGRESS_MS)
    return earliest_ms


def wrong_flags(
    rows: Rows, notices: Iterable[Notice], intervals: Iterable[Interval], sessions: Sessions
) -> list[str]:
    """Candles that carry `gap` without a notice for them, or lack it despite one."""
    reported: dict[int, list[Span]] = defaultdict(list)
    for notice in notices:
        for token in notice.tokens:
            reported[token].append(Span(notice.from_ms, notice.to_ms))
    seconds = {interval.name: interval.seconds for interval in intervals}
    words = []
    for (token, name), of_start in sorted(rows.items()):
        schedule = sessions.schedule_of(token)
        for start, row in sorted(of_start.items()):
            closes = sessions.day(schedule, start * 1000).windows[-1][1]
            end_ms = min((start + seconds[name]) * 1000, closes)
            hit = seconds[name] > 0 and any(
                span.from_ms < end_ms and start * 1000 < span.to_ms for span in reported[token]
            )
            flag = row[-1] if isinstance(row[-1], str) else ""
            if flag != "partial" and (flag in ("gap", "backfilled")) != hit:
                words.append(f"{token} {name} {start}: {flag or 'no flag'}, reported {reported[token]}")
    return words
