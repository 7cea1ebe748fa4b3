"""A trade file whose instruments the store knows already: what is new in it, and what to count on from.

no first sight yet      a baseline of 0, as `read_trades` made it
an earlier date         left out and counted: its rows are settled
the store's own date    later trades count on from the volume there; the same trades again change nothing;
                        other trades of a time we have are refused
a later date            starts from 0, as on Kite

Replays: captured frames through the real parser, trade files as ticks; at any speed, into the streams.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import redis

from pkbrokers_redis import logs
from pkbrokers_redis.candles import columns as col
from pkbrokers_redis.candles.calendar import Sessions, load_sessions
from pkbrokers_redis.candles.model import AT_MS, TIME_MS, TOKEN, VOLUME
from pkbrokers_redis.candles.state import ShardState
from pkbrokers_redis.client.trade_files import TradeFile, days_of, frames_of, read_trades
from pkbrokers_redis.errors import InputFileError
from pkbrokers_redis.keys import AGGREGATOR_GROUP, Keys
from pkbrokers_redis.kite.capture import KIND_BINARY, MAGIC, read_capture
from pkbrokers_redis.kite.protocol import parse_frame
from pkbrokers_redis.kite.quotes import PendingQuotes
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.cluster import Pipe
from pkbrokers_redis.store.streams import id_order
from pkbrokers_redis.store.symbols import load_symbols, save_instruments
from pkbrokers_redis.store.tick_writer import TickWriter

TOKENS_AT_ONCE = 1_000


class Known(NamedTuple):
    """What the store has of an instrument. Times are epoch ms; `seen` is NaN without volumes."""

    first_ms: float  # of its first sight: nothing older makes a candle
    day_ms: float  # midnight of the date it stands at
    seen: float  # that date's volume so far
    newest_ms: float  # of its latest trade


def load_known(
    client: redis.Redis, settings: Settings, sessions: Sessions, tokens: Sequence[int]
) -> dict[int, Known]:
    """Those of the instruments that the aggregators have seen; as of their last commits."""
    keys = settings.keys
    book = ShardState(settings.intervals[:1], sessions, instruments=max(1, len(tokens)))
    known: dict[int, Known] = {}
    pipe = Pipe(client)
    for first in range(0, len(tokens), TOKENS_AT_ONCE):
        chunk = tokens[first : first + TOKENS_AT_ONCE]
        for token in chunk:
            pipe.add("HGET", keys.state(keys.shard_of(token)), token)
        for token, hot in zip(chunk, pipe.execute(), strict=True):
            if not isinstance(hot, bytes):
                continue
            try:
                book.restore(token, hot, None, {})
            except ValueError:
                continue  # a foreign hand's: its aggregator starts anew, too
            i = book.index(token)
            inst = book.arrays.inst[i]
            if inst[col.FIRST_AT]:
                first_ms, day_ms = inst[col.FIRST_TIME] // 1000 * 1000, inst[col.DAY_S] * 1000
                newest_ms = book.arrays.window[i, 0, col.TICK_TIME] if inst[col.WINDOW_SIZE] else first_ms
                seen, outside_ms = inst[col.CUM_VOLUME], inst[col.OFF_SESSION_TIME]
                if outside_ms >= day_ms:  # said outside the windows, and nothing inside since
                    seen, newest_ms = max(inst[col.OFF_SESSION_VOLUME], seen), max(newest_ms, outside_ms)
                known[token] = Known(first_ms, day_ms, seen, newest_ms)
    return known


def carry_on(trades: TradeFile, known: Mapping[int, Known], sessions: Sessions, name: str) -> TradeFile:
    """The file's ticks for a store that knows `known`; `name` is the file's, for people.

    Raises InputFileError for other trades of a time that the store has.
    """
    baselines, ticks = trades.ticks[: trades.baselines], trades.ticks[trades.baselines :].copy()
    baselines = baselines[[int(token) not in known for token in baselines[:, TOKEN]]]
    times, days = ticks[:, TIME_MS], days_of(ticks[:, TIME_MS], sessions)
    order = np.argsort(ticks[:, TOKEN], kind="stable")
    stays = np.ones(len(ticks), bool)
    for rows in np.split(order, np.flatnonzero(np.diff(ticks[order, TOKEN])) + 1):
        token = int(ticks[rows[0], TOKEN])
        if (held := known.get(token)) is None:
            continue
        stays[rows] = (days[rows] >= held.day_ms) & (times[rows] >= held.first_ms)
        today = rows[days[rows] == held.day_ms]
        volumes = ticks[today, VOLUME]
        if not len(today) or np.isnan(held.seen) or (trades.cumulative and volumes[0] >= held.seen):
            continue
        if times[today[0]] > held.newest_ms:
            ticks[today, VOLUME] = np.round(volumes + held.seen, 8)
        elif not trades.cumulative and not _stood_at(volumes[times[today] >= held.newest_ms], held.seen):
            date = sessions.date_of(int(times[today[0]]))
            symbol = trades.symbols[trades.tokens.index(token)]
            raise InputFileError(
                f"{name}: the store has other trades of {symbol} on {date}, or later ones",
                "replay a date's files in order of time, or all into another PKB_PREFIX",
            )
    return replace(
        trades,
        ticks=np.concatenate([baselines, ticks[stays]]),
        baselines=len(baselines),
        rows_older=int(len(ticks) - stays.sum()),
    )


def _stood_at(volumes: Any, seen: float) -> bool:
    """Whether the day's volume was `seen` at some time: then these are the trades that the store has."""
    return bool(np.isclose(volumes, seen, rtol=1e-9, atol=1e-8).any())


