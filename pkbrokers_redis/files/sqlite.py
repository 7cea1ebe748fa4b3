"""What a candle file takes over from a store: the days, and the minutes closed since the last time.

`LocalCandleDatabase`: candles in one SQLite file, with upstream's methods and tables.

One file for all days (`candles.db`), where upstream begins a new one each day; times are stored in one form,
so that they compare as text. With PKB_TURSO_URL the rows are shared with a libSQL database, see
`remote_candles`; reading and writing go on when that is away.
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
import numpy.typing as npt
import pandas as pd

from pkbrokers_redis import logs
from pkbrokers_redis.candles.model import DAY, DEFAULT_INTERVALS, Candle, normalize
from pkbrokers_redis.client.bulk import Bulk, read_bulk
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.files.atomic import replacing
from pkbrokers_redis.files.candle_file import NAME, CandleFile, checked, day_text, moment_text, set_mark
from pkbrokers_redis.files.frames import (
    COLUMNS,
    KOLKATA_SECONDS,
    Floats,
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

INSTRUMENTS_A_CHUNK = 500  # 200,000 minutes at most: 13 MB as arrays, some 60 MB as records
OVERLAP_SECONDS = 15 * 60  # ticks that come later than this amend rows unnoticed until a full update
MINUTE = "1m"

Records = list[tuple[Any, ...]]


def changed_rows(store: Any, since_s: int | None, now_s: int) -> Iterator[tuple[Records, Records]]:
    """(day records, minute records) a chunk of instruments.

    Of a CandleStore, or of a store with upstream's methods. `since_s` None: everything it keeps; else the
    current day and the minutes from a quarter of an hour before.
    """
    inner = _inner(store)
    if inner is not None:
        yield from _from_redis(inner, since_s, now_s)
    else:
        yield from _from_upstream(store, now_s)


def is_ours(store: Any) -> bool:
    """Whether the rows come from Redis, checked and in the file's form."""
    return _inner(store) is not None


def _inner(store: Any) -> CandleStore | None:
    """The CandleStore itself, or the one an InMemoryCandleStore stands on."""
    inner = store if isinstance(store, CandleStore) else getattr(store, "store", None)
    return inner if isinstance(inner, CandleStore) else None


