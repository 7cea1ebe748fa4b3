"""Explain a candle: its row, the ticks that made it, its announcements, and the session around it.

Only what Redis holds now is read. Ticks stay for minutes (`PKB_STREAM_RETENTION_SECONDS`), announcements as
long as the cap of the closed stream allows; an explanation says what is no longer held.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from pkbrokers_redis.candles.calendar import KOLKATA, TIME_MS_MAX, TIME_MS_MIN, Day, Sessions
from pkbrokers_redis.candles.model import Candle, Interval, bucket_end_s, bucket_start_s
from pkbrokers_redis.client.follow import ENTRIES_PER_PAGE, newest_first, parse_closed
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.store.rows import ENTRIES_A_READ, ENTRIES_SCANNED_MAX, Tick, ticks_of

if TYPE_CHECKING:
    from pkbrokers_redis.client.store import CandleStore

DAY_MS = 86_400_000
FLAG_WORDS = {
    "": "a whole candle: the feed was received from its start to its end",
    "partial": "partial: watching began inside it",
    "gap": "gap: the feed was down inside it, so trades may be missing",
    "backfilled": "backfilled: repaired from Kite's history",
}


class Announcement(NamedTuple):
    """One entry of the closed stream about the candle: its time (epoch ms), its `rev`, the row announced."""

    at_ms: int
    rev: int
    candle: Candle


@dataclass(frozen=True)
class Explanation:
    """All that Redis knows about one candle.

    Attributes:
        start, end: Epoch seconds.
        place: `current` (being formed), `list` (completed) or empty (no row).
        windows: Trading hours of its day, epoch ms.
        ticks: The ticks still in the stream whose trade time lies in it, oldest first.
        has_older_ticks: Whether the stream reaches back to before the candle.
        sources: The producers that sent the ticks.
        before, after: The nearest rows kept of the same interval.
        baseline, day_volume: First and latest cumulative volume of its day, as the aggregator knows them;
            None on another day.
        now: When it was asked, epoch seconds.
    """

    token: int
    symbol: str
    interval: str
    start: int
    end: int
    row: Candle | None
    place: str
    schedule: str
    windows: tuple[tuple[int, int], ...]
    ticks: list[Tick]
    has_older_ticks: bool
    sources: list[str]
    announcements: list[Announcement]
    before: Candle | None
    after: Candle | None
    day_volume: float | None
    baseline: float | None
    now: float = math.inf

    @property
    def is_in_session(self) -> bool:
        """Return whether a part of the candle lies inside the trading hours."""
        return any(opens < self.end * 1000 and self.start * 1000 < closes for opens, closes in self.windows)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, and `lines`, for JSON."""
        names = "token symbol interval start end place schedule is_in_session baseline day_volume"
        return {
            **{name: getattr(self, name) for name in names.split()},
            "row": None if self.row is None else self.row.as_dict(),
            "flag": None if self.row is None else FLAG_WORDS[self.row.flag],
            "ticks_in_stream": len(self.ticks),
            "first_tick": self.ticks[0]._asdict() if self.ticks else None,
            "last_tick": self.ticks[-1]._asdict() if self.ticks else None,
            "sources": self.sources,
            "announcements": [
                {"at_ms": at_ms, "rev": rev, "row": row.as_dict()} for at_ms, rev, row in self.announcements
            ],
            "windows_ms": self.windows,
            "lines": self.lines(),
        }

    def lines(self) -> list[str]:
        """Return the explanation in sentences."""
        lines = [self._why_no_row()] if self.row is None else self._row_lines(self.row)
        for at_ms, rev, candle in self.announcements:
            kind = f"amended, revision {rev}" if rev else "announced"
            flag = f", {candle.flag}" if candle.flag else ""
            facts = f"close {_exact(candle.close)}, volume {_exact(candle.volume)}{flag}"
            lines.append(f"{kind} at {_time_of(at_ms)}: {facts}")
        hours = ", ".join(f"{_time_of(opens)[:5]}–{_time_of(closes)[:5]}" for opens, closes in self.windows)
        if len(self.windows) == 1 and self.windows[0][1] - self.windows[0][0] >= DAY_MS:
            hours = "all day"
        lines.append(f"session {self.schedule}: {hours or 'closed that day'}")
        if self.baseline is not None:
            before = f"of which {_exact(self.baseline)} is in no candle"
            lines.append(
                f"day's volume {_exact(self.day_volume)}, {before} (before watching began, or off-session)"
            )
        return lines

    def _why_no_row(self) -> str:
        if self.start > self.now:
            return "no row: it has not begun yet"
        if not self.is_in_session:
            return "no row: it lies outside the trading hours, whose trades update quotes only"
        if self.before is None and self.after is None:
            return "no row: nothing of this instrument and interval is kept"
        if self.before is None:
            return "no row: it is older than all rows that are kept, or watching had not begun"
        return "no row: no trade in it was received (fill=True shows a flat one)"

    def _row_lines(self, row: Candle) -> list[str]:
        state = "complete" if self.announcements else "complete; its announcement is due, or trimmed"
        if self.place == "current":
            state = "still forming" if self.after is None else "forming"
        lines = [f"{state}, {row.ticks} tick{'' if row.ticks == 1 else 's'} changed it", FLAG_WORDS[row.flag]]
        if not self.ticks:
            return [*lines, "its ticks are no longer in the stream"]
        missing = "" if self.has_older_ticks else " (the stream does not reach back to its start)"
        first, last = self.ticks[0], self.ticks[-1]
        return [
            *lines,
            f"{len(self.ticks)} of its ticks are in the stream{missing}, from {', '.join(self.sources)}",
            f"first {_time_of(first.time_ms)} at {_exact(first.last_price)}, last {_time_of(last.time_ms)} "
            f"at {_exact(last.last_price)}, received {_time_of(last.at_ms)}",
        ]


