"""Kite's historical candles of the simulated market, from its own packets, whoever received them.

The rules are the market's own, not the pipeline's: a packet states that at its trade time (an index: at its
exchange time) the last trade was at its last price, while the day's volume stood at its volume. What differs
from the packet before is news and belongs to the minute of that time, if the instrument's session is open
then. A new day extreme belongs to that minute too when the packet before spoke of the same one. Larger
candles are merges of minutes, from the day's open on; a day's candle is what the packets say of the day.

    before the simulator began   `HistoryGenerator`, made up
    since                        recorded minutes: a ring, [minute, instrument], of at most RING_BYTES_MAX;
                                 when it is full the oldest minutes are forgotten
"""

from __future__ import annotations

import threading
from datetime import datetime
from typing import Any, Final

import numpy as np

from pkbrokers_redis.candles.calendar import IST, IST_MS
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
from pkbrokers_redis.simulator.market import DAY_MS, Hours, Ints, Market

# Kite's names of intervals: seconds (0: the day), and the days one request may span.
SECONDS: Final = {
    "minute": 60,
    "3minute": 180,
    "5minute": 300,
    "10minute": 600,
    "15minute": 900,
    "30minute": 1800,
    "60minute": 3600,
    "day": 0,
}
DAYS_MAX: Final = {
    "minute": 60,
    "3minute": 100,
    "5minute": 100,
    "10minute": 100,
    "15minute": 200,
    "30minute": 200,
    "60minute": 400,
    "day": 2000,
}
RING_BYTES_MAX: Final = 256 * 2**20  # 500 instruments: five days; 9,000: a trading day; memory as it is used
RING_MINUTES_MAX: Final = 5 * 1440
DAYS_RECORDED_MAX: Final = 8
FIELDS: Final = 7  # START … OI


