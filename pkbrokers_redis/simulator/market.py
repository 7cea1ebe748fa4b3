"""When each instrument of the simulated market trades, and how: by its segment's sessions.

    closed ─► pre-open (cash and indices, 15 to 7 minutes before the open) ─► closed ─► open ─► closed
                                        from 2026-08-03 stocks with derivatives: open ─► closed ─► auction

Trades of the pre-open and prints of the auction are few; the pre-open's only raise the day's volume.

A market that trades: seeded, vectorised, and without a clock of its own: time is an argument.

Trades arrive at random (Poisson) and walk the price in ticks. As on Kite, nobody sees single trades: each
instrument is conflated into one packet per interval, with the last trade, the day's cumulative volume and
the day's true high and low. What the hidden trades did shows only there. A day's new extreme never hides
between two minutes: in the first packet of a minute it is the packet's own price. So an exact history exists
for each minute, and larger candles are merges of minutes.

All prices are kept as the wire's integers. Rows are positions in the universe given.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from pkbrokers_redis.candles.calendar import IST_MS, Day, Sessions
from pkbrokers_redis.candles.model import SEGMENT_INDICES
from pkbrokers_redis.kite.protocol import DEPTH_LEVELS, DTYPES, FULL, INDEX_FULL, PRICE_DIVISORS

Ints = npt.NDArray[np.int64]

CLOSED, PREOPEN, OPEN, AUCTION = range(4)
# Trades an instrument makes, against those of continuous trading, by phase.
TEMPO: Final = np.array([0.0, 0.01, 1.0, 0.02])
PREOPEN_MS: Final = (15 * 60_000, 7 * 60_000)  # before the open: 09:00 to 09:08
AUCTION_QUIET_MS: Final = 15 * 60_000  # orders are collected, then matched
DERIVATIVE_KINDS: Final = ("FUT", "CE", "PE")
CASH_OF: Final = {"NFO": "NSE", "BFO": "BSE"}  # where the underlying stocks of an exchange's contracts trade


class Hours:
    """The sessions of a universe's rows. Rows are positions in the universe, times epoch ms.

    `around_the_clock`: the sessions are those of PKB_SESSIONS=always, one per day and no pre-open.
    """

    def __init__(
        self, universe: list[dict[str, Any]], sessions: Sessions, *, around_the_clock: bool = False
    ) -> None:
        self.sessions = sessions
        self._around_the_clock = around_the_clock
        contracts = {
            (CASH_OF[row["exchange"]], row["name"])
            for row in universe
            if row["instrument_type"] in DERIVATIVE_KINDS and row["exchange"] in CASH_OF
        }
        schedules = [
            sessions.schedule_of(
                row["instrument_token"], (row["exchange"], row["tradingsymbol"]) in contracts
            )
            for row in universe
        ]
        self.schedule: Ints = np.array(schedules, np.int64)
        self._used = [int(each) for each in np.unique(self.schedule)]
        self._count = len(universe)

    def has_preopen(self, schedule: int) -> bool:
        """Cash segments and their indices begin with a pre-open call."""
        cash = self.sessions.schedules[schedule].startswith(("NSE", "BSE", "INDICES"))
        return cash and not self._around_the_clock

    def phases(self, now_ms: int) -> tuple[npt.NDArray[np.int8], Ints]:
        """By row: the phase, and the second before which a trade of this phase cannot have been."""
        phase, since_s = np.zeros(self._count, np.int8), np.zeros(self._count, np.int64)
        for schedule in self._used:
            kind, begun_ms = self._phase(schedule, self.sessions.day(schedule, now_ms), now_ms)
            mine = self.schedule == schedule
            phase[mine], since_s[mine] = kind, begun_ms // 1000
        return phase, since_s

    def inside(self, rows: Ints, times_s: Ints, now_ms: int) -> npt.NDArray[np.bool_]:
        """Which of these trade times (of rows, about `now_ms`) lie in a window, so in a candle."""
        inside = np.zeros(rows.size, bool)
        for schedule in self._used:
            mine = self.schedule[rows] == schedule
            if not mine.any():
                continue
            for opened_ms, closed_ms in self.sessions.day(schedule, now_ms).windows:
                inside |= mine & (opened_ms <= times_s * 1000) & (times_s * 1000 < closed_ms)
        return inside

    def trading(self, schedule: int, day: Day) -> list[tuple[int, int, int]]:
        """When `day` has trades: (phase, from, to). An auction's window begins with a quiet quarter."""
        is_auctioned = self.sessions.schedules[schedule].endswith("DERIVATIVES")
        return [
            (AUCTION, opened_ms + AUCTION_QUIET_MS, closed_ms)
            if number and is_auctioned
            else (OPEN, opened_ms, closed_ms)
            for number, (opened_ms, closed_ms) in enumerate(day.windows)
        ]

    def _phase(self, schedule: int, day: Day, now_ms: int) -> tuple[int, int]:
        for phase, begun_ms, ended_ms in self.trading(schedule, day):
            if begun_ms <= now_ms < ended_ms:
                return phase, begun_ms
        if self.has_preopen(schedule) and day.windows:
            first_ms, last_ms = (day.anchor_ms - before for before in PREOPEN_MS)
            if first_ms >= day.day_start_ms and first_ms <= now_ms < last_ms:
                return PREOPEN, first_ms
        return CLOSED, 0


