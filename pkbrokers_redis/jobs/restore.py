"""A fresh Redis filled from Parquet snapshots, and the check that what it holds is what they hold.

Candle rows belong to the aggregators, so a restore becomes one for a moment: it takes the shards' leases as
an aggregator would, and gives them back. It does nothing while somebody else holds one, and it writes only
lists that do not exist; rows that are there are never touched. Intervals that were not in the snapshot are
made from its minutes, those that the minutes do not cover marked `partial`. Aggregators that start afterwards
go on from these lists.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import redis

from pkbrokers_redis import logs
from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.candles.model import DAY, FLAG_NAMES, Interval, bucket_end_s
from pkbrokers_redis.client.bulk import read_bulk
from pkbrokers_redis.errors import InputFileError, PkbError
from pkbrokers_redis.files import manifest, parquet
from pkbrokers_redis.files.frames import midnights
from pkbrokers_redis.files.manifest import Entry
from pkbrokers_redis.files.parquet import Rows
from pkbrokers_redis.files.resample import bucket_starts_of
from pkbrokers_redis.jobs.snapshots import Run, open_run
from pkbrokers_redis.store.functions import load_functions
from pkbrokers_redis.store.instruments import load_derivative_tokens
from pkbrokers_redis.store.leases import lease_shards, release_shards
from pkbrokers_redis.store.meta import ensure_meta
from pkbrokers_redis.store.symbols import save_instruments

LEASE_MS = 60_000  # renewed with every slice of a partition
TOKENS_A_PIPELINE = 500
LAG_SECONDS = 60  # so long after its end at the latest a minute is in its list
MINUTE = "1m"
PARTIAL = FLAG_NAMES.index("partial")

Ints = npt.NDArray[np.int64]

log = logs.get("restore")


@dataclass
class Restored:
    """What a restore did: rows by interval, lists that were there already, instruments."""

    rows: dict[str, int] = field(default_factory=dict)
    left_alone: int = 0
    instruments: int = 0


def restore(folder: Path | None = None, run: Run | None = None) -> Restored:
    """Fill the store from the folder's Parquet partitions, newest rows up to what each list keeps.

    Every file is checked against the manifest first. Raises InputFileError (no snapshot, or not as written),
    PkbError when an aggregator is at work, redis-py's errors.
    """
    with _opened(run) as at:
        source = folder or at.folder
        listed = _checked(source)
        ensure_meta(at.store.client, at.settings, at.made_at())
        load_functions(at.store.client)
        owner = f"restore-{os.getpid()}-{secrets.token_hex(4)}"  # containers share their pids
        told = Restored()
        with _leases(at, owner) as renew:
            stored = {each.name: each for each in at.settings.intervals}
            for name in sorted(listed, key=lambda each: each != MINUTE):
                if name in stored:
                    rows, names = _newest(stored[name].keep, listed[name])
                    _save_names(at, names, told)
                    _fill(at, stored[name], rows, told)
                    renew()
                    if name == MINUTE:
                        made_s = _made_s(listed[name])
                        for other in stored.values():
                            if other.name not in listed and other.name != DAY and other.seconds > 60:
                                _fill(at, other, _longer(at, rows, other, made_s), told)
                                renew()
        log.info("restored", rows=sum(told.rows.values()), instruments=told.instruments, left=told.left_alone)
        return told


def verify(folder: Path | None = None, run: Run | None = None) -> list[str]:
    """Compare the store with the folder's Parquet snapshots: what differs, a line each; [] if nothing."""
    with _opened(run) as at:
        source = folder or at.folder
        found: list[str] = []
        listed = _checked(source)
        stored = {each.name: each for each in at.settings.intervals}
        for name in sorted(listed):
            if name not in stored:
                found.append(f"{name}: the store has no such interval")
                continue
            rows, names = _newest(stored[name].keep, listed[name])
            found += _differences(at, stored[name], rows, names)
        return found


@contextmanager
def _opened(run: Run | None) -> Iterator[Run]:
    if run is not None:
        yield run
        return
    with open_run() as opened:
        yield opened


def _checked(folder: Path) -> dict[str, dict[Path, Entry]]:
    """Interval → its partitions, newest first, all of them as the manifest says."""
    entries = {
        name: entry for name, entry in manifest.read_manifest(folder).items() if entry.kind == "parquet"
    }
    if not entries:
        hint = "run `pkb snapshot parquet` or `pkb sync pull`"
        raise InputFileError(f"there is no Parquet snapshot in {folder}", hint)
    wrong = manifest.problems(folder, entries)
    if wrong:
        raise InputFileError(f"the snapshot in {folder} is damaged ({wrong[0]})", "pull it again")
    listed: dict[str, dict[Path, Entry]] = {}
    for name in sorted(entries, reverse=True):
        path = folder / name
        interval = path.parent.parent.name.removeprefix("interval=")
        listed.setdefault(interval, {})[path] = entries[name]
    return listed


