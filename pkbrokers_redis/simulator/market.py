"""The simulated market: trading hours, random trades, and the packets that Kite sends of them.

The market is seeded, vectorised and without a clock: time is an argument. Trades arrive at random (Poisson)
and move the price in ticks. As on Kite, single trades stay invisible: each instrument is conflated into one
packet per interval, with the last trade, the day's cumulative volume and the day's true high and low. The
first packet of a minute carries no hidden extreme: a new day high or low there is the packet's own price. So
an exact history exists for each minute, and longer candles are merges of minutes.

    closed ─► pre-open (cash and indices, 15 to 7 minutes before the open) ─► closed ─► open ─► closed
                                        from 2026-08-03 stocks with derivatives: open ─► closed ─► auction

The pre-open and the auction have few trades. Those of the pre-open raise the day's volume only.
Prices are the wire's integers. Rows are positions in the universe.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from pkbrokers_redis.candles.calendar import IST_MS, Day, Sessions
from pkbrokers_redis.candles.model import SEGMENT_INDICES
from pkbrokers_redis.kite.protocol import DEPTH_LEVELS, DTYPES, FULL, INDEX_FULL, PRICE_DIVISORS

CLOSED, PREOPEN, OPEN, AUCTION = range(4)
TEMPO: Final = np.array([0.0, 0.01, 1.0, 0.02])  # trades by phase, relative to continuous trading
PREOPEN_MS: Final = (15 * 60_000, 7 * 60_000)  # before the open: 09:00 to 09:08
AUCTION_QUIET_MS: Final = 15 * 60_000  # orders are collected, then matched
DERIVATIVE_KINDS: Final = ("FUT", "CE", "PE")
CASH_OF: Final = {"NFO": "NSE", "BFO": "BSE"}  # derivatives exchange → the exchange of its underlying stocks

INTERVAL_MS = 1000  # Kite's usual conflation
DAY_MS = 86_400_000
TRADES_PER_PACKET = 1.5  # on average; about one packet in five has no trade and only new depth
VOLUME_PER_MS = 10  # growth of the volume's ceiling; a day's volume fits 32 bits
QUANTITY_MAX = 20  # of one trade, in lots
BAND = 0.10  # a price stays within ±10 % of the previous close

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


class Columns(NamedTuple):
    """A universe's fields as arrays by row; prices are wire integers."""

    tokens: Ints
    tick: Ints
    base: Floats  # the listed last price
    lot: Ints
    is_index: Flags
    has_oi: Flags


def columns_of(universe: list[dict[str, Any]]) -> Columns:
    """Return the fields of the universe's rows as arrays."""
    tokens = np.array([row["instrument_token"] for row in universe], np.int64)
    divisor = PRICE_DIVISORS[tokens & 0xFF]
    ticks = np.rint([row["tick_size"] for row in universe] * divisor).astype(np.int64)
    return Columns(
        tokens=tokens,
        tick=np.maximum(1, ticks),
        base=np.array([row["last_price"] for row in universe]) * divisor,
        lot=np.array([max(1, row["lot_size"]) for row in universe], np.int64),
        is_index=tokens & 0xFF == SEGMENT_INDICES,
        has_oi=np.array([row["instrument_type"] in DERIVATIVE_KINDS for row in universe]),
    )


