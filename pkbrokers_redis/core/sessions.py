"""When an instrument trades: pure functions of epoch milliseconds, over the calendar file.

A window is half-open, [open, close): Kite stamps the last trades of 15:30 with 15:29:59, and a packet
stamped 15:30:00 updates the quote only. Nothing here depends on the host's time zone.
"""

from __future__ import annotations

from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Literal, NamedTuple
from zoneinfo import ZoneInfo

from pkbrokers_redis.core.calendar_file import CalendarFile, load_calendar

MARKET_TIMEZONE = "Asia/Kolkata"
TIME_MS_MIN = 0  # 1970
TIME_MS_MAX = 7_258_118_400_000  # 2200; a time beyond it is a corrupt packet, not a trade
DAYS_CACHED_MAX = 4096  # ~1.5 years of ten schedules; then the cache starts anew
NEXT_OPEN_DAYS_MAX = 30  # no exchange closes longer; the search ends there


class Day(NamedTuple):
    """One local day of one schedule, in epoch milliseconds.

    `day_start_ms` to `day_end_ms` is local midnight to the next. `windows` are (open, close) in time
    order, () on a closed day. `anchor_ms`, where the buckets begin, is the first window's open, or the
    day's start on a closed day.
    """

    day_start_ms: int
    day_end_ms: int
    anchor_ms: int
    windows: tuple[tuple[int, int], ...]


class NamedWindow(NamedTuple):
    """A window of a day as people know it: `continuous`, `closing_auction`, `muhurat`; epoch milliseconds."""

    name: str
    open_ms: int
    close_ms: int


