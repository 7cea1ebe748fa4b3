"""When an instrument trades: the calendar file, and pure functions of epoch milliseconds over it.

The shipped `calendar.json` holds hours by valid-from date, holidays and special sessions, and explains its
own format in `about`. A user's file is laid over it as a JSON merge patch (RFC 7396), so that one new holiday
is one line: `{"calendars": {"equity": {"holidays": {"2027-01-26": "Republic Day"}}}}`.

A window is half-open, [open, close): Kite stamps the last trades of 15:30 with 15:29:59, and a packet
stamped 15:30:00 updates the quote only. Nothing here depends on the host's time zone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import date, datetime, time, timedelta, timezone
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from pkbrokers_redis.errors import SettingsError

IST_SECONDS: Final = 19_800  # +05:30; India has no daylight saving time
IST_MS: Final = IST_SECONDS * 1000
IST: Final = timezone(timedelta(seconds=IST_SECONDS), "IST")
KOLKATA: Final = ZoneInfo("Asia/Kolkata")  # the same under its name, which pandas shows and compares
UNKNOWN = "unknown"  # window of the schedule for unknown kinds: silence in it is no fault
REGULAR = "regular"  # special day that keeps the schedule's own hours: a Saturday or Sunday session
MARKET_TIMEZONE = "Asia/Kolkata"
TIME_MS_MIN = 0  # 1970
TIME_MS_MAX = 7_258_118_400_000  # 2200; a time beyond it is a corrupt packet, not a trade
DAYS_CACHED_MAX = 4096  # ~1.5 years of ten schedules; then the cache is emptied
NEXT_OPEN_DAYS_MAX = 30  # no exchange closes longer; the search ends there
_HINT = "correct the file or unset PKB_CALENDAR"

# -- the calendar file ---------------------------------------------------------------------------


class Window(NamedTuple):
    """One window in minutes after midnight; the `summer` pair counts while the US has summer time."""

    name: str
    winter: tuple[int, int]
    summer: tuple[int, int]


Windows = tuple[Window, ...]


class Calendar(NamedTuple):
    """Which days an exchange group trades. Days are `date.toordinal()`; REGULAR is None in `special`.

    `reasons` has the names of holidays and why a day is special; where both are given, the latter.
    """

    weekend: frozenset[int]  # ISO weekdays, Monday is 1
    holidays: frozenset[int]
    special: dict[int, Windows | None]
    reasons: dict[int, str]


class Schedule(NamedTuple):
    """The hours of one kind of instrument: (valid from, windows), ascending."""

    name: str
    calendar: Calendar
    hours: tuple[tuple[int, Windows], ...]

    def windows_on(self, day: date, summer_time_zone: ZoneInfo) -> list[tuple[str, int, int]]:
        """Return name, open and close (minutes after midnight) of the day's windows, in time order."""
        ordinal = day.toordinal()
        windows: Windows | None = None
        if ordinal in self.calendar.special:
            windows = self.calendar.special[ordinal]
        elif day.isoweekday() in self.calendar.weekend or ordinal in self.calendar.holidays:
            windows = ()
        if windows is None:
            windows = next((each for since, each in reversed(self.hours) if since <= ordinal), ())
        summer = bool(datetime.combine(day, time(12), summer_time_zone).dst())
        return [(each.name, *(each.summer if summer else each.winter)) for each in windows]


class CalendarFile(NamedTuple):
    """The whole file. `segments`: Kite segment → index in `schedules`, without and with derivatives.

    `exchanges`: exchange → index, for instruments whose token says another exchange than the master.
    """

    schedules: tuple[Schedule, ...]
    segments: dict[int, tuple[int, int]]
    exchanges: dict[str, int]
    default: int
    summer_time_zone: ZoneInfo


class _Segment(msgspec.Struct, forbid_unknown_fields=True):
    schedule: str
    with_derivatives: str | None = None


class _Time(msgspec.Struct, forbid_unknown_fields=True):
    winter: str
    summer: str


_RawWindows = dict[str, tuple[str | _Time, str | _Time]]


class _Hours(msgspec.Struct, forbid_unknown_fields=True):
    since: date = msgspec.field(name="from")
    windows: _RawWindows


class _Schedule(msgspec.Struct, forbid_unknown_fields=True):
    calendar: str
    hours: list[_Hours]


class _Special(msgspec.Struct, forbid_unknown_fields=True):
    windows: str | _RawWindows
    why: str = ""


