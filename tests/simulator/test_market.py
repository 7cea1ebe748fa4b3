"""The simulated market: its packets are possible and consistent; and its instrument master."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkbrokers_redis.candles import model
from pkbrokers_redis.candles.calendar import IST_MS
from pkbrokers_redis.candles.model import SEGMENTS
from pkbrokers_redis.errors import SettingsError
from pkbrokers_redis.kite.protocol import FULL, INDEX_FULL, INDEX_QUOTE, LTP, QUOTE, decode, parse_frame
from pkbrokers_redis.simulator.market import DAY_MS, Market
from pkbrokers_redis.simulator.subscriptions import MODE_FULL, MODES, frames_for
from pkbrokers_redis.simulator.universe import INSTRUMENTS_MAX, expired_contracts, universe
from tests.support import SHARED_DATA

START_MS = 1_760_000_000_000  # 2025-10-09 14:23 in India
MIDNIGHT_MS = (START_MS + IST_MS) // DAY_MS * DAY_MS - IST_MS
ROWS = universe(60)


def ticks_of(market: Market, rows: np.ndarray, mode: int = MODE_FULL) -> np.ndarray:
    modes = np.full(len(market.tokens), mode, np.int8)
    parsed = [parse_frame(frame, 0) for frame in frames_for(market, rows, modes)]
    assert not any(frame.unknown or frame.truncated or frame.trailing for frame in parsed)
    return np.concatenate([frame.ticks for frame in parsed] or [np.empty((0, model.BATCH_WIDTH))])


def run(market: Market, seconds: float, step_ms: int = 50) -> list[np.ndarray]:
    """The ticks of each step from START_MS on."""
    return [
        ticks_of(market, market.step(START_MS + elapsed))
        for elapsed in range(step_ms, int(seconds * 1000) + 1, step_ms)
    ]


def test_the_same_seed_gives_the_same_market() -> None:
    first, second = (np.concatenate(run(Market(ROWS, START_MS, seed=7), 3)) for _ in range(2))
    assert np.array_equal(first, second, equal_nan=True)
    other = np.concatenate(run(Market(ROWS, START_MS, seed=8), 3))
    assert not np.array_equal(first, other, equal_nan=True)


def test_every_instrument_is_conflated_into_one_packet_a_second() -> None:
    ticks = np.concatenate(run(Market(ROWS, START_MS), 5))
    _, counts = np.unique(ticks[:, model.TOKEN], return_counts=True)
    assert len(counts) == len(ROWS)
    assert set(counts.tolist()) == {5}


@pytest.mark.parametrize("rate", [120, 1200, 6000])
def test_a_rate_is_kept_over_all_instruments(rate: int) -> None:
    ticks = np.concatenate(run(Market(ROWS, START_MS, rate=rate), 2, step_ms=10))
    assert len(ticks) == pytest.approx(2 * rate, rel=0.05)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32), rate=st.sampled_from([None, 600, 3000]))
def test_successive_packets_are_consistent(seed: int, rate: float | None) -> None:
    market = Market(ROWS, START_MS, seed=seed, rate=rate)
    last: dict[float, np.ndarray] = {}
    for ticks in run(market, 3):
        for tick in ticks:
            price, high, low = tick[model.LAST_PRICE], tick[model.DAY_HIGH], tick[model.DAY_LOW]
            assert 0 < low <= price <= high
            assert low <= tick[model.DAY_OPEN] <= high
            before = last.get(tick[model.TOKEN])
            if before is not None:
                assert high >= before[model.DAY_HIGH]
                assert low <= before[model.DAY_LOW]
                assert tick[model.TIME_MS] >= before[model.TIME_MS]
                if not np.isnan(tick[model.VOLUME]):
                    assert tick[model.VOLUME] >= before[model.VOLUME]
                    if tick[model.VOLUME] == before[model.VOLUME]:
                        assert price == before[model.LAST_PRICE]  # no trade, no new price
            last[tick[model.TOKEN]] = tick
    assert len(last) == len(ROWS)


def test_hidden_trades_change_only_the_days_high_and_low() -> None:
    last: dict[float, np.ndarray] = {}
    above = below = 0
    for ticks in run(Market(ROWS, START_MS), 60):
        for tick in ticks:
            before, price = last.get(tick[model.TOKEN], tick), tick[model.LAST_PRICE]
            # A new extreme that is not this packet's price was made by a hidden trade.
            above += tick[model.DAY_HIGH] > max(before[model.DAY_HIGH], price)
            below += tick[model.DAY_LOW] < min(before[model.DAY_LOW], price)
            last[tick[model.TOKEN]] = tick
    assert above > 0
    assert below > 0


def test_some_packets_have_new_depth_and_no_trade() -> None:
    market = Market(ROWS, START_MS)
    volumes = [market.volume.copy()]
    for second in range(1, 11):
        market.step(START_MS + second * 1000)
        volumes.append(market.volume.copy())
    grown = np.diff(volumes, axis=0)[:, ~market.is_index] > 0
    assert 0.3 < grown.mean() < 0.98


@pytest.mark.parametrize("rate", [None, 60 * 50])
def test_a_restarted_market_continues_with_more_volume(rate: float | None) -> None:
    market = Market(ROWS, START_MS, seed=1, rate=rate)
    for elapsed in range(50, 20_001, 50):
        market.step(START_MS + elapsed)
    again = Market(ROWS, START_MS + 20_000, seed=2, rate=rate)
    assert (again.volume >= market.volume).all()
    assert (market.volume[~market.is_index] > Market(ROWS, START_MS).volume[~market.is_index]).any()
    assert (again.volume[~market.is_index] > 0).all()


def test_volume_fits_the_wire_to_the_end_of_the_day() -> None:
    market = Market(ROWS, MIDNIGHT_MS + DAY_MS - 2000)
    for elapsed in range(0, 1999, 50):
        market.step(MIDNIGHT_MS + DAY_MS - 2000 + elapsed)
    assert market.volume.max() < 2**32
    assert (market.packets["volume_traded"] == market.volume)[~market.is_index].all()


def test_a_new_day_resets_volume_and_extremes() -> None:
    market = Market(ROWS, MIDNIGHT_MS + DAY_MS - 5000)
    market.step(MIDNIGHT_MS + DAY_MS - 1)
    ended = market.price.copy()
    market.step(MIDNIGHT_MS + DAY_MS + 3000)
    assert (market.close == ended).all()
    assert (market.volume <= 30_000).all()
    assert (market.open == ended).all()


def test_prices_stay_in_the_days_band() -> None:
    market = Market(ROWS, START_MS, rate=6000)
    for elapsed in range(10, 5001, 10):
        market.step(START_MS + elapsed)
    moved = np.abs(market.price - market.close) / market.close
    assert moved.max() <= 0.11  # rounded to the tick size
    assert moved.max() > 0


def test_the_full_packet_has_depth_around_the_price_and_open_interest_of_derivatives() -> None:
    market = Market(ROWS, START_MS)
    rows = market.step(START_MS + 2000)
    modes = np.full(len(ROWS), MODE_FULL, np.int8)
    (frame,) = frames_for(market, rows, modes)
    parsed = parse_frame(frame, 0)
    kinds = {row["instrument_token"]: row["instrument_type"] for row in ROWS}
    for offset, length in zip(parsed.offsets, parsed.lengths, strict=True):
        tick = decode(frame[offset : offset + length])
        if length != FULL:
            assert tick["exchange_timestamp"].timestamp() == (START_MS + 2000) // 1000
            continue
        buy = [level["price"] for level in tick["depth"]["buy"]]
        sell = [level["price"] for level in tick["depth"]["sell"]]
        assert buy == sorted(buy, reverse=True) and sell == sorted(sell)
        assert buy[0] <= tick["last_price"] < sell[0]
        assert tick["total_buy_quantity"] >= sum(level["quantity"] for level in tick["depth"]["buy"])
        assert (tick["oi"] > 0) == (kinds[tick["instrument_token"]] != "EQ")
        assert tick["oi_day_low"] <= tick["oi"] <= tick["oi_day_high"]
        close = tick["ohlc"]["close"]
        assert abs(tick["average_traded_price"] - close) < close * 0.1


@pytest.mark.parametrize(
    ("mode", "lengths"), [("ltp", {LTP}), ("quote", {QUOTE, INDEX_QUOTE}), ("full", {FULL, INDEX_FULL})]
)
def test_each_mode_has_its_packets_and_the_same_prices(mode: str, lengths: set[int]) -> None:
    market = Market(ROWS, START_MS)
    rows = np.arange(len(ROWS))
    modes = np.full(len(ROWS), MODES[mode], np.int8)
    frames = list(frames_for(market, rows, modes, packets_max=25))
    assert len(frames) == 3
    parsed = [parse_frame(frame, 0) for frame in frames]
    assert {length for frame in parsed for length in frame.lengths} == lengths
    prices = {tick[0]: tick[1] for frame in parsed for tick in frame.ticks}
    assert prices == {tick[0]: tick[1] for tick in ticks_of(market, rows)}


def test_rows_have_the_fields_of_kites_csv() -> None:
    path = SHARED_DATA / "rest" / "instruments_nse.csv"
    if not path.exists():
        pytest.skip("recorded instruments (../shared/data/rest) are absent")
    with path.open() as file:
        fields = csv.DictReader(file).fieldnames
    assert all(list(row) == fields for row in universe(60))


def test_tokens_are_unique_and_end_in_their_segment() -> None:
    rows = universe(INSTRUMENTS_MAX)
    assert len({row["instrument_token"] for row in rows}) == len(rows) == INSTRUMENTS_MAX
    assert len({(row["exchange"], row["tradingsymbol"]) for row in rows}) == INSTRUMENTS_MAX
    for row in rows:
        token = row["instrument_token"]
        assert token < 2**32
        assert token >> 8 == row["exchange_token"]
        expected = "INDICES" if row["segment"] == "INDICES" else row["exchange"]
        assert SEGMENTS[token & 0xFF] == expected


def test_well_known_names_have_their_real_tokens() -> None:
    tokens = {(row["exchange"], row["tradingsymbol"]): row["instrument_token"] for row in universe(100)}
    known = {"INFY": 408065, "TCS": 2953217, "RELIANCE": 738561, "NIFTY 50": 256265, "SBIN": 779521}
    assert {name: tokens["NSE", name] for name in known} == known
    assert tokens["BSE", "SENSEX"] == 265


def test_a_universe_has_every_priced_segment() -> None:
    segments = {row["instrument_token"] & 0xFF for row in universe(100)}
    assert segments >= {1, 2, 3, 4, 5, 6, 7, 9}


def test_a_larger_universe_only_appends() -> None:
    assert universe(300)[:70] == universe(70)
    assert [len(universe(n)) for n in (1, 5, 46, 47)] == [1, 5, 46, 47]


def test_some_stocks_have_futures_by_their_tradingsymbol_and_some_have_none() -> None:
    rows = universe(100)
    stocks = {row["tradingsymbol"] for row in rows if row["segment"] == "NSE"}
    with_futures = {row["name"] for row in rows if row["segment"] == "NFO-FUT"} & stocks
    assert "INFY" in with_futures
    assert "SIM00001" in stocks - with_futures


def test_expired_contracts_are_in_no_universe() -> None:
    tokens = {row["instrument_token"] for row in universe(INSTRUMENTS_MAX)}
    expired = expired_contracts()
    assert {row["exchange"] for row in expired} == {"NFO", "MCX"}
    assert not tokens & {row["instrument_token"] for row in expired}
    assert all(row["expiry"] < "2025" for row in expired)


@pytest.mark.parametrize("n", [0, -1, INSTRUMENTS_MAX + 1])
def test_a_size_out_of_range_is_a_settings_error(n: int) -> None:
    with pytest.raises(SettingsError):
        universe(n)
