"""`InMemoryCandleStore`: upstream's class by name, arguments and results, on Redis instead of one process.

`process_tick` feeds the tick streams, the aggregators make the candles, and every process reads the same.
docs/migrating.md says what differs and why.
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
from pkbrokers_redis.client.bulk import arrays_of
from pkbrokers_redis.client.producer import TickProducer
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.compat.upstream_types import MAX_DAILY_ROWS, InstrumentsView
from pkbrokers_redis.errors import PkbError, UnknownInterval, UnknownSymbol
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.rows import read_window
from pkbrokers_redis.store.symbols import read_names, save_instruments

if TYPE_CHECKING:
    import pandas as pd

log = logs.get("store")

NAMES_SECONDS = 30.0  # how long the list of symbols is valid, and that a symbol is unknown
UNKNOWN_MAX = 10_000  # names remembered as unknown
STATS_SECONDS = 1.0  # how long statistics are valid: PKDevTools reads them before each of thousands of reads
INDEX_EXCHANGE = "NSE"  # of an index registered without an exchange
KEYS_PER_COMMAND = 1_000
SHARD_KEYS = ("ticks", "closed", "cursor", "state", "repairs")
INSTRUMENT_KEYS = ("candles", "current", "quote")


class InMemoryCandleStore:
    """Candles of all instruments, by `instrument_token` or `trading_symbol` (`RELIANCE`, `BSE:INFY`).

    An unknown instrument or interval gives None or an empty result, as upstream has it. Any thread may use
    it. `auto_persist`, `persist_interval` and `load_existing` are accepted without effect: Redis keeps the
    data.

    Args:
        shared_stats: A dict that `get_stats` also updates.
        settings: Default: from the environment.
        client: A Redis client to use; default: a connection of its own.

    Raises:
        RedisUnavailable: Redis cannot be reached.

    Example:
        >>> candles = InMemoryCandleStore()
        >>> candles.get_candles(trading_symbol="INFY", interval="5m", count=1)[-1]["close"]
        1512.5
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
        self._started_at = time.time()
        self._ticks_sent = 0
        self._stats: dict[str, Any] = {}
        self._stats_at = self._names_at = -math.inf  # monotonic seconds
        self._symbols: dict[int, str] = {}
        self._tokens: dict[str, int] = {}
        self._unknown: dict[str, float] = {}  # unknown name → looked up at, monotonic seconds
        self._once = logs.Once()

    # -- writing ---------------------------------------------------------------------------------

    def process_tick(self, tick_data: dict[str, Any]) -> bool:
        """Send a tick (KiteTicker's dict or PKBrokers') into the streams.

        Return False if it is malformed, or if Redis was unavailable so long that no more ticks are kept.
        """
        return self.process_ticks_batch([tick_data]) == 1

    def process_ticks_batch(self, ticks: Sequence[dict[str, Any]]) -> int:
        """Send many ticks at once, far cheaper than one by one; return how many were accepted."""
        accepted, _ = self._producer.send(ticks)
        self._ticks_sent += accepted
        if not self._producer.waiting:  # else Redis is unavailable, and a later tick brings the name
            self._register_names(ticks)
        return accepted

    def register_instrument(self, instrument_token: int, trading_symbol: str) -> None:
        """Give a token its name. A token or a name of the instrument master stays unchanged."""
        exchange, _, symbol = trading_symbol.rpartition(":")
        segment = instrument_token & 0xFF
        if not exchange:
            exchange = INDEX_EXCHANGE if segment == SEGMENT_INDICES else SEGMENTS.get(segment, "NSE")
        exchange = exchange.upper()
        client, keys = self.store.client, self.store.keys
        is_known = client.exists(keys.instrument(instrument_token))
        if not is_known and not client.hexists(keys.symbols(), f"{exchange}:{symbol}"):
            row = {
                "instrument_token": instrument_token,
                "tradingsymbol": symbol,
                "exchange": exchange,
                "segment": SEGMENTS.get(segment, exchange),
            }
            save_instruments(client, keys, [row])
            self._forget_names()
        self._registered.add(instrument_token)

    def clear(self) -> None:
        """Delete the candles, quotes, ticks and announcements of this prefix; keep names and the session.

        Raises:
            PkbError: An aggregator owns a shard: stop the workers first.
        """
        clear_store(self.store.client, self.store.keys)
        self._forget_names()
        self._stats_at = -math.inf
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
        """Return the last `count` candles as upstream's dicts, oldest first."""
        from pkbrokers_redis.compat.shapes import candle_dict

        token, candles, is_forming = self._window(
            instrument_token, trading_symbol, interval, count, include_current
        )
        dicts = [candle_dict(candle, is_complete=True) for candle in candles]
        if is_forming:
            dicts[-1] = candle_dict(candles[-1], False, self._last_trade_s(token, candles[-1]))
        return dicts

    def get_current_candle(
        self, instrument_token: int | None = None, trading_symbol: str | None = None, interval: str = "5m"
    ) -> dict[str, Any] | None:
        """Return the candle being formed; None if there is none."""
        candles = self.get_candles(instrument_token, trading_symbol, interval, 1)
        return candles[-1] if candles and not candles[-1]["is_complete"] else None

    def get_ohlcv_dataframe(
        self,
        instrument_token: int | None = None,
        trading_symbol: str | None = None,
        interval: str = "5m",
        count: int = 50,
    ) -> pd.DataFrame:
        """Return the last `count` candles, current one included, under `datetime` (Asia/Kolkata)."""
        from pkbrokers_redis.compat.shapes import ohlcv_frame

        _, candles, _ = self._window(instrument_token, trading_symbol, interval, count, True)
        return ohlcv_frame(arrays_of(candles)[0])

    def get_latest_price(
        self, instrument_token: int | None = None, trading_symbol: str | None = None
    ) -> float | None:
        """Return the last price: of the shortest interval's newest candle, the quote, or the day."""
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
        """Return the newest day candle: today's, after the close too, until the next day's first trade."""
        candles = self.get_candles(instrument_token, trading_symbol, DAY, 1)
        return candles[-1] if candles else None

    def get_all_instruments_ohlcv(self, interval: str = DAY) -> dict[int, dict[str, Any]]:
        """Return token → newest candle, with `trading_symbol`, of each instrument that has one."""
        from pkbrokers_redis.compat.shapes import newest_candles

        return newest_candles(self.store, interval)

    def get_all_symbols(self) -> list[str]:
        """Return the trading symbols of all known instruments, without `NSE:`."""
        return list(self.symbol_to_token)

    def get_all_instrument_tokens(self) -> list[int]:
        """Return the tokens of all known instruments."""
        return list(self.instrument_symbols)

    def has_recent_data(self, max_age_seconds: int = 300) -> bool:
        """Return whether a tick arrived within that time."""
        last = float(self.get_stats()["last_tick_time"])
        return last > 0 and time.time() - last <= max_age_seconds

    def get_stats(self) -> dict[str, Any]:
        """Return upstream's statistics over the whole store: of all processes, at most a second old.

        `ticks_processed` counts what running aggregators have processed, at least what this process sent.
        `candles_completed` counts announcements, `start_time` is when this object was made, `memory_mb` is
        the Redis server's.
        """
        if time.monotonic() - self._stats_at > STATS_SECONDS:
            self._stats, self._stats_at = self._read_stats(), time.monotonic()
        stats = {**self._stats, "uptime_seconds": time.time() - self._started_at}
        if self.shared_stats is not None:
            self.shared_stats.update(stats)
        return stats

    def update_shared_stats(self, shared_stats: dict[str, Any]) -> None:
        """Set the dict that `get_stats` also updates."""
        self.shared_stats = shared_stats
        self.get_stats()

    def get_diagnostic_info(self) -> str:
        """Return `get_stats` as lines for people; `pkb doctor` reports more."""
        lines = [f"{name}: {value}" for name, value in self.get_stats().items()]
        return "\n".join(["InMemoryCandleStore on Redis", *lines])

    # -- exports ---------------------------------------------------------------------------------

    def export_to_pickle_format(self) -> dict[str, Any]:
        """Return `{symbol: {"data": [[o, h, l, c, v], …], "columns": […], "index": [ISO …]}}` of days."""
        from pkbrokers_redis.compat.shapes import pickle_format

        return pickle_format(self.store, MAX_DAILY_ROWS)

    def export_to_ticks_json(self) -> dict[str, Any]:
        """Return `{"256265": {"instrument_token": …, "ohlcv": {…}, …}}` of the newest day."""
        from pkbrokers_redis.compat.shapes import ticks_json

        return ticks_json(self.store)

    def save_ticks_json(self, file_path: str | os.PathLike[str] | None = None) -> None:
        """Write `export_to_ticks_json()` to a file; default: `ticks.json` in PKB_DATA_DIR.

        Raises:
            OSError: The file cannot be written.
        """
        from pkbrokers_redis.compat.shapes import write_json

        data = self.export_to_ticks_json()
        path = Path(file_path) if file_path is not None else self.store.settings.data_dir / "ticks.json"
        write_json(path, data)
        if not data:
            log.warning("ticks_json_empty", path=str(path), hint="see `pkb status`: no ticks have come yet")

    # -- attributes that upstream's users read ---------------------------------------------------

    @property
    def stats(self) -> dict[str, Any]:
        """Return `get_stats()`, upstream's attribute."""
        return self.get_stats()

    @property
    def symbol_to_token(self) -> dict[str, int]:
        """Return trading symbol (`RELIANCE`; other exchanges `BSE:INFY`) → token."""
        self._load_names()
        return self._tokens

    @property
    def instrument_symbols(self) -> dict[int, str]:
        """Return token → trading symbol."""
        self._load_names()
        return self._symbols

    @property
    def instruments(self) -> InstrumentsView:
        """Return token → its candles, read from Redis when they are used."""
        return InstrumentsView(self.store, self.instrument_symbols)

    # -- names -----------------------------------------------------------------------------------

    def known_of(self, symbols: Sequence[str]) -> list[str]:
        """Return those of the symbols that are known; many unknown ones cost one read of all names."""
        candidates = [symbol for symbol in symbols if not self._is_unknown(symbol)]
        try:
            self.store.resolve_all(candidates)
        except UnknownSymbol:
            names = read_names(self.store.client, self.store.keys)
            known = {name.upper() for name in names} | {name.upper().partition(":")[2] for name in names}
            for symbol in candidates:
                spelling = ":".join(part.strip() for part in str(symbol).upper().split(":", 1))
                if not spelling.isdecimal() and spelling not in known:
                    self._remember_unknown(symbol)
            return [symbol for symbol in candidates if self._resolve(None, symbol) is not None]
        return candidates

    @cached_property
    def _producer(self) -> TickProducer:
        return TickProducer(self.store.settings)

    @cached_property
    def _registered(self) -> set[int]:
        return set(self.instrument_symbols)

    def _register_names(self, ticks: Sequence[Any]) -> None:
        """Register the names that ticks carry; raise nothing, because the ticks are sent already."""
        try:
            for tick in ticks:
                symbol = tick.get("trading_symbol") if isinstance(tick, Mapping) else None
                token = tick.get("instrument_token") if symbol else None
                if isinstance(symbol, str) and isinstance(token, int) and token not in self._registered:
                    self.register_instrument(token, symbol)
        except (PkbError, redis.RedisError) as error:
            if self._once.first("name"):
                log.warning("name_not_registered", reason=" ".join(str(error).split())[:200])

    def _load_names(self) -> None:
        if time.monotonic() - self._names_at > NAMES_SECONDS:
            pairs = [(token, symbol.removeprefix("NSE:")) for token, symbol in self.store.instruments()]
            self._symbols, self._tokens = dict(pairs), {symbol: token for token, symbol in pairs}
            self._names_at = time.monotonic()

    def _forget_names(self) -> None:
        self._names_at = -math.inf
        self._unknown.clear()

    def _resolve(self, instrument_token: int | None, trading_symbol: str | None) -> int | None:
        if instrument_token is not None or not trading_symbol:
            return instrument_token
        if time.monotonic() - self._names_at <= NAMES_SECONDS and trading_symbol in self._tokens:
            return self._tokens[trading_symbol]
        if self._is_unknown(trading_symbol):
            return None
        try:
            return self.store.resolve(trading_symbol)[0]
        except UnknownSymbol:
            self._remember_unknown(trading_symbol)
            return None

    def _is_unknown(self, symbol: str) -> bool:
        """Return whether it was unknown lately: finding out reads all names of the master."""
        return time.monotonic() - self._unknown.get(symbol, -math.inf) <= NAMES_SECONDS

    def _remember_unknown(self, symbol: str) -> None:
        if len(self._unknown) >= UNKNOWN_MAX:
            self._unknown.clear()
        self._unknown[symbol] = time.monotonic()

    # -- inside ----------------------------------------------------------------------------------

    def _window(
        self,
        instrument_token: int | None,
        trading_symbol: str | None,
        interval: str,
        count: int,
        include_current: bool,
    ) -> tuple[int, list[Candle], bool]:
        """Return `(token, candles, whether the last one is being formed)`."""
        token = self._resolve(instrument_token, trading_symbol)
        if token is None or count < 1:
            return 0, [], False
        store = self.store
        try:
            name = find_interval(store.settings.intervals, interval).name
            done, current = read_window(store.client, store.keys, token, name, count, store.tally)
        except UnknownInterval:
            return 0, [], False
        except PkbError as error:  # a key of another type, written by another program
            log.warning("candles_unreadable", reason=str(error))
            return token, [], False
        if current is None or not include_current:
            return token, done, False
        return token, [*done, current][-count:], True

    def _last_trade_s(self, token: int, candle: Candle) -> int:
        """Return when the instrument last traded in this candle, else the candle's start."""
        from pkbrokers_redis.compat.shapes import TIME_FIELDS, last_trade_s

        fields: Any = self.store.client.hmget(self.store.keys.quote(token), TIME_FIELDS)
        return last_trade_s(fields, candle)

    def _read_stats(self) -> dict[str, Any]:
        store, keys = self.store, self.store.keys
        seen = store.tokens_seen()
        pipe = store.client.pipeline(transaction=False)
        for shard in range(keys.shards):
            pipe.xinfo_stream(keys.closed(shard))
            pipe.xinfo_stream(keys.ticks(shard))
        replies: list[Any] = pipe.execute(raise_on_error=False)
        completed = sum(int(info["entries-added"]) for info in replies[::2] if isinstance(info, dict))
        last_ids = [_text(info["last-generated-id"]) for info in replies[1::2] if isinstance(info, dict)]
        registered: Any = store.client.hlen(keys.symbols())
        return {
            "ticks_processed": max(self._ticks_total(), self._ticks_sent),
            "candles_created": completed + len(seen) * len(store.intervals),
            "candles_completed": completed,
            "last_tick_time": max((int(text.partition("-")[0]) for text in last_ids), default=0) / 1000,
            "start_time": self._started_at,
            "instrument_count": max(len(seen), int(registered)),
            "instruments_with_ticks": len(seen),
            "registered_symbols": int(registered),
            "uptime_seconds": 0.0,
            "memory_mb": self._memory_mb(),
        }

    def _ticks_total(self) -> int:
        client, keys = self.store.client, self.store.keys
        names: Any = client.zrange(keys.workers(), 0, -1)
        ids = [name.decode().partition(" ")[2] for name in names if name.startswith(b"aggregate ")]
        pipe = client.pipeline(transaction=False)
        for worker_id in ids:
            pipe.hget(keys.worker(worker_id), "ticks_total")
        counts = pipe.execute(raise_on_error=False) if ids else []
        return sum(int(count) for count in counts if isinstance(count, bytes) and count.isdigit())

    def _memory_mb(self) -> float:
        try:
            info: Any = self.store.client.info("memory")
        except redis.RedisError:
            return 0.0  # a reader's user may lack the right
        nodes = (
            [info] if "used_memory" in info else [node for node in info.values() if isinstance(node, dict)]
        )
        return float(sum(node.get("used_memory", 0) for node in nodes)) / 2**20

    def __repr__(self) -> str:
        return f"<InMemoryCandleStore on Redis, prefix {self.store.keys.prefix!r}>"


