"""Fill a fresh Redis from Parquet snapshots, and compare the two.

Candle rows belong to the aggregators. A restore therefore holds the leases of all shards, as an aggregator
would; it does nothing while another worker holds one. It writes only lists that do not exist and never
changes existing rows. Intervals that are not in the snapshot are computed from its minutes and carry
`partial` where the minutes do not cover them. Aggregators that start later continue from these lists.
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
from pkbrokers_redis.store.instruments import read_hours
from pkbrokers_redis.store.leases import lease_shards, release_shards
from pkbrokers_redis.store.meta import ensure_meta
from pkbrokers_redis.store.symbols import save_instruments

LEASE_MS = 60_000  # renewed with every slice of a partition
TOKENS_A_PIPELINE = 500
LAG_SECONDS = 60  # a minute is in its list at most so long after its end
MINUTE = "1m"
PARTIAL = FLAG_NAMES.index("partial")

Ints = npt.NDArray[np.int64]

log = logs.get("restore")


@dataclass
class RestoreResult:
    """Counts of a restore: rows by interval, lists that existed already, instruments."""

    rows: dict[str, int] = field(default_factory=dict)
    lists_skipped: int = 0
    instruments: int = 0


def restore(folder: Path | None = None, run: Run | None = None) -> RestoreResult:
    """Fill the store from Parquet partitions, with the newest rows that each list keeps.

    Args:
        folder: folder with the partitions and their manifest; the default is the snapshot folder.
        run: tools of the caller; None opens new ones.

    Raises:
        InputFileError: there is no snapshot, or a file differs from the manifest.
        PkbError: an aggregator holds a shard.
    """
    with _opened(run) as at:
        source = folder or at.folder
        listed = _checked(source)
        ensure_meta(at.store.client, at.settings, at.made_at())
        load_functions(at.store.client)
        owner = f"restore-{os.getpid()}-{secrets.token_hex(4)}"  # process ids repeat in containers
        result = RestoreResult()
        with _leases(at, owner) as renew:
            stored = {each.name: each for each in at.settings.intervals}
            for name in sorted(listed, key=lambda each: each != MINUTE):
                if name in stored:
                    rows, names = _newest(stored[name].keep, listed[name])
                    _save_names(at, names, result)
                    _fill(at, stored[name], rows, result)
                    renew()
                    if name == MINUTE:
                        made_s = _made_s(listed[name])
                        for other in stored.values():
                            if other.name not in listed and other.name != DAY and other.seconds > 60:
                                _fill(at, other, _longer(at, rows, other, made_s), result)
                                renew()
        log.info(
            "restored",
            rows=sum(result.rows.values()),
            instruments=result.instruments,
            lists_skipped=result.lists_skipped,
        )
        return result


def verify(folder: Path | None = None, run: Run | None = None) -> list[str]:
    """Compare the store with Parquet snapshots. Return one line per difference."""
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
    """Return interval → partitions, newest first, all of them verified by the manifest."""
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
    """Return the newest `keep` rows of each instrument, sorted by token and start, and token → symbol.

    `paths` are the partitions, newest first. Of a partition whose instruments all have enough rows only the
    tokens are read.
    """
    parts: list[Rows] = []
    names: dict[int, str] = {}
    counts: dict[int, int] = {}
    for path in paths:
        missing = [token for token in parquet.read_tokens(path).tolist() if counts.get(token, 0) < keep]
        if not missing:
            continue
        for rows, symbols in parquet.read_rows(path):
            names = {**symbols, **names}
            parts.append(rows.take(np.isin(rows.tokens, missing)))
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
    """Return date → when the rows of its partition were read, epoch seconds."""
    return {
        path.parent.name.removeprefix("date="): (entry.made_at_ms or 0) / 1000
        for path, entry in paths.items()
    }


def _longer(run: Run, rows: Rows, interval: Interval, made_s: dict[str, float]) -> Rows:
    """Combine minutes into complete candles of a longer interval, up to what its lists keep.

    A candle is `partial` if it was not complete when its minutes were read, or if it is an instrument's first
    one and its minutes begin later.
    """
    client, keys = run.store.client, run.store.keys
    sessions = load_sessions(run.settings.sessions, run.settings.timezone, run.settings.calendar)
    read_hours(client, keys, sessions)
    parts: list[Rows] = []
    by_schedule: dict[int, list[int]] = {}
    for token in np.unique(rows.tokens).tolist():
        by_schedule.setdefault(sessions.schedule_of(token), []).append(token)
    for schedule, tokens in by_schedule.items():
        selected = rows.take(np.isin(rows.tokens, tokens))
        made = _bucketed(selected, bucket_starts_of(selected.starts, interval.seconds, tokens[0], sessions))
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
    order = np.where(rows.flags == 0, 99, rows.flags)  # partial overrides gap, gap overrides backfilled
    worst = np.minimum.reduceat(order, changes)
    tokens = rows.tokens[changes]
    is_cut = (np.diff(tokens, prepend=-1) != 0) & (rows.starts[changes] != buckets[changes])
    worst = np.where(is_cut, PARTIAL, np.where(worst == 99, 0, worst))
    return Rows(tokens, table, worst.astype(np.int8))


def _save_names(run: Run, names: dict[int, str], result: RestoreResult) -> None:
    """Save the symbols of instruments that the master lacks."""
    result.instruments = max(result.instruments, len(names))
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


def _fill(run: Run, interval: Interval, rows: Rows, result: RestoreResult) -> None:
    """Write the rows to lists that do not exist."""
    client, keys = run.store.client, run.store.keys
    tokens, first, sizes = np.unique(rows.tokens, return_index=True, return_counts=True)
    for begin in range(0, len(tokens), TOKENS_A_PIPELINE):
        group = slice(begin, begin + TOKENS_A_PIPELINE)
        names = [keys.candles(token, interval.name) for token in tokens[group].tolist()]
        pipeline = client.pipeline(transaction=False)
        for name in names:
            pipeline.exists(name)
        existing = pipeline.execute()
        pipeline = client.pipeline(transaction=False)
        for name, exists, at, size in zip(
            names, existing, first[group].tolist(), sizes[group].tolist(), strict=True
        ):
            if exists:
                result.lists_skipped += 1
                continue
            pipeline.rpush(name, *_texts(rows.take(slice(at, at + size))))
            result.rows[interval.name] = result.rows.get(interval.name, 0) + size
        pipeline.execute()


def _texts(rows: Rows) -> list[bytes]:
    """Encode candle rows as the store does."""
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
            stored_span = slice(int(bulk.offsets[i]), int(bulk.offsets[i + 1]))
            stored, expected = bulk.rows[stored_span], rows.rows[span]
            if len(stored) != len(expected):
                found.append(
                    f"{named[i][1]} {interval.name}: {len(stored)} rows, the snapshot has {len(expected)}"
                )
            elif not (
                np.array_equal(stored, expected, equal_nan=True)
                and np.array_equal(bulk.flags[stored_span], rows.flags[span])
            ):
                found.append(f"{named[i][1]} {interval.name}: rows differ")
    return found


@contextmanager
def _leases(run: Run, owner: str) -> Iterator[Any]:
    """Hold the leases of all shards. Raise PkbError if another worker holds one."""
    client, keys = run.store.client, run.store.keys
    shards = range(keys.shards)

    def renew() -> None:
        epochs, refused = lease_shards(client, keys, shards, owner, LEASE_MS)
        if refused:
            raise next(iter(refused.values()))
        for shard in set(shards) - set(epochs):
            raise _held_by_another(client, keys.lease(shard))

    try:
        renew()
        yield renew
    finally:
        release_shards(client, keys, shards, owner)


def _held_by_another(client: redis.Redis, lease: str) -> PkbError:
    """Return the error that names the holder of a shard's lease and the time left."""
    holder: Any = client.get(lease)
    left_ms: Any = client.pttl(lease)
    name = holder.decode(errors="replace") if holder else "another worker"
    seconds = max(0, left_ms) / 1000
    return PkbError(
        f"{name} holds a lease on this store (it ends in {seconds:.0f} s unless renewed)",
        "stop that worker, or wait for the end of its lease: only one may write candles",
    )
