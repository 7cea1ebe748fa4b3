"""Replay a file into the streams: captured frames through the real parser, trade files as ticks.

A trade file may hold instruments that the store knows already. Then the file continues the store's day:

    unknown instrument       starts at a baseline of 0, as `read_trades` made it
    an earlier date          is left out and counted: the store's rows of it are final
    the store's own date     later trades continue from the volume in the store; the same trades again change
                             nothing; other trades of a time that the store has are refused
    a later date             starts from 0, as on Kite
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import redis

from pkbrokers_redis import logs
from pkbrokers_redis.candles import columns as col
from pkbrokers_redis.candles.calendar import IST, Sessions, load_sessions
from pkbrokers_redis.candles.model import AT_MS, LAST_PRICE, TIME_MS, TOKEN, VOLUME, bucket_start_s
from pkbrokers_redis.candles.rows import OPEN, START, flag_name, number, parse_row
from pkbrokers_redis.candles.rows import VOLUME as VOLUME_CELL
from pkbrokers_redis.candles.state import ShardState
from pkbrokers_redis.client.trade_files import TradeFile, days_of, frames_of, read_trades
from pkbrokers_redis.errors import InputFileError
from pkbrokers_redis.keys import AGGREGATOR_GROUP, Keys
from pkbrokers_redis.kite.capture import KIND_BINARY, MAGIC, read_capture
from pkbrokers_redis.kite.protocol import parse_frame, quote_fields
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.cluster import Pipe
from pkbrokers_redis.store.symbols import load_symbols, save_instruments
from pkbrokers_redis.store.tick_writer import PendingQuotes, TickWriter

log = logs.get("replay")

FRAME_WALL_MS = 100  # of wall time in one frame of a paced trade file
LAG_ENTRIES_MAX = 5_000  # unapplied entries of a stream before the replay waits for the aggregator
FRAMES_PER_LAG_CHECK = 50
LAG_POLL_SECONDS = 0.05
TOKENS_PER_PIPELINE = 1_000


@dataclass
class Summary:
    """What a replay did: ticks and frames sent, seconds taken, rows of the file left out."""

    ticks: int = 0
    frames: int = 0
    seconds: float = 0.0
    rows_refused: int = 0  # malformed
    rows_older: int = 0  # older than what the store has of their instruments
    rows_unordered: int = 0  # of a cumulative file, whose volume is below an earlier row's
    rows_known: int = 0  # that the store has already; they change nothing
    symbols: list[str] = field(default_factory=list)


class Replay:
    """Write one file into the store, in the calling thread.

    Args:
        connect: Returns a client of the store.
        settings: The store's settings.
        speed: 1 is real time; None is as fast as the store accepts it.
        stop: Ends `run` early.

    Example:
        >>> stop = threading.Event()
        >>> replay = Replay(lambda: connect(settings), settings, speed=None, stop=stop)
        >>> replay.run(Path("trades.csv")).ticks
        4
    """

    def __init__(
        self,
        connect: Callable[[], redis.Redis],
        settings: Settings,
        *,
        speed: float | None,
        stop: threading.Event,
    ) -> None:
        self._client = connect()
        self._settings = settings
        self._keys = settings.keys
        self._speed = speed
        self._stop = stop
        symbols = load_symbols(self._client, self._keys)
        self._tokens = {name: token for token, name in symbols.items()}
        self._quotes = PendingQuotes(settings.keys, symbols, quote_fields)
        self._writer = TickWriter(connect, settings, quotes=self._quotes)
        self._began = 0.0  # monotonic seconds
        self._first_ms: float | None = None
        self._wait_logged = False
        self.summary = Summary()

    def run(self, path: Path) -> Summary:
        """Replay a capture or a trade file.

        Raises:
            InputFileError: The file is neither, or its trades contradict the store's.
        """
        self._began = time.monotonic()
        if is_capture(path):
            self._run_capture(path)
        else:
            self._run_trades(path)
        self.summary.seconds = time.monotonic() - self._began
        return self.summary

    def _run_capture(self, path: Path) -> None:
        for at_ms, kind, frame in read_capture(path):
            if self._stop.is_set() or not self._pace(at_ms):
                return
            if kind != KIND_BINARY:
                continue
            parsed = parse_frame(frame, at_ms)
            self._quotes.add(frame, parsed.tokens.tolist(), parsed.offsets, parsed.lengths, at_ms)
            batches = [self._writer.number(parsed.ticks, at_ms)] if len(parsed.ticks) else []
            self._writer.write(batches, _now_ms(), self._stop)
            self._count(len(parsed.ticks))
        while len(self._quotes) and not self._stop.is_set():
            self._writer.write([], _now_ms(), self._stop)

    def _run_trades(self, path: Path) -> None:
        settings = self._settings
        sessions = load_sessions(settings.sessions, settings.timezone, settings.calendar)
        trades = read_trades(path, self._tokens, sessions)
        # What an earlier replay wrote must be applied first, because this file continues from it.
        if not self._tokens.keys().isdisjoint(trades.symbols):
            self._wait_for_lag(0)
        if self._stop.is_set():
            return
        stored = read_stored(self._client, settings, sessions, trades.tokens)
        trades = resume(trades, stored, sessions, path.name)
        if trades.rows_known:
            check_prices(self._client, settings, sessions, trades, stored, path.name)
        self._save_new_instruments(trades)
        self.summary.symbols = trades.symbols
        for name in ("rows_refused", "rows_older", "rows_unordered", "rows_known"):
            setattr(self.summary, name, getattr(trades, name))
        if len(trades.ticks) == trades.baselines:
            return
        self._play(trades)
        self.summary.ticks = max(self.summary.ticks - trades.baselines, 0)

    def _play(self, trades: TradeFile) -> None:
        """Write the ticks of a trade file, the baselines first, until its end or `stop`."""
        window_ms = None if self._speed is None else FRAME_WALL_MS * self._speed
        first_trade_ms = trades.ticks[trades.baselines, TIME_MS]
        for ticks in frames_of(trades.ticks, window_ms):
            if self._stop.is_set() or not self._pace(max(ticks[0, TIME_MS], first_trade_ms)):
                return
            at_ms = _now_ms()
            ticks[:, AT_MS] = at_ms
            self._writer.write([self._writer.number(ticks, at_ms)], at_ms, self._stop)
            self._count(len(ticks))

    def _save_new_instruments(self, trades: TradeFile) -> None:
        rows: list[dict[str, Any]] = []
        for symbol, token in zip(trades.symbols, trades.tokens, strict=True):
            exchange, _, name = symbol.partition(":")
            row = {"instrument_token": token, "exchange_token": token >> 8, "instrument_type": "EQ"}
            row |= {"exchange": exchange, "segment": exchange, "tradingsymbol": name, "name": name}
            if symbol not in self._tokens:
                rows.append(row)
        if rows:
            save_instruments(self._client, self._keys, rows)

    def _count(self, ticks: int) -> None:
        self.summary.ticks += ticks
        self.summary.frames += 1
        if self.summary.frames % FRAMES_PER_LAG_CHECK == 0:
            # The streams' hard cap would otherwise trim entries that no aggregator has applied.
            self._wait_for_lag(LAG_ENTRIES_MAX)

    def _pace(self, moment_ms: float) -> bool:
        """Wait until a moment of the recording is due; return False if stopped meanwhile."""
        if self._speed is None:
            return True
        if self._first_ms is None:
            self._first_ms = moment_ms
        due = self._began + (moment_ms - self._first_ms) / 1000 / self._speed
        return not self._stop.wait(max(0.0, due - time.monotonic()))

    def _wait_for_lag(self, entries_max: int) -> None:
        while not self._stop.is_set() and lag_entries(self._client, self._keys) > entries_max:
            if not self._wait_logged:
                log.info("waiting_for_aggregator", hint="start `pkb aggregate` if none runs")
                self._wait_logged = True
            self._stop.wait(LAG_POLL_SECONDS)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def is_capture(path: Path) -> bool:
    """Return whether a file is a capture of frames (`pkb record`), by its first line."""
    if path.suffix == ".gz":
        return path.name.endswith((".cap.gz", ".pkbcap.gz"))
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


class StoredInstrument(NamedTuple):
    """What the store has of an instrument. Times are epoch ms; `volume` is NaN without volumes."""

    first_ms: float  # of its first tick: no older trade makes a candle
    day_ms: float  # midnight of its latest trade date
    volume: float  # that date's cumulative volume
    newest_ms: float  # of its latest trade


def read_stored(
    client: redis.Redis, settings: Settings, sessions: Sessions, tokens: Sequence[int]
) -> dict[int, StoredInstrument]:
    """Return token → what the aggregators' last commits have of it; unknown instruments are left out."""
    keys = settings.keys
    state = ShardState(settings.intervals[:1], sessions, instruments=max(1, len(tokens)))
    stored: dict[int, StoredInstrument] = {}
    pipe = Pipe(client)
    for first in range(0, len(tokens), TOKENS_PER_PIPELINE):
        chunk = tokens[first : first + TOKENS_PER_PIPELINE]
        for token in chunk:
            pipe.add("HGET", keys.state(keys.shard_of(token)), token)
        for token, text in zip(chunk, pipe.execute(), strict=True):
            if not isinstance(text, bytes):
                continue
            try:
                state.restore(token, text, None, {})
            except ValueError:
                continue  # malformed: its aggregator starts the instrument from nothing, too
            row = state.index(token)
            instrument, newest = state.arrays.inst[row], state.arrays.window[row, 0]
            if instrument[col.FIRST_AT]:
                stored[token] = _stored(instrument, newest)
    return stored


