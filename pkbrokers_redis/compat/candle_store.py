"""Emptying a store: the keys of one prefix, one by one, and only while nobody writes them.

Kept are the layout (`P:meta`), the instrument master, sessions and jobs: all that is no market data.

Upstream's `get_stats()` over a shared store: read from Redis, not counted in one process.

`InMemoryCandleStore`: upstream's class by name, arguments and answers, on Redis, not in one process.

A writer's `process_tick` feeds the tick streams, the aggregators make the candles, and every process that
asks sees the same. What differs, and why: docs/migrating.md.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis

from pkbrokers_redis import logs
from pkbrokers_redis.candles.model import DAY, SEGMENT_INDICES, SEGMENTS, Candle, find_interval
from pkbrokers_redis.client.producer import TickInput
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.compat.upstream_types import MAX_DAILY_ROWS, InstrumentsView
from pkbrokers_redis.errors import PkbError, UnknownInterval, UnknownSymbol
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.symbols import read_names, save_instruments

if TYPE_CHECKING:
    import pandas as pd

KEYS_AT_ONCE = 1_000
SHARD_KEYS = ("ticks", "closed", "cursor", "state", "repairs")
INSTRUMENT_KEYS = ("candles", "current", "quote")


def clear_store(client: redis.Redis, keys: Keys) -> int:
    """Delete the market data of this prefix; returns how many keys. Never FLUSHes.

    Raises PkbError while an aggregator owns a shard: what it has in memory it would write again.
    """
    for shard in range(keys.shards):
        owner: Any = client.get(keys.lease(shard))
        if owner:
            raise PkbError(
                f"the store is in use: {owner.decode(errors='replace')} owns shard {shard}",
                "stop the workers first (`pkb up`, `pkb aggregate`)",
            )
    deleted = 0
    for shard in range(keys.shards):
        root = f"{keys.prefix}:{{{shard}}}:"
        doomed: list[Any] = [root + name for name in SHARD_KEYS]
        for kind in INSTRUMENT_KEYS:
            for key in client.scan_iter(match=_escape(f"{root}{kind}:") + "*", count=KEYS_AT_ONCE):
                doomed.append(key)
                if len(doomed) >= KEYS_AT_ONCE:  # one slot, so that a cluster takes them in one command
                    deleted += int(client.unlink(*doomed))
                    doomed = []
        if doomed:
            deleted += int(client.unlink(*doomed))
    return deleted


def _escape(text: str) -> str:
    """For SCAN's pattern: a prefix may hold nothing special, but braces are ours."""
    return "".join(f"\\{letter}" if letter in "[]*?\\^" else letter for letter in text)


STATS_SECONDS = 1.0  # PKDevTools asks before each of thousands of reads


