"""Commands that need no store: `pkb config`, `pkb calendar`, `pkb bench`."""

from __future__ import annotations

import importlib
import os
import re
import sys
from datetime import date
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from pydantic import SecretStr

from pkbrokers_redis.candles.calendar import Sessions, load_sessions
from pkbrokers_redis.candles.model import SEGMENTS
from pkbrokers_redis.cli.common import AsCsv, AsJson, choose_form, dump, emit, iso, note, parse_date
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.errors import PkbError, SettingsError
from pkbrokers_redis.settings import Settings, env_name, load_settings, set_names, unknown_names

MASK = "********"
CONFIG_COLUMNS = ("name", "value", "source", "description")
_secret_option = re.compile(r"([?&][^=&]*(?:pass|secret|token|key|auth)[^=&]*=)[^&]*", re.IGNORECASE)


def config(as_json: AsJson = False, as_csv: AsCsv = False) -> None:
    """Print all settings with their values and sources; secrets are masked."""
    form = choose_form(as_json, as_csv)
    settings = load_settings()
    places = set_names()
    rows: list[dict[str, Any]] = []
    for field, info in Settings.model_fields.items():
        name = env_name(field)
        source = places.get(name, "default")
        value = shown(getattr(settings, field), is_url=field.endswith("url"))
        rows.append({"name": name, "value": value, "source": source, "description": info.description})
    emit(rows, CONFIG_COLUMNS, form)
    for name, meant in unknown_names().items():
        note(f"{name} is not a setting" + (f": did you mean {meant}?" if meant else ""))


def shown(value: Any, is_url: bool) -> Any:
    """A setting's value without what is secret in it: None, number, bool or text."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, SecretStr):
        return mask_url(value.get_secret_value()) if is_url else MASK
    return mask_url(str(value)) if is_url else str(value)


def mask_url(text: str) -> str:
    """A URL with its password (and secret-looking query options) masked; all of it if it cannot be read."""
    try:
        parts = urlsplit(text)
    except ValueError:
        return MASK
    if "://" not in text:
        return MASK if "@" in text else text
    login, at, place = parts.netloc.rpartition("@")
    rest = parts.path + parts.query + parts.fragment
    if "@" in rest and parts.scheme != "unix":
        return MASK  # a password with a bare / ? or # in it: what looks like a path is part of it
    user = login.partition(":")[0]
    if login and ":" not in login and parts.scheme in ("http", "https"):
        user = ""  # https://<token>@host
    masked = f"{user}:{MASK}@{place}" if at else place
    query = _secret_option.sub(rf"\1{MASK}", f"?{parts.query}") if parts.query else ""
    return f"{parts.scheme}://{masked}{parts.path}{query}"


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="a tenth of the work, for a first look")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure throughput, latency, memory and bulk reads on this machine, each with a reference.

    Takes about two minutes. The benchmarks are in a checkout of the repository (`benchmarks/`).
    """
    root = Path(__file__).parents[2]
    if not (root / "benchmarks" / "table.py").exists():
        raise PkbError(
            "the benchmarks are not part of an installed package", "run it from a checkout: make bench"
        )
    sys.path.insert(0, str(root))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    table = importlib.import_module("benchmarks.table")
    raise typer.Exit(table.main(quick, as_json))


DAY_COLUMNS = ("schedule", "segments", "session", "windows", "why", "previous", "next")
YEAR_COLUMNS = ("date", "weekday", "schedules", "session", "why")