def explain_candle(
    store: CandleStore, token: int, symbol: str, interval: Interval, moment_s: int
) -> Explanation:
    """Explain the candle of an instrument and interval that holds `moment_s` (epoch seconds).

    Raises:
        PkbError: The moment is outside 1970 to 2200.
    """
    if not TIME_MS_MIN <= moment_s * 1000 < TIME_MS_MAX:
        raise PkbError(
            f"{moment_s} is no time of a candle", "give epoch seconds, not milliseconds, of 1970 to 2200"
        )
    rows = store.get_candles(token, interval.name, interval.keep, include_current=True)
    current = store.get_current_candle(token, interval.name)
    sessions, day, start = _bucket(store, token, interval, moment_s, {row.start for row in rows})
    end = bucket_end_s(day, interval.seconds, start)
    row = next((row for row in rows if row.start == start), None)
    is_current = row is not None and current is not None and current.start == start
    ticks, sources, has_older_ticks = _read_ticks(store, token, start * 1000, end * 1000)
    opens_ms = day.windows[0][0] if day.windows else start * 1000
    day_volume, baseline = _read_volumes(store, token, sessions, opens_ms)
    return Explanation(
        token=token,
        symbol=symbol,
        interval=interval.name,
        start=start,
        end=end,
        row=row,
        place="" if row is None else "current" if is_current else "list",
        schedule=sessions.schedules[sessions.schedule_of(token)],
        windows=day.windows,
        ticks=ticks,
        has_older_ticks=has_older_ticks,
        sources=sources,
        announcements=_read_announcements(store, token, interval.name, start),
        before=next((row for row in reversed(rows) if row.start < start), None),
        after=next((row for row in rows if row.start > start), None),
        day_volume=day_volume,
        baseline=baseline,
        now=market_clock(store.settings)() / 1000,
    )


def _bucket(
    store: CandleStore, token: int, interval: Interval, moment_s: int, starts: set[int]
) -> tuple[Sessions, Day, int]:
    """Return the sessions whose grid the rows stand on, the day, and the start of the bucket in that grid."""
    buckets: list[tuple[Sessions, Day, int]] = []
    for sessions in store.possible_sessions():
        day = sessions.day(sessions.schedule_of(token), moment_s * 1000)
        buckets.append((sessions, day, bucket_start_s(day, interval.seconds, moment_s * 1000)))
    if (found := next((bucket for bucket in buckets if bucket[2] in starts), None)) is not None:
        return found
    made_by = store.sessions_of(token, sorted(starts))
    return next(bucket for bucket in buckets if bucket[0] is made_by)


def _read_ticks(
    store: CandleStore, token: int, start_ms: int, end_ms: int
) -> tuple[list[Tick], list[str], bool]:
    """Return the instrument's ticks of that time, their sources, and whether the stream holds older ones."""
    key = store.keys.ticks(store.keys.shard_of(token))
    ticks: list[Tick] = []
    sources: dict[str, None] = {}
    has_older = False
    for _, fields in newest_first(store.client, key, ENTRIES_A_READ, ENTRIES_SCANNED_MAX):
        for tick in ticks_of(fields, token, store.tally):
            if start_ms <= tick.time_ms < end_ms:
                ticks.append(tick)
                sources[fields.get(b"src", b"?").decode(errors="replace")] = None
            has_older |= tick.time_ms < start_ms
    ticks.sort(key=lambda tick: (tick.time_ms, tick.volume or 0, tick.at_ms))
    return ticks, list(sources), has_older


def _read_announcements(store: CandleStore, token: int, interval: str, start: int) -> list[Announcement]:
    """Return what the closed stream holds about the candle, oldest first."""
    key = store.keys.closed(store.keys.shard_of(token))
    found: list[Announcement] = []
    for entry_id, fields in newest_first(store.client, key, ENTRIES_PER_PAGE):
        closed = parse_closed(fields, store.tally, (token,), (interval,))
        if closed is not None and closed.candle.start == start:
            found.append(Announcement(entry_id[0], closed.rev, closed.candle))
    return found[::-1]


def _read_volumes(
    store: CandleStore, token: int, sessions: Sessions, day_ms: int
) -> tuple[float | None, float | None]:
    """Return `(volume, baseline)` of the aggregator's state, whose layout is private: None is valid."""
    text: Any = store.client.hget(store.keys.state(store.keys.shard_of(token)), str(token))
    try:
        day_s, volume, baseline = map(float, msgspec.json.decode(text or b"[]")[3:6])
        is_of_day = sessions.date_of(int(day_s) * 1000) == sessions.date_of(day_ms)
    except (ValueError, TypeError, OverflowError):
        return None, None
    return (volume, baseline) if is_of_day else (None, None)


def _exact(number: float | None) -> str:
    """Return a number with all its digits: 128,990,000 or 1,500.05."""
    return "–" if number is None else f"{number:,.10f}".rstrip("0").rstrip(".")


def _time_of(time_ms: int) -> str:
    moment = datetime.fromtimestamp(time_ms / 1000, KOLKATA)
    return moment.strftime("%H:%M:%S") + (f".{moment.microsecond // 1000:03}" if moment.microsecond else "")