class TradingHours:
    """When each instrument trades, and in which phase. `around_the_clock`: one session a day, no pre-open."""

    def __init__(
        self, universe: list[dict[str, Any]], sessions: Sessions, *, around_the_clock: bool = False
    ) -> None:
        self.sessions = sessions
        self._around_the_clock = around_the_clock
        self.is_open_anyway: Callable[[], bool] = lambda: False  # a session that no calendar has
        underlyings = {
            (CASH_OF[row["exchange"]], row["name"])
            for row in universe
            if row["instrument_type"] in DERIVATIVE_KINDS and row["exchange"] in CASH_OF
        }
        schedules = [
            sessions.schedule_of(
                row["instrument_token"], (row["exchange"], row["tradingsymbol"]) in underlyings
            )
            for row in universe
        ]
        self.schedule: Ints = np.array(schedules, np.int64)
        self._used: list[int] = np.unique(self.schedule).tolist()

    def has_preopen(self, schedule: int) -> bool:
        """Return whether a schedule begins with a pre-open call: cash segments and their indices do."""
        cash = self.sessions.schedules[schedule].startswith(("NSE", "BSE", "INDICES"))
        return cash and not self._around_the_clock

    def phases(self, now_ms: int) -> tuple[npt.NDArray[np.int8], Ints]:
        """Return by row: the phase at `now_ms`, and when it began (epoch seconds)."""
        phase, since_s = np.zeros(self.schedule.size, np.int8), np.zeros(self.schedule.size, np.int64)
        if self.is_open_anyway():
            phase[:], since_s[:] = OPEN, now_ms // 1000 - 1
            return phase, since_s
        for schedule in self._used:
            kind, began_ms = self._phase(schedule, self.sessions.day(schedule, now_ms), now_ms)
            of_schedule = self.schedule == schedule
            phase[of_schedule], since_s[of_schedule] = kind, began_ms // 1000
        return phase, since_s

    def inside(self, rows: Ints, times_s: Ints, now_ms: int) -> Flags:
        """Return which trades (row, epoch seconds on the day of `now_ms`) lie in a session."""
        inside = np.full(rows.size, self.is_open_anyway())
        for schedule in self._used:
            of_schedule = self.schedule[rows] == schedule
            if not of_schedule.any():
                continue
            for opened_ms, closed_ms in self.sessions.day(schedule, now_ms).windows:
                inside |= of_schedule & (opened_ms <= times_s * 1000) & (times_s * 1000 < closed_ms)
        return inside

    def trading(self, schedule: int, day: Day) -> list[tuple[int, int, int]]:
        """Return the times of a day with trades: (phase, from ms, to ms)."""
        is_auctioned = self.sessions.schedules[schedule].endswith("DERIVATIVES")
        return [
            (AUCTION, opened_ms + AUCTION_QUIET_MS, closed_ms)
            if number and is_auctioned
            else (OPEN, opened_ms, closed_ms)
            for number, (opened_ms, closed_ms) in enumerate(day.windows)
        ]

    def _phase(self, schedule: int, day: Day, now_ms: int) -> tuple[int, int]:
        for phase, began_ms, ended_ms in self.trading(schedule, day):
            if began_ms <= now_ms < ended_ms:
                return phase, began_ms
        if self.has_preopen(schedule) and day.windows:
            first_ms, last_ms = (day.anchor_ms - before for before in PREOPEN_MS)
            if first_ms >= day.day_start_ms and first_ms <= now_ms < last_ms:
                return PREOPEN, first_ms
        return CLOSED, 0


class Opening(NamedTuple):
    """What happened before the market starts, by row; prices are wire integers."""

    close: Ints  # of the previous day
    open: Ints
    high: Ints
    low: Ints
    price: Ints
    volume: Ints
    oi: Ints
    last_trade_s: Ints


