"""Reads the calendar file: hours by valid-from date, holidays and special sessions. Data, not code.

The shipped `calendar.json` explains its own format in `about`. A user's file is laid over it as a JSON
merge patch (RFC 7396), so that one new holiday is one line:
`{"calendars": {"equity": {"holidays": {"2027-01-26": "Republic Day"}}}}`.
"""

from __future__ import annotations

from datetime import date, datetime, time
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from pkbrokers_redis.core.errors import SettingsError

REGULAR = "regular"  # special day that keeps the schedule's own hours: a Saturday or Sunday session


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

    def windows_on(self, day: date, summer_time_zone: ZoneInfo) -> list[tuple[int, int]]:
        """The day's windows in minutes after midnight, in time order; empty on a closed day."""
        return [(opened, closed) for _, opened, closed in self.named_windows_on(day, summer_time_zone)]

    def named_windows_on(self, day: date, summer_time_zone: ZoneInfo) -> list[tuple[str, int, int]]:
        """The same with the windows' names in front."""
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
    """The whole file. `segments`: Kite segment → index in `schedules`, without and with derivatives."""

    schedules: tuple[Schedule, ...]
    segments: dict[int, tuple[int, int]]
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
    summer_time_zone: str = "America/New_York"
    about: list[str] = []
    sources: list[str] = []


def load_calendar(path: Path | None = None) -> CalendarFile:
    """The shipped calendar, with the user's file laid over it.

    Raises SettingsError: one line that names the file and the field.
    """
    content = msgspec.json.decode(resources.files(__package__).joinpath("calendar.json").read_bytes())
    if path is None:
        return _build(content, "calendar.json")
    try:
        content = _merge_patch(content, msgspec.json.decode(path.read_bytes()))
    except OSError as error:
        raise SettingsError(f"PKB_CALENDAR: cannot read {path} ({error.strerror})", _MEND) from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise SettingsError(f"PKB_CALENDAR: {path} is no JSON ({error})", _MEND) from None
    except RecursionError:
        raise SettingsError(f"PKB_CALENDAR: {path} is nested too deeply", _MEND) from None
    return _build(content, str(path))


_MEND = "correct the file or unset PKB_CALENDAR"


class _BadField(Exception):
    """Raised inside this module when a field is wrong; args: the field's path, what is wrong."""


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


def _build(content: Any, source: str) -> CalendarFile:
    try:
        return _build_checked(content)
    except _BadField as error:
        field, problem = error.args
        raise SettingsError(f"PKB_CALENDAR: {source}: {field}: {problem}", _MEND) from None


def _build_checked(content: Any) -> CalendarFile:
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
            raise _BadField(where, "a segment is a number from 0 to 255")
        plain = _known(segment.schedule, index, f"{where}.schedule")
        derivatives = _known(segment.with_derivatives or segment.schedule, index, f"{where}.with_derivatives")
        segments[int(key)] = (plain, derivatives)
    try:
        zone = ZoneInfo(file.summer_time_zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise _BadField("summer_time_zone", f"{file.summer_time_zone!r} is no time zone") from None
    return CalendarFile(schedules, segments, _known(file.default_schedule, index, "default_schedule"), zone)


def _convert(raw: Any, kind: type[Any], where: str) -> Any:
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        # msgspec ends its sentence with the place below `raw`: "… - at `$.hours[0].from`", or, for a
        # dict's key, "… - at `key` in `$.holidays`"
        problem, _, place = str(error).partition(" - at `")
        below = place.rpartition("$")[2].rstrip("`")
        problem = problem.replace("Invalid RFC3339 encoded date", "is no date YYYY-MM-DD")
        raise _BadField((where + below).lstrip(".") or "the file", problem) from None


def _known(name: str, index: dict[str, Any], where: str) -> Any:
    if name not in index:
        raise _BadField(where, f"{name!r} is not one of {', '.join(index)}")
    return index[name]


def _calendar(name: str, raw: _Calendar, others: dict[str, _Calendar]) -> Calendar:
    where = f"calendars.{name}"
    if any(not 1 <= weekday <= 7 for weekday in raw.weekend):
        raise _BadField(f"{where}.weekend", "weekdays are 1 (Monday) to 7 (Sunday)")
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
        raise _BadField(f"{where}.hours", "the from dates must ascend")
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
                raise _BadField(here, "a window opens before it closes, on the same day")
            if opened < earlier[1]:
                raise _BadField(here, "windows come in time order and do not overlap")
        windows.append(window)
    return tuple(windows)


def _minutes(raw: str | _Time, where: str) -> tuple[int, int]:
    """`"15:30"` → minutes in winter and in summer. 24:00 is the end of the day."""
    texts = (raw, raw) if isinstance(raw, str) else (raw.winter, raw.summer)
    pair = []
    for text in texts:
        hours, colon, minutes = text.partition(":")
        if not (colon and len(text) == 5 and hours.isascii() and hours.isdecimal()) or not (
            minutes.isascii() and minutes.isdecimal() and int(minutes) < 60
        ):
            raise _BadField(where, f"{text!r} is no time HH:MM")
        if (total := int(hours) * 60 + int(minutes)) > 1440:
            raise _BadField(where, f"{text!r} is later than 24:00")
        pair.append(total)
    return pair[0], pair[1]