INTERVAL_MS = 1000  # Kite's usual conflation
DAY_MS = 86_400_000
TRADES_PER_PACKET = 1.5  # on average; about one packet in five has none and shows a new book only
VOLUME_PER_MS = 10  # the volume's ceiling grows so fast; a day's stays far below 32 bits
QUANTITY_MAX = 20  # of one trade, in lots
BAND = 0.10  # a price stays within ±10 % of the previous close


Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


class Opening(NamedTuple):
    """What had happened before the market was started, by row; prices are wire integers."""

    close: Ints  # of the previous day
    open: Ints
    high: Ints
    low: Ints
    price: Ints
    volume: Ints
    oi: Ints
    last_trade_s: Ints


class Market:
    """The state of `universe` and its last packets. Not thread-safe; `step` is called with rising times.

    `rate` asks for that many packets a second over all instruments, by a shorter conflation interval.
    `hours`: each instrument trades in its own; unset: around the clock. `opening`: where it starts. Without
    one the volume of the day starts at a ceiling that depends on the time of day alone and stays below it, so
    that a simulator started again goes on higher, never lower.
    """

    def __init__(
        self,
        universe: list[dict[str, Any]],
        start_ms: int,
        *,
        seed: int = 1,
        rate: float | None = None,
        hours: Hours | None = None,
        opening: Opening | None = None,
    ) -> None:
        count = len(universe)
        self.rng = np.random.default_rng(seed)
        self.tokens: Ints = np.array([row["instrument_token"] for row in universe], np.int64)
        self.row_of = {token: row for row, token in enumerate(self.tokens.tolist())}
        segment = self.tokens & 0xFF
        self.is_index = segment == SEGMENT_INDICES
        self.interval_ms = INTERVAL_MS if rate is None else max(1.0, count * 1000 / rate)

        divisor = PRICE_DIVISORS[segment]
        self._tick: Ints = np.maximum(
            1, np.rint([row["tick_size"] for row in universe] * divisor).astype(np.int64)
        )
        base = np.rint([row["last_price"] for row in universe] * divisor).astype(np.int64)
        self._lot: Ints = np.array([max(1, row["lot_size"]) for row in universe], np.int64)
        self._has_oi = np.array([row["instrument_type"] in ("FUT", "CE", "PE") for row in universe])
        self._stride = np.maximum(1, base // (20_000 * self._tick))  # a trade moves 0 to 2 of these
        self._activity = TRADES_PER_PACKET * np.clip(self.rng.lognormal(0.0, 0.5, count), 0.2, 4.0)
        self._phase = self.rng.uniform(0, self.interval_ms, count)
        self._turn = np.floor((start_ms - self._phase) / self.interval_ms)

        self.price: Ints = base // self._tick * self._tick
        self.close = self.price.copy()  # of the previous day
        self.oi: Ints = np.where(self._has_oi, self._lot * self.rng.integers(10_000, 100_000, count), 0)
        self._begun_s = 0 if opening is None else start_ms // 1000  # what traded before is the opening's
        self._hours, self._has_ceiling = hours, opening is None and hours is None
        self.volume: Ints = np.zeros(count, np.int64)
        self._turnover = np.zeros(count)
        self._start_day(start_ms)
        if self._has_ceiling:
            self.volume[:] = np.where(self.is_index, 0, self._volume_ceiling(start_ms))
        if opening is not None:
            self._take_up(opening)
        self._turnover[:] = self.volume * self.price.astype(np.float64)

        self.packets = np.zeros(count, DTYPES[FULL])  # last packet of instruments
        self.index_packets = np.zeros(count, DTYPES[INDEX_FULL])  # and of indices, by the same rows
        every = np.arange(count)
        self._write(every, start_ms // 1000 if opening is None else self.last_trade_s)

    def _start_day(self, now_ms: int) -> None:
        count = len(self.tokens)
        self._day = (now_ms + IST_MS) // DAY_MS
        self.open, self.high, self.low = self.price.copy(), self.price.copy(), self.price.copy()
        self.volume[:] = 0
        self._turnover[:] = 0
        self.last_quantity: Ints = np.where(self.is_index, 0, self._lot)
        self.last_trade_s: Ints = np.full(count, now_ms // 1000, np.int64)
        self._stated_s: Ints = np.zeros(count, np.int64)  # of today's last packet that said something
        self._has_traded = np.ones(count, bool)  # today
        self._row_day: Ints = np.full(count, self._day, np.int64)
        self.oi_high, self.oi_low = self.oi.copy(), self.oi.copy()

    def _take_up(self, opening: Opening) -> None:
        self.close, self.open, self.high, self.low, self.price, self.volume = map(np.copy, opening[:6])
        self.oi, self.last_trade_s = opening.oi.copy(), opening.last_trade_s.copy()
        self.oi_high, self.oi_low = self.oi.copy(), self.oi.copy()
        self._row_day = (self.last_trade_s * 1000 + IST_MS) // DAY_MS
        self._day = int(self._row_day.max())  # if it was yesterday, the first step begins a new day

    def _start_rows(self, rows: Ints) -> None:
        """A new day of instruments that keep hours. Nothing is sent of them before their first trade."""
        self.close[rows] = self.price[rows]
        for extreme in (self.open, self.high, self.low):
            extreme[rows] = self.price[rows]
        self.volume[rows], self._turnover[rows] = 0, 0
        self.oi_high[rows], self.oi_low[rows] = self.oi[rows], self.oi[rows]
        self._has_traded[rows] = self.is_index[rows]  # an index has no trades, only a level
        self._row_day[rows] = self._day

    def _volume_ceiling(self, now_ms: int) -> int:
        return (now_ms + IST_MS) % DAY_MS * VOLUME_PER_MS

    def step(self, now_ms: int) -> Ints:
        """Trade up to `now_ms` (epoch ms). Returns the rows whose interval is over: their packets are new."""
        today = (now_ms + IST_MS) // DAY_MS
        turn = np.floor((now_ms - self._phase) / self.interval_ms)
        due = np.flatnonzero(turn > self._turn)
        self._turn[due] = turn[due]
        if self._hours is None:
            if today > self._day:
                self.close = self.price.copy()
                self._start_day(now_ms)
            tempo, since_s = np.ones(due.size), np.full(due.size, self._begun_s)
            is_call = np.zeros(due.size, bool)
        else:
            self._day = today
            phases, since = self._hours.phases(now_ms)
            due = due[phases[due] != CLOSED]
            fresh = due[self._row_day[due] < today]
            if fresh.size:
                self._start_rows(fresh)
            since_s = np.maximum(since[due], self._begun_s)
            tempo, is_call = TEMPO[phases[due]], phases[due] == AUCTION
        if not due.size:
            return due
        self._trade(due, now_ms, tempo, since_s, is_call)
        due = due[self._has_traded[due]]
        self._write(due, now_ms // 1000)
        return due

    def _trade(self, due: Ints, now_ms: int, tempo: Floats, since_s: Ints, is_call: Flags) -> None:
        """`tempo` scales how many trades, none is before `since_s`; an auction (`is_call`) has one price."""
        trades: Ints = self.rng.poisson(self._activity[due] * tempo)
        some = trades > 0
        rows, since_s, is_call, trades = due[some], since_s[some], is_call[some], trades[some]
        if not rows.size:
            return
        owner = np.repeat(rows, trades)  # the instrument of each single trade
        first = np.cumsum(trades) - trades
        last = first + trades - 1
        quantity = self._lot[owner] * self.rng.integers(1, QUANTITY_MAX + 1, owner.size)
        quantity[self.is_index[owner]] = 0
        bought = np.add.reduceat(quantity, first)

        # The volume never passes its ceiling: trades that would are not made.
        fits = self.volume[rows] + bought <= self._volume_ceiling(now_ms)
        if self._has_ceiling and not fits.all():
            keep = np.repeat(fits, trades)
            rows, since_s, is_call = rows[fits], since_s[fits], is_call[fits]
            trades, bought = trades[fits], bought[fits]
            owner, quantity = owner[keep], quantity[keep]
            if not rows.size:
                return
            first = np.cumsum(trades) - trades
            last = first + trades - 1

        price = self._walk(owner, first, trades)
        if is_call.any():
            one = np.repeat(is_call, trades)
            price[one] = self.price[owner[one]]
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
        """The day's open, high and low, by trades at `price`, of packets that speak of the second `at_s`."""
        begins = at_s // 60 != self._stated_s[rows] // 60  # a minute: nothing hides in its first packet
        highest = np.where(begins, price[last], np.maximum.reduceat(price, first))
        lowest = np.where(begins, price[last], np.minimum.reduceat(price, first))
        opening = ~self._has_traded[rows]
        self.open[rows] = np.where(opening, price[last], self.open[rows])
        self.high[rows] = np.where(opening, highest, np.maximum(self.high[rows], highest))
        self.low[rows] = np.where(opening, lowest, np.minimum(self.low[rows], lowest))
        self._has_traded[rows] = True
        self._stated_s[rows] = at_s

    def _walk(self, owner: Ints, first: Ints, trades: Ints) -> Ints:
        """The price of each trade: steps summed up within each instrument, kept in the day's band."""
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
        """State → packets, with a fresh order book. `now_s`: one second for all rows, or one each."""
        at_s: Ints = np.broadcast_to(now_s, len(self.tokens))
        index = rows[self.is_index[rows]]
        self._write_common(self.index_packets, index)
        if index.size:
            block = self.index_packets[index]
            block["price_change"] = self.price[index] - self.close[index]
            block["exchange_timestamp"] = self._stated_s[index] = at_s[index]
            self.index_packets[index] = block
        rows = rows[~self.is_index[rows]]
        self._write_common(self.packets, rows)
        if not rows.size:
            return
        block = self.packets[rows]
        volume = self.volume[rows]
        block["last_traded_quantity"] = self.last_quantity[rows]
        block["average_traded_price"] = np.rint(self._turnover[rows] / np.maximum(volume, 1))
        block["volume_traded"] = volume
        block["last_trade_time"] = self.last_trade_s[rows]
        block["exchange_timestamp"] = at_s[rows]
        block["oi"], block["oi_day_high"], block["oi_day_low"] = (
            self.oi[rows],
            self.oi_high[rows],
            self.oi_low[rows],
        )
        away = np.arange(1, DEPTH_LEVELS + 1) * self._tick[rows, None]
        orders = self.rng.integers(1, 30, (rows.size, 2, DEPTH_LEVELS))
        quantity = orders * self.rng.integers(1, 50, orders.shape) * self._lot[rows, None, None]
        depth = block["depth"]
        depth["quantity"], depth["orders"] = quantity, orders
        depth["price"][:, 0] = np.maximum(self.price[rows, None] - away, self._tick[rows, None])
        depth["price"][:, 1] = self.price[rows, None] + away
        block["total_buy_quantity"] = quantity[:, 0].sum(axis=1) * 20
        block["total_sell_quantity"] = quantity[:, 1].sum(axis=1) * 20
        self.packets[rows] = block

    def _write_common(self, packets: npt.NDArray[np.void], rows: Ints) -> None:
        if not rows.size:
            return
        block = packets[rows]
        block["instrument_token"] = self.tokens[rows]
        for name, values in (
            ("last_price", self.price),
            ("open", self.open),
            ("high", self.high),
            ("low", self.low),
            ("close", self.close),
        ):
            block[name] = values[rows]
        packets[rows] = block
