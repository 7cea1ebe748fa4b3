"""Snapshots of the store as files: ticks.json, pickles, SQLite, Parquet; each in its manifest entry.

    files/ticks.json                                  snapshot("ticks")
    files/stock_data_DDMMYYYY.pkl, daily_candles.pkl  snapshot("pickle")
    files/intraday_stock_data_DDMMYYYY.pkl, intraday_1m_candles.pkl
    files/candles.db → stock_data.db                  snapshot("sqlite")
    files/parquet/interval=…/date=…/candles.parquet   snapshot("parquet")
    files/manifest.json

One of a kind at a time, also among processes. A run that is killed leaves each file old or new, and the
manifest right. What has no rows is not written: a new store must not replace yesterday's files, here and on
the branch, by empty ones. Instruments are read in slices, so memory does not grow with their number.
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
    """What a snapshot works with; `made` is what it has written. `listener` hears of instruments done."""

    settings: Settings
    store: CandleStore
    clock: Clock
    folder: Path
    listener: Listener | None = None
    made: dict[str, Entry] = field(default_factory=dict)
    done: int = 0
    passes: int = 1  # over all instruments

    @property
    def today(self) -> date:
        """Kolkata's date, market time."""
        return datetime.fromtimestamp(self.clock() / 1000 + KOLKATA_SECONDS, UTC).date()

    def made_at(self) -> str:
        """Now, ISO with +05:30, market time."""
        return _iso(int(self.clock() / 1000))

    def position(self) -> dict[str, str]:
        """How far each shard's aggregator is: the cursor's stream id."""
        keys, client = self.store.keys, self.store.client
        pipeline = client.pipeline(transaction=False)
        for shard in range(keys.shards):
            pipeline.hget(keys.cursor(shard), "id")
        replies = enumerate(pipeline.execute(raise_on_error=False))
        return {str(shard): reply.decode() for shard, reply in replies if isinstance(reply, bytes)}

    def coming(self, entries: Mapping[str, Entry]) -> None:
        """These files are whole, and about to take their places."""
        announce(self.folder, entries)

    def placed(self, entries: Mapping[str, Entry]) -> None:
        """They have taken them."""
        update_manifest(self.folder, entries)
        self.made.update(entries)

    def tell(self, instruments: int, total: int, part: str) -> None:
        """So many more instruments are done, of `total` in each pass."""
        self.done += instruments
        if self.listener is not None:
            self.listener(self.done, self.passes * total, part)

    def slices(
        self, interval: str, count: int, include_current: bool = False, rows_a_slice: int = ROWS_A_SLICE
    ) -> Iterator[Bulk]:
        """The store's candles of an interval, instruments in slices with ascending tokens."""
        instruments = sorted(self.store.instruments())
        step = max(1, rows_a_slice // max(count, 1))
        parts = [instruments[first : first + step] for first in range(0, len(instruments), step)]

        def read(part: list[tuple[int, str]]) -> Bulk:
            return read_bulk(self.store.client, self.store.keys, part, interval, count, include_current)

        with ThreadPoolExecutor(1) as ahead:  # Redis answers for the next slice while this one is written
            coming = ahead.submit(read, parts[0]) if parts else None
            for part in [*parts[1:], None]:
                if coming is None:
                    return
                bulk = coming.result()
                coming = ahead.submit(read, part) if part is not None else None
                yield bulk.with_rows_only()
                self.tell(len(bulk), len(instruments), interval)


@dataclass(frozen=True)
class Wanted:
    """What the caller of `snapshot` chose; each kind takes what concerns it."""

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
    """On the configured store and folder, or on those handed in. A job's progress goes to Redis."""
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
    """Write one kind of snapshot. Returns `{"kind", "files": {name: rows}, "instruments", "seconds"}`.

    `shape` is the pickles', `intervals` the Parquet's (default: 1m and day), `full` writes again what an
    incremental run would leave, `day` (ISO, default: today) is the session's date, in the names of pickles.
    Raises PkbError when another run of the kind is at work, InputFileError for a damaged file in the way,
    FilesUnwritable for the disk.
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
        _WRITERS[kind](at, Wanted(shape, intervals or [MINUTE, DAY], full, local))
        told = {
            "kind": kind,
            "files": {name: entry.rows for name, entry in at.made.items()},
            "instruments": max((entry.instruments for entry in at.made.values()), default=0),
            "seconds": round(time.monotonic() - began, 2),
        }
        log.info(
            "snapshot",
            kind=kind,
            files=len(at.made),
            instruments=told["instruments"],
            seconds=told["seconds"],
        )
        return told


def _ticks(run: Run, _: Wanted) -> None:
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
        run.coming(made)
    run.placed(made)
    run.tell(len(instruments), len(instruments), ticks_json.NAME)


def _pickles(run: Run, wanted: Wanted) -> None:
    names, kept = run.store.intervals, run.settings.intervals
    run.passes = len({DAY, MINUTE} & set(names))
    if DAY in names:
        dated, latest = pickles.daily_name(wanted.day), pickles.DAILY_LATEST
        _pickle(run, DAY, DAILY_ROWS_MAX, wanted.shape, (dated, latest))
    if MINUTE in names:
        dated, latest = pickles.intraday_name(wanted.day), pickles.INTRADAY_LATEST
        _pickle(run, MINUTE, find_interval(kept, MINUTE).keep, wanted.shape, (dated, latest))


def _pickle(run: Run, interval: str, count: int, shape: Shape, names: tuple[str, str]) -> None:
    """One pickle under its dated and its undated name."""
    daily, position = interval == DAY, run.position()
    slices = run.slices(interval, count, include_current=daily)  # the day so far, whole minutes
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
        run.coming(dict.fromkeys(names, entry))
    linked(run.folder / names[0], run.folder / names[1])
    run.placed(dict.fromkeys(names, entry))


class _OlderDays:
    """Days that the store does not have (yet), from the candle file: a new store has a year at once."""

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
        """`rows` with older ones before them, `count` at most."""
        if self._database is None or not len(rows):
            return rows
        until = datetime.fromtimestamp(int(rows[0, 0]) + KOLKATA_SECONDS, UTC).date() - timedelta(days=1)
        for _, frame in self._database.iter_daily(symbol, None, until.isoformat()):
            old = np.zeros((len(frame), rows.shape[1]))
            old[:, 0] = frame.index.asi8 // 1_000_000_000  # type: ignore[attr-defined]
            old[:, 1:6] = frame.to_numpy(np.float64)
            return np.concatenate([old, rows])[-count:]
        return rows


def _sqlite(run: Run, wanted: Wanted) -> None:
    """The live candle file brought up to date, and a whole copy of it for other machines."""
    position, count = run.position(), len(run.store.instruments())
    run.passes = 2
    with LocalCandleDatabase(run.folder, run.settings) as database:
        database.update_from_ticks(run.store, full=wanted.full)
        run.tell(count, count, CANDLE_DB)
        stats = database.get_stats()
        first, last = database.span()
        rows = stats["daily"]["records"] + stats["intraday"]["records"]
        symbols = max(stats["daily"]["symbols"], stats["intraday"]["symbols"])
        if not rows:
            return
        with replacing_path(run.folder / SQLITE_COPY) as temporary:
            database.copy_to(temporary)
            told = sha256_of(temporary), temporary.stat().st_size
            entry = Entry(*told, rows, symbols, first, last, run.made_at(), "sqlite", position)
            run.coming({SQLITE_COPY: entry})
    run.placed({SQLITE_COPY: entry})
    run.tell(count, count, SQLITE_COPY)


def _parquet(run: Run, wanted: Wanted) -> None:
    run.passes = len(wanted.intervals)
    for name in wanted.intervals:
        interval = find_interval(run.settings.intervals, name)
        position, made_at = (
            run.position(),
            run.made_at(),
        )  # before the rows: a restore asks what was over then
        since = None if wanted.full else _since(run, interval.name)
        count = interval.keep
        if since is not None and interval.name == DAY:
            count = min(count, (run.today - since).days + 1)
        # A year of days is as many files: each must get more than a handful of rows at a time.
        rows_a_slice = ROWS_A_SLICE * (5 if interval.name == DAY else 1)
        slices = run.slices(interval.name, count, rows_a_slice=rows_a_slice)
        made: dict[str, Entry] = {}
        with parquet.writing_partitions(run.folder, interval.name, slices, since) as written:
            for each in written:
                counts = (each.bytes, each.rows, each.instruments)
                span = (_iso(each.first_s), _iso(each.last_s))
                entry = Entry(each.sha256, *counts, *span, made_at, "parquet", position)
                made[each.path.relative_to(run.folder).as_posix()] = entry
            run.coming(made)
        run.placed(made)


def _since(run: Run, interval: str) -> date | None:
    """From which day an incremental run writes: the newest partition that is there, and the one before it,
    whose candles may have been repaired since."""
    try:
        listed = read_manifest(run.folder)
    except InputFileError:
        return None
    there = parquet.partitions(run.folder, interval)
    known = [day for day, path in there.items() if path.relative_to(run.folder).as_posix() in listed]
    return known[-2:][0] if known else None


def _unless_empty(items: Iterator[T]) -> Iterator[T] | None:
    """The same; None where there are none."""
    for first in items:
        return chain([first], items)
    return None


def _iso(moment_s: int) -> str:
    """`2026-11-20T09:15:00+05:30`; "" for 0."""
    if not moment_s:
        return ""
    local = datetime.fromtimestamp(moment_s + KOLKATA_SECONDS, UTC)
    return local.strftime("%Y-%m-%dT%H:%M:%S+05:30")


# A new kind is a row; docs/adding.md says what else.
_WRITERS: dict[str, Callable[[Run, Wanted], None]] = {
    "ticks": _ticks,
    "pickle": _pickles,
    "sqlite": _sqlite,
    "parquet": _parquet,
}
KINDS = tuple(_WRITERS)