class Sessions:
    """Answers for every schedule of the calendar. `schedules` holds their names; an id is the index."""

    def __init__(self, calendar: CalendarFile, zone: ZoneInfo, always: bool) -> None:
        self.schedules: tuple[str, ...] = tuple(schedule.name for schedule in calendar.schedules)
        self._calendar = calendar
        self._zone = zone
        self._always = always
        self._days: dict[tuple[int, date], Day] = {}
        self.derivatives: frozenset[int] = frozenset()  # tokens of stocks with futures or options
        self._latest: dict[int, Day] = {}  # ticks come day after day: mostly one comparison

    def schedule_of(self, token: int, has_derivatives: bool | None = None) -> int:
        """The schedule id of a Kite token, from its segment (the low byte).

        `has_derivatives`: the stock has futures or options, so it takes part in the closing auction; None:
        it has if it is among `derivatives`.
        An unknown segment gets NSE cash hours (the file's `default_schedule`).
        """
        pair = self._calendar.segments.get(token & 0xFF)
        if pair is None:
            return self._calendar.default
        return pair[token in self.derivatives if has_derivatives is None else has_derivatives]

    def day(self, schedule: int, time_ms: int) -> Day:
        """The local day that holds `time_ms`.

        Raises ValueError outside 1970 to 2200, IndexError for an unknown schedule id.
        """
        if not TIME_MS_MIN <= time_ms < TIME_MS_MAX:
            raise ValueError(f"time_ms {time_ms} is not between 1970 and 2200")
        latest = self._latest.get(schedule)
        if latest is not None and latest.day_start_ms <= time_ms < latest.day_end_ms:
            return latest
        local = datetime.fromtimestamp(time_ms // 1000, self._zone).date()
        found = self._days.get((schedule, local))
        if found is None:
            if len(self._days) >= DAYS_CACHED_MAX:
                self._days.clear()
            found = self._days[schedule, local] = self._make_day(schedule, local)
        self._latest[schedule] = found
        return found

    def is_open(self, schedule: int, time_ms: int) -> bool:
        """Whether `time_ms` lies in a window. Raises as `day` does."""
        return any(opened <= time_ms < closed for opened, closed in self.day(schedule, time_ms).windows)

    def next_open(self, schedule: int, time_ms: int) -> int | None:
        """The next opening strictly after `time_ms`, in epoch ms; None if there is none in 30 days.

        A window that follows another without a break (the closing auction) is no opening, so a
        schedule that never closes never opens. Raises as `day` does.
        """
        day = self.day(schedule, time_ms)
        previous_close = -1
        for _ in range(NEXT_OPEN_DAYS_MAX + 1):
            for opened, closed in day.windows:
                if opened > time_ms and opened != previous_close:
                    return opened
                previous_close = closed
            if day.day_end_ms >= TIME_MS_MAX:
                break
            day = self.day(schedule, day.day_end_ms)
        return None

    def date_of(self, time_ms: int) -> date:
        """The local date of a moment: India's, or with `always` that of PKB_TIMEZONE."""
        return datetime.fromtimestamp(time_ms // 1000, self._zone).date()

    def on_date(self, schedule: int, local: date) -> Day:
        """The day of a local date. Raises as `day` does."""
        return self.day(schedule, self._midnight_ms(local))

    def named_windows(self, schedule: int, local: date) -> list[NamedWindow]:
        """The windows of a local date with their names, in time order; empty on a closed day."""
        day = self.on_date(schedule, local)
        names = ["always"]
        if not self._always:
            rules = self._calendar.schedules[schedule]
            names = [name for name, _, _ in rules.named_windows_on(local, self._calendar.summer_time_zone)]
        return [NamedWindow(name, *window) for name, window in zip(names, day.windows, strict=True)]

    def reason(self, schedule: int, local: date) -> str:
        """The holiday's name, or why the day is special; "" on any other day, weekends included."""
        if self._always:
            return ""
        return self._calendar.schedules[schedule].calendar.reasons.get(local.toordinal(), "")

    def session_near(self, schedule: int, local: date, step_days: int) -> date | None:
        """The nearest later (`step_days` 1) or earlier (-1) date with a session; None within 30 days."""
        for _ in range(NEXT_OPEN_DAYS_MAX):
            local += timedelta(days=step_days)
            if self.on_date(schedule, local).windows:
                return local
        return None

    def segments_of(self, schedule: int) -> list[int]:
        """Kite's segment numbers whose instruments follow this schedule, in ascending order."""
        return sorted(number for number, pair in self._calendar.segments.items() if schedule in pair)

    def reasons(self, schedule: int, year: int) -> dict[date, str]:
        """All holidays and special days of a year by date, in time order."""
        named = self._calendar.schedules[schedule].calendar.reasons
        days = sorted((date.fromordinal(ordinal), name) for ordinal, name in named.items())
        return {day: name for day, name in days if day.year == year}

    def _make_day(self, schedule: int, local: date) -> Day:
        rules = self._calendar.schedules[schedule]
        start_ms, end_ms = self._midnight_ms(local), self._midnight_ms(local + timedelta(days=1))
        if self._always:
            return Day(start_ms, end_ms, start_ms, ((start_ms, end_ms),))
        # India has no daylight saving time: minutes after midnight are elapsed minutes.
        windows = tuple(
            (start_ms + opened * 60_000, start_ms + closed * 60_000)
            for opened, closed in rules.windows_on(local, self._calendar.summer_time_zone)
        )
        return Day(start_ms, end_ms, windows[0][0] if windows else start_ms, windows)

    def _midnight_ms(self, local: date) -> int:
        midnight = datetime(local.year, local.month, local.day, tzinfo=self._zone)
        return int(midnight.timestamp()) * 1000


def load_sessions(
    mode: Literal["market", "always"], timezone: str = MARKET_TIMEZONE, path: Path | None = None
) -> Sessions:
    """Sessions of the shipped calendar, or with the user's calendar file laid over it.

    `always` makes every day of `timezone` one window from midnight to midnight (23 or 25 hours where
    the clocks change); `market` is always Asia/Kolkata. Raises SettingsError for a malformed file.
    """
    always = mode == "always"
    return Sessions(load_calendar(path), ZoneInfo(timezone if always else MARKET_TIMEZONE), always)
