"""The misbehaviours of the real market and the real Kite, each as it is switched on."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import numpy as np
import pytest
import requests

from pkbrokers_redis.candles.calendar import IST, load_sessions
from pkbrokers_redis.errors import SettingsError
from pkbrokers_redis.kite.protocol import decode
from pkbrokers_redis.simulator.faults import ANNULLED_VOLUME, KINDS, Faults, parse_fault
from pkbrokers_redis.simulator.kite import SimulatedKite
from pkbrokers_redis.simulator.market import Market, TradingHours
from pkbrokers_redis.simulator.subscriptions import MODE_FULL, frames_for
from pkbrokers_redis.simulator.universe import universe

ROWS = universe(12)
START_MS = int(datetime(2026, 8, 5, 11, 0, tzinfo=IST).timestamp() * 1000)
MARKET = load_sessions("market")
STOCK = next(int(row["instrument_token"]) for row in ROWS if row["tradingsymbol"] == "INFY")
OTHER = next(int(row["instrument_token"]) for row in ROWS if row["tradingsymbol"] == "RELIANCE")


@pytest.fixture
def market() -> Market:
    made = Market(ROWS, START_MS)
    for second in range(1, 5):
        made.step(START_MS + second * 1000)
    return made


def sent(faults: Faults, market: Any) -> dict[int, dict[str, Any]]:
    """What a client gets of every instrument now, by token."""
    rows = faults.unmuted(np.arange(len(ROWS)), market.tokens)
    modes = np.full(len(ROWS), MODE_FULL, np.int8)
    found: dict[int, dict[str, Any]] = {}
    for frame in frames_for(faults.spoil_packets(market, rows), rows, modes):
        position = 2
        while position < len(frame):
            size = int.from_bytes(frame[position : position + 2], "big")
            tick = decode(frame[position + 2 : position + 2 + size])
            found[tick["instrument_token"]] = tick
            position += 2 + size
    return found


def test_without_a_fault_the_packets_are_the_markets_own(market: Market) -> None:
    faults = Faults()
    assert faults.spoil_packets(market, np.arange(3)) is market  # type: ignore[arg-type]
    assert len(sent(faults, market)) == len(ROWS)


def test_a_corporate_action_is_in_prices_close_volume_and_history(market: Market) -> None:
    faults = Faults()
    before = sent(faults, market)
    faults.add("corporate_action", tokens=[STOCK], factor=5)
    after = sent(faults, market)
    assert after[OTHER] == before[OTHER]
    for name in ("last_price", "average_traded_price"):
        assert after[STOCK][name] == pytest.approx(before[STOCK][name] / 5, abs=0.01)
    for name in ("open", "high", "low", "close"):
        assert after[STOCK]["ohlc"][name] == pytest.approx(before[STOCK]["ohlc"][name] / 5, abs=0.01)
    assert after[STOCK]["volume_traded"] == before[STOCK]["volume_traded"] * 5
    row = ["2026-08-04T00:00:00+0530", 100.0, 110.0, 95.0, 105.0, 1_000]
    assert faults.spoil_history(STOCK, [row], "day") == [[row[0], 20.0, 22.0, 19.0, 21.0, 5_000]]
    assert faults.spoil_history(OTHER, [row], "day") == [row]


def test_an_annulled_volume_is_in_one_packet_only(market: Market) -> None:
    faults = Faults()
    before = sent(faults, market)
    faults.add("annul_volume", tokens=[STOCK], count=1)
    assert sent(faults, market)[STOCK]["volume_traded"] == before[STOCK]["volume_traded"] + ANNULLED_VOLUME
    assert sent(faults, market) == before
    assert faults.struck == {"annul_volume": 1}


def test_the_exchanges_clock_is_ahead_in_every_packet(market: Market) -> None:
    faults = Faults()
    before = sent(faults, market)
    faults.add("clock_offset", offset_seconds=-180)
    for token, tick in sent(faults, market).items():
        moved = tick["exchange_timestamp"] - before[token]["exchange_timestamp"]
        assert moved.total_seconds() == -180
    assert faults.offset_s == -180


def test_prices_are_zero_until_the_fault_ends_and_nothing_trades_meanwhile(market: Market) -> None:
    faults = Faults()
    faults.add("zero_price_first", tokens=[STOCK])
    market.held = faults.rows_of("zero_price_first", market.row_of)
    volume = market.volume[market.row_of[STOCK]]
    market.step(START_MS + 10_000)
    tick = sent(faults, market)[STOCK]
    assert (tick["last_price"], tick["volume_traded"], tick["ohlc"]["open"]) == (0, 0, 0)
    assert market.volume[market.row_of[STOCK]] == volume
    faults.clear()
    assert sent(faults, market)[STOCK]["last_price"] > 0


@pytest.mark.parametrize("kind", ["drop_token", "delist"])
def test_dropped_and_delisted_instruments_get_no_packets(kind: str, market: Market) -> None:
    faults = Faults()
    faults.add(kind, tokens=[STOCK])
    found = sent(faults, market)
    assert STOCK not in found and OTHER in found


def test_an_unlisted_session_trades_while_the_calendar_says_closed() -> None:
    hours = TradingHours(ROWS, MARKET)
    sunday_ms = START_MS + 4 * 86_400_000
    market = Market(ROWS, sunday_ms, hours=hours)
    assert not any(len(market.step(sunday_ms + n * 1000)) for n in range(1, 5))
    hours.is_open_anyway = lambda: True
    assert any(len(market.step(sunday_ms + n * 1000)) for n in range(5, 12))
    assert hours.inside(np.arange(3), np.full(3, sunday_ms // 1000), sunday_ms).all()


def test_an_odd_history_has_each_oddity_once() -> None:
    faults = Faults()
    faults.add("odd_history", count=1)
    rows = [[f"2026-08-05T09:{15 + n}:00+0530", 100.0, 101.0, 99.0, 100.5, 10] for n in range(8)]
    odd = faults.spoil_history(STOCK, rows, "minute")
    assert odd[1][1] > odd[1][2]
    assert [row[0] for row in odd[2:4]] == [rows[3][0], rows[2][0]]
    assert odd[4] == odd[5]
    assert odd[-1][0] == "2026-08-05T15:30:00+0530"
    assert len(odd) == len(rows) + 2
    assert faults.spoil_history(STOCK, rows, "minute") == rows


# --- over HTTP


@pytest.fixture(scope="module")
def kite() -> Iterator[SimulatedKite]:
    with SimulatedKite(ROWS, sessions=MARKET, start_ms=START_MS) as running:
        yield running


@pytest.fixture(autouse=True)
def _calm_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "kite" in request.fixturenames:
        request.getfixturevalue("kite").faults.clear()


def instruments(kite: SimulatedKite) -> str:
    return requests.get(f"{kite.api_url}/instruments/NSE", timeout=10).text


def history(kite: SimulatedKite) -> list[list[Any]]:
    token = kite.accounts.open_session()
    headers = {"X-Kite-Version": "3", "Authorization": f"token {kite.accounts.first.api_key}:{token}"}
    span = {"from": "2026-08-05 09:15:00", "to": "2026-08-05 10:59:59"}
    url = f"{kite.api_url}/instruments/historical/{STOCK}/minute"
    answer = requests.get(url, params=span, headers=headers, timeout=10).json()
    return list(answer["data"]["candles"])


def test_a_rename_and_a_delisting_are_in_the_instruments_csv(kite: SimulatedKite) -> None:
    kite.faults.add("rename", tokens=[STOCK], name="INFYNEW2")
    kite.faults.add("delist", tokens=[OTHER])
    by_token = {int(row["instrument_token"]): row for row in csv.DictReader(io.StringIO(instruments(kite)))}
    assert by_token[STOCK]["tradingsymbol"] == "INFYNEW2"
    assert OTHER not in by_token
    kite.faults.clear()
    assert "INFYNEW2" not in instruments(kite)


def test_a_damaged_instruments_csv_has_a_quote_a_column_and_a_comma_or_ends_early(
    kite: SimulatedKite,
) -> None:
    whole = instruments(kite)
    kite.faults.add("csv_damage", count=1)
    damaged = instruments(kite)
    assert damaged.splitlines()[0].endswith(",freeze qty,")
    assert damaged.count('"') == 3
    kite.faults.add("csv_damage", count=1, name="short")
    assert instruments(kite) == whole[: len(whole) // 2]
    assert instruments(kite) == whole


def test_history_follows_the_exchanges_clock(kite: SimulatedKite) -> None:
    before = history(kite)
    kite.faults.add("clock_offset", offset_seconds=180)
    after = history(kite)
    assert len(after) == len(before) - 3
    assert [row[1:] for row in after] == [row[1:] for row in before[:-3]]
    assert (before[0][0][11:16], after[0][0][11:16]) == ("09:15", "09:18")


# --- orders


@pytest.mark.parametrize(
    "text", ["corporate_action", "rename", "clock_offset,offset_seconds=90", "delist,factor=0"]
)
def test_a_fault_that_lacks_what_it_needs_is_refused(text: str) -> None:
    with pytest.raises(SettingsError):
        Faults().add(**parse_fault(text))


def test_faults_of_the_market_can_be_ordered_as_text() -> None:
    wanted = {"kind": "corporate_action", "tokens": [408065, 738561], "factor": 10.0}
    assert parse_fault("corporate_action,tokens=408065+738561,factor=10") == wanted
    assert {
        "annul_volume",
        "zero_price_first",
        "unlisted_session",
        "csv_damage",
        "odd_history",
    } <= KINDS.keys()
