"""Generated candles of the time before the simulator began, a function of (seed, instrument, day).

A day's open, high, low, close, volume and open interest are drawn first. Its minutes are then made to fit, so
that a day equals the merge of its minutes (and, in cash segments, the volume of the pre-open).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from pkbrokers_redis.candles.calendar import IST_MS, Day
from pkbrokers_redis.simulator.market import DAY_MS, Ints, Opening, TradingHours, columns_of

Floats = npt.NDArray[np.float64]

MINUTES_CACHED_MAX: Final = 512  # days of single instruments, 20 to 80 KB each
DAYS_BACK_MAX: Final = 15  # between two trading days: no holiday is longer
LOTS_A_MINUTE: Final = 900  # about as many as the live market trades

START, OPEN, HIGH, LOW, CLOSE, VOLUME, OI = range(7)  # rows of a table of candles, one candle a column

_NONE: Final = np.empty(0, np.int64)
CHANCES: Final = 6
_SALTS: Final = np.arange(1, CHANCES + 1, dtype=np.uint64)[:, None] * np.uint64(0xD1342543DE82EF95)
_GOLDEN: Final = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)
_SHIFTS: Final = np.array([30, 27, 31, 11], np.uint64)


class Days(NamedTuple):
    """Whole days of one instrument as aligned arrays; prices are wire integers."""

    open: Ints
    high: Ints
    low: Ints
    close: Ints
    volume: Ints  # of the sessions
    preopen: Ints  # volume before the open
    oi: Ints


class HistoryGenerator:
    """Generates the days and minutes of a universe before the simulator began."""

    def __init__(self, universe: list[dict[str, Any]], hours: TradingHours, *, seed: int = 1) -> None:
        self.hours = hours
        self._seed = seed
        self._columns = columns_of(universe)
        self._waves = np.random.default_rng(seed).random((len(universe), 2))  # the phases of each row's waves
        self._minutes = lru_cache(MINUTES_CACHED_MAX)(self._make_minutes)

    def day(self, row: int, time_ms: int) -> Day:
        """Return the instrument's local day that holds `time_ms` (epoch ms)."""
        return self.hours.sessions.day(int(self.hours.schedule[row]), time_ms)

    def trading_day_before(self, row: int, day: Day) -> Day | None:
        """Return the last day with a session before `day`; None if 15 days have none."""
        for _ in range(DAYS_BACK_MAX):
            day = self.day(row, day.day_start_ms - 1)
            if day.windows:
                return day
        return None

    def days(self, row: int, days: list[Day]) -> Days:
        """Return whole trading days of an instrument."""
        number = np.array([_number(day) for day in days], np.int64)
        minutes = np.array([_minutes_of(day) for day in days], np.int64)
        token, tick, lot = self._of(row)

        chance = _chances(self._seed, token, np.concatenate([number - 1, number]))
        before, chance = chance[:, : number.size], chance[:, number.size :]
        opened = self._level(row, number - 1, before[0]) * (1 + 0.004 * (chance[1] - 0.5))
        closed = self._level(row, number, chance[0])
        highest = np.maximum(opened, closed) * (1 + 0.006 * chance[2])
        lowest = np.minimum(opened, closed) * (1 - 0.006 * chance[3])

        def on_tick(price: Floats) -> Ints:
            rounded: Ints = np.maximum(np.rint(price / tick), 1).astype(np.int64) * tick
            return rounded

        none = np.zeros(number.size, np.int64)
        volume = none
        if not self._columns.is_index[row]:
            volume = (minutes * LOTS_A_MINUTE * (0.5 + chance[4])).astype(np.int64)
        has_preopen = (
            self.hours.has_preopen(int(self.hours.schedule[row])) and not self._columns.is_index[row]
        )
        preopen = (200 + 400 * chance[5]).astype(np.int64) if has_preopen else none
        wave = 30_000 * (1 + 0.4 * np.sin(number / 9 + token % 7)) * self._columns.has_oi[row]
        return Days(
            on_tick(opened),
            on_tick(highest),
            on_tick(lowest),
            on_tick(closed),
            volume * lot,
            preopen * lot,
            wave.astype(np.int64) * lot,
        )

    def minutes(self, row: int, day: Day) -> Ints:
        """Return a day's minutes, int64[7, n]: rows START (epoch seconds) … OI. The array is shared."""
        return self._minutes(row, day)

    def opening(self, now_ms: int) -> Opening:
        """Return the state after the last whole minute before `now_ms`, or after the last trading day."""
        rows = [self._opening(row, now_ms) for row in range(self._columns.tokens.size)]
        return Opening(*np.array(rows, np.int64).T)

    def _opening(self, row: int, now_ms: int) -> tuple[int, ...]:
        today = self.day(row, now_ms)
        begun = bool(today.windows) and now_ms >= today.anchor_ms + 60_000
        day = today if begun else self.trading_day_before(row, today)
        if day is None:
            _, tick, _ = self._of(row)
            price = int(self._columns.base[row]) // tick * tick
            return (price, price, price, price, price, 0, 0, now_ms // 1000)
        minutes = self.minutes(row, day)
        done = minutes[:, minutes[START] * 1000 + 60_000 <= now_ms]
        before = self.trading_day_before(row, day)
        whole = self.days(row, [day] if before is None else [day, before])
        close = int(done[OPEN, 0] if before is None else whole.close[1])
        volume = int(done[VOLUME].sum() + whole.preopen[0])
        extremes = int(done[HIGH].max()), int(done[LOW].min())
        last_s = int(done[START, -1]) + 59
        return (close, int(done[OPEN, 0]), *extremes, int(done[CLOSE, -1]), volume, int(done[OI, -1]), last_s)

    def _level(self, row: int, number: Ints, chance: Floats) -> Floats:
        """Return the price at the end of days: two slow waves and a little noise."""
        first, second = self._waves[row]
        waves = 0.04 * np.sin(2 * np.pi * (number / 97 + first))
        waves += 0.03 * np.sin(2 * np.pi * (number / 31 + second))
        level: Floats = self._columns.base[row] * np.exp(waves + 0.006 * (chance - 0.5))
        return level

    def _make_minutes(self, row: int, day: Day) -> Ints:
        trading = self.hours.trading(int(self.hours.schedule[row]), day)
        starts = np.concatenate([_NONE, *(np.arange(a // 1000, b // 1000, 60) for _, a, b in trading)])
        table = np.zeros((7, len(starts)), np.int64)
        if not len(starts):
            return table
        table[START] = starts
        whole = self.days(row, [day])
        token, tick, lot = self._of(row)
        rng = np.random.default_rng([self._seed, token, _number(day)])
        self._make_prices(table, whole, tick, rng)
        lots = int(whole.volume[0]) // lot
        weights = rng.random(len(starts)) + 0.2
        shares = np.floor(weights / weights.sum() * lots).astype(np.int64)
        shares[0] += lots - shares.sum()
        table[VOLUME] = shares * lot
        if whole.oi[0]:
            drift = np.cumsum(rng.integers(-20, 21, len(starts)))
            table[OI] = np.maximum(whole.oi[0] + (drift - drift[-1]) * lot, 0)
        return table

    def _make_prices(self, table: Ints, whole: Days, tick: int, rng: np.random.Generator) -> None:
        """Fill in a random bridge from the day's open to its close, inside its range."""
        opened, highest, lowest, closed = (int(values[0]) for values in whole[:4])
        count = table.shape[1]
        steps = np.cumsum(rng.normal(size=count))
        share = np.arange(1, count + 1) / count
        bridge = (steps - share * steps[-1]) * max(highest - lowest, tick) / (2 * np.sqrt(count))
        close = np.rint((opened + share * (closed - opened) + bridge) / tick).astype(np.int64) * tick
        close = np.clip(close, lowest, highest)
        close[-1] = closed
        table[CLOSE] = close
        table[OPEN, 0], table[OPEN, 1:] = opened, close[:-1]
        wicks = rng.integers(0, 3, (2, count)) * tick
        upper, lower = np.maximum(table[OPEN], close), np.minimum(table[OPEN], close)
        table[HIGH] = np.minimum(upper + wicks[0], highest)
        table[LOW] = np.maximum(lower - wicks[1], lowest)
        table[HIGH, upper.argmax()], table[LOW, lower.argmin()] = highest, lowest

    def _of(self, row: int) -> tuple[int, int, int]:
        """Return token, tick size and lot size of a row."""
        columns = self._columns
        return int(columns.tokens[row]), int(columns.tick[row]), int(columns.lot[row])


def _number(day: Day) -> int:
    return (day.day_start_ms + IST_MS) // DAY_MS


def _minutes_of(day: Day) -> int:
    return sum(closed - opened for opened, closed in day.windows) // 60_000


def _chances(seed: int, token: int, numbers: Ints) -> Floats:
    """Return CHANCES rows of numbers in [0, 1), a function of the arguments (splitmix64)."""
    start = (seed * 0x9E3779B97F4A7C15 + token * 0xD1B54A32D192ED03) & (2**64 - 1)
    mixed = numbers.astype(np.uint64) * _GOLDEN[0] + _SALTS + np.uint64(start)
    mixed = (mixed ^ (mixed >> _SHIFTS[0])) * _GOLDEN[1]
    mixed = (mixed ^ (mixed >> _SHIFTS[1])) * _GOLDEN[2]
    mixed ^= mixed >> _SHIFTS[2]
    spread: Floats = (mixed >> _SHIFTS[3]).astype(np.float64) / 2**53
    return spread
