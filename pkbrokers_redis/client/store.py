"""`CandleStore`: what programs read from. Any process, any machine that reaches Redis, any number."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import redis

from pkbrokers_redis.candles.calendar import Sessions, load_sessions
from pkbrokers_redis.candles.model import CANDLE_FIELDS, FLAG_NAMES, Candle, Interval, find_interval
from pkbrokers_redis.client.fill import fill_gaps
from pkbrokers_redis.client.follow import ClosedCandle, Follower, follow_ticks, last_closed
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store import rows
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.instruments import load_derivative_tokens
from pkbrokers_redis.store.meta import adopt_meta
from pkbrokers_redis.store.symbols import load_symbols, resolve, resolve_all

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd

    from pkbrokers_redis.client.bulk import Bulk
    from pkbrokers_redis.client.explain import Explanation
    from pkbrokers_redis.client.follow import AsyncFollower

SYMBOLS_READ_MAX = 10_000  # above it `bulk(None)` asks only for what the aggregators have seen


class CandleStore:
    """Candles, quotes and ticks of a store, by symbol (`NSE:INFY`, `INFY`, a token) and interval.

    Prefix aside, the store itself says how it is laid out: shards and intervals come from `P:meta`.
    Not for sharing between threads while it follows; each thread makes its own.

    Raises UnknownSymbol, UnknownInterval, WrongKeyType, RedisUnavailable and redis-py's own errors.
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
        """The settings as the store has them; asked for until there is a store, which may come later."""
        if not self._adopted:
            self._adopted = bool(self.client.exists(self._settings.keys.meta()))
            self._settings = adopt_meta(self.client, self._settings)
        return self._settings

    @property
    def keys(self) -> Keys:
        """Key names of this store."""
        return self.settings.keys

    @property
    def intervals(self) -> tuple[str, ...]:
        """Interval names of this store, in ascending length."""
        return tuple(interval.name for interval in self.settings.intervals)

    @property
    def rows_refused(self) -> int:
        """Rows met in Redis that were no rows; they are left out of every answer."""
        return self.tally.rows_refused

    def close(self) -> None:
        """Give the connections back, unless the client was handed in."""
        if self._owns_client:
            self.client.close()

    def __enter__(self) -> CandleStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def resolve(self, symbol: str | int) -> tuple[int, str]:
        """`(token, "NSE:INFY")`. Raises UnknownSymbol, which holds the nearest names."""
        return resolve(self.client, self.keys, str(symbol))

    def resolve_all(self, symbols: Sequence[str | int]) -> list[tuple[int, str]]:
        """`resolve` for many, in two round trips. Keeps the order."""
        return resolve_all(self.client, self.keys, symbols)

    def instruments(self) -> list[tuple[int, str]]:
        """`(token, symbol)` of all that may have candles: the master's and those the aggregators have seen.

        Of a master beyond SYMBOLS_READ_MAX only the latter. Sorted by symbol.
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
        """The instruments that the aggregators have had a tick of."""
        seen: set[int] = set()
        for shard in range(self.keys.shards):
            fields: Any = self.client.hkeys(self.keys.state(shard))
            seen.update(int(field) for field in fields if field.isdigit())
        return seen

    def get_candles(
        self,
        symbol: str | int,
        interval: str,
        count: int = 50,
        include_current: bool = False,
        fill: bool = False,
    ) -> list[Candle]:
        """The last `count` candles, newest last; the one still forming is among them only if asked.

        `fill` puts a flat candle (last close, volume 0, ticks 0) into every empty interval of the session.
        """
        token, _ = self.resolve(symbol)
        wanted = find_interval(self.settings.intervals, interval)
        if count < 1:
            return []
        if not fill and not include_current:
            return rows.read_candles(self.client, self.keys, token, wanted.name, count, self.tally)
        done, current = rows.read_window(self.client, self.keys, token, wanted.name, count, self.tally)
        candles = [*done, current] if current else done
        if fill:
            # One more than asked for: the current candle bounds the last gap even when it is not wanted.
            hidden = int(current is not None and not include_current)
            filled = self._fill(candles, token, wanted, count + hidden, current is not None)
            return filled[: len(filled) - hidden]
        return candles[-count:]

    def get_current_candle(self, symbol: str | int, interval: str) -> Candle | None:
        """The candle being formed; None before its first trade."""
        token, _ = self.resolve(symbol)
        wanted = find_interval(self.settings.intervals, interval)
        return rows.read_current(self.client, self.keys, token, wanted.name, self.tally)

    def get_quote(self, symbol: str | int) -> dict[str, Any]:
        """The latest full quote by Kite's field names, typed, `depth` decoded; {} when there is none."""
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
        """`get_candles` under `datetime` (Asia/Kolkata): open high low close volume oi ticks flag."""
        import numpy as np

        from pkbrokers_redis.client.bulk import candle_frame, kolkata_index

        candles = self.get_candles(symbol, interval, count, include_current, fill)
        width = len(CANDLE_FIELDS)
        rows = np.array([candle[:width] for candle in candles], np.float64).reshape(-1, width)
        flags = np.array([FLAG_NAMES.index(candle.flag) for candle in candles], np.int8)
        return candle_frame(rows, flags, kolkata_index(rows[:, 0].astype(np.int64)))

    def bulk(
        self,
        symbols: Sequence[str | int] | None = None,
        interval: str = "5m",
        count: int = 100,
        include_current: bool = False,
    ) -> Bulk:
        """The last `count` candles of many instruments in one call: arrays, `.of(symbol)`, `.to_pandas()`.

        None means every instrument that has candles. Those asked for by name are always in the answer,
        with no rows if need be, in the order given, each once.
        """
        from pkbrokers_redis.client.bulk import read_bulk

        wanted = find_interval(self.settings.intervals, interval)
        if symbols is None:
            instruments = self.instruments()
        else:
            instruments = list(dict(resolve_all(self.client, self.keys, symbols)).items())
        bulk = read_bulk(self.client, self.keys, instruments, wanted.name, count, include_current)
        self.tally.rows_refused += bulk.rows_refused
        return bulk.with_rows_only() if symbols is None else bulk

    def follow(
        self,
        symbols: Sequence[str | int] | None = None,
        intervals: Sequence[str] | None = None,
        position: str | None = None,
        block_seconds: float | None = None,
    ) -> Follower:
        """Closed candles as they are announced, of all instruments and intervals or of some.

        From now on, or from after `position` (a candle's, in any process; `"0"`: all that is still
        there). Amended candles come again with a higher `rev`. Ends when nothing came for
        `block_seconds`. The iterator's `missed` says how many announcements were trimmed unread.
        """
        tokens = None
        if symbols is not None:
            tokens = [token for token, _ in resolve_all(self.client, self.keys, symbols)]
        return Follower(
            self.client,
            self.keys,
            tokens=tokens,
            intervals=self._names(intervals),
            position=position,
            block_seconds=block_seconds,
        )

    def follow_async(
        self,
        symbols: Sequence[str | int] | None = None,
        intervals: Sequence[str] | None = None,
        position: str | None = None,
        block_seconds: float | None = None,
    ) -> AsyncFollower:
        """`follow` for asyncio: `async for candle in store.follow_async(…)`. Names are resolved here."""
        from pkbrokers_redis.client.follow import AsyncFollower
        from pkbrokers_redis.store.cluster import async_client_of

        tokens = None if symbols is None else [token for token, _ in self.resolve_all(symbols)]
        return AsyncFollower(
            async_client_of(self.client),
            self.keys,
            tokens=tokens,
            intervals=self._names(intervals),
            position=position,
            block_seconds=block_seconds,
        )

    def explain(self, symbol: str | int, interval: str, start: int) -> Explanation:
        """Why the candle at the moment `start` (epoch seconds) looks as it does; see `Explanation`."""
        from pkbrokers_redis.client.explain import explain_candle

        token, name = self.resolve(symbol)
        return explain_candle(self, token, name, find_interval(self.settings.intervals, interval), start)

    def last_closed(self, count: int = 50, intervals: Sequence[str] | None = None) -> list[ClosedCandle]:
        """The last `count` announcements of all instruments, newest last."""
        return last_closed(self.client, self.keys, count, intervals=self._names(intervals), tally=self.tally)

    def ticks(self, symbol: str | int, count: int = 100) -> list[rows.Tick]:
        """The last `count` ticks still in the stream (minutes at most), newest last."""
        token, _ = self.resolve(symbol)
        return rows.read_ticks(self.client, self.keys, token, count, self.tally)

    def follow_ticks(self, symbol: str | int, block_seconds: float | None = None) -> Iterator[rows.Tick]:
        """An instrument's ticks from now on. Ends when none came for `block_seconds`."""
        token, _ = self.resolve(symbol)
        return follow_ticks(self.client, self.keys, token, block_seconds, self.tally)

    def _names(self, intervals: Sequence[str] | None) -> list[str] | None:
        if intervals is None:
            return None
        return [find_interval(self.settings.intervals, name).name for name in intervals]

    @cached_property
    def _sessions(self) -> dict[str, Sessions]:
        calendar = self.settings.calendar
        market = load_sessions("market", path=calendar)
        market.derivatives = frozenset(load_derivative_tokens(self.client, self.keys))
        return {"market": market, "always": load_sessions("always", self.settings.timezone, calendar)}

    def sessions_of(self, token: int, starts: Sequence[int]) -> Sessions:
        """The sessions in which candles with these starts can have been made.

        With candles out of hours the writers run with PKB_SESSIONS=always, whatever this reader's is.
        """
        sessions = self._sessions[self.settings.sessions]
        schedule = sessions.schedule_of(token)
        if all(sessions.is_open(schedule, start * 1000) for start in starts):
            return sessions
        return self._sessions["always"]

    def possible_sessions(self) -> list[Sessions]:
        """The sessions the writers may have been run with: this reader's first, then the other."""
        first = self.settings.sessions
        return [self._sessions[first], self._sessions["always" if first == "market" else "market"]]

    def _fill(
        self, candles: list[Candle], token: int, interval: Interval, count: int, has_current: bool
    ) -> list[Candle]:
        sessions = self.sessions_of(token, [candle.start for candle in candles])
        schedule = sessions.schedule_of(token)
        now_s = None
        if self.settings.clock == "wall" and not has_current:
            now_s = int(market_clock(self.settings)() / 1000 - self.settings.close_grace_seconds)
        return fill_gaps(candles, sessions, schedule, interval.seconds, count, now_s)
