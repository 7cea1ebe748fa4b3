"""Which files of a folder a sync publishes, and which are old enough to delete.

ticks.json, *.pkl                           for other programs
parquet/interval=…/date=…/candles.parquet   the newest ones, as many as a restore needs
stock_data_20112026.pkl                     thirty days
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
DATED_DAYS = 30  # dated pickles are deleted after this; the undated ones and the database keep their rows
PARTITION = re.compile(r"parquet/interval=([^/]+)/date=\d{4}-\d{2}-\d{2}/[^/]+")
PARTITIONS_MAX = 400  # of an interval


def select(
    files: Mapping[str, Entry], patterns: Sequence[str] | None, intervals: Sequence[Interval]
) -> list[str]:
    """Return the files that match a pattern, sorted.

    Without patterns: the files for other programs, and the Parquet that a restore needs.
    """
    matched = {name for name in files if any(fnmatchcase(name, pattern) for pattern in patterns or PATTERNS)}
    return sorted(matched if patterns else matched.union(needed(files, intervals)))


def needed(files: Mapping[str, Entry], intervals: Iterable[Interval]) -> list[str]:
    """Return the newest Parquet partitions of each interval, as many as fill the lists of a store.

    A partition counts with the average number of rows of its instruments.
    """
    found: list[str] = []
    missing_rows = {interval.name: interval.keep for interval in intervals}
    partitions_left = dict.fromkeys(missing_rows, PARTITIONS_MAX)
    for name in sorted(files, reverse=True):
        match = PARTITION.fullmatch(name)
        if match and missing_rows.get(match[1], 0) > 0 and partitions_left[match[1]] > 0:
            found.append(name)
            partitions_left[match[1]] -= 1
            missing_rows[match[1]] -= max(1, files[name].rows // max(1, files[name].instruments))
    return found


def unneeded(files: Mapping[str, Entry], intervals: Sequence[Interval]) -> list[str]:
    """Return the partitions of these intervals that a restore does not need."""
    known = {interval.name for interval in intervals}
    partitions = {name for name in files if (match := PARTITION.fullmatch(name)) and match[1] in known}
    return sorted(partitions.difference(needed(files, intervals)))


def deleted(folder: Path, names: Iterable[str]) -> list[str]:
    """Return the files of a single day that are not in the folder: a user deleted them, and no run writes
    them again."""
    return sorted(name for name in names if is_of_a_day(name) and not (folder / name).exists())


def is_of_a_day(name: str) -> bool:
    """Return whether the file is a dated pickle or a partition, which do not change after their day."""
    return _day_in(name) is not None or PARTITION.fullmatch(name) is not None


def outdated(names: Iterable[str], today: date) -> list[str]:
    """Return the dated pickles that are older than `DATED_DAYS`."""
    oldest = today - timedelta(days=DATED_DAYS)
    return sorted(name for name in names if (day := _day_in(name)) is not None and day < oldest)


def _day_in(name: str) -> date | None:
    found = DATED.search(name)
    try:
        return date(int(found[3]), int(found[2]), int(found[1])) if found else None
    except ValueError:
        return None
