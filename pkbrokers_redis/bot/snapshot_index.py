"""The snapshots in the files folder: which file a command sends, and when it is too old.

Read-only. Only the manifest counts: `pkb snapshot` writes it last, so the files that it names are complete.
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
class FileKind:
    """What a command sends.

    Attributes:
        snapshot: The argument of `pkb snapshot` that makes it.
        patterns: Which files of that snapshot are meant.
        age_seconds_max: In market hours an older file is made again first.
        is_folder: All files together, as one zip.
    """

    title: str
    snapshot: str
    patterns: tuple[str, ...]
    age_seconds_max: float
    is_folder: bool = False


FILE_KINDS: dict[str, FileKind] = {
    "ticks": FileKind("ticks.json", "ticks", ("ticks.json",), 60),
    "db": FileKind("stock_data.db", "sqlite", ("stock_data.db",), 900),
    "daily_pkl": FileKind("daily_candles.pkl", "pickle", ("stock_data_*.pkl",), 3600),
    "intraday_pkl": FileKind("intraday_1m_candles.pkl", "pickle", ("intraday_stock_data_*.pkl",), 900),
    "candles": FileKind("candles", "parquet", ("parquet/*.parquet",), 900, is_folder=True),
    "instrument_history": FileKind("instrument_history.db", "sqlite", ("stock_data.db",), 3600),
}
CLOSED_AGE_SECONDS_MAX = 12 * 3600.0  # while the market is closed little changes
LOOK_BACK_DAYS = 30  # no exchange is closed for longer
CLOSING_SECONDS = 60.0  # after a close: until the last candles are complete


class MarketState(NamedTuple):
    """Whether any streamed instrument trades, and the last close in epoch seconds (0 if unknown)."""

    is_open: bool
    closed_at: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The newest file or files of a kind; `made_at` is market time, epoch seconds."""

    paths: tuple[Path, ...]
    made_at: float
    size_bytes: int
    rows: int


def newest(folder: Path, kind: FileKind) -> Snapshot | None:
    """Return the newest file of a kind, or all files of a folder kind; None when there is none.

    Raises:
        InputFileError: The manifest is damaged.
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
    return Snapshot(
        tuple(sorted(path for _, path, _, _ in chosen)),
        dated[-1][0],
        sum(size for _, _, size, _ in chosen),
        sum(rows for *_, rows in chosen),
    )


def market_state(sessions: Sessions, schedules: Iterable[int], now_s: float) -> MarketState:
    """Return the state of the market with these trading hours at `now_s` (epoch seconds)."""
    plan, now_ms = Plan(sessions, schedules), int(now_s * 1000)
    today = sessions.date_of(now_ms)
    is_open = any(opens <= now_ms < closes for opens, closes in plan.windows(today))
    for days in range(LOOK_BACK_DAYS):
        ended = [closes for _, closes in plan.windows(today - timedelta(days)) if closes <= now_ms]
        if ended:
            return MarketState(is_open, ended[-1] / 1000)
    return MarketState(is_open, 0.0)


def is_fresh(snapshot: Snapshot | None, kind: FileKind, now_s: float, market: MarketState) -> bool:
    """Return whether a snapshot can be sent as it is.

    While the market is open it must be younger than its kind's age; after that, made after the close.
    """
    if snapshot is None:
        return False
    if market.is_open:
        return now_s - snapshot.made_at <= kind.age_seconds_max
    return snapshot.made_at >= max(market.closed_at + CLOSING_SECONDS, now_s - CLOSED_AGE_SECONDS_MAX)
