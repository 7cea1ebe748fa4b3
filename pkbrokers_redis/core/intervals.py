"""The intervals: one table. Adding `2h` is one row in `DEFAULT_INTERVALS`.

Names are Kite's short ones; `seconds` is 0 for `day`, which is as long as its session.
"""

from __future__ import annotations

from dataclasses import dataclass

from pkbrokers_redis.core.errors import SettingsError, UnknownInterval


@dataclass(frozen=True, slots=True)
class Interval:
    """One candle interval. `seconds` 0 means one candle a session; `keep` completed rows are kept."""

    name: str
    seconds: int
    keep: int


DAY = "day"

DEFAULT_INTERVALS: tuple[Interval, ...] = (
    Interval("1m", 60, 390),
    Interval("2m", 120, 195),
    Interval("3m", 180, 130),
    Interval("4m", 240, 98),
    Interval("5m", 300, 78),
    Interval("10m", 600, 39),
    Interval("15m", 900, 26),
    Interval("30m", 1800, 13),
    Interval("60m", 3600, 7),
    Interval(DAY, 0, 365),
)

ALIASES = {"1h": "60m", "1d": DAY, "d": DAY, "minute": "1m", "1min": "1m", "5min": "5m", "hour": "60m"}

KEEP_MAX = 1_000_000  # a list longer than this is a database, not a cache


def normalize(name: str) -> str:
    """`1h` → `60m`, `1D` → `day`; other names come back lower-case and as they are."""
    name = name.strip().lower()
    return ALIASES.get(name, name)


def parse_intervals(text: str) -> tuple[Interval, ...]:
    """`"1m,5m:100,2h"` → intervals, in ascending length. `:100` overrides how many rows are kept.

    Raises SettingsError for a name that is no number of minutes or hours and not `day`.
    """
    known = {interval.name: interval for interval in DEFAULT_INTERVALS}
    found: dict[str, Interval] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        raw, _, keep_text = part.partition(":")
        name = normalize(raw)
        interval = known.get(name) or Interval(name, _seconds_of(name, part), 100)
        if keep_text:
            if not keep_text.isdecimal() or not 1 <= int(keep_text) <= KEEP_MAX:
                raise SettingsError(
                    f"PKB_INTERVALS: {part!r} keeps no number of rows", f"write {name}:100 (1 to {KEEP_MAX})"
                )
            interval = Interval(interval.name, interval.seconds, int(keep_text))
        found[interval.name] = interval
    if not found:
        raise SettingsError("PKB_INTERVALS is empty", "name at least one interval, e.g. 1m,5m,day")
    return tuple(sorted(found.values(), key=lambda each: each.seconds or 86_400))


def _seconds_of(name: str, part: str) -> int:
    unit = {"m": 60, "h": 3600}.get(name[-1:], 0)
    count = name[:-1]
    if not unit or not count.isdecimal() or not 1 <= int(count) * unit <= 43_200:
        raise SettingsError(
            f"PKB_INTERVALS: {part!r} is no interval", "use minutes or hours up to 12h, or day: 1m,5m,2h,day"
        )
    return int(count) * unit


def find_interval(intervals: tuple[Interval, ...], name: str) -> Interval:
    """The configured interval of that name or alias. Raises UnknownInterval and lists the names."""
    wanted = normalize(name)
    for interval in intervals:
        if interval.name == wanted:
            return interval
    raise UnknownInterval(
        f"unknown interval {name!r}", "use one of " + " ".join(each.name for each in intervals)
    )
