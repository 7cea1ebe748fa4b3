"""Kite's historical candles of the simulated market, made from every packet that the market makes.

The rules are written independently of the pipeline's. A packet states that at its trade time (an index: at
its exchange time) the last trade had its last price, and the day's volume was its volume. What differs from
the previous packet belongs to the minute of that time, if the instrument's session is open then. A new day
extreme belongs to that minute too if the previous packet was of the same minute. Longer candles are merges of
minutes, from the day's open on; a day's candle has the day fields of the packets.

    before the simulator began   `HistoryGenerator`
    since                        recorded minutes: a ring, [minute, instrument], of at most RING_BYTES_MAX;
                                 a full ring overwrites the oldest minutes
"""

from __future__ import annotations

import threading
from typing import Any, Final

import numpy as np

from pkbrokers_redis.candles.calendar import IST_MS
from pkbrokers_redis.kite.history_api import KITE_INTERVALS, stamp
from pkbrokers_redis.kite.protocol import PRICE_DIVISOR_OF
from pkbrokers_redis.simulator.history_generator import (
    CLOSE,
    HIGH,
    LOW,
    OI,
    OPEN,
    START,
    VOLUME,
    HistoryGenerator,
)
from pkbrokers_redis.simulator.market import DAY_MS, Ints, Market, TradingHours

# Kite's names of intervals → seconds (0: a day), and the days that one request may span.
SECONDS: Final = {interval.name: interval.seconds for interval in KITE_INTERVALS.values()}
DAYS_MAX: Final = {interval.name: interval.days_max for interval in KITE_INTERVALS.values()}

RING_BYTES_MAX: Final = 256 * 2**20  # 500 instruments: five days; 9,000: a trading day. Memory grows with use
RING_MINUTES_MAX: Final = 5 * 1440
DAYS_RECORDED_MAX: Final = 8
FIELDS: Final = 7  # START … OI


