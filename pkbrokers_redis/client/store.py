"""`CandleStore`: what programs read from, in any process on any machine that reaches Redis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import redis

from pkbrokers_redis.candles.calendar import Sessions, load_sessions
from pkbrokers_redis.candles.model import Candle, Interval, bucket_end_s, bucket_starts, find_interval
from pkbrokers_redis.client.follow import (
    AsyncFollower,
    ClosedCandle,
    Follower,
    FollowOptions,
    follow_ticks,
    last_closed,
)
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store import rows
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.instruments import read_hours
from pkbrokers_redis.store.meta import adopt_meta
from pkbrokers_redis.store.symbols import load_symbols, resolve, resolve_all

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd

    from pkbrokers_redis.client.bulk import Bulk
    from pkbrokers_redis.client.explain import Explanation

SYMBOLS_READ_MAX = 10_000  # a larger master is not read whole: only the instruments that have ticked
CLOSED_DAYS_MAX = 10  # `fill`: the longest run of days without trading that a look-back crosses
DAY_SECONDS = 86_400
FILL_SPARE_FACTOR = 4  # how much longer than the missing rows the look-back is: nights and lunch breaks


class CandleStore:
    """Candles, quotes and ticks of a store.

    A symbol is `NSE:INFY`, `INFY` (NSE assumed) or a token. Shards and intervals are read from the store
    itself (`P:meta`), so a reader needs only the prefix and the address. Threads may share a store; each
    follower belongs to one thread.

    Args:
        settings: Default: from the environment (PKB_REDIS_URL, else the embedded server).
        client: A Redis client to use, which the caller closes; default: a connection of its own.

    Raises:
        UnknownSymbol: A symbol does not exist; the error names the nearest ones.
        UnknownInterval: The store has no such interval.
        WrongKeyType: A key holds another type than it should.
        RedisUnavailable: Redis cannot be reached; later, redis-py's own errors.

    Example:
        >>> with CandleStore() as store:
        ...     store.get_candles("INFY", "5m", count=1)[-1].close
        1512.5
    """

    def __init__(self, settings: Settings | None = None, client: redis.Redis | None = None) -> None:
        settings = settings or load_settings()
        self._owns_client = client is None
        self.client = connect(settings, for_reading=True) if client is None else client
        self.tally = rows.Tally()
        self._settings = settings
        self._adopted = False

    @property
    def settings(self) -> Settings:
        """Return the settings with the store's own layout; read again until the store exists."""
        if not self._adopted:
            self._adopted = bool(self.client.exists(self._settings.keys.meta()))
            self._settings = adopt_meta(self.client, self._settings)
        return self._settings

    @property
    def keys(self) -> Keys:
        """Return the key names of this store."""
        return self.settings.keys

    @property
    def intervals(self) -> tuple[str, ...]:
        """Return the interval names of this store, in ascending length."""
        return tuple(interval.name for interval in self.settings.intervals)

    @property
    def rows_refused(self) -> int:
        """Return how many malformed rows were met; they are left out of every result."""
        return self.tally.rows_refused

    def close(self) -> None:
        """Close the connections, unless the client was passed in."""
        if self._owns_client:
            self.client.close()

    def __enter__(self) -> CandleStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- instruments -----------------------------------------------------------------------------

    def resolve(self, symbol: str | int) -> tuple[int, str]:
        """Return `(token, "NSE:INFY")` of a symbol."""
        return resolve(self.client, self.keys, str(symbol))

    def resolve_all(self, symbols: Sequence[str | int]) -> list[tuple[int, str]]:
        """Return `resolve` of each symbol, in their order, in two round trips."""
        return resolve_all(self.client, self.keys, symbols)

    def instruments(self) -> list[tuple[int, str]]:
        """Return `(token, symbol)` of all instruments that may have candles, sorted by symbol.

        They are the master's and those that have ticked; of a master beyond SYMBOLS_READ_MAX only the latter.
        """
        seen = self.tokens_seen()
        size: Any = self.client.hlen(self.keys.symbols())
        if size > SYMBOLS_READ_MAX and seen:
            named = resolve_all(self.client, self.keys, sorted(seen))
        else:
            names = load_symbols(self.client, self.keys)
            named = [(token, names.get(token, str(token))) for token in {**names, **dict.fromkeys(seen, "")}]
        return sorted(named, key=lambda pair: pair[1])

    def tokens_seen(self) -> set[int]:
        """Return the instruments of which the aggregators have had a tick."""
        seen: set[int] = set()
        for shard in range(self.keys.shards):
            fields: Any = self.client.hkeys(self.keys.state(shard))
            seen.update(int(field) for field in fields if field.isdigit())
        return seen

    # -- candles, quotes, ticks ------------------------------------------------------------------

    def get_candles(
        self,
        symbol: str | int,
        interval: str,
        count: int = 50,
        include_current: bool = False,
        fill: bool = False,
    ) -> list[Candle]:
        """Read the last candles of an instrument.

        Args:
            symbol: `NSE:INFY`, `INFY` or a token.
            interval: `1m` to `day`, as in `intervals`; `1h` and `1d` too.
            count: At most so many candles.
            include_current: Include the candle being formed.
            fill: Put a flat candle (last close, volume 0, ticks 0) into every empty interval of the session.

        Returns:
            Candles, newest last; `start` in epoch seconds, prices in rupees.
        """
        token, _ = self.resolve(symbol)
        chosen = find_interval(self.settings.intervals, interval)
        if count < 1:
            return []
        if not fill and not include_current:
            return rows.read_candles(self.client, self.keys, token, chosen.name, count, self.tally)
        done, current = rows.read_window(self.client, self.keys, token, chosen.name, count, self.tally)
        candles = [*done, current] if current else done
        if fill:
            # One candle more: the current one bounds the last gap even if it is not requested.
            hidden = int(current is not None and not include_current)
            filled = self._fill(candles, token, chosen, count + hidden, current is not None)
            return filled[: len(filled) - hidden]
        return candles[-count:]

    def get_current_candle(self, symbol: str | int, interval: str) -> Candle | None:
        """Return the candle being formed; None before its first trade."""
        token, _ = self.resolve(symbol)
        chosen = find_interval(self.settings.intervals, interval)
        return rows.read_current(self.client, self.keys, token, chosen.name, self.tally)

    def get_quote(self, symbol: str | int) -> dict[str, Any]:
        """Return the latest full quote by Kite's field names, `depth` decoded; {} if there is none."""
        token, _ = self.resolve(symbol)
        return rows.read_quote(self.client, self.keys, token)

    def get_dataframe(
        self,
        symbol: str | int,
        interval: str,
        count: int = 50,
        include_current: bool = False,
        fill: bool = False,
    ) -> pd.DataFrame:
        """Return `get_candles` as a DataFrame: open high low close volume oi ticks flag.

        The index `datetime` is in Asia/Kolkata.
        """
        import numpy as np

        from pkbrokers_redis.client.bulk import arrays_of, candle_frame, kolkata_index

        candles = self.get_candles(symbol, interval, count, include_current, fill)
        values, flags = arrays_of(candles)
        return candle_frame(values, flags, kolkata_index(values[:, 0].astype(np.int64)))

    def bulk(
        self,
        symbols: Sequence[str | int] | None = None,
        interval: str = "5m",
        count: int = 100,
        include_current: bool = False,
    ) -> Bulk:
        """Read the last candles of many instruments in one call.

        Args:
            symbols: Default: every instrument that has candles. Named instruments are always in the result,
                in their order and each once, without rows if they have none.
            interval: As in `get_candles`.
            count: At most so many candles of each.
            include_current: Include the candles being formed.

        Returns:
            Flat arrays, with `.of(symbol)`, `.grid(field)` and `.to_pandas()`.
        """
        from pkbrokers_redis.client.bulk import read_bulk

        chosen = find_interval(self.settings.intervals, interval)
        if symbols is None:
            instruments = self.instruments()
        else:
            instruments = list(dict(resolve_all(self.client, self.keys, symbols)).items())
        bulk = read_bulk(self.client, self.keys, instruments, chosen.name, count, include_current)
        self.tally.rows_refused += bulk.rows_refused
        return bulk.with_rows_only() if symbols is None else bulk

    def ticks(self, symbol: str | int, count: int = 100) -> list[rows.Tick]:
        """Return the last `count` ticks that the stream still holds (minutes at most), newest last."""
        token, _ = self.resolve(symbol)
        return rows.read_ticks(self.client, self.keys, token, count, self.tally)

    def explain(self, symbol: str | int, interval: str, start: int) -> Explanation:
        """Explain why the candle at the moment `start` (epoch seconds) looks as it does."""
        from pkbrokers_redis.client.explain import explain_candle

        token, name = self.resolve(symbol)
        return explain_candle(self, token, name, find_interval(self.settings.intervals, interval), start)

    # -- following -------------------------------------------------------------------------------

    def follow(
        self,
        symbols: Sequence[str | int] | None = None,
        intervals: Sequence[str] | None = None,
        position: str | None = None,
        block_seconds: float | None = None,
    ) -> Follower:
        """Iterate over closed candles as they are announced; an amended one again with a higher `rev`.

        Args:
            symbols: Default: all instruments.
            intervals: Default: all intervals.
            position: Continue behind it: a candle's `position`, from any process. Default: from now on.
                `"0"`: from the oldest announcement held.
            block_seconds: End when nothing was announced for so long; default: never.

        Returns:
            An iterator; its `missed` is the number of announcements that were trimmed unread.

        Raises:
            PkbError: The position is malformed, or of another store.

        Example:
            >>> for closed in store.follow(intervals=["1m"], position="0", block_seconds=0):
            ...     print(closed.symbol, closed.candle.close)
            NSE:INFY 1512.5
        """
        options = self._follow_options(symbols, intervals, position, block_seconds)
        return Follower(self.client, self.keys, options)

    def follow_async(
        self,
        symbols: Sequence[str | int] | None = None,
        intervals: Sequence[str] | None = None,
        position: str | None = None,
        block_seconds: float | None = None,
    ) -> AsyncFollower:
        """Return `follow` for asyncio: `async for closed in store.follow_async(…)`. Names resolve at once."""
        options = self._follow_options(symbols, intervals, position, block_seconds)
        return AsyncFollower(self.client, self.keys, options)

    def last_closed(self, count: int = 50, intervals: Sequence[str] | None = None) -> list[ClosedCandle]:
        """Return the last `count` announcements of all instruments, newest last."""
        return last_closed(self.client, self.keys, count, self._interval_names(intervals), self.tally)

    def follow_ticks(self, symbol: str | int, block_seconds: float | None = None) -> Iterator[rows.Tick]:
        """Iterate over an instrument's ticks from now on; end when none arrived for `block_seconds`."""
        token, _ = self.resolve(symbol)
        return follow_ticks(self.client, self.keys, token, block_seconds, self.tally)

    def _follow_options(
        self,
        symbols: Sequence[str | int] | None,
        intervals: Sequence[str] | None,
        position: str | None,
        block_seconds: float | None,
    ) -> FollowOptions:
        tokens = None if symbols is None else {token for token, _ in self.resolve_all(symbols)}
        return FollowOptions(tokens, self._interval_names(intervals), position, block_seconds)

    def _interval_names(self, intervals: Sequence[str] | None) -> set[str] | None:
        if intervals is None:
            return None
        return {find_interval(self.settings.intervals, name).name for name in intervals}

    # -- sessions --------------------------------------------------------------------------------

    @cached_property
    def _sessions(self) -> dict[str, Sessions]:
        calendar = self.settings.calendar
        market = load_sessions("market", path=calendar)
        read_hours(self.client, self.keys, market)
        return {"market": market, "always": load_sessions("always", self.settings.timezone, calendar)}

    def sessions_of(self, token: int, starts: Sequence[int]) -> Sessions:
        """Return the sessions in which candles with these starts (epoch seconds) can have been made.

        Candles outside the hours mean that the writers run with PKB_SESSIONS=always, whatever this reader's
        setting is.
        """
        first, other = self.possible_sessions()
        schedule = first.schedule_of(token)
        return first if all(first.is_open(schedule, start * 1000) for start in starts) else other

    def possible_sessions(self) -> list[Sessions]:
        """Return the sessions that the writers may run with, this reader's first."""
        first = self.settings.sessions
        return [self._sessions[first], self._sessions["always" if first == "market" else "market"]]

    def _fill(
        self, candles: list[Candle], token: int, interval: Interval, count: int, has_current: bool
    ) -> list[Candle]:
        sessions = self.sessions_of(token, [candle.start for candle in candles])
        now_s = None
        if self.settings.clock == "wall" and not has_current:
            now_s = int(market_clock(self.settings)() / 1000 - self.settings.close_grace_seconds)
        return _filled(candles, sessions, sessions.schedule_of(token), interval.seconds, count, now_s)


