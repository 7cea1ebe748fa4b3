"""`LocalCandleDatabase`: candles in one SQLite file, with upstream's methods and tables.

One file has all days (`candles.db`), where upstream makes one a day. Times have one form, so that they
compare as text. With PKB_TURSO_URL the rows are shared through a libSQL database (`turso.py`). Reading and
writing continue while that is unavailable.
"""

from __future__ import annotations

import datetime as dt
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from pkbrokers_redis import logs
from pkbrokers_redis.candles.model import DAY, DEFAULT_INTERVALS, Candle, normalize
from pkbrokers_redis.client.bulk import Bulk, read_bulk
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.files.atomic import replacing
from pkbrokers_redis.files.candle_file import (
    KEYS_OF,
    NAME,
    CandleFile,
    checked,
    day_text,
    moment_text,
    set_progress,
)
from pkbrokers_redis.files.frames import (
    COLUMNS,
    KOLKATA_SECONDS,
    Frames,
    date_texts,
    file_symbol,
    is_symbol,
    is_whole,
    iso_texts,
    kolkata,
    moments_of,
    whole,
)
from pkbrokers_redis.files.pickles import (
    DAILY_ROWS_MAX,
    PickledDict,
    daily_name,
    intraday_name,
    split_frame,
)
from pkbrokers_redis.files.turso import DAILY, LibsqlClient, RemoteCandles
from pkbrokers_redis.settings import Settings, load_settings

REFRESH_SECONDS = 60.0  # a read syncs with the remote if the last sync is older
ROWS_A_FETCH = 20_000
INSTRUMENTS_A_CHUNK = 500  # at most 200,000 minutes: 13 MB as arrays, about 60 MB as records
OVERLAP_SECONDS = 15 * 60  # rows amended by later ticks than this are read by a full update only
MINUTE = "1m"
PROGRESS = "minutes until"  # of `update_from_ticks`, epoch seconds

Record = tuple[str, str, float, float, float, float, float]  # symbol, date, open, high, low, close, volume
IntradayRecord = tuple[str, str, str, float, float, float, float, float]
Records = list[tuple[Any, ...]]

log = logs.get("candle_file")


