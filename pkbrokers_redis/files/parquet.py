"""Candles as Parquet, one folder per interval and day, as polars and DuckDB read them:

    parquet/interval=1m/date=2026-11-20/candles.parquet
    token int64 · symbol · start timestamp[us, Asia/Kolkata] · open high low close volume oi double ·
    ticks int64 · flag ("" whole, partial, gap, backfilled); sorted by token and start

    pl.read_parquet("parquet/**/*.parquet", hive_partitioning=True)
    SELECT * FROM read_parquet('parquet/*/*/*.parquet', hive_partitioning = true)

A partition is written again as a whole, from what is in the file and what the store has now (the store's rows
count), instruments in slices, so that memory stays small. What the store has dropped stays in the file.
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
DATES_MAX = (
    400  # partitions written at once, each an open file: a year of days. Older rows wait for a full run
)
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
        """Epoch seconds."""
        return self.rows[:, 0].astype(np.int64)

    def take(self, which: Any) -> Rows:
        """Some of them, by mask or positions."""
        return Rows(self.tokens[which], self.rows[which], self.flags[which])


@dataclass(slots=True)
class Written:
    """What a partition holds now."""

    path: Path
    rows: int = 0
    instruments: int = 0
    first_s: int = 0
    last_s: int = 0
    sha256: str = ""
    bytes: int = 0


def partition_path(folder: Path, interval: str, day: date) -> Path:
    """`<folder>/parquet/interval=1m/date=2026-11-20/candles.parquet`."""
    return folder / FOLDER / f"interval={interval}" / f"date={day.isoformat()}" / FILE


def partitions(folder: Path, interval: str) -> dict[date, Path]:
    """The partitions there are, oldest first."""
    found: dict[date, Path] = {}
    for path in sorted((folder / FOLDER / f"interval={interval}").glob(f"date=*/{FILE}")):
        try:
            found[date.fromisoformat(path.parent.name.removeprefix("date="))] = path
        except ValueError:
            continue  # somebody else's folder
    return found


@contextmanager
def writing_partitions(
    folder: Path, interval: str, slices: Iterable[Bulk], since: date | None
) -> Iterator[list[Written]]:
    """Bring the partitions of an interval up to date, from `since` on (None: all).

    `slices` gives the store's candles in slices of instruments with ascending tokens. Yields what is written,
    under temporary names; at the end of the block it takes its places. Raises OSError, and InputFileError
    for an old file that is damaged.
    """
    with ExitStack() as stack:
        writers: dict[date, _Partition] = {}
        after = -1  # the highest token of the slices so far
        for bulk in slices:
            rows = of_bulk(bulk)
            names = dict(zip(bulk.tokens.tolist(), bulk.symbols, strict=True))
            until = int(bulk.tokens[-1]) if len(bulk) else after
            for day, some in _by_day(rows, since):
                if day not in writers:
                    if len(writers) >= DATES_MAX:
                        continue
                    path = partition_path(folder, interval, day)
                    writers[day] = stack.enter_context(_Partition(path))
                writers[day].add(some, names, until)
            after = until
        for writer in writers.values():
            writer.add(Rows(np.empty(0, np.int64), np.empty((0, 8)), np.empty(0, np.int8)), {}, TOKEN_MAX)
            writer.finish()
        yield [writer.written for writer in writers.values()]


def _by_day(rows: Rows, since: date | None) -> Iterator[tuple[date, Rows]]:
    """The rows of each Kolkata date from `since` on, the newest first."""
    days = midnights(rows.starts)
    order = np.argsort(days, kind="stable")
    ordered, days = rows.take(order), days[order]
    each, first = np.unique(days, return_index=True)
    bounds = [*first.tolist(), len(days)]
    for i in range(len(each) - 1, -1, -1):
        if since is None or each[i] >= midnight_s(since):
            yield date_of(int(each[i])), ordered.take(slice(bounds[i], bounds[i + 1]))


class _Partition:
    """One partition being written: the old file's rows are laid under the new ones as the tokens go by."""

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
        """The instruments up to token `until`; tokens must ascend from call to call."""
        if self._old is not None and until > self._after:
            old, old_names = _between(self._old, self._after, until)
            new, names = merge(old, new), {**old_names, **names}
        self._after = max(until, self._after)
        if not len(new):
            return
        order = np.lexsort((new.rows[:, 0], new.tokens))
        new = new.take(order)
        self._writer.write_table(table_of(new, names))
        told, starts = self.written, new.starts
        told.first_s = min(told.first_s or int(starts.min()), int(starts.min()))
        told.last_s = max(told.last_s, int(starts.max()))
        told.rows += len(new)
        told.instruments += len(np.unique(new.tokens))

    def finish(self) -> None:
        """No more rows are to come: the file is whole."""
        self._writer.close()
        self.written.sha256 = sha256_of(self._temporary)
        self.written.bytes = self._temporary.stat().st_size