class History:
    """Records `market` from now on and answers for any time. Thread-safe."""

    def __init__(self, market: Market, hours: Hours, past: HistoryGenerator, start_ms: int) -> None:
        count = len(market.tokens)
        self.market, self.past = market, past
        self._hours = hours
        self._lock = threading.Lock()
        self._begun_s = start_ms // 60_000 * 60  # the first minute that is recorded
        self._size = max(2, min(RING_MINUTES_MAX, RING_BYTES_MAX // (count * FIELDS * 8)))
        self._ring: Ints = np.zeros((FIELDS, self._size, count), np.int64)
        self._days: dict[int, Ints] = {}  # local day number → table like the ring's, one column a row
        self._time_s, self._price, self._volume = self._stated(np.arange(count))
        self._high, self._low = market.high.copy(), market.low.copy()

    # --- recording ------------------------------------------------------------------------------------

    def record(self, rows: Ints, now_ms: int) -> None:
        """Take in the packets of these rows that a step of the market has just made."""
        if not rows.size:
            return
        with self._lock:
            time_s, price, volume = self._stated(rows)
            news = (
                (time_s != self._time_s[rows]) | (price != self._price[rows]) | (volume != self._volume[rows])
            )
            inside = news & self._hours.inside(rows, time_s, now_ms)
            if inside.any():
                self._merge(rows[inside], time_s[inside], price[inside], volume[inside])
            self._time_s[rows], self._price[rows], self._volume[rows] = time_s, price, volume
            said = rows[news]  # a repeat says nothing: what it shows for the first time, the next one tells
            self._high[said], self._low[said] = self.market.high[said], self.market.low[said]

    def _stated(self, rows: Ints) -> tuple[Ints, Ints, Ints]:
        """What the packets of these rows say: time (epoch s), last price, volume of the day."""
        packets, index_packets = self.market.packets[rows], self.market.index_packets[rows]
        is_index = self.market.is_index[rows]
        time_s = np.where(is_index, index_packets["exchange_timestamp"], packets["last_trade_time"])
        price = np.where(is_index, index_packets["last_price"], packets["last_price"])
        volume = np.where(is_index, 0, packets["volume_traded"])
        return time_s.astype(np.int64), price.astype(np.int64), volume.astype(np.int64)

    def _merge(self, rows: Ints, time_s: Ints, price: Ints, volume: Ints) -> None:
        minute_s = time_s // 60 * 60
        slot = minute_s // 60 % self._size
        ring = self._ring
        fresh = ring[START, slot, rows] != minute_s
        for field in (OPEN, HIGH, LOW):
            ring[field, slot[fresh], rows[fresh]] = price[fresh]
        ring[VOLUME, slot[fresh], rows[fresh]] = 0
        ring[START, slot, rows], ring[CLOSE, slot, rows], ring[OI, slot, rows] = (
            minute_s,
            price,
            self.market.oi[rows],
        )
        same_day = _local_day(time_s) == _local_day(self._time_s[rows])
        ring[VOLUME, slot, rows] += np.maximum(volume - np.where(same_day, self._volume[rows], 0), 0)

        same_minute = self._time_s[rows] // 60 * 60 == minute_s
        high, low = self.market.high[rows], self.market.low[rows]
        high = np.where(same_minute & (high > self._high[rows]), np.maximum(high, price), price)
        low = np.where(same_minute & (low < self._low[rows]), np.minimum(low, price), price)
        ring[HIGH, slot, rows] = np.maximum(ring[HIGH, slot, rows], high)
        ring[LOW, slot, rows] = np.minimum(ring[LOW, slot, rows], low)
        self._merge_days(rows, time_s, price, volume)

    def _merge_days(self, rows: Ints, time_s: Ints, price: Ints, volume: Ints) -> None:
        """The day as its packets tell it."""
        local = _local_day(time_s)
        for number in np.unique(local).tolist():
            if number not in self._days:
                while len(self._days) >= DAYS_RECORDED_MAX:
                    del self._days[min(self._days)]
                self._days[number] = np.zeros((FIELDS, len(self.market.tokens)), np.int64)
            mine = local == number
            these, table = rows[mine], self._days[number]
            table[START, these] = 1
            for field, values in (
                (OPEN, self.market.open),
                (HIGH, self.market.high),
                (LOW, self.market.low),
                (OI, self.market.oi),
            ):
                table[field, these] = values[these]
            table[CLOSE, these], table[VOLUME, these] = price[mine], volume[mine]

    # --- answering ------------------------------------------------------------------------------------

    def knows(self, token: int) -> bool:
        """Whether the instrument trades here."""
        return token in self.market.row_of

    def answer(
        self, token: int, interval: str, from_s: int, to_s: int, now_ms: float, *, with_oi: bool = False
    ) -> list[list[Any]]:
        """Kite's answer: `["2017-12-15T09:15:00+0530", open, high, low, close, volume]`, and oi if wanted."""
        rows = self.rows(token, interval, from_s, to_s, now_ms)
        width = FIELDS if with_oi else FIELDS - 1
        return [[_stamp(row[0]), *row[OPEN:width]] for row in rows]

    def rows(
        self, token: int, interval: str, from_s: int, to_s: int, now_ms: float
    ) -> list[tuple[int, float, float, float, float, int, int]]:
        """Candles that start between the two (inclusive), the forming one too: `(start, open, high, low,
        close, volume, oi)`, start in epoch seconds (a day's: midnight), prices in rupees, oldest first.

        Raises KeyError for an unknown token or interval.
        """
        row, seconds = self.market.row_of[token], SECONDS[interval]
        to_s = min(to_s, int(now_ms // 1000))
        if seconds == 0:
            from_s = _local_day(from_s) * 86_400 - IST_MS // 1000  # by date, as Kite
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
        """Minute candles that start between the two, made up before the simulator began, recorded since."""
        parts = []
        time_ms = from_s * 1000
        while time_ms <= min(to_s, self._begun_s) * 1000:
            day = self.past.day(row, time_ms)
            parts.append(self.past.minutes(row, day))
            time_ms = day.day_end_ms
        made_up = np.concatenate(parts or [np.zeros((FIELDS, 0), np.int64)], axis=1)
        made_up = made_up[:, made_up[START] < self._begun_s]
        recorded = self._ring[:, :, row]
        recorded = recorded[:, recorded[START] != 0]
        recorded = recorded[:, np.argsort(recorded[START])]
        table = np.concatenate([made_up, recorded], axis=1)
        return table[:, (from_s <= table[START]) & (table[START] <= to_s)]

    def _merged(self, row: int, minutes: Ints, seconds: int) -> Ints:
        """Minutes → candles of `seconds`, counted from each day's open."""
        if not minutes.size:
            return minutes
        starts = minutes[START]
        local = _local_day(starts)
        anchors = {
            number: self.past.day(row, number * DAY_MS - IST_MS).anchor_ms // 1000
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
        """Day candles, each starting at midnight."""
        past, begun = [], self.past.day(row, self._begun_s * 1000)
        time_ms, columns = from_s * 1000, []
        while time_ms <= to_s * 1000:
            day = self.past.day(row, time_ms)
            time_ms = day.day_end_ms
            number = int(_local_day(day.day_start_ms // 1000))
            if number in self._days and self._days[number][START, row]:
                column = self._days[number][:, row].copy()
                column[START] = day.day_start_ms // 1000
                columns.append(column)
            elif day.windows and day.day_start_ms < begun.day_start_ms:
                past.append(day)
            elif day.day_start_ms == begun.day_start_ms:
                columns += self._part_of_day(row)
        made_up = np.zeros((FIELDS, 0), np.int64)
        if past:
            whole = self.past.days(row, past)
            starts = np.array([day.day_start_ms // 1000 for day in past], np.int64)
            volume = whole.volume + whole.preopen
            made_up = np.stack([starts, whole.open, whole.high, whole.low, whole.close, volume, whole.oi])
        return np.concatenate([made_up, np.array(columns, np.int64).reshape(-1, FIELDS).T], axis=1)

    def _part_of_day(self, row: int) -> list[Ints]:
        """The day in which the simulator began, before the instrument traded in it."""
        day = self.past.day(row, self._begun_s * 1000)
        minutes = self.past.minutes(row, day)
        minutes = minutes[:, minutes[START] < self._begun_s]
        if not minutes.size:
            return []
        preopen = self.past.days(row, [day]).preopen[0]
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


def _stamp(epoch_s: int) -> str:
    return datetime.fromtimestamp(epoch_s, IST).strftime("%Y-%m-%dT%H:%M:%S%z")