def _newest(keep: int, paths: Iterable[Path]) -> tuple[Rows, dict[int, str]]:
    """The newest `keep` rows of each instrument, sorted by token and start; token → symbol.

    `paths` are the partitions, newest first. Where nobody in one lacks rows, only its tokens are read.
    """
    parts: list[Rows] = []
    names: dict[int, str] = {}
    counts: dict[int, int] = {}
    for path in paths:
        wanted = [token for token in parquet.read_tokens(path).tolist() if counts.get(token, 0) < keep]
        if not wanted:
            continue
        for rows, told in parquet.read_rows(path):
            names = {**told, **names}
            parts.append(rows.take(np.isin(rows.tokens, wanted)))
            tokens, sizes = np.unique(parts[-1].tokens, return_counts=True)
            for token, size in zip(tokens.tolist(), sizes.tolist(), strict=True):
                counts[token] = counts.get(token, 0) + size
    rows = _joined(parts)
    rows = rows.take(np.lexsort((rows.rows[:, 0], rows.tokens)))
    _, first, sizes = np.unique(rows.tokens, return_index=True, return_counts=True)
    back = np.repeat(first + sizes, sizes) - np.arange(len(rows))  # 1 for an instrument's newest row
    return rows.take(back <= keep), names


def _joined(parts: list[Rows]) -> Rows:
    if not parts:
        return Rows(np.empty(0, np.int64), np.empty((0, 8)), np.empty(0, np.int8))
    return Rows(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.flags for part in parts]),
    )


def _made_s(paths: dict[Path, Entry]) -> dict[str, float]:
    """Date → when the rows of its partition were read, epoch s."""
    return {
        path.parent.name.removeprefix("date="): (entry.made_at_ms or 0) / 1000
        for path, entry in paths.items()
    }


def _longer(run: Run, rows: Rows, interval: Interval, made_s: dict[str, float]) -> Rows:
    """Minutes → candles of a longer interval, up to what its lists keep; only buckets that are over.

    One that was not over when its minutes were read is partial, and so is an instrument's first one where
    the minutes begin later than it.
    """
    client, keys = run.store.client, run.store.keys
    sessions = load_sessions(run.settings.sessions, run.settings.timezone, run.settings.calendar)
    sessions.derivatives = frozenset(load_derivative_tokens(client, keys))
    parts: list[Rows] = []
    by_schedule: dict[int, list[int]] = {}
    for token in np.unique(rows.tokens).tolist():
        by_schedule.setdefault(sessions.schedule_of(token), []).append(token)
    for schedule, tokens in by_schedule.items():
        some = rows.take(np.isin(rows.tokens, tokens))
        made = _bucketed(some, bucket_starts_of(some.starts, interval.seconds, tokens[0], sessions))
        starts, which = np.unique(made.starts, return_inverse=True)
        ends = np.array(
            [bucket_end_s(sessions.day(schedule, s * 1000), interval.seconds, s) for s in starts.tolist()],
            np.int64,
        )[which]
        read = np.array([made_s.get(str(parquet.date_of(day)), 0.0) for day in midnights(starts).tolist()])[
            which
        ]
        flags = np.where(ends + LAG_SECONDS > read, PARTIAL, made.flags).astype(np.int8)
        parts.append(Rows(made.tokens, made.rows, flags).take(ends <= run.clock() / 1000))
    made = _joined(parts)
    _, first, sizes = np.unique(made.tokens, return_index=True, return_counts=True)
    back = np.repeat(first + sizes, sizes) - np.arange(len(made))
    return made.take(back <= interval.keep)


def _bucketed(rows: Rows, buckets: Ints) -> Rows:
    changes = np.flatnonzero((np.diff(rows.tokens, prepend=-1) != 0) | (np.diff(buckets, prepend=-1) != 0))
    if not len(changes):
        return rows
    last = np.append(changes[1:], len(rows)) - 1
    table = np.empty((len(changes), rows.rows.shape[1]))
    table[:, 0] = buckets[changes]
    table[:, 1] = rows.rows[changes, 1]
    table[:, 2] = np.maximum.reduceat(rows.rows[:, 2], changes)
    table[:, 3] = np.minimum.reduceat(rows.rows[:, 3], changes)
    table[:, 4] = rows.rows[last, 4]
    table[:, 5] = np.add.reduceat(rows.rows[:, 5], changes)
    table[:, 6] = rows.rows[last, 6]
    table[:, 7] = np.add.reduceat(rows.rows[:, 7], changes)
    order = np.where(rows.flags == 0, 99, rows.flags)  # partial says more than gap, gap more than backfilled
    worst = np.minimum.reduceat(order, changes)
    tokens = rows.tokens[changes]
    is_cut = (np.diff(tokens, prepend=-1) != 0) & (rows.starts[changes] != buckets[changes])
    worst = np.where(is_cut, PARTIAL, np.where(worst == 99, 0, worst))
    return Rows(tokens, table, worst.astype(np.int8))