def calendar(
    day: Annotated[str, typer.Argument(metavar="[DATE]", help="2026-11-08, or 2026 for its holidays")] = "",
    segment: Annotated[str, typer.Option(help="NSE, MCX, … or a schedule's name: only that")] = "",
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Show when the markets trade: hours of a day by schedule, holidays, special sessions.

    Without a date it is today. A year lists all its holidays and special sessions. PKB_CALENDAR names a file
    that is laid over the shipped calendar.
    """
    form = choose_form(as_json, as_csv)
    settings = load_settings()
    sessions = load_sessions(settings.sessions, settings.timezone, settings.calendar)
    chosen = _schedules(sessions, segment)
    if len(day) == 4 and day.isdecimal():
        emit(_year_rows(sessions, chosen, int(day)), YEAR_COLUMNS, form, title=day)
        return
    local = parse_date(day) if day else sessions.date_of(int(market_clock(settings)()))
    _check_year(local.year)
    found = [_about(sessions, schedule, local) for schedule in chosen]
    if form == "json":
        print(dump({"date": local, "weekday": f"{local:%A}", "schedules": found}))
    else:
        emit([_flat(about) for about in found], DAY_COLUMNS, form, title=f"{local:%A} {local}")


def _check_year(year: int) -> None:
    if not 1971 <= year < 2199:  # the calendar's own limits, a month of neighbours left on each side
        raise SettingsError(f"{year} is out of range", "the calendar knows 1971 to 2198")


def _schedules(sessions: Sessions, segment: str) -> list[int]:
    """The schedules a segment or schedule name means; all for none."""
    name = segment.strip().upper()
    everything = range(len(sessions.schedules))
    if not name:
        return list(everything)
    names = {each: {sessions.schedules[each].upper(), *_segments(sessions, each)} for each in everything}
    found = [each for each in everything if name in names[each]]
    if not found:
        known = sorted(set().union(*names.values()))
        raise SettingsError(f"unknown segment {segment!r}", "use one of " + " ".join(known))
    return found


def _segments(sessions: Sessions, schedule: int) -> list[str]:
    return [SEGMENTS.get(number, str(number)) for number in sessions.segments_of(schedule)]


def _about(sessions: Sessions, schedule: int, local: date) -> dict[str, Any]:
    """Return one schedule's day, as `--json` shows it."""
    windows = sessions.named_windows(schedule, local)
    return {
        "schedule": sessions.schedules[schedule],
        "segments": _segments(sessions, schedule),
        "session": bool(windows),
        "why": sessions.reason(schedule, local) or ("" if windows else "weekend"),
        "windows": [
            {"name": each.name, "open": iso(each.open_ms / 1000), "close": iso(each.close_ms / 1000)}
            for each in windows
        ],
        "previous": sessions.session_near(schedule, local, -1),
        "next": sessions.session_near(schedule, local, 1),
    }


def _hours(windows: list[dict[str, Any]]) -> str:
    shown = [f"{each['open'][11:16]}-{each['close'][11:16]}" for each in windows]
    if len(shown) > 1:
        shown = [f"{hours} {each['name']}" for hours, each in zip(shown, windows, strict=True)]
    return ", ".join(shown)


def _flat(about: dict[str, Any]) -> dict[str, Any]:
    """Return the same as cells of a table."""
    return {
        **about,
        "segments": " ".join(about["segments"]),
        "session": "open" if about["session"] else "closed",
        "windows": _hours(about["windows"]),
        "previous": str(about["previous"] or ""),
        "next": str(about["next"] or ""),
    }


def _year_rows(sessions: Sessions, chosen: list[int], year: int) -> list[dict[str, Any]]:
    """Return one row per day and reason; schedules that share both share the row."""
    _check_year(year)
    groups: dict[tuple[date, str, str], list[str]] = {}
    for schedule in chosen:
        for local, why in sessions.reasons(schedule, year).items():
            hours = _hours(_about(sessions, schedule, local)["windows"]) or "closed"
            groups.setdefault((local, hours, why), []).append(sessions.schedules[schedule])
    return [
        {
            "date": str(local),
            "weekday": f"{local:%A}",
            "schedules": "all" if len(names) == len(chosen) else " ".join(names),
            "session": hours,
            "why": why,
        }
        for (local, hours, why), names in sorted(groups.items())
    ]