def _filled(
    candles: list[Candle],
    sessions: Sessions,
    schedule: int,
    interval_seconds: int,
    count: int,
    now_s: int | None,
) -> list[Candle]:
    """Return the last `count` candles, with a flat one in every empty interval between them.

    Intervals of the last candle's day that have ended by `now_s` (epoch seconds, less the grace) are filled
    too; None fills only between candles.
    """
    if not candles:
        return []
    filled: list[Candle] = []  # newest first
    last = candles[-1]
    day = sessions.day(schedule, last.start * 1000)
    if now_s is not None and interval_seconds and last.start < now_s < day.day_end_ms // 1000:
        starts = bucket_starts(sessions, schedule, interval_seconds, last.start + 1, now_s)
        ended = [start for start in starts if bucket_end_s(day, interval_seconds, start) <= now_s]
        filled = [_flat(start, last) for start in reversed(ended)]
    later = math.inf
    for candle in reversed(candles):
        if len(filled) >= count:
            break
        if candle.start + max(interval_seconds, 1) < later < math.inf:
            # Far enough back for the missing rows, not through months of a share that rarely trades.
            missing_seconds = (count - len(filled)) * (interval_seconds or DAY_SECONDS)
            span = missing_seconds * FILL_SPARE_FACTOR + CLOSED_DAYS_MAX * DAY_SECONDS
            first = max(candle.start + 1, int(later) - span)
            starts = bucket_starts(sessions, schedule, interval_seconds, first, int(later) - 1)
            filled += [_flat(start, candle) for start in reversed(starts)]
        filled.append(candle)
        later = candle.start
    return filled[:count][::-1]


def _flat(start: int, before: Candle) -> Candle:
    """Return a candle in which nothing traded: prices at the last close, the last open interest."""
    close = before.close
    return Candle(start, close, close, close, close, 0, before.oi, 0)
