"""Which files of a folder a sync takes, and which have had their day. Pure, but for `gone`.

ticks.json, *.pkl                           what other programs read
parquet/interval=…/date=…/candles.parquet   the newest, as many as a restore needs
stock_data_20112026.pkl                     for thirty days
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, timedelta
from fnmatch import fnmatchcase
from pathlib import Path

from pkbrokers_redis.candles.model import Interval
from pkbrokers_redis.files.manifest import Entry

PATTERNS = ("ticks.json", "*.pkl")
DATED = re.compile(r"_(\d{2})(\d{2})(\d{4})\.pkl$")  # stock_data_20112026.pkl
DATED_DAYS = 30  # how long those are kept: the undated ones and the database have what is in them
PARTITION = re.compile(r"parquet/interval=([^/]+)/date=\d{4}-\d{2}-\d{2}/[^/]+")
PARTITIONS_MAX = 400  # of an interval


def chosen(
    files: Mapping[str, Entry], patterns: Sequence[str] | None, intervals: Sequence[Interval]
) -> list[str]:
    """The files that match one of the patterns, sorted. Without patterns: what other programs read, and the
    Parquet that a restore needs."""
    matched = {name for name in files if any(fnmatchcase(name, each) for each in patterns or PATTERNS)}
    return sorted(matched if patterns else matched.union(restorable(files, intervals)))


def restorable(files: Mapping[str, Entry], intervals: Iterable[Interval]) -> list[str]:
    """The newest Parquet partitions of each interval, as many as fill a store's lists; in one counts what
    its instruments have on average."""
    found: list[str] = []
    wanted = {each.name: each.keep for each in intervals}
    room = dict.fromkeys(wanted, PARTITIONS_MAX)
    for name in sorted(files, reverse=True):
        told = PARTITION.fullmatch(name)
        if told and wanted.get(told[1], 0) > 0 and room[told[1]] > 0:
            found.append(name)
            room[told[1]] -= 1
            wanted[told[1]] -= max(1, files[name].rows // max(1, files[name].instruments))
    return found


def surplus(files: Mapping[str, Entry], intervals: Sequence[Interval]) -> list[str]:
    """Partitions of these intervals that a restore can do without."""
    known = {each.name for each in intervals}
    ours = {name for name in files if (told := PARTITION.fullmatch(name)) and told[1] in known}
    return sorted(ours.difference(restorable(files, intervals)))


def gone(folder: Path, names: Iterable[str]) -> list[str]:
    """Files of a single day that somebody removed. No run makes them anew, and the others do without."""
    return sorted(name for name in names if is_of_a_day(name) and not (folder / name).exists())


def is_of_a_day(name: str) -> bool:
    """A dated pickle or a partition: when its day is over it stays as it is."""
    return _day_in(name) is not None or PARTITION.fullmatch(name) is not None


def outdated(names: Iterable[str], today: date) -> list[str]:
    """The dated pickles that are too old to keep."""
    oldest = today - timedelta(days=DATED_DAYS)
    return sorted(name for name in names if (day := _day_in(name)) is not None and day < oldest)


def _day_in(name: str) -> date | None:
    found = DATED.search(name)
    try:
        return date(int(found[3]), int(found[2]), int(found[1])) if found else None
    except ValueError:
        return None