def _save_names(run: Run, names: dict[int, str], told: Restored) -> None:
    """Symbols of instruments that the master does not have."""
    told.instruments = max(told.instruments, len(names))
    client, keys = run.store.client, run.store.keys
    tokens = list(names)
    pipeline = client.pipeline(transaction=False)
    for token in tokens:
        pipeline.exists(keys.instrument(token))
    known = pipeline.execute()
    rows = []
    for token, is_known in zip(tokens, known, strict=True):
        exchange, colon, symbol = names[token].partition(":")
        if not is_known and colon:
            rows.append({"instrument_token": token, "tradingsymbol": symbol, "exchange": exchange})
    save_instruments(client, keys, rows)


def _fill(run: Run, interval: Interval, rows: Rows, told: Restored) -> None:
    """The rows into lists that do not exist."""
    client, keys = run.store.client, run.store.keys
    tokens, first, sizes = np.unique(rows.tokens, return_index=True, return_counts=True)
    for begin in range(0, len(tokens), TOKENS_A_PIPELINE):
        group = slice(begin, begin + TOKENS_A_PIPELINE)
        names = [keys.candles(token, interval.name) for token in tokens[group].tolist()]
        pipeline = client.pipeline(transaction=False)
        for name in names:
            pipeline.exists(name)
        there = pipeline.execute()
        pipeline = client.pipeline(transaction=False)
        for name, exists, at, size in zip(
            names, there, first[group].tolist(), sizes[group].tolist(), strict=True
        ):
            if exists:
                told.left_alone += 1
                continue
            pipeline.rpush(name, *_texts(rows.take(slice(at, at + size))))
            told.rows[interval.name] = told.rows.get(interval.name, 0) + size
        pipeline.execute()


def _texts(rows: Rows) -> list[bytes]:
    """Candle rows as the store writes them."""
    encode = msgspec.json.Encoder().encode
    return [
        encode(_cells(row, flag)) for row, flag in zip(rows.rows.tolist(), rows.flags.tolist(), strict=True)
    ]


def _cells(row: list[float], flag: int) -> list[Any]:
    cells: list[Any] = [None if cell != cell else int(cell) if cell == int(cell) else cell for cell in row]
    return [*cells, FLAG_NAMES[flag]] if flag else cells


def _differences(run: Run, interval: Interval, rows: Rows, names: dict[int, str]) -> list[str]:
    found: list[str] = []
    tokens, first, sizes = np.unique(rows.tokens, return_index=True, return_counts=True)
    for begin in range(0, len(tokens), TOKENS_A_PIPELINE):
        group = tokens[begin : begin + TOKENS_A_PIPELINE].tolist()
        named = [(token, names.get(token, str(token))) for token in group]
        bulk = read_bulk(run.store.client, run.store.keys, named, interval.name, interval.keep)
        for i in range(len(group)):
            place = begin + i
            span = slice(int(first[place]), int(first[place] + sizes[place]))
            here = slice(int(bulk.offsets[i]), int(bulk.offsets[i + 1]))
            ours, theirs = bulk.rows[here], rows.rows[span]
            if len(ours) != len(theirs):
                found.append(
                    f"{named[i][1]} {interval.name}: {len(ours)} rows, the snapshot has {len(theirs)}"
                )
            elif not (
                np.array_equal(ours, theirs, equal_nan=True)
                and np.array_equal(bulk.flags[here], rows.flags[span])
            ):
                found.append(f"{named[i][1]} {interval.name}: rows differ")
    return found


@contextmanager
def _leases(run: Run, owner: str) -> Iterator[Any]:
    """All shards' leases, as an aggregator holds them. Raises PkbError when one is somebody else's."""
    client, keys = run.store.client, run.store.keys
    shards = range(keys.shards)

    def renew() -> None:
        epochs, refused = lease_shards(client, keys, shards, owner, LEASE_MS)
        if refused:
            raise next(iter(refused.values()))
        for shard in set(shards) - set(epochs):
            raise _at_work(client, keys.lease(shard))

    try:
        renew()
        yield renew
    finally:
        release_shards(client, keys, shards, owner)


def _at_work(client: redis.Redis, lease: str) -> PkbError:
    """Who holds a shard's lease, and for how long."""
    holder: Any = client.get(lease)
    left_ms: Any = client.pttl(lease)
    name = holder.decode(errors="replace") if holder else "somebody"
    seconds = max(0, left_ms) / 1000
    return PkbError(
        f"{name} is at work on this store (its lease ends in {seconds:.0f} s unless it is renewed)",
        "stop it, or wait until then if it is dead: only one may write candles",
    )