class StoreStats:
    """Reads at most once in STATS_SECONDS. `sent` is what this process has sent into the streams."""

    def __init__(self, store: CandleStore) -> None:
        self.sent = 0
        self._store = store
        self._began = time.time()
        self._read: tuple[float, dict[str, Any]] | None = None

    def read(self) -> dict[str, Any]:
        """`ticks_processed candles_created candles_completed last_tick_time start_time instrument_count
        instruments_with_ticks registered_symbols uptime_seconds memory_mb`.

        Ticks are what living aggregators have processed, at least what this process sent; `candles_completed`
        counts announcements; `start_time` is when this object was made; memory is the Redis server's.
        """
        now = time.monotonic()
        if self._read is None or now - self._read[0] > STATS_SECONDS:
            self._read = now, self._ask()
        return {**self._read[1], "uptime_seconds": time.time() - self._began}

    def last_tick_time(self) -> float:
        """When the last tick came into Redis, epoch seconds; 0 for never."""
        return float(self.read()["last_tick_time"])

    def _ask(self) -> dict[str, Any]:
        store, keys = self._store, self._store.keys
        seen = store.tokens_seen()
        pipe = store.client.pipeline(transaction=False)
        for shard in range(keys.shards):
            pipe.xinfo_stream(keys.closed(shard))
            pipe.xinfo_stream(keys.ticks(shard))
        infos: list[Any] = pipe.execute(raise_on_error=False)
        closed = [each for each in infos[::2] if isinstance(each, dict)]
        ticks = [each for each in infos[1::2] if isinstance(each, dict)]
        completed = sum(int(each["entries-added"]) for each in closed)
        last_ms = max((int(_text(each["last-generated-id"]).partition("-")[0]) for each in ticks), default=0)
        registered: Any = store.client.hlen(keys.symbols())
        return {
            "ticks_processed": max(self._ticks_total(), self.sent),
            "candles_created": completed + len(seen) * len(store.intervals),
            "candles_completed": completed,
            "last_tick_time": last_ms / 1000,
            "start_time": self._began,
            "instrument_count": max(len(seen), int(registered)),
            "instruments_with_ticks": len(seen),
            "registered_symbols": int(registered),
            "uptime_seconds": 0.0,
            "memory_mb": self._memory_mb(),
        }

    def _ticks_total(self) -> int:
        keys = self._store.keys
        names: Any = self._store.client.zrange(keys.workers(), 0, -1)
        ids = [name.decode().partition(" ")[2] for name in names if name.startswith(b"aggregate ")]
        pipe = self._store.client.pipeline(transaction=False)
        for worker_id in ids:
            pipe.hget(keys.worker(worker_id), "ticks_total")
        counts = pipe.execute(raise_on_error=False) if ids else []
        return sum(int(count) for count in counts if isinstance(count, bytes) and count.isdigit())

    def _memory_mb(self) -> float:
        try:
            info: Any = self._store.client.info("memory")
        except redis.RedisError:
            return 0.0  # a reader's user may have no right to ask
        if "used_memory" in info:
            return float(info["used_memory"]) / 2**20
        nodes = [each for each in info.values() if isinstance(each, dict)]  # a cluster's, node by node
        return float(sum(each.get("used_memory", 0) for each in nodes)) / 2**20


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


log = logs.get("store")

NAMES_SECONDS = 30.0  # how long the list of symbols is believed, and that there is no such symbol
UNKNOWN_MAX = 10_000  # names remembered as unknown
INDEX_EXCHANGE = "NSE"  # of an index that nobody named an exchange for


