"""The trading day: which job runs when. One table; a new row is a new run, every day.

Times are relative to the day's session, so that a holiday has none of them and a muhurat evening all. A day's
session reaches from the first open to the last close of what is streamed: NSE alone 09:15–15:30, with MCX
09:00–23:30. Pure: market time comes as an argument, epoch ms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any, Literal

from pkbrokers_redis.core.india import IST
from pkbrokers_redis.core.jobs import job_id
from pkbrokers_redis.core.sessions import Sessions

Anchor = Literal["open", "close", "minute"]

MINUTE_MS = 60_000
LOOK_BACK_DAYS = 1  # a session's last rows may run after midnight (MCX closes at 23:30 or 23:55)
LOOK_INTO_DAYS = 1  # and its first before: a feed that never closes opens at midnight
LOOK_AHEAD_DAYS = 30  # no exchange closes longer


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    `anchor` "open" and "close" is once a day, "minute" after each minute of the session; `offset_seconds`
    from there. `job` is a name of `core.jobs.JOBS`. A run that was missed is made up for within
    `late_seconds_max`, the latest one only. `needs` names rows of the same day that must be over first.
    """

    name: str
    anchor: Anchor
    offset_seconds: int
    job: str
    does: str
    late_seconds_max: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    @property
    def when(self) -> str:
        """`open - 45 min`, `every minute + 5 s`, `close + 10 min, after settle`."""
        minutes, seconds = divmod(abs(self.offset_seconds), 60)
        amount = " ".join(f"{n} {unit}" for n, unit in ((minutes, "min"), (seconds, "s")) if n)
        sign = f" {'-' if self.offset_seconds < 0 else '+'} {amount}" if amount else ""
        text = f"{'every minute' if self.anchor == 'minute' else self.anchor}{sign}"
        return text + (f", after {' '.join(self.needs)}" if self.needs else "")


MORNING, EVENING = 2 * 3600, 12 * 3600  # how late it is still of use
SETTLED, WRITTEN = ("settle",), ("pickle", "sqlite", "parquet")