_instance: InMemoryCandleStore | None = None
_instance_lock = threading.Lock()


def get_candle_store(shared_stats: dict[str, Any] | None = None) -> InMemoryCandleStore:
    """Return the process' candle store, made on first use.

    Raises:
        RedisUnavailable: Redis cannot be reached.
    """
    global _instance
    with _instance_lock:
        if _instance is None:
            _instance = InMemoryCandleStore(shared_stats=shared_stats)
        elif shared_stats is not None:
            _instance.update_shared_stats(shared_stats)
        return _instance


def clear_store(client: redis.Redis, keys: Keys) -> int:
    """Delete the market data of this prefix key by key, never by FLUSH; return how many keys.

    The layout, the instrument master, sessions and jobs stay.

    Raises:
        PkbError: An aggregator owns a shard: it would write again what it has in memory.
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
        pending: list[Any] = [root + name for name in SHARD_KEYS]
        for kind in INSTRUMENT_KEYS:
            for key in client.scan_iter(match=_escape(f"{root}{kind}:") + "*", count=KEYS_PER_COMMAND):
                pending.append(key)
                if len(pending) >= KEYS_PER_COMMAND:  # of one slot, so one command works on a cluster too
                    deleted += int(client.unlink(*pending))
                    pending = []
        if pending:
            deleted += int(client.unlink(*pending))
    return deleted


def _escape(text: str) -> str:
    """Escape the letters that are special in SCAN's pattern."""
    return "".join(f"\\{letter}" if letter in "[]*?\\^" else letter for letter in text)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