class InMemoryCandleStore:
    """Candles of all instruments, by `instrument_token` or `trading_symbol` (`RELIANCE`, `BSE:INFY`).

    What is not known is None or empty, as upstream has it, not an error. `auto_persist`, `persist_interval`
    and `load_existing` are accepted and have nothing to do: Redis keeps the data. Any thread may use it.

    Raises RedisUnavailable and redis-py's own errors.
    """

    def __init__(
        self,
        auto_persist: bool = True,
        persist_interval: int = 300,
        load_existing: bool = True,
        shared_stats: dict[str, Any] | None = None,
        *,
        settings: Settings | None = None,
        client: redis.Redis | None = None,
    ) -> None:
        self.auto_persist = auto_persist
        self.persist_interval = persist_interval
        self.load_existing = load_existing
        self.shared_stats = shared_stats
        self.store = CandleStore(settings, client)
        self.lock = threading.RLock()
        self._stats = StoreStats(self.store)
        self._names: tuple[float, dict[int, str], dict[str, int]] | None = None
        self._unknown: dict[str, float] = {}  # names that nobody has → looked for at, monotonic seconds
        self._once = logs.Once()

    # -- writing ---------------------------------------------------------------------------------

    def process_tick(self, tick_data: dict[str, Any]) -> bool:
        """Send a tick (a dict as KiteTicker's or PKBrokers' client gives it) into the streams.

        False for what is no tick, or when Redis has been away so long that no more is kept.
        """
        return self.process_ticks_batch([tick_data]) == 1

    def process_ticks_batch(self, ticks: Sequence[dict[str, Any]]) -> int:
        """Send many at once, which is far cheaper than one by one; returns how many were taken."""
        taken, _ = self._input.put(ticks)
        self._stats.sent += taken
        if not self._input.waiting:  # else Redis is away, and a later tick brings the name
            self._register_names(ticks)
        return taken

    def _register_names(self, ticks: Sequence[Any]) -> None:
        """The names that ticks carry; raises nothing, as the ticks are taken."""
        try:
            for tick in ticks:
                symbol = tick.get("trading_symbol") if isinstance(tick, Mapping) else None
                token = tick.get("instrument_token") if symbol else None
                if isinstance(symbol, str) and isinstance(token, int) and token not in self._registered:
                    self.register_instrument(token, symbol)
        except (PkbError, redis.RedisError) as error:
            if self._once.first("name"):
                log.warning("name_not_registered", why=" ".join(str(error).split())[:200])

    def register_instrument(self, instrument_token: int, trading_symbol: str) -> None:
        """Give a token its name. A token or a name that the instrument master has stays as it is there."""
        exchange, _, symbol = trading_symbol.rpartition(":")
        if not exchange:
            segment = instrument_token & 0xFF
            exchange = INDEX_EXCHANGE if segment == SEGMENT_INDICES else SEGMENTS.get(segment, "NSE")
        full = f"{exchange.upper()}:{symbol}"
        client, keys = self.store.client, self.store.keys
        if not client.exists(keys.instrument(instrument_token)) and not client.hexists(keys.symbols(), full):
            row = {
                "instrument_token": instrument_token,
                "tradingsymbol": symbol,
                "exchange": exchange.upper(),
                "segment": SEGMENTS.get(instrument_token & 0xFF, exchange.upper()),
            }
            save_instruments(client, keys, [row])
            self._names = None
            self._unknown.clear()
        self._registered.add(instrument_token)

    def clear(self) -> None:
        """Delete the candles, quotes, ticks and announcements of this store's prefix; names and session stay.

        Never FLUSH, and never under a running pipeline: raises PkbError while an aggregator owns a shard.
        """
        clear_store(self.store.client, self.store.keys)
        self._names = None
        self._stats = StoreStats(self.store)
        log.info("store_cleared", prefix=self.store.keys.prefix)

    # -- reading ---------------------------------------------------------------------------------

    def get_candles(
        self,
        instrument_token: int | None = None,
        trading_symbol: str | None = None,
        interval: str = "5m",
        count: int = 50,
        include_current: bool = True,
    ) -> list[dict[str, Any]]:
        """The last `count` candles as upstream's dicts, oldest first, the one that forms among them."""
        from pkbrokers_redis.client.dataframes import candle_dict

        found = self._window(instrument_token, trading_symbol, interval, count, include_current)
        token, candles, is_forming = found
        last_s = self._last_trade_s(token, candles[-1]) if candles and is_forming else 0
        ends = len(candles) - is_forming
        return [candle_dict(each, n < ends, 0 if n < ends else last_s) for n, each in enumerate(candles)]

    def get_current_candle(
        self, instrument_token: int | None = None, trading_symbol: str | None = None, interval: str = "5m"
    ) -> dict[str, Any] | None:
        """The candle that forms, None without one."""
        candles = self.get_candles(instrument_token, trading_symbol, interval, 1)
        return candles[-1] if candles and not candles[-1]["is_complete"] else None

    def get_ohlcv_dataframe(
        self,
        instrument_token: int | None = None,
        trading_symbol: str | None = None,
        interval: str = "5m",
        count: int = 50,
    ) -> pd.DataFrame:
        """The last `count` candles, the one that forms among them, under `datetime` (Asia/Kolkata)."""
        import numpy as np

        from pkbrokers_redis.client.dataframes import ohlcv_frame

        _, candles, _ = self._window(instrument_token, trading_symbol, interval, count, True)
        return ohlcv_frame(np.array([candle[:8] for candle in candles], np.float64).reshape(-1, 8))

    def get_latest_price(
        self, instrument_token: int | None = None, trading_symbol: str | None = None
    ) -> float | None:
        """The last price: of the shortest interval's newest candle, else of the quote, else of the day."""
        token = self._resolve(instrument_token, trading_symbol)
        if token is None:
            return None
        _, candles, _ = self._window(token, None, self.store.intervals[0], 1, True)
        if candles:
            return candles[-1].close
        price = self.store.get_quote(token).get("last_price")
        if isinstance(price, float):
            return price
        _, days, _ = self._window(token, None, DAY, 1, True)
        return days[-1].close if days else None

    def get_day_ohlcv(
        self, instrument_token: int | None = None, trading_symbol: str | None = None
    ) -> dict[str, Any] | None:
        """The newest day candle: today's, after the close too, until the next day's first trade."""
        candles = self.get_candles(instrument_token, trading_symbol, DAY, 1)
        return candles[-1] if candles else None

    def get_all_instruments_ohlcv(self, interval: str = DAY) -> dict[int, dict[str, Any]]:
        """Token → the newest candle of each instrument that has one, with `trading_symbol`."""
        from pkbrokers_redis.compat.exports import newest_candles

        return newest_candles(self.store, interval)

    def get_all_symbols(self) -> list[str]:
        """The trading symbols of all instruments known, without `NSE:`."""
        return list(self.symbol_to_token)

    def get_all_instrument_tokens(self) -> list[int]:
        """Their tokens."""
        return list(self.instrument_symbols)

    def known_of(self, symbols: Sequence[str]) -> list[str]:
        """Those of the symbols that are known; of many unknown ones one look at all names finds out."""
        moment = time.monotonic()
        asked = [symbol for symbol in symbols if not self._is_unknown(symbol, moment)]
        try:
            self.store.resolve_all(asked)
        except UnknownSymbol:
            parts = [name.upper().partition(":") for name in read_names(self.store.client, self.store.keys)]
            names = {part for exchange, _, symbol in parts for part in (f"{exchange}:{symbol}", symbol)}
            for symbol in asked:
                spelt = ":".join(part.strip() for part in str(symbol).upper().split(":", 1))
                if not spelt.isdecimal() and spelt not in names:
                    self._note_unknown(symbol, moment)
            return [symbol for symbol in asked if self._resolve(None, symbol) is not None]
        return asked

    def has_recent_data(self, max_age_seconds: int = 300) -> bool:
        """Whether a tick came within that time."""
        last = self._stats.last_tick_time()
        return last > 0 and time.time() - last <= max_age_seconds

    def get_stats(self) -> dict[str, Any]:
        """Upstream's keys, over the whole store: what all processes have done, at most a second old."""
        stats = self._stats.read()
        if self.shared_stats is not None:
            self.shared_stats.update(stats)
        return stats

    def update_shared_stats(self, shared_stats: dict[str, Any]) -> None:
        """Where `get_stats` also writes what it answers."""
        self.shared_stats = shared_stats
        self.get_stats()

    def get_diagnostic_info(self) -> str:
        """`get_stats` as lines for people; `pkb doctor` tells more."""
        lines = [f"{name}: {value}" for name, value in self.get_stats().items()]
        return "\n".join(["InMemoryCandleStore on Redis", *lines])

    # -- exports ---------------------------------------------------------------------------------

    def export_to_pickle_format(self) -> dict[str, Any]:
        """`{symbol: {"data": [[o, h, l, c, v], …], "columns": […], "index": [ISO …]}}` of day candles."""
        from pkbrokers_redis.compat.exports import pickle_format

        return pickle_format(self.store, MAX_DAILY_ROWS)

    def export_to_ticks_json(self) -> dict[str, Any]:
        """`{"256265": {"instrument_token": …, "trading_symbol": …, "ohlcv": {…}, …}}` of the newest day."""
        from pkbrokers_redis.compat.exports import ticks_json

        return ticks_json(self.store)

    def save_ticks_json(self, file_path: str | os.PathLike[str] | None = None) -> None:
        """The same as a file, written beside its name and renamed; in PKB_DATA_DIR unless told."""
        from pkbrokers_redis.compat.exports import write_json

        data = self.export_to_ticks_json()
        path = Path(file_path) if file_path is not None else self.store.settings.data_dir / "ticks.json"
        write_json(path, data)
        if not data:
            log.warning("ticks_json_empty", path=str(path), hint="see `pkb status`: no ticks have come yet")

    # -- what upstream's users reach into --------------------------------------------------------

    @property
    def stats(self) -> dict[str, Any]:
        """Upstream's attribute: the same as `get_stats()`."""
        return self.get_stats()

    @property
    def symbol_to_token(self) -> dict[str, int]:
        """Trading symbol (`RELIANCE`, others with their exchange) → token."""
        return self._known()[2]

    @property
    def instrument_symbols(self) -> dict[int, str]:
        """Token → trading symbol."""
        return self._known()[1]

    @property
    def instruments(self) -> InstrumentsView:
        """Token → its candles, of all instruments known; read from Redis as one reaches into them."""
        return InstrumentsView(self.store, self._known()[1])

    # -- inside ----------------------------------------------------------------------------------

    @cached_property
    def _input(self) -> TickInput:
        return TickInput(self.store.settings)

    @cached_property
    def _registered(self) -> set[int]:
        return set(self.instrument_symbols)

    def _known(self) -> tuple[float, dict[int, str], dict[str, int]]:
        names = self._names
        if names is None or time.monotonic() - names[0] > NAMES_SECONDS:
            pairs = [(token, symbol.removeprefix("NSE:")) for token, symbol in self.store.instruments()]
            names = time.monotonic(), dict(pairs), {symbol: token for token, symbol in pairs}
            self._names = names
        return names

    def _resolve(self, instrument_token: int | None, trading_symbol: str | None) -> int | None:
        if instrument_token is not None:
            return instrument_token
        if not trading_symbol:
            return None
        moment = time.monotonic()
        if self._names is not None and moment - self._names[0] <= NAMES_SECONDS:
            known = self._names[2].get(trading_symbol)
            if known is not None:
                return known
        if self._is_unknown(trading_symbol, moment):
            return None
        try:
            return self.store.resolve(trading_symbol)[0]
        except UnknownSymbol:
            self._note_unknown(trading_symbol, moment)
            return None

    def _is_unknown(self, symbol: str, moment: float) -> bool:
        """Whether it was so lately: to find out takes a look at all names of the master."""
        return moment - self._unknown.get(symbol, -math.inf) <= NAMES_SECONDS

    def _note_unknown(self, symbol: str, moment: float) -> None:
        if len(self._unknown) >= UNKNOWN_MAX:
            self._unknown.clear()
        self._unknown[symbol] = moment

    def _window(
        self,
        instrument_token: int | None,
        trading_symbol: str | None,
        interval: str,
        count: int,
        include_current: bool,
    ) -> tuple[int, list[Candle], bool]:
        """`(token, candles, whether the last one still forms)`."""
        token = self._resolve(instrument_token, trading_symbol)
        try:
            name = find_interval(self.store.settings.intervals, interval).name
        except UnknownInterval:
            name = ""
        if token is None or not name or count < 1:
            return 0, [], False
        from pkbrokers_redis.store.rows import read_window

        try:
            done, current = read_window(
                self.store.client, self.store.keys, token, name, count, self.store.tally
            )
        except PkbError as error:  # a foreign hand's key: told, and nothing here to read
            log.warning("unreadable", why=str(error))
            return token, [], False
        if current is None or not include_current:
            return token, done, False
        return token, [*done, current][-count:], True

    def _last_trade_s(self, token: int, candle: Candle) -> int:
        """When the instrument last traded, as far as it lies in this candle; else the candle's start."""
        from pkbrokers_redis.compat.exports import last_trade_s

        fields: Any = self.store.client.hmget(
            self.store.keys.quote(token), ["last_trade_time", "exchange_time", "received_at"]
        )
        return last_trade_s(fields, candle)

    def __repr__(self) -> str:
        return f"<InMemoryCandleStore on Redis, prefix {self.store.keys.prefix!r}>"


_instance: InMemoryCandleStore | None = None
_instance_lock = threading.Lock()


def get_candle_store(shared_stats: dict[str, Any] | None = None) -> InMemoryCandleStore:
    """The process' candle store, made when first asked for. Raises RedisUnavailable while Redis is away."""
    global _instance
    with _instance_lock:
        if _instance is None:
            _instance = InMemoryCandleStore(shared_stats=shared_stats)
        elif shared_stats is not None:
            _instance.update_shared_stats(shared_stats)
        return _instance