def of_bulk(bulk: Bulk) -> Rows:
    """A bulk read's rows with their tokens."""
    return Rows(np.repeat(bulk.tokens, bulk.counts), bulk.rows, bulk.flags)


def merge(old: Rows, new: Rows) -> Rows:
    """Both; where they have the same token and start, the new one."""
    if not len(old):
        return new
    kept = old.take(~np.isin(_keys(old), _keys(new)))
    return Rows(
        np.concatenate([kept.tokens, new.tokens]),
        np.concatenate([kept.rows, new.rows]),
        np.concatenate([kept.flags, new.flags]),
    )


def _keys(rows: Rows) -> Ints:
    """Token and start in one number: 32 bits each."""
    return (rows.tokens << 32) + rows.starts


def table_of(rows: Rows, names: dict[int, str]) -> pa.Table:
    """Rows → a table of SCHEMA."""
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
    """The instruments of a partition, ascending. Raises InputFileError for what is none."""
    with _open(path) as file:
        try:
            return np.unique(file.read(["token"])["token"].to_numpy())
        except (pa.ArrowInvalid, OSError) as error:
            raise _damaged(path, error) from error


def read_rows(path: Path) -> Iterator[tuple[Rows, dict[int, str]]]:
    """A partition's rows and symbols, a row group at a time. Raises InputFileError for what is none."""
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
        raise InputFileError(f"{path} has other columns", "move it away; it is made anew")
    return file


def _between(file: pq.ParquetFile, after: int, until: int) -> tuple[Rows, dict[int, str]]:
    """The old file's rows with after < token <= until, from the row groups that can hold them."""
    column = file.schema_arrow.get_field_index("token")
    groups = []
    for group in range(file.num_row_groups):
        seen = file.metadata.row_group(group).column(column).statistics
        if seen is None or not seen.has_min_max or (seen.max > after and seen.min <= until):
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
    """Codes into FLAG_NAMES, by the column's own dictionary."""
    if not pa.types.is_dictionary(column.type):  # written anew by another program
        column = column.dictionary_encode()
    codes = []
    for chunk in column.chunks:
        meaning = np.array([FLAG_NAMES.index(name) for name in chunk.dictionary.to_pylist()], np.int8)
        codes.append(meaning[chunk.indices.to_numpy(zero_copy_only=False)])
    return np.concatenate(codes) if codes else np.empty(0, np.int8)


def _damaged(path: Path, error: Exception) -> InputFileError:
    why = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
    return InputFileError(f"{path} is no Parquet file of candles ({why})", "move it away; it is made anew")


def midnight_s(day: date) -> int:
    """Epoch seconds of a Kolkata day's beginning."""
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) - KOLKATA_SECONDS


def date_of(day_s: int) -> date:
    """The Kolkata date of a moment in epoch seconds."""
    return datetime.fromtimestamp(day_s + KOLKATA_SECONDS, UTC).date()
