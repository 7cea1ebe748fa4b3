"""Write snapshots of the store: ticks.json, pickles, SQLite, Parquet, and a manifest of them.

    files/ticks.json                                  snapshot("ticks")
    files/stock_data_DDMMYYYY.pkl, daily_candles.pkl  snapshot("pickle")
    files/intraday_stock_data_DDMMYYYY.pkl, intraday_1m_candles.pkl
    files/candles.db → stock_data.db                  snapshot("sqlite")
    files/parquet/interval=…/date=…/candles.parquet   snapshot("parquet")
    files/manifest.json

One run of a kind at a time, also among processes. A killed run leaves each file old or new, and a manifest
that matches. A file without rows is not written: an empty store must not replace yesterday's files, locally
and on the branch. Instruments are read in slices, so memory does not grow with their number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pkbrokers_redis import logs
from pkbrokers_redis.candles.model import DAY, find_interval
from pkbrokers_redis.client.bulk import Bulk, read_bulk
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.clock import Clock, market_clock
from pkbrokers_redis.errors import InputFileError, PkbError
from pkbrokers_redis.files import parquet, pickles, ticks_json
from pkbrokers_redis.files.atomic import (
    exclusively,
    linked,
    replacing,
    replacing_path,
    sha256_of,
    writing_into,
)
from pkbrokers_redis.files.candle_file import NAME as CANDLE_DB
from pkbrokers_redis.files.frames import KOLKATA_SECONDS, Floats, file_symbol
from pkbrokers_redis.files.manifest import Entry, announce, read_manifest, update_manifest
from pkbrokers_redis.files.pickles import DAILY_ROWS_MAX, PickledDict, Shape
from pkbrokers_redis.files.sqlite import LocalCandleDatabase
from pkbrokers_redis.jobs.progress import Listener, job_listener
from pkbrokers_redis.settings import Settings, load_settings

SQLITE_COPY = "stock_data.db"
ROWS_A_SLICE = 200_000  # at most: 13 MB as arrays, some 60 MB as what is made of them
MINUTE = "1m"

T = TypeVar("T")

log = logs.get("snapshots")


@dataclass
class Run:
    """The tools and the progress of one snapshot.

    `listener` gets (instruments done, instruments × passes, part); `made` are the files' entries.
    """

    settings: Settings
    store: CandleStore
    clock: Clock
    folder: Path
    listener: Listener | None = None
    made: dict[str, Entry] = field(default_factory=dict)
    done: int = 0
    passes: int = 1

    @property
    def today(self) -> date:
        """Return the date in Kolkata, market time."""
        return datetime.fromtimestamp(self.clock() / 1000 + KOLKATA_SECONDS, UTC).date()

    def made_at(self) -> str:
        """Return the present market time, ISO with +05:30."""
        return _iso(int(self.clock() / 1000))

    def position(self) -> dict[str, str]:
        """Return the position of each shard's aggregator: its cursor's stream id."""
        keys, client = self.store.keys, self.store.client
        pipeline = client.pipeline(transaction=False)
        for shard in range(keys.shards):
            pipeline.hget(keys.cursor(shard), "id")
        replies = enumerate(pipeline.execute(raise_on_error=False))
        return {str(shard): reply.decode() for shard, reply in replies if isinstance(reply, bytes)}

    def before_rename(self, entries: Mapping[str, Entry]) -> None:
        """Note in the manifest that these files are whole and about to be renamed."""
        announce(self.folder, entries)

    def after_rename(self, entries: Mapping[str, Entry]) -> None:
        """Note that the files have their names."""
        update_manifest(self.folder, entries)
        self.made.update(entries)

    def report(self, instruments: int, total: int, part: str) -> None:
        """Report that `instruments` more are done, of `total` in each pass."""
        self.done += instruments
        if self.listener is not None:
            self.listener(self.done, self.passes * total, part)

    def slices(
        self, interval: str, count: int, include_current: bool = False, rows_a_slice: int = ROWS_A_SLICE
    ) -> Iterator[Bulk]:
        """Yield the newest `count` candles of each instrument, in slices with ascending tokens."""
        instruments = sorted(self.store.instruments())
        step = max(1, rows_a_slice // max(count, 1))
        parts = [instruments[first : first + step] for first in range(0, len(instruments), step)]

        def read(part: list[tuple[int, str]]) -> Bulk:
            return read_bulk(self.store.client, self.store.keys, part, interval, count, include_current)

        with ThreadPoolExecutor(1) as executor:  # reads the next slice while the caller writes this one
            pending = executor.submit(read, parts[0]) if parts else None
            for part in [*parts[1:], None]:
                if pending is None:
                    return
                bulk = pending.result()
                pending = executor.submit(read, part) if part is not None else None
                yield bulk.with_rows_only()
                self.report(len(bulk), len(instruments), interval)


@dataclass(frozen=True)
class SnapshotOptions:
    """The arguments of `snapshot`; each kind uses those that concern it."""

    shape: Shape
    intervals: list[str]
    full: bool
    day: date


@contextmanager
def open_run(
    settings: Settings | None = None,
    store: CandleStore | None = None,
    folder: Path | None = None,
    listener: Listener | None = None,
) -> Iterator[Run]:
    """Open a run on the configured store and folder, or on the given ones.

    Inside a job the progress is reported to Redis.
    """
    settings = settings or load_settings()
    with ExitStack() as stack:
        opened = store or stack.enter_context(CandleStore(settings))
        listener = listener or job_listener(opened.client, opened.settings.keys)
        yield Run(opened.settings, opened, market_clock(settings), folder or settings.files_folder, listener)


def snapshot(
    kind: str,
    shape: Shape = "published",
    intervals: list[str] | None = None,
    full: bool = False,
    day: str = "",
    run: Run | None = None,
) -> dict[str, Any]:
    """Write one kind of snapshot.

    Args:
        kind: One of `KINDS`.
        shape: Shape of the pickles: "published" (DataFrames) or "split" (dicts of lists).
        intervals: Intervals of the Parquet; default: 1m and day.
        full: Write everything again, also what an incremental run would keep.
        day: Date of the session, ISO; it is part of the pickles' names. Default: today.
        run: An open run; default: on the configured store and folder.

    Returns:
        `{"kind": …, "files": {name: rows}, "instruments": …, "seconds": …}`.

    Raises:
        PkbError: Another run of the kind is in progress, or the kind is unknown.
        InputFileError: A file that is to be updated is damaged.
        FilesUnwritable: The disk is full, or refuses the write.
    """
    if kind not in KINDS:
        raise PkbError(f"unknown snapshot {kind!r}", "use one of " + " ".join(KINDS))
    with ExitStack() as stack:
        at = run or stack.enter_context(open_run())
        began = time.monotonic()
        stack.enter_context(writing_into(at.folder))
        stack.enter_context(exclusively(at.folder / f".snapshot-{kind}.lock"))
        at.made.clear()
        at.done, at.passes = 0, 1
        local = date.fromisoformat(day) if day else at.today
        _WRITERS[kind](at, SnapshotOptions(shape, intervals or [MINUTE, DAY], full, local))
        result = {
            "kind": kind,
            "files": {name: entry.rows for name, entry in at.made.items()},
            "instruments": max((entry.instruments for entry in at.made.values()), default=0),
            "seconds": round(time.monotonic() - began, 2),
        }
        log.info(
            "snapshot_written",
            kind=kind,
            files=len(at.made),
            instruments=result["instruments"],
            seconds=result["seconds"],
        )
        return result


def _ticks(run: Run, _: SnapshotOptions) -> None:
    position, instruments = run.position(), sorted(run.store.instruments())
    first, last = "", ""
    entries = _unless_empty(
        ticks_json.read_entries(run.store.client, run.store.keys, instruments, run.store.tally)
    )
    if entries is None:
        return
    with replacing(run.folder / ticks_json.NAME) as file:
        ticks = ticks_json.TicksFile(file)
        for token, entry in entries:
            stamp = entry["ohlcv"]["timestamp"]
            first, last = min(first or stamp, stamp), max(last, stamp)
            ticks.add(token, entry)
        ticks.finish()
        counts = (file.bytes_written, ticks.entries, ticks.entries)
        made = {ticks_json.NAME: Entry(file.sha256, *counts, first, last, run.made_at(), "ticks", position)}
        run.before_rename(made)
    run.after_rename(made)
    run.report(len(instruments), len(instruments), ticks_json.NAME)


def _pickles(run: Run, options: SnapshotOptions) -> None:
    names, kept = run.store.intervals, run.settings.intervals
    run.passes = len({DAY, MINUTE} & set(names))
    if DAY in names:
        dated, latest = pickles.daily_name(options.day), pickles.DAILY_LATEST
        _pickle(run, DAY, DAILY_ROWS_MAX, options.shape, (dated, latest))
    if MINUTE in names:
        dated, latest = pickles.intraday_name(options.day), pickles.INTRADAY_LATEST
        _pickle(run, MINUTE, find_interval(kept, MINUTE).keep, options.shape, (dated, latest))


def _pickle(run: Run, interval: str, count: int, shape: Shape, names: tuple[str, str]) -> None:
    """Write one pickle under its dated and its undated name."""
    daily, position = interval == DAY, run.position()
    slices = run.slices(
        interval, count, include_current=daily
    )  # the current day candle, but whole minutes only
    bulks = _unless_empty(bulk for bulk in slices if len(bulk))
    if bulks is None:
        return
    total, first_s, last_s = 0, 0, 0
    with _OlderDays(run, daily) as older, replacing(run.folder / names[0]) as file:
        pickled = PickledDict(file)
        for bulk in bulks:
            for i, token in enumerate(bulk.tokens.tolist()):
                symbol = file_symbol(token, bulk.symbols[i])
                rows = bulk.rows[bulk.offsets[i] : bulk.offsets[i + 1]]
                if len(rows) < count:
                    rows = older.before(symbol, rows, count)
                pickled.add(symbol, pickles.shaped(rows, daily, shape))
                total += len(rows)
                first_s = min(first_s or int(rows[0, 0]), int(rows[0, 0]))
                last_s = max(last_s, int(rows[-1, 0]))
        pickled.finish()
        counts, span = (file.bytes_written, total, pickled.items), (_iso(first_s), _iso(last_s))
        entry = Entry(file.sha256, *counts, *span, run.made_at(), "pickle", position)
        run.before_rename(dict.fromkeys(names, entry))
    linked(run.folder / names[0], run.folder / names[1])
    run.after_rename(dict.fromkeys(names, entry))


class _OlderDays:
    """Days that the store does not have yet, read from the candle file: a new store has a year at once."""

    def __init__(self, run: Run, daily: bool) -> None:
        self._database: LocalCandleDatabase | None = None
        if daily and (run.folder / CANDLE_DB).exists():
            self._database = LocalCandleDatabase(run.folder, run.settings)

    def __enter__(self) -> _OlderDays:
        return self

    def __exit__(self, *_: object) -> None:
        if self._database is not None:
            self._database.close()

    def before(self, symbol: str, rows: Floats, count: int) -> Floats:
        """Return `rows` after older ones, `count` at most."""
        if self._database is None or not len(rows):
            return rows
        until = datetime.fromtimestamp(int(rows[0, 0]) + KOLKATA_SECONDS, UTC).date() - timedelta(days=1)
        for _, frame in self._database.iter_daily(symbol, None, until.isoformat()):
            old = np.zeros((len(frame), rows.shape[1]))
            old[:, 0] = frame.index.asi8 // 1_000_000_000  # type: ignore[attr-defined]
            old[:, 1:6] = frame.to_numpy(np.float64)
            return np.concatenate([old, rows])[-count:]
        return rows


def _sqlite(run: Run, options: SnapshotOptions) -> None:
    """Update the live candle file, and write a whole copy of it for other machines."""
    position, count = run.position(), len(run.store.instruments())
    run.passes = 2
    with LocalCandleDatabase(run.folder, run.settings) as database:
        database.update_from_ticks(run.store, full=options.full)
        run.report(count, count, CANDLE_DB)
        stats = database.get_stats()
        first, last = database.span()
        rows = stats["daily"]["records"] + stats["intraday"]["records"]
        symbols = max(stats["daily"]["symbols"], stats["intraday"]["symbols"])
        if not rows:
            return
        with replacing_path(run.folder / SQLITE_COPY) as temporary:
            database.copy_to(temporary)
            digest, size = sha256_of(temporary), temporary.stat().st_size
            entry = Entry(digest, size, rows, symbols, first, last, run.made_at(), "sqlite", position)
            run.before_rename({SQLITE_COPY: entry})
    run.after_rename({SQLITE_COPY: entry})
    run.report(count, count, SQLITE_COPY)


def _parquet(run: Run, options: SnapshotOptions) -> None:
    run.passes = len(options.intervals)
    for name in options.intervals:
        interval = find_interval(run.settings.intervals, name)
        # Before the rows are read: a restore needs to know which candles were complete at that time.
        position, made_at = run.position(), run.made_at()
        since = None if options.full else _since(run, interval.name)
        count = interval.keep
        if since is not None and interval.name == DAY:
            count = min(count, (run.today - since).days + 1)
        # A year of day candles is as many files: larger slices write more rows to each at a time.
        rows_a_slice = ROWS_A_SLICE * (5 if interval.name == DAY else 1)
        slices = run.slices(interval.name, count, rows_a_slice=rows_a_slice)
        made: dict[str, Entry] = {}
        with parquet.writing_partitions(run.folder, interval.name, slices, since) as written:
            for partition in written:
                counts = (partition.bytes, partition.rows, partition.instruments)
                span = (_iso(partition.first_s), _iso(partition.last_s))
                entry = Entry(partition.sha256, *counts, *span, made_at, "parquet", position)
                made[partition.path.relative_to(run.folder).as_posix()] = entry
            run.before_rename(made)
        run.after_rename(made)


def _since(run: Run, interval: str) -> date | None:
    """Return the first day that an incremental run writes: the day of the newest partition but one, whose
    candles may have been repaired since."""
    try:
        listed = read_manifest(run.folder)
    except InputFileError:
        return None
    existing = parquet.partitions(run.folder, interval)
    known = [day for day, path in existing.items() if path.relative_to(run.folder).as_posix() in listed]
    return known[-2:][0] if known else None


def _unless_empty(items: Iterator[T]) -> Iterator[T] | None:
    """Return the iterator, or None if it is empty."""
    for first in items:
        return chain([first], items)
    return None


def _iso(moment_s: int) -> str:
    """Return `2026-11-20T09:15:00+05:30`; "" for 0."""
    if not moment_s:
        return ""
    local = datetime.fromtimestamp(moment_s + KOLKATA_SECONDS, UTC)
    return local.strftime("%Y-%m-%dT%H:%M:%S+05:30")


# A new kind is a row; docs/adding.md lists the other places.
_WRITERS: dict[str, Callable[[Run, SnapshotOptions], None]] = {
    "ticks": _ticks,
    "pickle": _pickles,
    "sqlite": _sqlite,
    "parquet": _parquet,
}
KINDS = tuple(_WRITERS)
