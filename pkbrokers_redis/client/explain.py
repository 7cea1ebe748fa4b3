"""Why a candle looks as it does: its row, what made it, what was announced of it, and the session around it.

Reads only what is in Redis now. Ticks are there for minutes (`PKB_STREAM_RETENTION_SECONDS`), announcements
as long as the closed stream's cap allows; what is gone is said to be gone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

import msgspec
import redis

from pkbrokers_redis.candles.calendar import KOLKATA, TIME_MS_MAX, TIME_MS_MIN, Sessions
from pkbrokers_redis.candles.model import Candle, Interval, bucket_end_s, bucket_start_s
from pkbrokers_redis.client.follow import ENTRIES_A_READ, SCAN_MAX, parse_entry, parse_id
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store import rows

FLAG_WORDS = {
    "": "a whole candle: we watched all of it",
    "partial": "partial: we began to watch inside it",
    "gap": "gap: the feed was down inside it, so trades may be missing",
    "backfilled": "backfilled: repaired from Kite's history",
}


class Reader(Protocol):
    """What an explanation asks of a `CandleStore`."""

    client: redis.Redis
    tally: rows.Tally

    @property
    def keys(self) -> Keys: ...
    def get_candles(
        self, symbol: str | int, interval: str, count: int = ..., include_current: bool = ...
    ) -> list[Candle]: ...
    def get_current_candle(self, symbol: str | int, interval: str) -> Candle | None: ...
    def possible_sessions(self) -> list[Sessions]: ...


@dataclass(frozen=True)
class Announcement:
    """One entry of the closed stream about the candle: when (epoch ms), its `rev`, the row as announced."""

    at_ms: int
    rev: int
    candle: Candle


@dataclass(frozen=True)
class Explanation:
    """All that Redis knows about one candle.

    `start` and `end` are epoch seconds. `place` is `current` (it forms), `list` (completed) or "" (no row).
    `ticks` are those still in the stream whose trade time lies in it, oldest first, `sources` the ingests
    that sent them. `windows` are the trading hours of its day (epoch ms), `baseline` and `seen` the day's
    first and last cumulative volume as the aggregator knows them, of `baseline_day` (epoch seconds).
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
    is_in_session: bool
    ticks: tuple[rows.Tick, ...] = ()
    sources: tuple[str, ...] = ()
    announcements: tuple[Announcement, ...] = ()
    before: Candle | None = None
    after: Candle | None = None
    baseline: float | None = None
    seen: float | None = None
    baseline_day: int | None = None
    has_older_ticks: bool = field(default=False)  # the stream reaches back to before the candle

    @property
    def revision(self) -> int | None:
        """The highest revision announced and still in the stream."""
        return max((each.rev for each in self.announcements), default=None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields by name, and `lines`."""
        return {
            "token": self.token,
            "symbol": self.symbol,
            "interval": self.interval,
            "start": self.start,
            "end": self.end,
            "place": self.place,
            "row": None if self.row is None else self.row.as_dict(),
            "flag": None if self.row is None else FLAG_WORDS[self.row.flag],
            "ticks_in_stream": len(self.ticks),
            "first_tick": self.ticks[0]._asdict() if self.ticks else None,
            "last_tick": self.ticks[-1]._asdict() if self.ticks else None,
            "sources": list(self.sources),
            "announcements": [
                {"at_ms": each.at_ms, "rev": each.rev, "row": each.candle.as_dict()}
                for each in self.announcements
            ],
            "schedule": self.schedule,
            "windows_ms": [list(window) for window in self.windows],
            "is_in_session": self.is_in_session,
            "baseline": self.baseline,
            "seen": self.seen,
            "lines": self.lines(),
        }

    def lines(self) -> list[str]:
        """The explanation in sentences."""
        return [
            *self._row_lines(),
            *self._tick_lines(),
            *self._announcement_lines(),
            *self._session_lines(),
        ]

    def _row_lines(self) -> list[str]:
        if self.row is None:
            if not self.is_in_session:
                return ["no row: it lies outside the trading hours, whose trades update quotes only"]
            if self.before is None and self.after is None:
                return ["no row: nothing of this instrument and interval is kept"]
            if self.before is None:
                return ["no row: it is older than all that is kept, or we had not begun to watch"]
            return ["no row: nothing traded in it, as far as we know (fill=True shows a flat one)"]
        state = {
            "current": "still forming" if self.after is None else "forming",
            "list": "complete" if self.announcements else "complete; its announcement is due, or trimmed",
        }[self.place]
        ticks = f"{self.row.ticks} tick{'' if self.row.ticks == 1 else 's'} changed it"
        return [f"{state}, {ticks}", FLAG_WORDS[self.row.flag]]

    def _tick_lines(self) -> list[str]:
        if not self.ticks:
            return ["its ticks are no longer in the stream"] if self.row is not None else []
        first, last = self.ticks[0], self.ticks[-1]
        whole = "" if self.has_older_ticks else " (the stream does not reach back to its start)"
        return [
            f"{len(self.ticks)} of its ticks are in the stream{whole}, from {', '.join(self.sources)}",
            f"first {_clock(first.time_ms)} at {first.last_price:g}, last {_clock(last.time_ms)} at "
            f"{last.last_price:g}, received {_clock(last.at_ms)}",
        ]

    def _announcement_lines(self) -> list[str]:
        lines: list[str] = []
        for one in self.announcements:
            what = "announced" if one.rev == 0 else f"amended, revision {one.rev}"
            lines.append(
                f"{what} at {_clock(one.at_ms)}: close {one.candle.close:g}, volume {one.candle.volume:g}"
                + (f", {one.candle.flag}" if one.candle.flag else "")
            )
        return lines

    def _session_lines(self) -> list[str]:
        hours = ", ".join(f"{_clock(opened)[:5]}–{_clock(closed)[:5]}" for opened, closed in self.windows)
        lines = [f"session {self.schedule}: {hours or 'closed that day'}"]
        day = self.windows[0][0] // 1000 if self.windows else self.start
        is_of_day = self.baseline_day is not None and _date(self.baseline_day) == _date(day)
        if self.baseline is not None and self.seen is not None and is_of_day:
            lines.append(
                f"day's volume {self.seen:g}, of which {self.baseline:g} was traded before we watched"
            )
        return lines


def explain_candle(store: Reader, token: int, symbol: str, interval: Interval, moment_s: int) -> Explanation:
    """The candle of that instrument and interval that holds `moment_s`, which may be its start.

    Raises PkbError for a moment outside 1970 to 2200.
    """
    if not TIME_MS_MIN <= moment_s * 1000 < TIME_MS_MAX:
        raise PkbError(
            f"{moment_s} is no time of a candle", "give epoch seconds, not milliseconds, of 1970 to 2200"
        )
    rows = store.get_candles(token, interval.name, interval.keep, include_current=True)
    current = store.get_current_candle(token, interval.name)
    sessions, start = _bucket(store, token, interval, moment_s, {row.start for row in rows})
    schedule = sessions.schedule_of(token)
    day = sessions.day(schedule, moment_s * 1000)
    end = bucket_end_s(day, interval.seconds, start)
    row = next((row for row in rows if row.start == start), None)
    is_current = row is not None and current is not None and current.start == start
    ticks, sources, reaches = _ticks(store, token, start * 1000, end * 1000)
    baseline_day, seen, baseline = _baseline(store, token)
    return Explanation(
        token,
        symbol,
        interval.name,
        start,
        end,
        row,
        "" if row is None else "current" if is_current else "list",
        sessions.schedules[schedule],
        day.windows,
        any(opened < end * 1000 and start * 1000 < closed for opened, closed in day.windows),
        ticks,
        sources,
        _announcements(store, token, interval.name, start),
        next((row for row in reversed(rows) if row.start < start), None),
        next((row for row in rows if row.start > start), None),
        baseline,
        seen,
        baseline_day,
        reaches,
    )


def _bucket(
    store: Reader, token: int, interval: Interval, moment_s: int, starts: set[int]
) -> tuple[Sessions, int]:
    """The sessions whose grid the rows stand on, and the start of the bucket in it."""
    found: list[tuple[Sessions, int]] = []
    for sessions in store.possible_sessions():
        day = sessions.day(sessions.schedule_of(token), moment_s * 1000)
        found.append((sessions, bucket_start_s(day, interval.seconds, moment_s * 1000)))
    return next((each for each in found if each[1] in starts), found[0])


def _ticks(
    store: Reader, token: int, start_ms: int, end_ms: int
) -> tuple[tuple[rows.Tick, ...], tuple[str, ...], bool]:
    """The instrument's ticks of that time, who sent them, and whether the stream holds older ones."""
    key = store.keys.ticks(store.keys.shard_of(token))
    found: list[rows.Tick] = []
    sources: dict[str, None] = {}
    has_older = False
    before = "+"
    with rows.expecting(store.client, key, "stream"):
        for _ in range(rows.ENTRIES_SCANNED_MAX // rows.ENTRIES_A_READ):
            entries: Any = store.client.xrevrange(key, before, "-", count=rows.ENTRIES_A_READ)
            for _, fields in entries:
                for tick in rows.ticks_of(fields, token, store.tally):
                    if start_ms <= tick.time_ms < end_ms:
                        found.append(tick)
                        sources[fields.get(b"src", b"?").decode(errors="replace")] = None
                    has_older |= tick.time_ms < start_ms
            if len(entries) < rows.ENTRIES_A_READ:
                break
            before = "(" + entries[-1][0].decode()
    found.sort(key=lambda tick: (tick.time_ms, tick.volume or 0, tick.at_ms))
    return tuple(found), tuple(sources), has_older


def _announcements(store: Reader, token: int, interval: str, start: int) -> tuple[Announcement, ...]:
    """What the closed stream still holds about it, oldest first."""
    key = store.keys.closed(store.keys.shard_of(token))
    found: list[Announcement] = []
    before, scanned = "+", 0
    with rows.expecting(store.client, key, "stream"):
        while scanned < SCAN_MAX:
            entries: Any = store.client.xrevrange(key, before, "-", count=ENTRIES_A_READ)
            for raw_id, fields in entries:
                closed = parse_entry(fields, store.tally, (token,), (interval,))
                if closed is not None and closed.candle.start == start:
                    found.append(Announcement(parse_id(raw_id)[0], closed.rev, closed.candle))
            if len(entries) < ENTRIES_A_READ:
                break
            scanned += len(entries)
            before = "(" + entries[-1][0].decode()
    return tuple(reversed(found))


def _baseline(store: Reader, token: int) -> tuple[int | None, float | None, float | None]:
    """`(day, seen, baseline)` of the aggregator's notebook; its layout is its own, so None is an answer."""
    text: Any = store.client.hget(store.keys.state(store.keys.shard_of(token)), str(token))
    try:
        day_s, seen, baseline = msgspec.json.decode(text or b"[]")[3:6]
        return int(day_s), float(seen), float(baseline)
    except (ValueError, TypeError):
        return None, None, None


def _clock(time_ms: int) -> str:
    moment = datetime.fromtimestamp(time_ms / 1000, KOLKATA)
    return moment.strftime("%H:%M:%S") + (f".{moment.microsecond // 1000:03}" if moment.microsecond else "")


def _date(time_s: int) -> str:
    return datetime.fromtimestamp(time_s, KOLKATA).date().isoformat()
