"""The snapshots in the files folder: which file a command sends, and when it is too old.

Only looks, and believes the manifest only: `pkb snapshot` writes it last, so that what it names is whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from pkbrokers_redis.candles.calendar import Sessions
from pkbrokers_redis.files.manifest import read_manifest
from pkbrokers_redis.jobs.cron import Plan


@dataclass(frozen=True, slots=True)
class Kind:
    """What a command sends. `snapshot` is the word behind `pkb snapshot`, `patterns` which of its files are
    meant. In market hours a file older than `age_seconds_max` is made anew first."""

    title: str
    snapshot: str
    patterns: tuple[str, ...]
    age_seconds_max: float
    is_folder: bool = False  # all files together, as one zip


KINDS: dict[str, Kind] = {
    "ticks": Kind("ticks.json", "ticks", ("ticks.json",), 60),
    "db": Kind("stock_data.db", "sqlite", ("stock_data.db",), 900),
    "daily_pkl": Kind("daily_candles.pkl", "pickle", ("stock_data_*.pkl",), 3600),
    "intraday_pkl": Kind("intraday_1m_candles.pkl", "pickle", ("intraday_stock_data_*.pkl",), 900),
    "candles": Kind("candles", "parquet", ("parquet/*.parquet",), 900, is_folder=True),
    "instrument_history": Kind("instrument_history.db", "sqlite", ("stock_data.db",), 3600),
}
AGE_SECONDS_MAX_CLOSED = 12 * 3600.0  # outside market hours little changes
LOOK_BACK_DAYS = 30  # no exchange closes longer
CLOSING_SECONDS = 60.0  # after a close: until its candles are whole, and what was begun before is written


class Market(NamedTuple):
    """Whether anything that is streamed trades, and when that last ended: epoch seconds, 0 for not lately."""

    is_open: bool
    closed_at: float


@dataclass(frozen=True, slots=True)
class Found:
    """The newest file or files of a kind; `made_at` is market time, epoch seconds."""

    paths: tuple[Path, ...]
    made_at: float
    size_bytes: int
    rows: int


def newest(folder: Path, kind: Kind) -> Found | None:
    """The newest file of a kind, or all files of a folder kind. None where there is none.

    Raises InputFileError for a damaged manifest.
    """
    dated: list[tuple[float, Path, int, int]] = []
    for name, entry in read_manifest(folder).items():
        if entry.kind != kind.snapshot or not any(fnmatch(name, pattern) for pattern in kind.patterns):
            continue
        path = folder / name
        if entry.bytes and path.is_file() and path.stat().st_size == entry.bytes:
            dated.append(((entry.made_at_ms or 0.0) / 1000, path, entry.bytes, entry.rows))
    if not dated:
        return None
    dated.sort()
    chosen = dated if kind.is_folder else dated[-1:]
    return Found(
        tuple(sorted(path for _, path, _, _ in chosen)),
        dated[-1][0],
        sum(size for _, _, size, _ in chosen),
        sum(rows for *_, rows in chosen),
    )


def market_at(sessions: Sessions, schedules: Iterable[int], now_s: float) -> Market:
    """The market of these trading hours at a moment."""
    plan, now_ms = Plan(sessions, schedules), int(now_s * 1000)
    today = sessions.date_of(now_ms)
    is_open = any(opened <= now_ms < closed for opened, closed in plan.windows(today))
    for days in range(LOOK_BACK_DAYS):
        ended = [closed for _, closed in plan.windows(today - timedelta(days)) if closed <= now_ms]
        if ended:
            return Market(is_open, ended[-1] / 1000)
    return Market(is_open, 0.0)


def is_fresh(found: Found | None, kind: Kind, now_s: float, market: Market) -> bool:
    """Whether it can be sent as it is: in market hours a young one, after them one from after the close."""
    if found is None:
        return False
    if market.is_open:
        return now_s - found.made_at <= kind.age_seconds_max
    return found.made_at >= max(market.closed_at + CLOSING_SECONDS, now_s - AGE_SECONDS_MAX_CLOSED)