DAY: tuple[Row, ...] = (
    # before the open
    Row("login", "open", -45 * 60, "login", "a Kite session that works, shared by all", MORNING),
    Row("instruments", "open", -40 * 60, "instruments", "the day's instrument master", MORNING),
    Row("calendar", "open", -30 * 60, "calendar", "the calendar knows the coming sessions", MORNING),
    Row("capacity", "open", -25 * 60, "capacity", "connections, memory and disk suffice", MORNING),
    # in the session
    Row("open", "open", 60, "feed", "the pipeline is healthy and ticks flow", 600),
    Row("ticks", "minute", 5, "day_snapshot", "ticks.json", 300, {"kind": "ticks"}),
    # the close
    Row("close", "close", 60, "day_snapshot", "the session's last ticks.json", EVENING, {"kind": "ticks"}),
    # and after it
    Row("settle", "close", 600, "settle", "day candles as Kite settled them", EVENING),
    Row("pickle", "close", 660, "day_snapshot", "the day's pickles", EVENING, {"kind": "pickle"}, SETTLED),
    Row("sqlite", "close", 660, "day_snapshot", "candles.db, its copy", EVENING, {"kind": "sqlite"}, SETTLED),
    Row("parquet", "close", 660, "day_snapshot", "Parquet of the day", EVENING, {"kind": "parquet"}, SETTLED),
    Row("sync", "close", 720, "sync_push", "files to the data branch", EVENING, {}, WRITTEN),
    Row("trim", "close", 780, "trim", "dated files that are too old go", EVENING, {}, ("sync",)),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Planned:
    """One run of a row. `day` is the session's date, `at_ms` market time."""

    row: Row
    day: date
    at_ms: int
    arguments: dict[str, Any]

    @property
    def job_id(self) -> str:
        """The same for every cron that plans this run."""
        return job_id(self.row.job, self.arguments)


class Plan:
    """The table on a calendar. `schedules` are those of the instruments that are streamed."""

    def __init__(self, sessions: Sessions, schedules: Iterable[int], table: Sequence[Row] = DAY) -> None:
        self.sessions = sessions
        self.schedules = tuple(sorted(set(schedules)))
        self.table = tuple(table)
        self._rows = {row.name: row for row in self.table}

    def windows(self, day: date) -> list[tuple[int, int]]:
        """When anything that is streamed trades: (open, close), apart, epoch ms; [] on a holiday."""
        found: list[tuple[int, int]] = []
        for opened, closed in sorted(
            window for each in self.schedules for window in self.sessions.on_date(each, day).windows
        ):
            if found and opened <= found[-1][1]:
                found[-1] = found[-1][0], max(closed, found[-1][1])
            else:
                found.append((opened, closed))
        return found

    def times(self, row: Row, day: date) -> list[int]:
        """When the row runs on that day, ascending, epoch ms."""
        windows = self.windows(day)
        if not windows:
            return []
        offset_ms = row.offset_seconds * 1000
        if row.anchor == "open":
            return [windows[0][0] + offset_ms]
        if row.anchor == "close":
            return [windows[-1][1] + offset_ms]
        return [
            minute + offset_ms
            for opened, closed in windows
            for minute in range(opened + MINUTE_MS, closed + 1, MINUTE_MS)
        ]

    def last(self, row: Row, now_ms: float) -> Planned | None:
        """The row's newest run that is due, if it is not too late for it."""
        today = self.sessions.date_of(int(now_ms))
        for days in range(-LOOK_INTO_DAYS, LOOK_BACK_DAYS + 1):
            day = date.fromordinal(today.toordinal() - days)
            due = [at for at in self.times(row, day) if at <= now_ms]
            if due:
                return (
                    self.run(row, day, due[-1]) if now_ms - due[-1] <= row.late_seconds_max * 1000 else None
                )
        return None

    def next(self, row: Row, now_ms: float) -> Planned | None:
        """The row's next run after now; None where there is none in thirty days."""
        today = self.sessions.date_of(int(now_ms))
        for days in range(LOOK_AHEAD_DAYS + 1):
            day = date.fromordinal(today.toordinal() + days)
            for at in self.times(row, day):
                if at > now_ms:
                    return self.run(row, day, at)
        return None

    def due(self, now_ms: float) -> list[Planned]:
        """What should be in the queue by now, rows in the table's order."""
        return [run for row in self.table if (run := self.last(row, now_ms)) is not None]

    def day_of(self, day: date) -> Iterator[Planned]:
        """Every run of a day, in time order."""
        runs = [self.run(row, day, at) for row in self.table for at in self.times(row, day)]
        return iter(sorted(runs, key=lambda run: run.at_ms))

    def run(self, row: Row, day: date, at_ms: int) -> Planned:
        """The row's run of that moment, with the ids of the runs it waits for."""
        needed = [
            self.run(self._rows[name], day, at).job_id
            for name in row.needs
            for at in self.times(self._rows[name], day)[-1:]
        ]
        arguments = {"at": iso(at_ms), "day": str(day), **row.arguments}
        return Planned(row, day, at_ms, {**arguments, "after": needed} if needed else arguments)


def iso(at_ms: float) -> str:
    """`2026-11-20T09:15:00+05:30`."""
    return datetime.fromtimestamp(at_ms / 1000, IST).isoformat(timespec="seconds")


def next_runs(plan: Plan, now_ms: float) -> list[dict[str, Any]]:
    """The table for people: `row when job next does`, in the table's order."""
    rows = []
    for row in plan.table:
        run = plan.next(row, now_ms)
        shown = {"row": row.name, "when": row.when, "job": row.job}
        rows.append({**shown, "next": iso(run.at_ms) if run else None, "does": row.does})
    return rows