def newest_entries(client: redis.Redis, keys: Keys, shards: Sequence[int]) -> dict[int, str]:
    """The newest entry of each shard's tick stream; none for an empty one."""
    pipe = Pipe(client)
    for shard in shards:
        pipe.add("XREVRANGE", keys.ticks(shard), "+", "-", "COUNT", 1)
    replies = zip(shards, pipe.execute(), strict=True)
    return {shard: reply[0][0].decode() for shard, reply in replies if isinstance(reply, list) and reply}


def are_applied(client: redis.Redis, keys: Keys, entries: Mapping[int, str]) -> bool:
    """Whether the aggregators' commits are past these entries."""
    pipe = Pipe(client)
    for shard in entries:
        pipe.add("HGET", keys.cursor(shard), "id")
    done = [reply.decode() if isinstance(reply, bytes) else "0-0" for reply in pipe.execute()]
    return all(id_order(at) >= id_order(entry) for at, entry in zip(done, entries.values(), strict=True))


log = logs.get("replay")

WINDOW_MS = 100  # of wall time in one frame of a paced trade file
LAG_ENTRIES_MAX = 5_000  # unapplied entries of a stream before the replay waits for the aggregator
FRAMES_BETWEEN_LOOKS = 50
LAG_WAIT_SECONDS = 0.05


@dataclass
class Summary:
    """What a replay did."""

    ticks: int = 0
    frames: int = 0
    seconds: float = 0.0
    rows_refused: int = 0
    rows_older: int = 0
    symbols: list[str] = field(default_factory=list)


def is_capture(path: Path) -> bool:
    """Whether a file is a capture of frames (`pkb record`), by its magic line."""
    if path.suffix == ".gz":
        return path.name.endswith((".cap.gz", ".pkbcap.gz"))
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