class LocalCandleDatabase:
    """Day and intraday candles by symbol. Writes replace rows; invalid rows are refused and counted.

    Threads of a process may share an object; processes have their own.

    Args:
        base_path: The folder; default: PKB_FILES_DIR.
        settings: Default: the environment's.
        clock: Machine time in seconds, for the syncs with the remote.

    Attributes:
        rows_refused: The number of invalid rows, the remote's included.

    Raises:
        CandleFileError: The file cannot be used. Every method raises it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, LocalCandleDatabase(folder) as database:
        ...     database.update_daily_candle("INFY", "2026-11-20", 100, 102, 99, 101, 1000)
        ...     database.get_daily_candles("INFY")["INFY"]["close"].to_list()
        True
        [101.0]
    """

    SUPPORTED_INTERVALS: ClassVar[list[str]] = [interval.name for interval in DEFAULT_INTERVALS]

    def __init__(
        self,
        base_path: str | Path | None = None,
        settings: Settings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings or load_settings()
        self.base_path = Path(base_path) if base_path else self.settings.files_folder
        self.daily_db_path = self.intraday_db_path = self.base_path / NAME
        self.rows_refused = 0
        self.remote: RemoteCandles | None = None
        self._now_ms = market_clock(self.settings)
        self._clock = clock
        self._synced_at = -math.inf
        self._file = CandleFile(self.daily_db_path)
        if self.settings.turso_url:
            secret = self.settings.turso_token
            client = LibsqlClient(self.settings.turso_url, secret.get_secret_value() if secret else "")
            self.remote = RemoteCandles(self._file, client, self._validated, clock)

    def close(self) -> None:
        """Send the outbox to the remote and close the file. A second call does nothing."""
        remote, self.remote = self.remote, None
        try:
            if remote is not None:
                remote.sync()
        finally:
            if remote is not None:
                remote.close()
            self._file.close()

    def __enter__(self) -> LocalCandleDatabase:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- writing -------------------------------------------------------------------------------------

    def update_daily_candle(
        self,
        symbol: str,
        date_str: str,
        open_price: float,
        high: float,
        low: float,
        close: float,
        volume: int,
    ) -> bool:
        """Write one day (`2026-11-20`). Return False if it is no candle."""
        return self.write_daily([(symbol, date_str, open_price, high, low, close, volume)]) == 1

    def update_intraday_candle(
        self,
        symbol: str,
        timestamp: str,
        interval: str,
        open_price: float,
        high: float,
        low: float,
        close: float,
        volume: int,
    ) -> bool:
        """Write one candle; `timestamp` is ISO 8601, Indian time by default. Return False if invalid."""
        return self.write_intraday([(symbol, timestamp, interval, open_price, high, low, close, volume)]) == 1

    def write_daily(self, records: Iterable[Record]) -> int:
        """Write `(symbol, date, open, high, low, close, volume)` in one transaction. Return how many."""
        return self._write("daily_candles", self._validated(records, 2))

    def write_intraday(self, records: Iterable[IntradayRecord]) -> int:
        """Write `(symbol, timestamp, interval, open, high, low, close, volume)` likewise."""
        return self._write("intraday_candles", self._validated(records, 3))

    def update_from_ticks(self, candle_store: Any, full: bool = False) -> bool:
        """Copy days and completed minutes from a store.

        Args:
            candle_store: A CandleStore, or an object with the methods of upstream's in-memory store.
            full: Whether to copy all that the store has, instead of what is new since the last call.

        Returns:
            False if there is no store, or nothing in it.
        """
        if candle_store is None:
            return False
        now_s = int(self._now_ms() / 1000)
        written = 0
        redis_store = _redis_store(candle_store)
        if redis_store is not None:
            last = self._file.progress(PROGRESS)
            since_s = int(last) if last is not None and last.isdecimal() and not full else None
            for daily, minutes in _rows_of_redis(redis_store, since_s, now_s):
                written += self._write("daily_candles", daily) + self._write("intraday_candles", minutes)
        else:
            for daily, minutes in _rows_of_upstream(candle_store, now_s):
                written += self.write_daily(daily) + self.write_intraday(minutes)
        if not written:
            return False
        with self._file.writing() as connection:
            set_progress(connection, PROGRESS, str(now_s))
        self.sync_if_due()
        return True

    def trim(self, intraday_days: int = 30) -> int:
        """Delete intraday candles that are older than that many days. Return the number deleted."""
        until = moments_of([pd.Timestamp(self._now_ms() - intraday_days * 86_400_000, unit="ms", tz="UTC")])
        with self._file.writing() as connection:
            cursor = connection.execute(
                "DELETE FROM intraday_candles WHERE timestamp < ?", (iso_texts(until)[0],)
            )
            return cursor.rowcount

    # --- reading -------------------------------------------------------------------------------------

    def get_daily_candles(
        self, symbol: str | None = None, start_date: str | None = None, end_date: str | None = None
    ) -> Frames:
        """Return days by symbol: `open high low close volume`, index `date` (midnights in Asia/Kolkata).

        Args:
            symbol: None: all.
            start_date: `2026-11-20`, inclusive.
            end_date: Inclusive.
        """
        self.sync_if_due()
        return dict(self.iter_daily(symbol, start_date, end_date))

    def get_intraday_candles(
        self,
        symbol: str | None = None,
        interval: str = "1m",
        start_time: str | None = None,
        end_time: str | None = None,
    ) -> Frames:
        """Return intraday candles by symbol, index `timestamp`; ends as in `get_daily_candles`, or times."""
        self.sync_if_due()
        return dict(self.iter_intraday(symbol, interval, start_time, end_time))

    def iter_daily(
        self, symbol: str | None = None, start_date: str | None = None, end_date: str | None = None
    ) -> Iterator[tuple[str, pd.DataFrame]]:
        """Yield `get_daily_candles` symbol by symbol, in alphabetical order."""
        first = day_text(start_date) if start_date else None
        last = day_text(end_date) if end_date else None
        return self._frames("daily_candles", symbol, None, first, last)

    def iter_intraday(
        self,
        symbol: str | None = None,
        interval: str = "1m",
        start_time: str | None = None,
        end_time: str | None = None,
    ) -> Iterator[tuple[str, pd.DataFrame]]:
        """Yield `get_intraday_candles` symbol by symbol, in alphabetical order."""
        first = moment_text(start_time) if start_time else None
        last = moment_text(end_time, end=True) if end_time else None
        return self._frames("intraday_candles", symbol, normalize(interval), first, last)

    def last_update_ms(self) -> float | None:
        """Return the market time of the last `update_from_ticks`, epoch ms; None: never."""
        text = self._file.progress(PROGRESS)
        return float(text) * 1000 if text is not None and text.isdecimal() else None

    def get_stats(self) -> dict[str, Any]:
        """Return `{"daily": {symbols, records, db_path, db_size_mb}, "intraday": …}` and "remote"."""
        size_mb = self._file.bytes_on_disk / 2**20
        stats: dict[str, Any] = {}
        with self._file.using() as connection:
            for table in KEYS_OF:
                stats[table.removesuffix("_candles")] = {
                    "symbols": connection.execute(_COUNT_SYMBOLS.format(table=table)).fetchone()[0],
                    "records": connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0],  # noqa: S608
                    "db_path": str(self.daily_db_path),
                    "db_size_mb": size_mb,
                }
        if self.remote is not None:
            stats["remote"] = {
                "state": self.remote.state,
                "waiting": self.remote.waiting,
                "dropped": self.remote.outbox_dropped,
            }
        return stats

    def span(self) -> tuple[str, str]:
        """Return the first date and the last moment in the file, "" if it is empty."""
        with self._file.using() as connection:
            first, last = connection.execute("SELECT min(date), max(date) FROM daily_candles").fetchone()
            minute = connection.execute(
                "SELECT max(timestamp) FROM intraday_candles WHERE interval = '1m'"
            ).fetchone()[0]
        return first or minute or "", max(last or "", minute or "")

    # --- files and the remote ------------------------------------------------------------------------

    def export_to_pickle(self, output_dir: str | Path | None = None) -> tuple[str, str]:
        """Write `stock_data_DDMMYYYY.pkl` and `intraday_stock_data_DDMMYYYY.pkl` (minutes).

        Symbols have the form `{"data", "columns", "index"}`, days their newest 251 rows. Memory holds one
        symbol at a time.

        Returns:
            The paths of both files.
        """
        folder = Path(output_dir) if output_dir else self.base_path
        today = dt.datetime.fromtimestamp(self._now_ms() / 1000 + KOLKATA_SECONDS, dt.UTC).date()
        daily, intraday = folder / daily_name(today), folder / intraday_name(today)
        days = ((symbol, frame.tail(DAILY_ROWS_MAX)) for symbol, frame in self.iter_daily())
        for path, frames in ((daily, days), (intraday, self.iter_intraday())):
            with replacing(path) as file:
                pickled = PickledDict(file)
                for symbol, frame in frames:
                    pickled.add(symbol, split_frame(frame))
                pickled.finish()
        return str(daily), str(intraday)

    def copy_to(self, path: Path) -> None:
        """Write a consistent, compact copy of the file. Other processes may write meanwhile."""
        with self._file.using() as connection:
            connection.execute("VACUUM INTO ?", (str(path),))

    def sync_from_turso(self, turso_conn: Any = None) -> bool:
        """Exchange rows with the remote database now. Return False if there is none, or it failed."""
        if self.remote is None:
            return False
        self._synced_at = self._clock()
        return self.remote.sync()

    def sync_if_due(self) -> None:
        """Sync with the remote unless the last attempt is less than a minute old."""
        if self.remote is not None and self._clock() - self._synced_at >= REFRESH_SECONDS:
            self.sync_from_turso()

    # --- helpers -------------------------------------------------------------------------------------

    def _validated(self, records: Iterable[Sequence[Any]], keys: int) -> Iterator[list[Any]]:
        """Yield the valid records in the file's form, and count the invalid ones."""
        for record in records:
            try:
                yield checked(record, keys)
            except (ValueError, TypeError, OverflowError) as error:
                self.rows_refused += 1
                if self.rows_refused == 1:
                    log.warning("candle_refused", record=str(record)[:120], reason=str(error)[:80])

    def _write(self, table: str, records: Iterable[Sequence[Any]]) -> int:
        rows = list(records)
        if not rows:
            return 0
        stamp = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        names = (*KEYS_OF[table], *COLUMNS)
        updates = ", ".join(f"{name} = excluded.{name}" for name in (*COLUMNS, "updated_at"))
        sql = (
            f"INSERT INTO {table} ({', '.join(names)}, updated_at) "  # noqa: S608 - constant names
            f"VALUES ({', '.join('?' * len(names))}, '{stamp}') ON CONFLICT DO UPDATE SET {updates}"
        )
        with self._file.writing() as connection:
            connection.executemany(sql, rows)
            if self.remote is not None:
                keys = len(KEYS_OF[table])
                self.remote.add_to_outbox(connection, [(*row[:keys], DAILY)[:3] for row in rows])
        return len(rows)

    def _frames(
        self, table: str, symbol: str | None, interval: str | None, first: str | None, last: str | None
    ) -> Iterator[tuple[str, pd.DataFrame]]:
        moment = KEYS_OF[table][1]
        tests = {"symbol =": symbol, "interval =": interval, f"{moment} >=": first, f"{moment} <=": last}
        given = {test: value for test, value in tests.items() if value}
        where = " AND ".join(f"{test} ?" for test in given) or "1"
        sql = (
            f"SELECT symbol, {moment}, {', '.join(COLUMNS)} FROM {table} "  # noqa: S608 - constant names
            f"WHERE {where} ORDER BY symbol, {moment}"
        )
        with self._file.using() as connection:
            cursor = connection.execute(sql, list(given.values()))
            rows = itertools.chain.from_iterable(iter(lambda: cursor.fetchmany(ROWS_A_FETCH), []))
            for name, group in itertools.groupby(rows, key=lambda row: row[0]):
                yield str(name), _frame(list(group), moment)