def _stored(instrument: Any, newest: Any) -> StoredInstrument:
    first_ms, day_ms = instrument[col.FIRST_TIME] // 1000 * 1000, instrument[col.DAY_S] * 1000
    newest_ms = newest[col.TICK_TIME] if instrument[col.WINDOW_SIZE] else first_ms
    volume, off_session_ms = instrument[col.CUM_VOLUME], instrument[col.OFF_SESSION_TIME]
    if off_session_ms >= day_ms:  # traded outside the hours of that day, and not inside since
        volume = max(instrument[col.OFF_SESSION_VOLUME], volume)
        newest_ms = max(newest_ms, off_session_ms)
    return StoredInstrument(first_ms, day_ms, volume, newest_ms)


def resume(
    trades: TradeFile, stored: Mapping[int, StoredInstrument], sessions: Sessions, name: str
) -> TradeFile:
    """Return the file's ticks as they continue what the store has (see the module's table).

    Raises InputFileError, with the file's `name`, if the store has other trades of the same time.
    """
    baselines, ticks = trades.ticks[: trades.baselines], trades.ticks[trades.baselines :].copy()
    baselines = baselines[[int(token) not in stored for token in baselines[:, TOKEN]]]
    times, days = ticks[:, TIME_MS], days_of(ticks[:, TIME_MS], sessions)
    order = np.argsort(ticks[:, TOKEN], kind="stable")
    keep = np.ones(len(ticks), bool)
    known_rows = 0
    for rows in np.split(order, np.flatnonzero(np.diff(ticks[order, TOKEN])) + 1):
        token = int(ticks[rows[0], TOKEN])
        known = stored.get(token)
        if known is None:
            continue
        keep[rows] = (days[rows] >= known.day_ms) & (times[rows] >= known.first_ms)
        today = rows[days[rows] == known.day_ms]
        volumes = ticks[today, VOLUME]
        if not len(today) or np.isnan(known.volume) or (trades.cumulative and volumes[0] >= known.volume):
            continue
        if times[today[0]] > known.newest_ms:
            ticks[today, VOLUME] = np.round(volumes + known.volume, 8)
            continue
        # They are the store's own trades if the day's volume in the file reaches the store's volume.
        reached = np.isclose(volumes[times[today] >= known.newest_ms], known.volume, rtol=1e-9, atol=1e-8)
        if not trades.cumulative and not reached.any():
            date = sessions.date_of(int(times[today[0]]))
            symbol = trades.symbols[trades.tokens.index(token)]
            raise InputFileError(
                f"{name}: the store has other trades of {symbol} on {date}, or later ones",
                "replay a date's files in order of time, or all into another PKB_PREFIX",
            )
        known_rows += int((times[today] <= known.newest_ms).sum())
    return replace(
        trades,
        ticks=np.concatenate([baselines, ticks[keep]]),
        baselines=len(baselines),
        rows_older=int(len(ticks) - keep.sum()),
        rows_known=known_rows,
    )