class Replay:
    """Writes one file into the store. `speed` None is as fast as the store takes it."""

    def __init__(
        self,
        connect: Callable[[], redis.Redis],
        settings: Settings,
        *,
        speed: float | None,
        stop: threading.Event,
        monotonic: Callable[[], float] = time.monotonic,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._client = connect()
        self._settings = settings
        self._keys = settings.keys
        self._speed = speed
        self._stop = stop
        self._monotonic = monotonic
        self._now_ms = now_ms
        symbols = load_symbols(self._client, self._keys)
        self._known = {name: token for token, name in symbols.items()}
        self._quotes = PendingQuotes(settings.keys, symbols)
        self._writer = TickWriter(connect, settings, quotes=self._quotes)
        self._began = monotonic()
        self._first_ms: float | None = None
        self._waited = False
        self.summary = Summary()

    def run(self, path: Path) -> Summary:
        """Replay a capture or a trade file. Raises InputFileError when it is neither."""
        self._began = self._monotonic()
        if is_capture(path):
            self._run_capture(path)
        else:
            self._run_trades(path)
        self.summary.seconds = self._monotonic() - self._began
        return self.summary

    def _run_capture(self, path: Path) -> None:
        for at_ms, kind, frame in read_capture(path):
            if self._stop.is_set() or not self._pace(at_ms):
                return
            if kind != KIND_BINARY:
                continue
            parsed = parse_frame(frame, at_ms)
            self._quotes.add(frame, parsed, at_ms)
            batches = [self._writer.number(parsed.ticks, at_ms)] if len(parsed.ticks) else []
            self._writer.write(batches, self._now_ms(), self._stop)
            self._count(len(parsed.ticks))
        while len(self._quotes) and not self._stop.is_set():
            self._writer.write([], self._now_ms(), self._stop)

    def _run_trades(self, path: Path) -> None:
        settings = self._settings
        sessions = load_sessions(settings.sessions, settings.timezone, settings.calendar)
        trades = read_trades(path, self._known, sessions)
        self._wait_for_what_was_told(set(trades.tokens) & set(self._known.values()))
        if self._stop.is_set():
            return
        known = load_known(self._client, settings, sessions, trades.tokens)
        trades = carry_on(trades, known, sessions, path.name)
        new = [
            {"instrument_token": token, "exchange_token": token >> 8, "exchange": exchange,
             "tradingsymbol": name, "name": name, "segment": exchange, "instrument_type": "EQ"}
            for symbol, token in zip(trades.symbols, trades.tokens, strict=True)
            for exchange, _, name in (symbol.partition(":"),)
            if symbol not in self._known
        ]  # fmt: skip
        if new:
            save_instruments(self._client, self._keys, new)
        self.summary.symbols = trades.symbols
        self.summary.rows_refused, self.summary.rows_older = trades.rows_refused, trades.rows_older
        if len(trades.ticks) == trades.baselines:
            return
        window_ms = None if self._speed is None else WINDOW_MS * self._speed
        paced = trades.ticks[trades.baselines]  # behind the baselines comes the first trade
        for ticks in frames_of(trades.ticks, window_ms):
            if self._stop.is_set() or not self._pace(max(ticks[0, TIME_MS], paced[TIME_MS])):
                return
            at_ms = self._now_ms()
            ticks[:, AT_MS] = at_ms
            self._writer.write([self._writer.number(ticks, at_ms)], at_ms, self._stop)
            self._count(len(ticks))
        self.summary.ticks -= trades.baselines

    def _count(self, ticks: int) -> None:
        self.summary.ticks += ticks
        self.summary.frames += 1
        if self.summary.frames % FRAMES_BETWEEN_LOOKS == 0:
            self._wait_for_the_aggregator()

    def _pace(self, moment_ms: float) -> bool:
        """Wait until a moment of the recording is due. False: told to stop meanwhile."""
        if self._speed is None:
            return True
        if self._first_ms is None:
            self._first_ms = moment_ms
        due = self._began + (moment_ms - self._first_ms) / 1000 / self._speed
        return not self._stop.wait(max(0.0, due - self._monotonic()))

    def _wait_for_the_aggregator(self) -> None:
        """Never push so far ahead that the streams' hard cap would cut what nobody has applied."""
        self._wait_while(lambda: lag_entries(self._client, self._keys) > LAG_ENTRIES_MAX)

    def _wait_for_what_was_told(self, tokens: set[int]) -> None:
        """A file goes on where the store stands: what an earlier replay wrote must be applied before."""
        shards = sorted({self._keys.shard_of(token) for token in tokens})
        entries = newest_entries(self._client, self._keys, shards)
        self._wait_while(lambda: not are_applied(self._client, self._keys, entries))

    def _wait_while(self, is_behind: Callable[[], bool]) -> None:
        while not self._stop.is_set() and is_behind():
            if not self._waited:
                log.info("waiting_for_aggregator", hint="start `pkb aggregate` if none runs")
                self._waited = True
            self._stop.wait(LAG_WAIT_SECONDS)


def lag_entries(client: redis.Redis, keys: Keys) -> int:
    """The most entries any shard's aggregator has not applied yet."""
    pipeline = client.pipeline(transaction=False)
    for shard in range(keys.shards):
        pipeline.xlen(keys.ticks(shard))
        pipeline.xinfo_groups(keys.ticks(shard))
    replies = pipeline.execute(raise_on_error=False)
    lags = [0]
    for size, groups in zip(replies[::2], replies[1::2], strict=True):
        ours = (
            [g for g in groups if g["name"] == AGGREGATOR_GROUP.encode()] if isinstance(groups, list) else []
        )
        lags.append(int(ours[0]["lag"] or 0) if ours else size if isinstance(size, int) else 0)
    return max(lags)
