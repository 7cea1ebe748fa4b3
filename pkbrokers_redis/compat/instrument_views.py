"""Upstream's `Candle` and `InstrumentCandles`, for those who reach into `store.instruments`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pkbrokers_redis.candles.model import Candle as Row
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.store.rows import parse_candles


@dataclass
class Candle:
    """A candle by upstream's field names. `last_tick_time` is 0 where it is not known."""

    timestamp: int
    last_tick_time: int = 0
    open: float = 0.0
    high: float = 0.0
    low: float = float("inf")
    close: float = 0.0
    volume: float = 0
    oi: float = 0
    tick_count: int = 0
    is_complete: bool = False

    @classmethod
    def from_row(cls, row: Row, is_complete: bool, last_tick_time: int = 0) -> Candle:
        """Of a row as it stands in Redis."""
        prices = row.open, row.high, row.low, row.close
        return cls(row.start, last_tick_time, *prices, row.volume, row.oi or 0, row.ticks, is_complete)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Candle:
        """Of what `to_dict` gave; missing fields are the defaults."""
        known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        return cls(**{"timestamp": 0, **known})

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    def to_list(self) -> list[float]:
        """`[open, high, low, close, volume]`."""
        return [self.open, self.high, self.low, self.close, self.volume]


class InstrumentCandles:
    """One instrument: `candles` and `current_candle` by interval, as they are in Redis at that moment."""

    def __init__(self, store: CandleStore, instrument_token: int, trading_symbol: str) -> None:
        self.instrument_token = instrument_token
        self.trading_symbol = trading_symbol
        self._store = store

    @property
    def candles(self) -> dict[str, deque[Candle]]:
        """Interval → all completed candles kept, oldest first."""
        store = self._store
        pipe = store.client.pipeline(transaction=False)
        for name in store.intervals:
            pipe.lrange(store.keys.candles(self.instrument_token, name), 0, -1)
        rows = [parse_candles(texts, store.tally) for texts in pipe.execute()]
        return {
            name: deque(Candle.from_row(row, is_complete=True) for row in some)
            for name, some in zip(store.intervals, rows, strict=True)
        }

    @property
    def current_candle(self) -> dict[str, Candle | None]:
        """Interval → the candle that forms, None without one."""
        store = self._store
        texts: Any = store.client.hmget(store.keys.current(self.instrument_token), list(store.intervals))
        found: dict[str, Candle | None] = {}
        for name, text in zip(store.intervals, texts, strict=True):
            rows = parse_candles([text] if text else [], store.tally)
            found[name] = Candle.from_row(rows[0], is_complete=False) if rows else None
        return found


class InstrumentsView(Mapping[int, InstrumentCandles]):
    """Token → InstrumentCandles of all instruments known."""

    def __init__(self, store: CandleStore, symbols: Mapping[int, str]) -> None:
        self._store = store
        self._symbols = symbols

    def __getitem__(self, token: int) -> InstrumentCandles:
        return InstrumentCandles(self._store, token, self._symbols[token])

    def __iter__(self) -> Iterator[int]:
        return iter(self._symbols)

    def __len__(self) -> int:
        return len(self._symbols)