# One step a symbol, where count(DISTINCT) reads all rows.
_COUNT_SYMBOLS = """
    WITH RECURSIVE symbols(symbol) AS (
        SELECT min(symbol) FROM {table}
        UNION ALL SELECT (SELECT min(symbol) FROM {table} WHERE symbol > symbols.symbol)
        FROM symbols WHERE symbol NOT NULL
    ) SELECT count(symbol) FROM symbols
"""


def _frame(rows: list[tuple[Any, ...]], moment: str) -> pd.DataFrame:
    table = np.array([row[2:] for row in rows], np.float64)
    frame = pd.DataFrame({name: table[:, i] for i, name in enumerate(COLUMNS)})
    frame["volume"] = whole(frame["volume"])
    try:
        texts = np.array([row[1][:19] for row in rows], "datetime64[s]")
        frame.index = kolkata(texts.astype(np.int64) - KOLKATA_SECONDS, moment)
    except ValueError:  # another program wrote the row, with another form of time
        frame.index = moments_of([row[1] for row in rows]).rename(moment)
    return frame


# --- rows of a store -------------------------------------------------------------------------------------


def _redis_store(store: Any) -> CandleStore | None:
    """Return the CandleStore itself, or the one that an InMemoryCandleStore wraps."""
    inner = store if isinstance(store, CandleStore) else getattr(store, "store", None)
    return inner if isinstance(inner, CandleStore) else None


