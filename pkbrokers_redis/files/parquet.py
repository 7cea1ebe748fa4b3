"""Candles as Parquet, one folder per interval and day, which polars and DuckDB read directly:

    parquet/interval=1m/date=2026-11-20/candles.parquet
    token int64 · symbol · start timestamp[us, Asia/Kolkata] · open high low close volume oi double ·
    ticks int64 · flag ("" whole, partial, gap, backfilled); sorted by token and start

    pl.read_parquet("parquet/**/*.parquet", hive_partitioning=True)
    SELECT * FROM read_parquet('parquet/*/*/*.parquet', hive_partitioning = true)

A partition is rewritten as a whole from the rows of the old file and those of the store, which take
precedence. Rows that left the store stay in the file. Instruments are read in slices to bound the memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pkbrokers_redis.candles.calendar import MARKET_TIMEZONE
from pkbrokers_redis.candles.model import CANDLE_FIELDS, FLAG_NAMES, TOKEN_MAX
from pkbrokers_redis.client.bulk import Bulk
from pkbrokers_redis.errors import InputFileError
from pkbrokers_redis.files.atomic import replacing_path, sha256_of
from pkbrokers_redis.files.frames import KOLKATA_SECONDS, midnights

FOLDER = "parquet"
FILE = "candles.parquet"
# Partitions written at once, each an open file: a year of days. A full run writes rows that are older.
DATES_MAX = 400
COMPRESSION = "zstd"

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_NUMBERS = CANDLE_FIELDS[1:7]
SCHEMA = pa.schema(
    [
        ("token", pa.int64()),
        ("symbol", pa.dictionary(pa.int32(), pa.string())),
        ("start", pa.timestamp("us", MARKET_TIMEZONE)),
        *((name, pa.float64()) for name in _NUMBERS),
        ("ticks", pa.int64()),
        ("flag", pa.dictionary(pa.int8(), pa.string())),
    ]
)


@dataclass(frozen=True)
class Rows:
    """Candles of several instruments: `tokens` int64[n], `rows` float64[n, 8], `flags` int8[n]."""

    tokens: Ints
    rows: Floats
    flags: npt.NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def starts(self) -> Ints:
        """Return the starts in epoch seconds."""
        return self.rows[:, 0].astype(np.int64)

    def take(self, which: Any) -> Rows:
        """Return a selection by mask or positions."""
        return Rows(self.tokens[which], self.rows[which], self.flags[which])


@dataclass(slots=True)
class Written:
    """The content of a partition that was written."""

    path: Path
    rows: int = 0
    instruments: int = 0
    first_s: int = 0
    last_s: int = 0
    sha256: str = ""
    bytes: int = 0


def partition_path(folder: Path, interval: str, day: date) -> Path:
    """Return `<folder>/parquet/interval=1m/date=2026-11-20/candles.parquet`."""
    return folder / FOLDER / f"interval={interval}" / f"date={day.isoformat()}" / FILE


def partitions(folder: Path, interval: str) -> dict[date, Path]:
    """Return the existing partitions, oldest first."""
    found: dict[date, Path] = {}
    for path in sorted((folder / FOLDER / f"interval={interval}").glob(f"date=*/{FILE}")):
        try:
            found[date.fromisoformat(path.parent.name.removeprefix("date="))] = path
        except ValueError:
            continue  # a folder of another program
    return found


@contextmanager
def writing_partitions(
    folder: Path, interval: str, slices: Iterable[Bulk], since: date | None
) -> Iterator[list[Written]]:
    """Update an interval's partitions from the first day `since` (None: all): written under temporary names,
    renamed at the end of the block. `slices` of instruments have ascending tokens.

    Raises InputFileError if an existing partition is damaged, and OSError.
    """
    with ExitStack() as stack:
        writers: dict[date, _Partition] = {}
        after = -1  # the highest token of the slices so far
        for bulk in slices:
            rows = of_bulk(bulk)
            names = dict(zip(bulk.tokens.tolist(), bulk.symbols, strict=True))
            until = int(bulk.tokens[-1]) if len(bulk) else after
            for day, day_rows in _by_day(rows, since):
                if day not in writers:
                    if len(writers) >= DATES_MAX:
                        continue
                    path = partition_path(folder, interval, day)
                    writers[day] = stack.enter_context(_Partition(path))
                writers[day].add(day_rows, names, until)
            after = until
        for writer in writers.values():
            writer.add(Rows(np.empty(0, np.int64), np.empty((0, 8)), np.empty(0, np.int8)), {}, TOKEN_MAX)
            writer.finish()
        yield [writer.written for writer in writers.values()]


def _by_day(rows: Rows, since: date | None) -> Iterator[tuple[date, Rows]]:
    """Yield each Kolkata date from `since` on with its rows, newest first."""
    days = midnights(rows.starts)
    order = np.argsort(days, kind="stable")
    ordered, days = rows.take(order), days[order]
    dates, first = np.unique(days, return_index=True)
    bounds = [*first.tolist(), len(days)]
    for i in range(len(dates) - 1, -1, -1):
        if since is None or dates[i] >= midnight_s(since):
            yield date_of(int(dates[i])), ordered.take(slice(bounds[i], bounds[i + 1]))


class _Partition:
    """One partition being written: merges the old file's rows with the new ones in order of the tokens."""

    def __init__(self, path: Path) -> None:
        self.written = Written(path)
        self._stack = ExitStack()
        self._old: pq.ParquetFile | None = None
        self._after = -1

    def __enter__(self) -> _Partition:
        with ExitStack() as stack:
            path = self.written.path
            if path.exists():
                self._old = stack.enter_context(_open(path))
            self._temporary = stack.enter_context(replacing_path(path))
            self._writer = stack.enter_context(
                pq.ParquetWriter(self._temporary, SCHEMA, compression=COMPRESSION)
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add(self, new: Rows, names: dict[int, str], until: int) -> None:
        """Write the instruments up to token `until`; tokens must ascend from call to call."""
        if self._old is not None and until > self._after:
            old, old_names = _between(self._old, self._after, until)
            new, names = merge(old, new), {**old_names, **names}
        self._after = max(until, self._after)
        if not len(new):
            return
        order = np.lexsort((new.rows[:, 0], new.tokens))
        new = new.take(order)
        self._writer.write_table(table_of(new, names))
        written, starts = self.written, new.starts
        written.first_s = min(written.first_s or int(starts.min()), int(starts.min()))
        written.last_s = max(written.last_s, int(starts.max()))
        written.rows += len(new)
        written.instruments += len(np.unique(new.tokens))

    def finish(self) -> None:
        """Close the file, and note its hash and size."""
        self._writer.close()
        self.written.sha256 = sha256_of(self._temporary)
        self.written.bytes = self._temporary.stat().st_size


def of_bulk(bulk: Bulk) -> Rows:
    """Return the rows of a bulk read with their tokens."""
    return Rows(np.repeat(bulk.tokens, bulk.counts), bulk.rows, bulk.flags)


def merge(old: Rows, new: Rows) -> Rows:
    """Return the rows of both; of equal token and start the new one."""
    if not len(old):
        return new
    kept = old.take(~np.isin(_keys(old), _keys(new)))
    return Rows(
        np.concatenate([kept.tokens, new.tokens]),
        np.concatenate([kept.rows, new.rows]),
        np.concatenate([kept.flags, new.flags]),
    )


def _keys(rows: Rows) -> Ints:
    """Return token and start as one number: 32 bits each."""
    return (rows.tokens << 32) + rows.starts


def table_of(rows: Rows, names: dict[int, str]) -> pa.Table:
    """Return the rows as a table of SCHEMA."""
    tokens, owner = np.unique(rows.tokens, return_inverse=True)
    symbols = pa.array([names.get(int(token), str(token)) for token in tokens], pa.string())
    ticks = np.nan_to_num(rows.rows[:, 7]).astype(np.int64)
    columns: list[Any] = [
        pa.array(rows.tokens),
        pa.DictionaryArray.from_arrays(pa.array(owner.astype(np.int32)), symbols),
        pa.array(rows.starts * 1_000_000, pa.int64()).cast(pa.timestamp("us", MARKET_TIMEZONE)),
        *(pa.array(rows.rows[:, i + 1], from_pandas=True) for i in range(len(_NUMBERS))),
        pa.array(ticks),
        pa.DictionaryArray.from_arrays(pa.array(rows.flags), pa.array(FLAG_NAMES)),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def read_tokens(path: Path) -> Ints:
    """Return the tokens of a partition, ascending. Raise InputFileError if it is damaged."""
    with _open(path) as file:
        try:
            return np.unique(file.read(["token"])["token"].to_numpy())
        except (pa.ArrowInvalid, OSError) as error:
            raise _damaged(path, error) from error


def read_rows(path: Path) -> Iterator[tuple[Rows, dict[int, str]]]:
    """Yield a partition's rows and symbols per row group. Raise InputFileError if it is damaged."""
    with _open(path) as file:
        for group in range(file.num_row_groups):
            yield _rows_of(path, file.read_row_group(group))


def _open(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(path, error) from error
    if set(SCHEMA.names) - set(file.schema_arrow.names):
        file.close()
        raise InputFileError(f"{path} has other columns", "move it away; the next snapshot writes it")
    return file


def _between(file: pq.ParquetFile, after: int, until: int) -> tuple[Rows, dict[int, str]]:
    """Return the file's rows with after < token <= until, from the row groups that can contain them."""
    column = file.schema_arrow.get_field_index("token")
    groups = []
    for group in range(file.num_row_groups):
        bounds = file.metadata.row_group(group).column(column).statistics
        if bounds is None or not bounds.has_min_max or (bounds.max > after and bounds.min <= until):
            groups.append(group)
    rows, names = _rows_of(Path(), file.read_row_groups(groups))
    return rows.take((rows.tokens > after) & (rows.tokens <= until)), names


def _rows_of(path: Path, table: pa.Table) -> tuple[Rows, dict[int, str]]:
    try:
        tokens = table["token"].to_numpy()
        rows = np.empty((len(table), len(CANDLE_FIELDS)))
        rows[:, 0] = table["start"].cast(pa.int64()).to_numpy() // 1_000_000
        for i, name in enumerate((*_NUMBERS, "ticks")):
            rows[:, i + 1] = table[name].to_numpy()
        flags = _flag_codes(table["flag"])
        _, first = np.unique(tokens, return_index=True)
        symbols = table["symbol"].take(pa.array(first)).to_pylist()
    except (pa.ArrowInvalid, KeyError, ValueError, TypeError) as error:
        raise _damaged(path, error) from error
    return Rows(tokens.astype(np.int64), rows, flags), dict(zip(tokens[first].tolist(), symbols, strict=True))


def _flag_codes(column: pa.ChunkedArray) -> npt.NDArray[np.int8]:
    """Return positions in FLAG_NAMES, by the column's own dictionary."""
    if not pa.types.is_dictionary(column.type):  # written by another program
        column = column.dictionary_encode()
    codes = []
    for chunk in column.chunks:
        meaning = np.array([FLAG_NAMES.index(name) for name in chunk.dictionary.to_pylist()], np.int8)
        codes.append(meaning[chunk.indices.to_numpy(zero_copy_only=False)])
    return np.concatenate(codes) if codes else np.empty(0, np.int8)


def _damaged(path: Path, error: Exception) -> InputFileError:
    reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
    return InputFileError(
        f"{path} is no Parquet file of candles ({reason})",
        "move it away; the next snapshot writes it",
    )


def midnight_s(day: date) -> int:
    """Return the epoch seconds of a day's midnight in Kolkata."""
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) - KOLKATA_SECONDS


def date_of(day_s: int) -> date:
    """Return the date in Kolkata of a moment in epoch seconds."""
    return datetime.fromtimestamp(day_s + KOLKATA_SECONDS, UTC).date()