class History:
    """Records a market since `start_ms`, and returns candles of any time. Thread-safe."""

    def __init__(
        self, market: Market, hours: TradingHours, generator: HistoryGenerator, start_ms: int
    ) -> None:
        count = len(market.tokens)
        self.market, self.generator = market, generator
        self._hours = hours
        self._lock = threading.Lock()
        self._begun_s = start_ms // 60_000 * 60  # the first recorded minute
        self._size = max(2, min(RING_MINUTES_MAX, RING_BYTES_MAX // (count * FIELDS * 8)))
        self._ring: Ints = np.zeros((FIELDS, self._size, count), np.int64)
        self._days: dict[int, Ints] = {}  # local day number → int64[FIELDS, instruments]
        self._time_s, self._price, self._volume = self._last_packets(np.arange(count))
        self._high, self._low = market.high.copy(), market.low.copy()

    # --- recording ------------------------------------------------------------------------------------

    def record(self, rows: Ints, now_ms: int) -> None:
        """Record the packets of these rows, which a step of the market has just made."""
        if not rows.size:
            return
        with self._lock:
            time_s, price, volume = self._last_packets(rows)
            news = (
                (time_s != self._time_s[rows]) | (price != self._price[rows]) | (volume != self._volume[rows])
            )
            inside = news & self._hours.inside(rows, time_s, now_ms)
            if inside.any():
                self._merge(rows[inside], time_s[inside], price[inside], volume[inside])
            self._time_s[rows], self._price[rows], self._volume[rows] = time_s, price, volume
            # A repeated packet changes nothing: a new extreme in it counts with the next packet.
            changed = rows[news]
            self._high[changed], self._low[changed] = self.market.high[changed], self.market.low[changed]

    def _last_packets(self, rows: Ints) -> tuple[Ints, Ints, Ints]:
        """Return time (epoch seconds), last price and day volume of the rows' packets."""
        packets, index_packets = self.market.packets[rows], self.market.index_packets[rows]
        is_index = self.market.is_index[rows]
        time_s = np.where(is_index, index_packets["exchange_timestamp"], packets["last_trade_time"])
        price = np.where(is_index, index_packets["last_price"], packets["last_price"])
        volume = np.where(is_index, 0, packets["volume_traded"])
        return time_s.astype(np.int64), price.astype(np.int64), volume.astype(np.int64)

    def _merge(self, rows: Ints, time_s: Ints, price: Ints, volume: Ints) -> None:
        minute_s = time_s // 60 * 60
        index = minute_s // 60 % self._size
        ring = self._ring
        fresh = ring[START, index, rows] != minute_s
        for field in (OPEN, HIGH, LOW):
            ring[field, index[fresh], rows[fresh]] = price[fresh]
        ring[VOLUME, index[fresh], rows[fresh]] = 0
        ring[START, index, rows], ring[CLOSE, index, rows], ring[OI, index, rows] = (
            minute_s,
            price,
            self.market.oi[rows],
        )
        same_day = _local_day(time_s) == _local_day(self._time_s[rows])
        ring[VOLUME, index, rows] += np.maximum(volume - np.where(same_day, self._volume[rows], 0), 0)

        same_minute = self._time_s[rows] // 60 * 60 == minute_s
        high, low = self.market.high[rows], self.market.low[rows]
        high = np.where(same_minute & (high > self._high[rows]), np.maximum(high, price), price)
        low = np.where(same_minute & (low < self._low[rows]), np.minimum(low, price), price)
        ring[HIGH, index, rows] = np.maximum(ring[HIGH, index, rows], high)
        ring[LOW, index, rows] = np.minimum(ring[LOW, index, rows], low)
        self._merge_days(rows, time_s, price, volume)

    def _merge_days(self, rows: Ints, time_s: Ints, price: Ints, volume: Ints) -> None:
        """Record the day fields of the packets."""
        local = _local_day(time_s)
        for number in np.unique(local).tolist():
            if number not in self._days:
                while len(self._days) >= DAYS_RECORDED_MAX:
                    del self._days[min(self._days)]
                self._days[number] = np.zeros((FIELDS, len(self.market.tokens)), np.int64)
            of_day = local == number
            day_rows, table = rows[of_day], self._days[number]
            table[START, day_rows] = 1
            for field, values in (
                (OPEN, self.market.open),
                (HIGH, self.market.high),
                (LOW, self.market.low),
                (OI, self.market.oi),
            ):
                table[field, day_rows] = values[day_rows]
            table[CLOSE, day_rows], table[VOLUME, day_rows] = price[of_day], volume[of_day]

    # --- reading --------------------------------------------------------------------------------------

    def knows(self, token: int) -> bool:
        """Return whether the instrument trades in this market."""
        return token in self.market.row_of

    def candles(
        self, token: int, interval: str, from_s: int, to_s: int, now_ms: float, *, with_oi: bool = False,
        offset_s: int = 0,
    ) -> list[list[Any]]:  # fmt: skip
        """Return Kite's JSON rows: `["2017-12-15T09:15:00+0530", open, high, low, close, volume(, oi)]`.

        Their times, and those of the request, are `offset_s` ahead of the market's.
        """
        offset_s = offset_s if SECONDS[interval] else 0
        rows = self.rows(token, interval, from_s - offset_s, to_s - offset_s, now_ms)
        width = FIELDS if with_oi else FIELDS - 1
        return [[stamp(row[0] + offset_s), *row[OPEN:width]] for row in rows]

    def rows(
        self, token: int, interval: str, from_s: int, to_s: int, now_ms: float
    ) -> list[tuple[int, float, float, float, float, int, int]]:
        """Return the candles that start within [from_s, to_s], oldest first, the current one included.

        A row is `(start, open, high, low, close, volume, oi)`: start in epoch seconds (a day's is its
        midnight), prices in rupees. `interval` is Kite's name.
        """
        row, seconds = self.market.row_of[token], SECONDS[interval]
        to_s = min(to_s, int(now_ms // 1000))
        if seconds == 0:
            from_s = _local_day(from_s) * 86_400 - IST_MS // 1000  # by date, as on Kite
        with self._lock:
            table = self._day_candles(row, from_s, to_s) if seconds == 0 else None
            if table is None:
                table = self._minutes_between(row, from_s - seconds, to_s + seconds)
                if seconds > 60:
                    table = self._merged(row, table, seconds)
        starts = table[START]
        table = table[:, (from_s <= starts) & (starts <= to_s)]
        divisor = PRICE_DIVISOR_OF[token & 0xFF]
        start, volume, oi = table[[START, VOLUME, OI]].tolist()
        opened, high, low, close = (table[OPEN : CLOSE + 1] / divisor).tolist()
        return list(zip(start, opened, high, low, close, volume, oi, strict=True))

    def _minutes_between(self, row: int, from_s: int, to_s: int) -> Ints:
        """Return minutes that start within [from_s, to_s]: generated ones, then recorded ones."""
        parts = []
        time_ms = from_s * 1000
        while time_ms <= min(to_s, self._begun_s) * 1000:
            day = self.generator.day(row, time_ms)
            parts.append(self.generator.minutes(row, day))
            time_ms = day.day_end_ms
        generated = np.concatenate(parts or [np.zeros((FIELDS, 0), np.int64)], axis=1)
        generated = generated[:, generated[START] < self._begun_s]
        recorded = self._ring[:, :, row]
        recorded = recorded[:, recorded[START] != 0]
        recorded = recorded[:, np.argsort(recorded[START])]
        table = np.concatenate([generated, recorded], axis=1)
        return table[:, (from_s <= table[START]) & (table[START] <= to_s)]

    def _merged(self, row: int, minutes: Ints, seconds: int) -> Ints:
        """Merge minutes into candles of `seconds`, counted from each day's open."""
        if not minutes.size:
            return minutes
        starts = minutes[START]
        local = _local_day(starts)
        anchors = {
            number: self.generator.day(row, number * DAY_MS - IST_MS).anchor_ms // 1000
            for number in np.unique(local).tolist()
        }
        anchor = np.array([anchors[number] for number in local.tolist()], np.int64)
        bucket = anchor + (starts - anchor) // seconds * seconds
        first = np.flatnonzero(np.diff(bucket, prepend=bucket[0] - 1))
        last = np.append(first[1:], starts.size) - 1
        return np.stack(
            [
                bucket[first],
                minutes[OPEN, first],
                np.maximum.reduceat(minutes[HIGH], first),
                np.minimum.reduceat(minutes[LOW], first),
                minutes[CLOSE, last],
                np.add.reduceat(minutes[VOLUME], first),
                minutes[OI, last],
            ]
        )

    def _day_candles(self, row: int, from_s: int, to_s: int) -> Ints:
        """Return day candles, which start at midnight."""
        past_days, first_day = [], self.generator.day(row, self._begun_s * 1000)
        time_ms, columns = from_s * 1000, []
        while time_ms <= to_s * 1000:
            day = self.generator.day(row, time_ms)
            time_ms = day.day_end_ms
            number = int(_local_day(day.day_start_ms // 1000))
            if number in self._days and self._days[number][START, row]:
                column = self._days[number][:, row].copy()
                column[START] = day.day_start_ms // 1000
                columns.append(column)
            elif day.windows and day.day_start_ms < first_day.day_start_ms:
                past_days.append(day)
            elif day.day_start_ms == first_day.day_start_ms:
                columns += self._part_of_day(row)
        generated = np.zeros((FIELDS, 0), np.int64)
        if past_days:
            whole = self.generator.days(row, past_days)
            starts = np.array([day.day_start_ms // 1000 for day in past_days], np.int64)
            volume = whole.volume + whole.preopen
            generated = np.stack([starts, whole.open, whole.high, whole.low, whole.close, volume, whole.oi])
        return np.concatenate([generated, np.array(columns, np.int64).reshape(-1, FIELDS).T], axis=1)

    def _part_of_day(self, row: int) -> list[Ints]:
        """Return the generated part of the day on which the simulator began."""
        day = self.generator.day(row, self._begun_s * 1000)
        minutes = self.generator.minutes(row, day)
        minutes = minutes[:, minutes[START] < self._begun_s]
        if not minutes.size:
            return []
        preopen = self.generator.days(row, [day]).preopen[0]
        return [
            np.array(
                [
                    day.day_start_ms // 1000,
                    minutes[OPEN, 0],
                    minutes[HIGH].max(),
                    minutes[LOW].min(),
                    minutes[CLOSE, -1],
                    minutes[VOLUME].sum() + preopen,
                    minutes[OI, -1],
                ]
            )
        ]


def _local_day(time_s: Any) -> Any:
    return (time_s + IST_MS // 1000) // (DAY_MS // 1000)