class Market:
    """The state of each instrument and its last packet. Not thread-safe; `step` needs rising times.

    Without `opening` and `hours`, the day's volume starts at a ceiling that depends on the time of day alone,
    and stays below it. So a simulator that is started again continues with more volume, never with less.

    Args:
        universe: The instruments.
        start_ms: Market time at the start, epoch ms.
        seed: Of the random trades.
        rate: Packets a second over all instruments, by another conflation interval; None: one a second of
            each instrument.
        hours: Each instrument trades in its hours only; None: around the clock.
        opening: The state at the start.

    Attributes:
        packets: The last full packet of each row that is no index; `index_packets` likewise for indices.
    """

    def __init__(
        self,
        universe: list[dict[str, Any]],
        start_ms: int,
        *,
        seed: int = 1,
        rate: float | None = None,
        hours: TradingHours | None = None,
        opening: Opening | None = None,
    ) -> None:
        count = len(universe)
        columns = columns_of(universe)
        self.rng = np.random.default_rng(seed)
        self.tokens, self.is_index = columns.tokens, columns.is_index
        self.row_of = {token: row for row, token in enumerate(self.tokens.tolist())}
        self.interval_ms = INTERVAL_MS if rate is None else max(1.0, count * 1000 / rate)
        self._tick, self._lot, self._has_oi = columns.tick, columns.lot, columns.has_oi
        base = np.rint(columns.base).astype(np.int64)
        self._stride = np.maximum(
            1, base // (20_000 * self._tick)
        )  # a trade moves the price by 0 to 2 of these
        self._activity = TRADES_PER_PACKET * np.clip(self.rng.lognormal(0.0, 0.5, count), 0.2, 4.0)
        self._phase = self.rng.uniform(0, self.interval_ms, count)
        self._turn = np.floor((start_ms - self._phase) / self.interval_ms)

        self.price: Ints = base // self._tick * self._tick
        self.close = self.price.copy()  # of the previous day
        self.oi: Ints = np.where(self._has_oi, self._lot * self.rng.integers(10_000, 100_000, count), 0)
        self._begun_s = 0 if opening is None else start_ms // 1000  # earlier trades are the opening's
        self.held: Ints = np.zeros(0, np.int64)  # rows that do not trade now
        self._hours, self._has_ceiling = hours, opening is None and hours is None
        self.volume: Ints = np.zeros(count, np.int64)
        self._turnover = np.zeros(count)
        self._start_day(start_ms)
        if self._has_ceiling:
            self.volume[:] = np.where(self.is_index, 0, _volume_ceiling(start_ms))
        if opening is not None:
            self._restore(opening)
        self._turnover[:] = self.volume * self.price.astype(np.float64)

        self.packets = np.zeros(count, DTYPES[FULL])
        self.index_packets = np.zeros(count, DTYPES[INDEX_FULL])
        self._write(np.arange(count), start_ms // 1000 if opening is None else self.last_trade_s)

    def _start_day(self, now_ms: int) -> None:
        count = len(self.tokens)
        self._day = (now_ms + IST_MS) // DAY_MS
        self.open, self.high, self.low = self.price.copy(), self.price.copy(), self.price.copy()
        self.volume[:] = 0
        self._turnover[:] = 0
        self.last_quantity: Ints = np.where(self.is_index, 0, self._lot)
        self.last_trade_s: Ints = np.full(count, now_ms // 1000, np.int64)
        self._packet_s: Ints = np.zeros(count, np.int64)  # the time of today's last packet with news
        self._has_traded = np.ones(count, bool)  # today
        self._row_day: Ints = np.full(count, self._day, np.int64)
        self.oi_high, self.oi_low = self.oi.copy(), self.oi.copy()

    def _restore(self, opening: Opening) -> None:
        self.close, self.open, self.high, self.low, self.price, self.volume = map(np.copy, opening[:6])
        self.oi, self.last_trade_s = opening.oi.copy(), opening.last_trade_s.copy()
        self.oi_high, self.oi_low = self.oi.copy(), self.oi.copy()
        self._row_day = (self.last_trade_s * 1000 + IST_MS) // DAY_MS
        self._day = int(self._row_day.max())  # if it was yesterday, the first step begins a new day

    def _start_rows(self, rows: Ints) -> None:
        """Begin a new day of instruments with hours. They send nothing before their first trade."""
        self.close[rows] = self.price[rows]
        for extreme in (self.open, self.high, self.low):
            extreme[rows] = self.price[rows]
        self.volume[rows], self._turnover[rows] = 0, 0
        self.oi_high[rows], self.oi_low[rows] = self.oi[rows], self.oi[rows]
        self._has_traded[rows] = self.is_index[rows]  # an index has no trades, only a level
        self._row_day[rows] = self._day

    def step(self, now_ms: int) -> Ints:
        """Trade up to `now_ms` (epoch ms). Return the rows with a new packet."""
        today = (now_ms + IST_MS) // DAY_MS
        turn = np.floor((now_ms - self._phase) / self.interval_ms)
        due = np.flatnonzero(turn > self._turn)
        self._turn[due] = turn[due]
        if self.held.size:
            due = np.setdiff1d(due, self.held)
        if self._hours is None:
            if today > self._day:
                self.close = self.price.copy()
                self._start_day(now_ms)
            tempo, since_s = np.ones(due.size), np.full(due.size, self._begun_s)
            is_auction = np.zeros(due.size, bool)
        else:
            self._day = today
            phases, since = self._hours.phases(now_ms)
            due = due[phases[due] != CLOSED]
            fresh = due[self._row_day[due] < today]
            if fresh.size:
                self._start_rows(fresh)
            since_s = np.maximum(since[due], self._begun_s)
            tempo, is_auction = TEMPO[phases[due]], phases[due] == AUCTION
        if not due.size:
            return due
        self._trade(due, now_ms, tempo, since_s, is_auction)
        due = due[self._has_traded[due]]
        self._write(due, now_ms // 1000)
        return due

    def _trade(self, due: Ints, now_ms: int, tempo: Floats, since_s: Ints, is_auction: Flags) -> None:
        """Make the trades of due rows: `tempo` scales their number, none is earlier than `since_s`."""
        trades: Ints = self.rng.poisson(self._activity[due] * tempo)
        traded = trades > 0
        rows, since_s, is_auction, trades = due[traded], since_s[traded], is_auction[traded], trades[traded]
        if not rows.size:
            return
        owner = np.repeat(rows, trades)  # the instrument of each single trade
        quantity = self._lot[owner] * self.rng.integers(1, QUANTITY_MAX + 1, owner.size)
        quantity[self.is_index[owner]] = 0
        bought = np.add.reduceat(quantity, np.cumsum(trades) - trades)
        if self._has_ceiling:  # trades that would exceed it are not made
            fits = self.volume[rows] + bought <= _volume_ceiling(now_ms)
            owner, quantity = owner[np.repeat(fits, trades)], quantity[np.repeat(fits, trades)]
            rows, since_s, is_auction = rows[fits], since_s[fits], is_auction[fits]
            trades, bought = trades[fits], bought[fits]
            if not rows.size:
                return
        first = np.cumsum(trades) - trades
        last = first + trades - 1

        price = self._walk(owner, first, trades)
        in_auction = np.repeat(is_auction, trades)  # an auction has one price
        price[in_auction] = self.price[owner[in_auction]]
        # The last of k trades spread over the interval, in whole seconds as Kite gives them.
        back_ms = self.interval_ms * self.rng.random(rows.size) / (trades + 1)
        traded_s = ((now_ms - np.minimum(back_ms, INTERVAL_MS)) // 1000).astype(np.int64)
        traded_s = np.maximum(np.maximum(self.last_trade_s[rows], traded_s), since_s)
        self._set_extremes(rows, price, first, last, np.where(self.is_index[rows], now_ms // 1000, traded_s))
        self.price[rows] = price[last]
        self.volume[rows] += bought
        self._turnover[rows] += np.add.reduceat(quantity * price.astype(np.float64), first)
        self.last_quantity[rows] = quantity[last]
        self.last_trade_s[rows] = traded_s
        moved = np.where(self._has_oi[rows], self._lot[rows] * self.rng.integers(-20, 21, rows.size), 0)
        self.oi[rows] = np.maximum(0, self.oi[rows] + moved)
        self.oi_high[rows] = np.maximum(self.oi_high[rows], self.oi[rows])
        self.oi_low[rows] = np.minimum(self.oi_low[rows], self.oi[rows])

    def _set_extremes(self, rows: Ints, price: Ints, first: Ints, last: Ints, at_s: Ints) -> None:
        """Set the day's open, high and low by trades at `price`; `at_s` is the time of each row's packet."""
        begins = at_s // 60 != self._packet_s[rows] // 60  # the first packet of a minute hides nothing
        highest = np.where(begins, price[last], np.maximum.reduceat(price, first))
        lowest = np.where(begins, price[last], np.minimum.reduceat(price, first))
        opening = ~self._has_traded[rows]
        self.open[rows] = np.where(opening, price[last], self.open[rows])
        self.high[rows] = np.where(opening, highest, np.maximum(self.high[rows], highest))
        self.low[rows] = np.where(opening, lowest, np.minimum(self.low[rows], lowest))
        self._has_traded[rows] = True
        self._packet_s[rows] = at_s

    def _walk(self, owner: Ints, first: Ints, trades: Ints) -> Ints:
        """Return the price of each trade: steps summed within each instrument, inside the day's band."""
        step = self.rng.integers(-2, 3, owner.size) * self._stride[owner] * self._tick[owner]
        total = np.cumsum(step)
        before = np.repeat(total[first] - step[first], trades)
        price = self.price[owner] + total - before
        tick, close = self._tick[owner], self.close[owner]
        width = (close * BAND).astype(np.int64)
        walked = np.clip(price, close - width, close + width) // tick * tick
        bounded: Ints = np.maximum(walked, tick)
        return bounded

    def _write(self, rows: Ints, now_s: int | Ints) -> None:
        """Write packets with fresh depth. `now_s` is one exchange time, or one of each row."""
        at_s: Ints = np.broadcast_to(now_s, len(self.tokens))
        index = rows[self.is_index[rows]]
        self._write_prices(self.index_packets, index)
        if index.size:
            self._packet_s[index] = at_s[index]
            self.index_packets["price_change"][index] = self.price[index] - self.close[index]
            self.index_packets["exchange_timestamp"][index] = at_s[index]
        rows = rows[~self.is_index[rows]]
        self._write_prices(self.packets, rows)
        if not rows.size:
            return
        average = np.rint(self._turnover[rows] / np.maximum(self.volume[rows], 1))
        for name, values in (
            ("last_traded_quantity", self.last_quantity[rows]),
            ("average_traded_price", average),
            ("volume_traded", self.volume[rows]),
            ("last_trade_time", self.last_trade_s[rows]),
            ("exchange_timestamp", at_s[rows]),
            ("oi", self.oi[rows]),
            ("oi_day_high", self.oi_high[rows]),
            ("oi_day_low", self.oi_low[rows]),
        ):
            self.packets[name][rows] = values
        self._write_depth(rows)

    def _write_depth(self, rows: Ints) -> None:
        distance = np.arange(1, DEPTH_LEVELS + 1) * self._tick[rows, None]
        orders = self.rng.integers(1, 30, (rows.size, 2, DEPTH_LEVELS))
        quantity = orders * self.rng.integers(1, 50, orders.shape) * self._lot[rows, None, None]
        depth = np.zeros(orders.shape, self.packets.dtype["depth"].base)
        depth["quantity"], depth["orders"] = quantity, orders
        depth["price"][:, 0] = np.maximum(self.price[rows, None] - distance, self._tick[rows, None])
        depth["price"][:, 1] = self.price[rows, None] + distance
        self.packets["depth"][rows] = depth
        self.packets["total_buy_quantity"][rows] = quantity[:, 0].sum(axis=1) * 20
        self.packets["total_sell_quantity"][rows] = quantity[:, 1].sum(axis=1) * 20

    def _write_prices(self, packets: npt.NDArray[np.void], rows: Ints) -> None:
        packets["instrument_token"][rows] = self.tokens[rows]
        packets["last_price"][rows] = self.price[rows]
        for name, values in (
            ("open", self.open),
            ("high", self.high),
            ("low", self.low),
            ("close", self.close),
        ):
            packets[name][rows] = values[rows]


def _volume_ceiling(now_ms: int) -> int:
    return (now_ms + IST_MS) % DAY_MS * VOLUME_PER_MS