def _from_redis(store: CandleStore, since_s: int | None, now_s: int) -> Iterator[tuple[Records, Records]]:
    names = store.intervals
    keep = {interval.name: interval.keep for interval in store.settings.intervals}
    minutes = keep.get(MINUTE, 0)
    days = keep.get(DAY, 0)
    if since_s is not None:
        minutes = min(minutes, max(0, now_s - since_s + OVERLAP_SECONDS) // 60 + 1)
        days = min(days, 2 + max(0, now_s - since_s) // 86_400)
    instruments = store.instruments()
    for first in range(0, len(instruments), INSTRUMENTS_A_CHUNK):
        chunk = instruments[first : first + INSTRUMENTS_A_CHUNK]
        some = [(token, symbol) for token, symbol in chunk if is_symbol(symbol)]
        daily: Records = []
        intraday: Records = []
        if DAY in names and days:
            daily = _records(read_bulk(store.client, store.keys, some, DAY, days, include_current=True), None)
        if MINUTE in names and minutes:
            bulk = read_bulk(store.client, store.keys, some, MINUTE, minutes)
            intraday = _records(bulk, MINUTE, None if since_s is None else since_s - OVERLAP_SECONDS)
        yield daily, intraday


def _records(bulk: Bulk, interval: str | None, from_s: int | None = None) -> Records:
    texts = iso_texts(kolkata(bulk.start)) if interval else date_texts(bulk.start)
    symbols = [
        file_symbol(int(token), symbol) for token, symbol in zip(bulk.tokens, bulk.symbols, strict=True)
    ]
    owners = np.repeat(np.arange(len(bulk)), bulk.counts).tolist()
    keys = (interval,) if interval else ()
    volumes = bulk.rows[:, 5]
    whole = volumes.astype(np.int64) if is_whole(volumes) else volumes
    cells = zip(*(bulk.rows[:, i].tolist() for i in range(1, 5)), whole.tolist(), strict=True)
    wanted = (_are_candles(bulk.rows) & (bulk.start >= (from_s or 0))).tolist()
    return [
        (symbols[owner], text, *keys, *row)
        for owner, text, row, is_wanted in zip(owners, texts, cells, wanted, strict=True)
        if is_wanted
    ]


def _are_candles(rows: Floats) -> npt.NDArray[np.bool_]:
    """bool[n]: what `candle_records.checked` asks of a row, of all rows at once."""
    open_, high, low, close, volume = (rows[:, i] for i in range(1, 6))
    inside = (low <= np.minimum(open_, close)) & (np.maximum(open_, close) <= high)  # a NaN fails it
    return np.asarray(inside & np.isfinite(low) & np.isfinite(high) & (volume >= 0) & np.isfinite(volume))


def _from_upstream(store: Any, now_s: int) -> Iterator[tuple[Records, Records]]:
    """A store with `get_all_symbols`, `get_current_candle` and `get_candles` that answer with dicts."""
    today = dt.datetime.fromtimestamp(now_s + KOLKATA_SECONDS, dt.UTC).date().isoformat()
    for symbol in store.get_all_symbols():
        day = store.get_current_candle(trading_symbol=symbol, interval=DAY)
        minutes = store.get_candles(trading_symbol=symbol, interval=MINUTE, count=390)
        yield (
            [(symbol, today, *_cells(day))] if day else [],
            [(symbol, _cell(candle, "timestamp"), MINUTE, *_cells(candle)) for candle in minutes or []],
        )


def _cells(candle: Any) -> tuple[Any, ...]:
    return tuple(_cell(candle, name) for name in ("open", "high", "low", "close", "volume"))


def _cell(candle: Any, name: str) -> Any:
    if isinstance(candle, Candle):
        return getattr(candle, "start" if name == "timestamp" else name)
    return candle.get(name)


REFRESH_SECONDS = 60.0  # how old the last exchange with the remote may be when somebody reads
ROWS_A_FETCH = 20_000

Record = tuple[str, str, float, float, float, float, float]  # symbol, date, open, high, low, close, volume
IntradayRecord = tuple[str, str, str, float, float, float, float, float]

log = logs.get("candle file")

_UPSERT = {
    "daily_candles": ("symbol", "date"),
    "intraday_candles": ("symbol", "timestamp", "interval"),
}


class LocalCandleDatabase:
    """Day and intraday candles by symbol. Rows are upserted; odd ones (a remote's, too) are refused, counted.

    `base_path` is the folder (default: PKB_FILES_DIR). Threads of a process may share one, processes open
    their own. Raises CandleFileError when the file cannot be used.
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
            self.remote = RemoteCandles(self._file, client, self._good, clock)

    def close(self) -> None:
        """Send what waits for the remote, then close the file. Again is no error."""
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

    # writing

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
        """Insert or replace one day (`2026-11-20`). False when it is no candle."""
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
        """Insert or replace one candle; `timestamp` is ISO, Kolkata's unless it says otherwise."""
        return self.write_intraday([(symbol, timestamp, interval, open_price, high, low, close, volume)]) == 1

    def write_daily(self, records: Iterable[Record]) -> int:
        """Upsert `(symbol, date, open, high, low, close, volume)` in one transaction. How many were taken."""
        return self._write("daily_candles", self._good(records, 2))

    def write_intraday(self, records: Iterable[IntradayRecord]) -> int:
        """Upsert `(symbol, timestamp, interval, open, high, low, close, volume)` in one transaction."""
        return self._write("intraday_candles", self._good(records, 3))

    def update_from_ticks(self, candle_store: Any, full: bool = False) -> bool:
        """Take over days and finished minutes from a CandleStore, or from upstream's in-memory store.

        Minutes since the last time, with some minutes' overlap for late ticks; all that the store keeps if
        `full` (after the close, when repairs are done). False when there is no store or nothing in it.
        """
        if candle_store is None:
            return False
        now_s = int(self._now_ms() / 1000)
        mark = self._file.mark("minutes until")
        since_s = int(mark) if mark is not None and mark.isdecimal() and not full else None
        written = 0
        for daily, minutes in changed_rows(candle_store, since_s, now_s):
            # They come checked and in the one form; upstream's store is a stranger's.
            if is_ours(candle_store):
                written += self._write("daily_candles", daily) + self._write("intraday_candles", minutes)
            else:
                written += self.write_daily(daily) + self.write_intraday(minutes)
        if not written:
            return False
        with self._file.writing() as connection:
            set_mark(connection, "minutes until", str(now_s))
        self.sync_if_due()
        return True

    def trim(self, intraday_days: int = 30) -> int:
        """Forget intraday candles older than that many days; their space is used again. How many went."""
        until = moments_of([pd.Timestamp(self._now_ms() - intraday_days * 86_400_000, unit="ms", tz="UTC")])
        with self._file.writing() as connection:
            cursor = connection.execute(
                "DELETE FROM intraday_candles WHERE timestamp < ?", (iso_texts(until)[0],)
            )
            return cursor.rowcount

    # reading

    def get_daily_candles(
        self, symbol: str | None = None, start_date: str | None = None, end_date: str | None = None
    ) -> Frames:
        """Symbol → `open high low close volume` under `date` (Kolkata midnights); both ends included."""
        self.sync_if_due()
        return dict(self.iter_daily(symbol, start_date, end_date))

    def get_intraday_candles(
        self,
        symbol: str | None = None,
        interval: str = "1m",
        start_time: str | None = None,
        end_time: str | None = None,
    ) -> Frames:
        """Symbol → the same under `timestamp`; a date alone means the whole day. Both ends included."""
        self.sync_if_due()
        return dict(self.iter_intraday(symbol, interval, start_time, end_time))

    def iter_daily(
        self, symbol: str | None = None, start_date: str | None = None, end_date: str | None = None
    ) -> Iterator[tuple[str, pd.DataFrame]]:
        """`get_daily_candles` one symbol at a time, in the order of symbols."""
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
        """`get_intraday_candles` one symbol at a time, in the order of symbols."""
        first = moment_text(start_time) if start_time else None
        last = moment_text(end_time, end=True) if end_time else None
        return self._frames("intraday_candles", symbol, normalize(interval), first, last)

    def last_update_ms(self) -> float | None:
        """When rows were last taken over from the store, market time; None: never."""
        mark = self._file.mark("minutes until")
        return float(mark) * 1000 if mark is not None and mark.isdecimal() else None

    def get_stats(self) -> dict[str, Any]:
        """`{"daily": {symbols, records, db_path, db_size_mb}, "intraday": …}`, and the remote's state."""
        size_mb = self._file.bytes_on_disk / 2**20
        stats: dict[str, Any] = {}
        with self._file.using() as connection:
            for name, table in (("daily", "daily_candles"), ("intraday", "intraday_candles")):
                records = connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]  # noqa: S608
                symbols = connection.execute(_COUNT_SYMBOLS.format(table=table)).fetchone()[0]
                path = str(self.daily_db_path)
                stats[name] = {"symbols": symbols, "records": records, "db_path": path, "db_size_mb": size_mb}
        if self.remote is not None:
            stats["remote"] = {
                "state": self.remote.state,
                "waiting": self.remote.waiting,
                "dropped": self.remote.outbox_dropped,
            }
        return stats

    # files and the remote

    def export_to_pickle(self, output_dir: str | Path | None = None) -> tuple[str, str]:
        """Write `stock_data_DDMMYYYY.pkl` and `intraday_stock_data_DDMMYYYY.pkl` (minutes): their paths.

        The split shape; days are cut to the newest 251. Symbol by symbol, so memory stays small.
        """
        folder = Path(output_dir) if output_dir else self.base_path
        today = dt.datetime.fromtimestamp(self._now_ms() / 1000 + KOLKATA_SECONDS, dt.UTC).date()
        paths = (folder / daily_name(today), folder / intraday_name(today))
        for path, frames in zip(paths, (self.iter_daily(), self.iter_intraday()), strict=True):
            with replacing(path) as file:
                pickled = PickledDict(file)
                for symbol, frame in frames:
                    pickled.add(
                        symbol, split_frame(frame if path is paths[1] else frame.tail(DAILY_ROWS_MAX))
                    )
                pickled.finish()
        return str(paths[0]), str(paths[1])

    def copy_to(self, path: Path) -> None:
        """A whole, compact copy of the file as it stands now; others may go on writing."""
        with self._file.using() as connection:
            connection.execute("VACUUM INTO ?", (str(path),))

    def span(self) -> tuple[str, str]:
        """The first date and the last moment in the file; "" where it is empty."""
        with self._file.using() as connection:
            first, last = connection.execute("SELECT min(date), max(date) FROM daily_candles").fetchone()
            minute = connection.execute(
                "SELECT max(timestamp) FROM intraday_candles WHERE interval = '1m'"
            ).fetchone()[0]
        return first or minute or "", max(last or "", minute or "")

    def sync_from_turso(self, turso_conn: Any = None) -> bool:
        """Exchange rows with the remote database now. False when there is none or it cannot be had."""
        if self.remote is None:
            return False
        self._synced_at = self._clock()
        return self.remote.sync()

    def sync_if_due(self) -> None:
        """`sync_from_turso` unless it was asked less than a minute ago."""
        if self.remote is not None and self._clock() - self._synced_at >= REFRESH_SECONDS:
            self.sync_from_turso()

    def _good(self, records: Iterable[Sequence[Any]], keys: int) -> Iterator[list[Any]]:
        """Records with their keys in the one form; the others are counted and left out."""
        for record in records:
            try:
                yield checked(record, keys)
            except (ValueError, TypeError, OverflowError) as error:
                self.rows_refused += 1
                if self.rows_refused == 1:
                    log.warning("a candle was refused", record=str(record)[:120], reason=str(error)[:80])

    def _write(self, table: str, records: Iterable[Sequence[Any]]) -> int:
        taken = list(records)
        if not taken:
            return 0
        stamp = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        names = (*_UPSERT[table], *COLUMNS)
        updates = ", ".join(f"{name} = excluded.{name}" for name in (*COLUMNS, "updated_at"))
        sql = (
            f"INSERT INTO {table} ({', '.join(names)}, updated_at) "  # noqa: S608 - names are ours
            f"VALUES ({', '.join('?' * len(names))}, '{stamp}') ON CONFLICT DO UPDATE SET {updates}"
        )
        with self._file.writing() as connection:
            connection.executemany(sql, taken)
            if self.remote is not None:
                keys = len(_UPSERT[table])
                self.remote.note(connection, [(*record[:keys], DAILY)[:3] for record in taken])
        return len(taken)

    def _frames(
        self, table: str, symbol: str | None, interval: str | None, first: str | None, last: str | None
    ) -> Iterator[tuple[str, pd.DataFrame]]:
        moment = _UPSERT[table][1]
        asked = {"symbol =": symbol, "interval =": interval, f"{moment} >=": first, f"{moment} <=": last}
        wanted = {test: value for test, value in asked.items() if value}
        where = " AND ".join(f"{test} ?" for test in wanted) or "1"
        sql = (
            f"SELECT symbol, {moment}, {', '.join(COLUMNS)} FROM {table} "  # noqa: S608 - names are ours
            f"WHERE {where} ORDER BY symbol, {moment}"
        )
        with self._file.using() as connection:
            cursor = connection.execute(sql, list(wanted.values()))
            rows = itertools.chain.from_iterable(iter(lambda: cursor.fetchmany(ROWS_A_FETCH), []))
            for name, group in itertools.groupby(rows, key=lambda row: row[0]):
                yield str(name), _frame(list(group), moment)


_COUNT_SYMBOLS = """
    WITH RECURSIVE each(symbol) AS (
        SELECT min(symbol) FROM {table}
        UNION ALL SELECT (SELECT min(symbol) FROM {table} WHERE symbol > each.symbol)
        FROM each WHERE symbol NOT NULL
    ) SELECT count(symbol) FROM each
"""  # a step a symbol, where count(DISTINCT) walks all rows


def _frame(rows: list[tuple[Any, ...]], moment: str) -> pd.DataFrame:
    table = np.array([row[2:] for row in rows], np.float64)
    frame = pd.DataFrame({name: table[:, i] for i, name in enumerate(COLUMNS)})
    frame["volume"] = whole(frame["volume"])
    try:
        texts = np.array([row[1][:19] for row in rows], "datetime64[s]")
        frame.index = kolkata(texts.astype(np.int64) - KOLKATA_SECONDS, moment)
    except ValueError:  # a row of another writer's
        frame.index = moments_of([row[1] for row in rows]).rename(moment)
    return frame