def _rows_of_redis(store: CandleStore, since_s: int | None, now_s: int) -> Iterator[tuple[Records, Records]]:
    """Yield valid (day records, minute records) by chunks of instruments.

    Args:
        store: The store.
        since_s: Epoch seconds of the last update, for the current day and new minutes; None: everything.
        now_s: Epoch seconds.
    """
    keep = {interval.name: interval.keep for interval in store.settings.intervals}
    minutes = keep.get(MINUTE, 0) if MINUTE in store.intervals else 0
    days = keep.get(DAY, 0) if DAY in store.intervals else 0
    from_s = 0
    if since_s is not None:
        from_s = since_s - OVERLAP_SECONDS
        minutes = min(minutes, max(0, now_s - from_s) // 60 + 1)
        days = min(days, 2 + max(0, now_s - since_s) // 86_400)
    instruments = [(token, symbol) for token, symbol in store.instruments() if is_symbol(symbol)]
    for first in range(0, len(instruments), INSTRUMENTS_A_CHUNK):
        chunk = instruments[first : first + INSTRUMENTS_A_CHUNK]
        daily: Records = []
        intraday: Records = []
        if days:
            daily = _records(read_bulk(store.client, store.keys, chunk, DAY, days, include_current=True), 0)
        if minutes:
            intraday = _records(read_bulk(store.client, store.keys, chunk, MINUTE, minutes), from_s, MINUTE)
        yield daily, intraday


def _records(bulk: Bulk, from_s: int, interval: str = "") -> Records:
    """Return the records of rows that start at `from_s` or later; without `interval` those of days.

    Leaves out the rows that `checked` refuses, all of them at once.
    """
    texts = iso_texts(kolkata(bulk.start)) if interval else date_texts(bulk.start)
    names = [file_symbol(int(token), symbol) for token, symbol in zip(bulk.tokens, bulk.symbols, strict=True)]
    owners = np.repeat(np.arange(len(bulk)), bulk.counts).tolist()
    keys = (interval,) if interval else ()
    open_, high, low, close, volume = (bulk.rows[:, i] for i in range(1, 6))
    in_range = (low <= np.minimum(open_, close)) & (np.maximum(open_, close) <= high)  # False for NaN
    finite = np.isfinite(low) & np.isfinite(high) & np.isfinite(volume)
    valid = in_range & finite & (volume >= 0) & (bulk.start >= from_s)
    volumes = volume.astype(np.int64) if is_whole(volume) else volume
    cells = zip(*(column.tolist() for column in (open_, high, low, close, volumes)), strict=True)
    return [
        (names[owner], text, *keys, *row)
        for owner, text, row, is_valid in zip(owners, texts, cells, valid.tolist(), strict=True)
        if is_valid
    ]


def _rows_of_upstream(store: Any, now_s: int) -> Iterator[tuple[Any, Any]]:
    """Yield (day records, minute records) of a store with upstream's methods; they are not validated."""
    today = dt.datetime.fromtimestamp(now_s + KOLKATA_SECONDS, dt.UTC).date().isoformat()
    for symbol in store.get_all_symbols():
        day = store.get_current_candle(trading_symbol=symbol, interval=DAY)
        minutes = store.get_candles(trading_symbol=symbol, interval=MINUTE, count=390) or []
        yield (
            [(symbol, today, *_cells(day))] if day else [],
            [(symbol, _cell(candle, "timestamp"), MINUTE, *_cells(candle)) for candle in minutes],
        )


def _cells(candle: Any) -> tuple[Any, ...]:
    return tuple(_cell(candle, name) for name in COLUMNS)


def _cell(candle: Any, name: str) -> Any:
    if isinstance(candle, Candle):
        return getattr(candle, "start" if name == "timestamp" else name)
    return candle.get(name)