class _Calendar(msgspec.Struct, forbid_unknown_fields=True):
    weekend: list[int] = []
    holidays: dict[date, str] = {}
    holidays_of: str | None = None
    day_types: dict[str, _RawWindows] = {}
    special: dict[date, _Special] = {}


class _File(msgspec.Struct, forbid_unknown_fields=True):
    schedules: dict[str, dict[str, Any]]
    calendars: dict[str, dict[str, Any]]
    segments: dict[str, _Segment]
    default_schedule: str
    exchanges: dict[str, str] = {}
    summer_time_zone: str = "America/New_York"
    about: list[str] = []
    sources: list[str] = []


class _BadField(ValueError):
    """A field is wrong; the message has its path and what is wrong."""


def load_calendar(path: Path | None = None) -> CalendarFile:
    """Return the shipped calendar, with the user's file laid over it; SettingsError names file and field."""
    content = msgspec.json.decode(resources.files(__package__).joinpath("calendar.json").read_bytes())
    try:
        if path is not None:
            content = _merge_patch(content, msgspec.json.decode(path.read_bytes()))
        return _build(content)
    except OSError as error:
        problem = f"cannot read {path} ({error.strerror})"
    except _BadField as error:
        problem = f"{path or 'calendar.json'}: {error}"
    except (msgspec.DecodeError, UnicodeError) as error:
        problem = f"{path} is no JSON ({error})"
    except RecursionError:
        problem = f"{path} is nested too deeply"
    raise SettingsError(f"PKB_CALENDAR: {problem}", _HINT)


