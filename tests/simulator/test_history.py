"""The simulator's history against an independent reading of the packets it sent."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import numpy as np
import pytest

from pkbrokers_redis.candles import model
from pkbrokers_redis.candles.calendar import IST, load_sessions
from pkbrokers_redis.kite.protocol import parse_frame
from pkbrokers_redis.simulator.history import SECONDS
from pkbrokers_redis.simulator.kite import SimulatedKite
from pkbrokers_redis.simulator.market import Market
from pkbrokers_redis.simulator.subscriptions import MODE_FULL, frames_for
from pkbrokers_redis.simulator.universe import universe
from tests.candles.test_rules import Market as Pipeline

ROWS = universe(60)
INFY, NIFTY, SBIN, SIM1 = 408065, 256265, 779521, (100_001 << 8) | 1
CRUDE, USDINR, NIFTY_FUTURE = 220_001 << 8 | 7, 1_201 << 8 | 3, 35_001 << 8 | 2
INTRADAY = [name for name in SECONDS if name != "day"]

Candle = tuple[int, float, float, float, float, int, int]


def at_ms(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=IST).timestamp() * 1000)


class Tape:
    """A simulated Kite that no thread runs: stepped by hand, every packet parsed as a client does."""

    def __init__(self, start: str, *, always: bool = False, **options: Any) -> None:
        sessions = None if always else load_sessions("market")
        self.now_ms = at_ms(start)
        self.kite = SimulatedKite(ROWS, sessions=sessions, start_ms=self.now_ms, **options)
        self.market: Market = self.kite.market
        self.ticks: dict[int, list[np.ndarray]] = {token: [] for token in self.market.tokens.tolist()}
        self._take(np.arange(len(ROWS)))

    def run_to(self, end: str, step_ms: int = 1000) -> None:
        for now_ms in range(self.now_ms + step_ms, at_ms(end) + 1, step_ms):
            rows = self.market.step(now_ms)
            self.kite.history.record(rows, now_ms)
            self._take(rows)
            self.now_ms = now_ms

    def _take(self, rows: np.ndarray) -> None:
        modes = np.full(len(ROWS), MODE_FULL, np.int8)
        for frame in frames_for(self.market, rows, modes):
            for tick in parse_frame(frame, 0).ticks:
                self.ticks[int(tick[model.TOKEN])].append(tick)

    def history(self, token: int, interval: str, start: str, end: str) -> list[Candle]:
        return self.kite.history.rows(token, interval, at_ms(start) // 1000, at_ms(end) // 1000, self.now_ms)

    def oracle(self, token: int, seconds: int, anchor: str) -> list[Candle]:
        """Candles by rules 1 to 3 of `candles/rules.py`, written down once more, slowly."""
        anchor_s = at_ms(anchor) // 1000
        sessions = load_sessions("market")
        schedule = int(self.kite.history.generator.hours.schedule[self.market.row_of[token]])
        found: dict[int, list[float]] = {}
        before = self.ticks[token][0]
        for tick in self.ticks[token][1:]:
            time_s = int(tick[model.TIME_MS]) // 1000
            same = all(tick[column] == before[column] for column in (model.TIME_MS, model.LAST_PRICE))
            volume = 0.0 if np.isnan(tick[model.VOLUME]) else tick[model.VOLUME]
            base = 0.0 if np.isnan(before[model.VOLUME]) else before[model.VOLUME]
            if same and volume == base:
                continue
            before_s = int(before[model.TIME_MS]) // 1000
            if (before_s + 19800) // 86400 != (time_s + 19800) // 86400:
                base = 0.0
            if sessions.is_open(schedule, time_s * 1000) or self.kite.environment().get("PKB_SESSIONS"):
                start = anchor_s + (time_s - anchor_s) // seconds * seconds
                price = tick[model.LAST_PRICE]
                oi = 0 if np.isnan(tick[model.OI]) else int(tick[model.OI])
                row = found.setdefault(start, [price, price, price, price, 0.0, 0.0])
                row[1], row[2], row[3] = max(row[1], price), min(row[2], price), price
                if start == anchor_s + (before_s - anchor_s) // seconds * seconds:
                    if tick[model.DAY_HIGH] > before[model.DAY_HIGH]:
                        row[1] = max(row[1], tick[model.DAY_HIGH])
                    if tick[model.DAY_LOW] < before[model.DAY_LOW]:
                        row[2] = min(row[2], tick[model.DAY_LOW])
                row[4] += volume - base
                row[5] = oi
            before = tick
        return [(start, *row[:4], int(row[4]), int(row[5])) for start, row in sorted(found.items())]


@pytest.fixture(scope="module")
def morning() -> Tape:
    """From before the open, through the pre-open, to 10:31."""
    tape = Tape("2026-09-10 08:55:00")
    tape.run_to("2026-09-10 10:31:00")
    return tape


@pytest.mark.parametrize("token", [INFY, NIFTY, SBIN, NIFTY_FUTURE, CRUDE, USDINR])
def test_history_equals_an_independent_reading_of_the_packets(morning: Tape, token: int) -> None:
    opened = "09:00:00" if token in (CRUDE, USDINR) else "09:15:00"
    for interval in INTRADAY:
        rows = morning.history(token, interval, "2026-09-10 00:00:00", "2026-09-10 23:59:59")
        expected = morning.oracle(token, SECONDS[interval], f"2026-09-10 {opened}")
        assert rows == expected, interval
        assert rows[0][0] == at_ms(f"2026-09-10 {opened}") // 1000


def test_history_equals_the_candles_of_the_pipeline(morning: Tape) -> None:
    names = {"1m": "minute", "60m": "60minute", "day": "day"}
    names |= {f"{minutes}m": f"{minutes}minute" for minutes in (3, 5, 10, 15, 30)}
    for token, ticks in morning.ticks.items():
        pipeline = Pipeline(intervals=",".join(names))
        for first in range(0, len(ticks), 500):
            pipeline.take(*(tick.tolist() for tick in ticks[first : first + 500]))
        for name, kite_name in names.items():
            history = morning.history(token, kite_name, "2026-09-10 00:00", "2026-09-10 23:59")
            candles = [row[:7] for row in pipeline.rows(name, token)]
            if name == "day":  # Kite stamps a day with its midnight
                history, candles = [[0, *row[1:]] for row in history], [[0, *row[1:]] for row in candles]
            nothing = [0 if value is None else value for row in candles for value in row]
            assert nothing == [value for row in history for value in row], (token, name)


def test_preopen_trades_count_in_the_day_and_in_no_minute(morning: Tape) -> None:
    first = next(tick for tick in morning.ticks[INFY][1:])
    assert at_ms("2026-09-10 09:00") <= first[model.TIME_MS] < at_ms("2026-09-10 09:08")
    minutes = morning.history(INFY, "minute", "2026-09-10 00:00", "2026-09-10 23:59")
    (day,) = morning.history(INFY, "day", "2026-09-10 00:00", "2026-09-10 23:59")
    last = morning.ticks[INFY][-1]
    assert day[0] == at_ms("2026-09-10 00:00") // 1000
    assert day[1:6] == (
        last[model.DAY_OPEN],
        last[model.DAY_HIGH],
        last[model.DAY_LOW],
        last[model.LAST_PRICE],
        last[model.VOLUME],
    )
    assert 0 < sum(row[5] for row in minutes) < day[5]
    assert morning.market.volume[morning.market.row_of[CRUDE]] == sum(
        row[5] for row in morning.history(CRUDE, "minute", "2026-09-10 00:00", "2026-09-10 23:59")
    )


def test_no_instrument_ticks_outside_its_hours(morning: Tape) -> None:
    for token, ticks in morning.ticks.items():
        times = np.array([tick[model.TIME_MS] for tick in ticks[1:]])
        assert times.size, token
        if token & 0xFF in (3, 6, 7):
            assert times.min() >= at_ms("2026-09-10 09:00")
        else:
            quiet = (times >= at_ms("2026-09-10 09:08")) & (times < at_ms("2026-09-10 09:15"))
            assert not quiet.any()


def test_the_current_candle_is_the_last_row(morning: Tape) -> None:
    rows = morning.history(INFY, "60minute", "2026-09-10 00:00", "2026-09-10 23:59")
    assert rows[-1][0] == at_ms("2026-09-10 10:15") // 1000


def test_a_simulator_started_at_noon_continues_its_generated_morning() -> None:
    tape = Tape("2026-09-10 12:00:20")
    first = tape.ticks[INFY][0]
    tape.run_to("2026-09-10 12:03:00")
    minutes = tape.history(INFY, "minute", "2026-09-10 00:00", "2026-09-10 23:59")
    starts = [row[0] for row in minutes]
    assert starts == list(range(at_ms("2026-09-10 09:15") // 1000, at_ms("2026-09-10 12:03") // 1000, 60))
    before = [row for row in minutes if row[0] < at_ms("2026-09-10 12:00") // 1000]
    assert first[model.DAY_HIGH] == max(row[2] for row in before)
    assert first[model.DAY_LOW] == min(row[3] for row in before)
    assert first[model.LAST_PRICE] == before[-1][4]
    preopen = first[model.VOLUME] - sum(row[5] for row in before)
    assert preopen > 0
    assert sum(row[5] for row in minutes) + preopen == tape.ticks[INFY][-1][model.VOLUME]
    assert minutes[-3:] == tape.oracle(INFY, 60, "2026-09-10 09:15:00")
    (day,) = tape.history(INFY, "day", "2026-09-10 00:00", "2026-09-10 23:59")
    assert (day[1], day[5]) == (before[0][1], tape.ticks[INFY][-1][model.VOLUME])


def test_before_the_first_trade_the_last_packet_is_yesterdays() -> None:
    tape = Tape("2026-09-11 08:30:00")
    for token, closed in ((SBIN, "15:34:59"), (NIFTY, "15:34:59"), (USDINR, "16:59:59"), (CRUDE, "23:29:59")):
        assert tape.ticks[token][0][model.TIME_MS] == at_ms(f"2026-09-10 {closed}"), token
    before = tape.history(INFY, "day", "2026-09-10 00:00", "2026-09-11 00:00")
    assert tape.ticks[INFY][0][model.VOLUME] == before[-1][5]


def test_generated_history_is_a_function_of_the_seed() -> None:
    def past(start: str, **options: Any) -> list[Candle]:
        return Tape(start, **options).history(INFY, "5minute", "2026-09-07 00:00", "2026-09-08 23:59")

    assert past("2026-09-10 12:00:00") == past("2026-09-15 09:00:00")
    assert past("2026-09-10 12:00:00") != past("2026-09-10 12:00:00", seed=2)


def test_generated_days_are_merges_of_their_minutes() -> None:
    tape = Tape("2026-09-10 12:00:00")
    for token in (INFY, NIFTY, CRUDE, NIFTY_FUTURE):
        days = tape.history(token, "day", "2026-08-24 00:00", "2026-09-09 00:00")
        assert len(days) == 13
        for day in days:
            of_day = tape.kite.history.rows(token, "minute", day[0], day[0] + 86_399, tape.now_ms)
            assert day[1:5] == (
                of_day[0][1],
                max(row[2] for row in of_day),
                min(row[3] for row in of_day),
                of_day[-1][4],
            )
            assert day[6] == of_day[-1][6]
            extra = day[5] - sum(row[5] for row in of_day)
            assert extra > 0 if token == INFY else extra == 0


def test_holidays_have_no_candles() -> None:
    tape = Tape("2026-10-05 12:00:00")
    days = tape.history(INFY, "day", "2026-10-01 00:00", "2026-10-05 00:00")
    assert [datetime.fromtimestamp(row[0], IST).day for row in days] == [1, 5]  # Gandhi Jayanti, a weekend


def test_around_the_clock_history_continues_over_midnight() -> None:
    tape = Tape("2026-09-10 23:58:00", always=True)
    tape.run_to("2026-09-11 00:02:00")
    minutes = tape.history(INFY, "minute", "2026-09-10 23:58", "2026-09-11 23:59")
    assert minutes == tape.oracle(INFY, 60, "2026-09-11 00:00:00")
    assert len(minutes) == 4
    days = tape.history(INFY, "day", "2026-09-10 00:00", "2026-09-11 00:00")
    assert days[-1][5] == sum(row[5] for row in minutes[2:]) == tape.ticks[INFY][-1][model.VOLUME]


def test_the_closing_auction_prints_at_one_price_after_a_quiet_quarter() -> None:
    tape = Tape("2026-09-10 15:14:00")
    tape.run_to("2026-09-10 15:41:00")
    hours = tape.kite.history.generator.hours
    names = {
        token: hours.sessions.schedules[hours.schedule[row]] for token, row in tape.market.row_of.items()
    }
    assert names[INFY] == "NSE_CASH_DERIVATIVES"
    assert names[SIM1] == "NSE_CASH"
    times = np.array([tick[model.TIME_MS] for tick in tape.ticks[INFY]])
    assert not ((times >= at_ms("2026-09-10 15:15")) & (times < at_ms("2026-09-10 15:30"))).any()
    prints = tape.history(INFY, "minute", "2026-09-10 15:15", "2026-09-10 16:00")
    assert prints and len({price for row in prints for price in row[1:5]}) == 1
    assert tape.history(SIM1, "minute", "2026-09-10 15:30", "2026-09-10 16:00") == []
    assert tape.history(NIFTY_FUTURE, "minute", "2026-09-10 15:39", "2026-09-10 16:00")
    assert tape.history(CRUDE, "minute", "2026-09-10 15:40", "2026-09-10 16:00")


def test_a_full_ring_overwrites_the_oldest_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pkbrokers_redis.simulator.history.RING_MINUTES_MAX", 3)
    tape = Tape("2026-09-10 12:00:00")
    tape.run_to("2026-09-10 12:04:30")
    kept = tape.history(INFY, "minute", "2026-09-10 12:00", "2026-09-10 12:59")
    assert kept == tape.oracle(INFY, 60, "2026-09-10 09:15:00")[-3:]


@pytest.mark.parametrize("start", ["2026-09-10 11:59:59", "2026-09-10 09:15:30", "2026-09-10 00:00:10"])
def test_a_start_within_a_minute_makes_no_minute_twice(start: str) -> None:
    tape = Tape(start)
    tape.run_to(start[:11] + ("12:01:00" if "11:" in start else start[11:17] + "59"))
    rows = tape.history(INFY, "minute", "2026-09-09 00:00", "2026-09-10 23:59")
    starts = [row[0] for row in rows]
    assert starts == sorted(set(starts))
