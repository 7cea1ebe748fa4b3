"""The simulator's instrument master."""

from __future__ import annotations

import csv

import pytest

from pkbrokers_redis.candles.model import SEGMENTS
from pkbrokers_redis.errors import SettingsError
from pkbrokers_redis.simulator.universe import INSTRUMENTS_MAX, expired_contracts, universe
from tests.support import SHARED_DATA


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