def _merge_patch(target: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = _merge_patch(merged.get(name), value)
    return merged


def _build(content: Any) -> CalendarFile:
    file = _convert(content, _File, "")
    raw_calendars = {
        name: _convert(raw, _Calendar, f"calendars.{name}") for name, raw in file.calendars.items()
    }
    calendars = {name: _calendar(name, raw, raw_calendars) for name, raw in raw_calendars.items()}
    schedules = tuple(_schedule(name, raw, calendars) for name, raw in file.schedules.items())
    index = {schedule.name: number for number, schedule in enumerate(schedules)}
    segments = {}
    for key, segment in file.segments.items():
        where = f"segments.{key}"
        if not key.isdecimal() or not 0 <= int(key) <= 255:
            raise _BadField(f"{where}: a segment is a number from 0 to 255")
        plain = _known(segment.schedule, index, f"{where}.schedule")
        derivatives = _known(segment.with_derivatives or segment.schedule, index, f"{where}.with_derivatives")
        segments[int(key)] = (plain, derivatives)
    try:
        zone = ZoneInfo(file.summer_time_zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise _BadField(f"summer_time_zone: {file.summer_time_zone!r} is no time zone") from None
    exchanges = {name: _known(each, index, f"exchanges.{name}") for name, each in file.exchanges.items()}
    default = _known(file.default_schedule, index, "default_schedule")
    return CalendarFile(schedules, segments, exchanges, default, zone)


def _convert(raw: Any, kind: type[Any], where: str) -> Any:
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        # msgspec ends its sentence with the place below `raw`: "… - at `$.hours[0].from`", or, for a
        # dict's key, "… - at `key` in `$.holidays`"
        problem, _, place = str(error).partition(" - at `")
        below = place.rpartition("$")[2].rstrip("`")
        problem = problem.replace("Invalid RFC3339 encoded date", "is no date YYYY-MM-DD")
        raise _BadField(f"{(where + below).lstrip('.') or 'the file'}: {problem}") from None


def _known(name: str, index: dict[str, Any], where: str) -> Any:
    if name not in index:
        raise _BadField(f"{where}: {name!r} is not one of {', '.join(index)}")
    return index[name]


def _calendar(name: str, raw: _Calendar, others: dict[str, _Calendar]) -> Calendar:
    where = f"calendars.{name}"
    if any(not 1 <= weekday <= 7 for weekday in raw.weekend):
        raise _BadField(f"{where}.weekend: weekdays are 1 (Monday) to 7 (Sunday)")
    holidays = dict(raw.holidays)
    if raw.holidays_of is not None:
        holidays = _known(raw.holidays_of, others, f"{where}.holidays_of").holidays | holidays
    types: dict[str, Windows | None] = {
        kind: _windows(windows, f"{where}.day_types.{kind}") for kind, windows in raw.day_types.items()
    }
    types[REGULAR] = None
    special: dict[int, Windows | None] = {}
    for day, entry in raw.special.items():
        here = f"{where}.special.{day}.windows"
        if isinstance(entry.windows, str):
            special[day.toordinal()] = _known(entry.windows, types, here)
        else:
            special[day.toordinal()] = _windows(entry.windows, here)
    names = holidays | {day: entry.why for day, entry in raw.special.items() if entry.why}
    reasons = {day.toordinal(): name for day, name in names.items()}
    closed = frozenset(day.toordinal() for day in holidays)
    return Calendar(frozenset(raw.weekend), closed, special, reasons)


def _schedule(name: str, raw_fields: dict[str, Any], calendars: dict[str, Calendar]) -> Schedule:
    where = f"schedules.{name}"
    raw: _Schedule = _convert(raw_fields, _Schedule, where)
    hours = [
        (each.since.toordinal(), _windows(each.windows, f"{where}.hours[{number}].windows"))
        for number, each in enumerate(raw.hours)
    ]
    if [since for since, _ in hours] != sorted({since for since, _ in hours}):
        raise _BadField(f"{where}.hours: the from dates must ascend")
    return Schedule(name, _known(raw.calendar, calendars, f"{where}.calendar"), tuple(hours))


def _windows(raw: _RawWindows, where: str) -> Windows:
    windows: list[Window] = []
    for name, (opens, closes) in raw.items():
        here = f"{where}.{name}"
        open_pair, close_pair = _minutes(opens, here), _minutes(closes, here)
        window = Window(name, (open_pair[0], close_pair[0]), (open_pair[1], close_pair[1]))
        before = windows[-1] if windows else Window("", (0, 0), (0, 0))
        for (opened, closed), earlier in ((window.winter, before.winter), (window.summer, before.summer)):
            if opened >= closed:
                raise _BadField(f"{here}: a window opens before it closes, on the same day")
            if opened < earlier[1]:
                raise _BadField(f"{here}: windows come in time order and do not overlap")
        windows.append(window)
    return tuple(windows)


def _minutes(raw: str | _Time, where: str) -> tuple[int, int]:
    """`"15:30"` → minutes in winter and in summer. 24:00 is the end of the day."""
    pair = []
    for text in (raw, raw) if isinstance(raw, str) else (raw.winter, raw.summer):
        if not re.fullmatch(r"[0-9]{2}:[0-5][0-9]", text):
            raise _BadField(f"{where}: {text!r} is no time HH:MM")
        if (total := int(text[:2]) * 60 + int(text[3:])) > 1440:
            raise _BadField(f"{where}: {text!r} is later than 24:00")
        pair.append(total)
    return pair[0], pair[1]


# -- sessions ------------------------------------------------------------------------------------


class Day(NamedTuple):
    """One local day of one schedule, in epoch milliseconds.

    `day_start_ms` to `day_end_ms` is local midnight to the next. `windows` are (open, close) in time
    order, () on a closed day. `anchor_ms`, where the buckets begin, is the first window's open, or the
    day's start on a closed day. `names` are the windows' names: `continuous`, `closing_auction`, `muhurat`.
    """

    day_start_ms: int
    day_end_ms: int
    anchor_ms: int
    windows: tuple[tuple[int, int], ...]
    names: tuple[str, ...]


class NamedWindow(NamedTuple):
    """A window of a day with its name; epoch milliseconds."""

    name: str
    open_ms: int
    close_ms: int


class _Loaded(NamedTuple):
    """A calendar and the days that were made by it: replaced as one, while other threads read."""

    calendar: CalendarFile
    days: dict[tuple[int, date], Day]
    latest: dict[int, Day]  # by schedule; ticks come day after day: mostly one comparison


class Sessions:
    """Answers for every schedule of the calendar. `schedules` holds their names; an id is the index.

    Any thread may ask. `refresh` follows the user's file; what was derived from ids or days (the aggregator's
    states, the watchdog's table) must then be made again.
    """

    def __init__(
        self, calendar: CalendarFile, zone: ZoneInfo, always: bool, path: Path | None = None
    ) -> None:
        self._zone = zone
        self._always = always
        self._path = path
        self._stamp = _stamp(path)
        self._loaded = _Loaded(calendar, {}, {})
        self.derivatives: frozenset[int] = frozenset()  # tokens of stocks with futures or options
        self.exchanges: Mapping[int, str] = {}  # token → exchange, where the token says another one

    @property
    def schedules(self) -> tuple[str, ...]:
        """The names of the schedules; an id is the index."""
        return tuple(schedule.name for schedule in self._loaded.calendar.schedules)

    @property
    def unknown_schedule(self) -> int:
        """The id of the schedule of instruments of an unknown kind."""
        return self._loaded.calendar.default

    def refresh(self) -> bool:
        """Read PKB_CALENDAR again if the file changed; return whether other hours may apply.

        Raises SettingsError once a change if it is malformed or gone: the hours stay as they were.
        """
        stamp = _stamp(self._path)
        if stamp == self._stamp or self._always:
            return False
        self._stamp = stamp
        self._loaded = _Loaded(load_calendar(self._path), {}, {})
        return True

    def schedule_of(self, token: int, has_derivatives: bool | None = None) -> int:
        """Return the schedule id of a Kite token: by its exchange in `exchanges`, else by its low byte.

        `has_derivatives`: the stock has futures or options, so it takes part in the closing auction; None
        looks it up in `derivatives`. An unknown kind gets the file's `default_schedule`, which never closes.
        """
        calendar = self._loaded.calendar
        if (exchange := self.exchanges.get(token)) is not None:
            return calendar.exchanges.get(exchange, calendar.default)
        pair = calendar.segments.get(token & 0xFF)
        if pair is None:
            return calendar.default
        return pair[token in self.derivatives if has_derivatives is None else has_derivatives]

    def schedules_of(self, tokens: Iterable[int]) -> set[int]:
        """Return the schedules of instruments; without the one of unknown kinds, if there are others."""
        found = {self.schedule_of(token) for token in tokens}
        return found - {self.unknown_schedule} or found

    def day(self, schedule: int, time_ms: int) -> Day:
        """Return the local day that holds `time_ms`.

        Raises ValueError outside 1970 to 2200, IndexError for an unknown schedule id.
        """
        if not TIME_MS_MIN <= time_ms < TIME_MS_MAX:
            raise ValueError(f"time_ms {time_ms} is not between 1970 and 2200")
        calendar, days, latest_days = self._loaded
        latest = latest_days.get(schedule)
        if latest is not None and latest.day_start_ms <= time_ms < latest.day_end_ms:
            return latest
        local = datetime.fromtimestamp(time_ms // 1000, self._zone).date()
        found = days.get((schedule, local))
        if found is None:
            if len(days) >= DAYS_CACHED_MAX:
                days.clear()
            found = days[schedule, local] = self._make_day(calendar, schedule, local)
        latest_days[schedule] = found
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
        return [NamedWindow(name, *window) for name, window in zip(day.names, day.windows, strict=True)]

    def reason(self, schedule: int, local: date) -> str:
        """The holiday's name, or why the day is special; "" on any other day, weekends included."""
        if self._always:
            return ""
        return self._loaded.calendar.schedules[schedule].calendar.reasons.get(local.toordinal(), "")

    def session_near(self, schedule: int, local: date, step_days: int) -> date | None:
        """The nearest later (`step_days` 1) or earlier (-1) date with a session; None within 30 days."""
        for _ in range(NEXT_OPEN_DAYS_MAX):
            local += timedelta(days=step_days)
            if self.on_date(schedule, local).windows:
                return local
        return None

    def segments_of(self, schedule: int) -> list[int]:
        """Kite's segment numbers whose instruments follow this schedule, in ascending order."""
        return sorted(number for number, pair in self._loaded.calendar.segments.items() if schedule in pair)

    def reasons(self, schedule: int, year: int) -> dict[date, str]:
        """All holidays and special days of a year by date, in time order."""
        named = self._loaded.calendar.schedules[schedule].calendar.reasons
        days = sorted((date.fromordinal(ordinal), name) for ordinal, name in named.items())
        return {day: name for day, name in days if day.year == year}

    def _make_day(self, calendar: CalendarFile, schedule: int, local: date) -> Day:
        rules = calendar.schedules[schedule]
        start_ms, end_ms = self._midnight_ms(local), self._midnight_ms(local + timedelta(days=1))
        if self._always:
            return Day(start_ms, end_ms, start_ms, ((start_ms, end_ms),), ("always",))
        named = rules.windows_on(local, calendar.summer_time_zone)
        # India has no daylight saving time: minutes after midnight are elapsed minutes.
        windows = tuple((start_ms + opens * 60_000, start_ms + closes * 60_000) for _, opens, closes in named)
        names = tuple(name for name, _, _ in named)
        return Day(start_ms, end_ms, windows[0][0] if windows else start_ms, windows, names)

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
    return Sessions(load_calendar(path), ZoneInfo(timezone if always else MARKET_TIMEZONE), always, path)


def _stamp(path: Path | None) -> tuple[int, int, int] | None:
    """Return what changes when a file is written or replaced; None without one."""
    try:
        found = path.stat() if path is not None else None
    except OSError:
        return None
    return None if found is None else (found.st_mtime_ns, found.st_size, found.st_ino)