def check_prices(
    client: redis.Redis, settings: Settings, sessions: Sessions, trades: TradeFile,
    stored: Mapping[int, StoredInstrument], name: str,
) -> None:  # fmt: skip
    """Check that trades which the store has already have the prices of its candles.

    A candle merges what it was told first: corrected prices at the same times would change nothing. Raises
    InputFileError, with the file's `name`, for the first candle that differs.
    """
    interval = min((each for each in settings.intervals if each.seconds), key=lambda each: each.seconds)
    for symbol, token in zip(trades.symbols, trades.tokens, strict=True):
        known = stored.get(token)
        if known is None:
            continue
        schedule = sessions.schedule_of(token)
        rows = trades.ticks[(trades.ticks[:, TOKEN] == token) & (trades.ticks[:, TIME_MS] <= known.newest_ms)]
        by_start: dict[int, list[float]] = {}
        for price, time_ms in rows[:, [LAST_PRICE, TIME_MS]].tolist():
            if sessions.is_open(schedule, int(time_ms)):
                start = bucket_start_s(sessions.day(schedule, int(time_ms)), interval.seconds, int(time_ms))
                by_start.setdefault(start, []).append(price)
        texts: Any = client.lrange(settings.keys.candles(token, interval.name), 0, -1)
        for row in filter(None, map(parse_row, texts)):
            prices = by_start.get(int(number(row[START])))
            if prices is None or flag_name(row):
                continue
            wanted = [prices[0], max(prices), min(prices), prices[-1]]
            if not np.allclose(wanted, [number(cell) for cell in row[OPEN:VOLUME_CELL]], rtol=1e-9):
                at = datetime.fromtimestamp(number(row[START]), IST)
                raise InputFileError(
                    f"{name}: {symbol} has other prices than the store at {at:%Y-%m-%d %H:%M}",
                    "nothing changed: replay it into another PKB_PREFIX; `pkb backfill` asks Kite",
                )


def lag_entries(client: redis.Redis, keys: Keys) -> int:
    """Return the most entries that any shard's aggregator has not applied yet."""
    pipe = client.pipeline(transaction=False)
    for shard in range(keys.shards):
        pipe.xlen(keys.ticks(shard))
        pipe.xinfo_groups(keys.ticks(shard))
    replies = pipe.execute(raise_on_error=False)
    lags = [0]
    for length, groups in zip(replies[::2], replies[1::2], strict=True):
        by_name = {group["name"]: group for group in groups} if isinstance(groups, list) else {}
        group = by_name.get(AGGREGATOR_GROUP.encode())
        if group is not None:
            lags.append(int(group["lag"] or 0))
        elif isinstance(length, int):
            lags.append(length)
    return max(lags)
