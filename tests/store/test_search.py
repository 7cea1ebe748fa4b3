"""Searching the master: the share before its thousand contracts, company names, typos."""

from __future__ import annotations

from typing import Any

import pytest
import redis

from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.instruments import search_instruments
from pkbrokers_redis.store.symbols import save_instruments


@pytest.fixture
def server_kind() -> str:
    return "valkey"  # which of them does not matter here


def row(token: int, name: str, company: str, **cells: Any) -> dict[str, Any]:
    exchange, _, symbol = name.partition(":")
    return {
        "instrument_token": token,
        "exchange": exchange,
        "tradingsymbol": symbol,
        "name": company,
        **cells,
    }


@pytest.fixture(autouse=True)
def _master(client: redis.Redis, settings: Settings) -> None:
    rows = [
        row(408065, "NSE:INFY", "INFOSYS", lot_size=1),
        row(128053508, "BSE:INFY", "INFOSYS"),
        row(738561, "NSE:RELIANCE", "RELIANCE INDUSTRIES"),
        row(257, "NSE:RELINFRA", "RELIANCE INFRASTRUCTURE"),
        row(513, "NSE:HDFCBANK", "HDFC BANK"),
        row(260105, "NSE:NIFTY BANK", "NIFTY BANK"),
    ]
    contract = {"expiry": "2026-12-31", "lot_size": 400}
    rows += [row(n << 8 | 2, f"NFO:INFY26DEC{n}CE", "INFY", **contract) for n in range(1, 60)]
    save_instruments(client, settings.keys, rows)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("infy", ["NSE:INFY", "BSE:INFY", "NFO:INFY26DEC1CE"]),
        ("infosys", ["NSE:INFY", "BSE:INFY"]),
        ("reliance  ind", ["NSE:RELIANCE"]),
        ("RELI", ["NSE:RELIANCE", "NSE:RELINFRA"]),
        ("bank", ["NSE:HDFCBANK", "NSE:NIFTY BANK"]),
        ("BSE:INF", ["BSE:INFY"]),
        ("NFO:INFY26DEC7CE", ["NFO:INFY26DEC7CE"]),
        ("26DEC7C", ["NFO:INFY26DEC7CE"]),
    ],
)
def test_the_best_match_comes_first(
    client: redis.Redis, settings: Settings, text: str, first: list[str]
) -> None:
    found = search_instruments(client, settings.keys, text)
    assert [each["symbol"] for each in found.rows][: len(first)] == first and found.exact


def test_search_returns_the_total_and_the_columns(client: redis.Redis, settings: Settings) -> None:
    found = search_instruments(client, settings.keys, "infy", exchange="nfo", limit=5)
    assert (len(found.rows), found.total) == (5, 59)
    assert {"name": "INFY", "expiry": "2026-12-31", "lot_size": "400"}.items() <= found.rows[0].items()


def test_typo_finds_similar_names(client: redis.Redis, settings: Settings) -> None:
    found = search_instruments(client, settings.keys, "RELIENCE")
    assert not found.exact and found.rows[0]["symbol"] == "NSE:RELIANCE"


@pytest.mark.parametrize("text", ["", " ", "NSE:", "qqqqqq", "\x00", "x" * 10_000])
def test_nonsense_finds_nothing(client: redis.Redis, settings: Settings, text: str) -> None:
    assert search_instruments(client, settings.keys, text).rows == []


def test_missing_or_malformed_row_has_empty_cells(client: redis.Redis, settings: Settings) -> None:
    client.delete(settings.keys.instrument(408065))
    client.delete(settings.keys.instrument(738561))
    client.set(settings.keys.instrument(738561), "not a hash")
    assert search_instruments(client, settings.keys, "INFY").rows[0]["name"] == ""
    assert search_instruments(client, settings.keys, "RELIANCE").rows[0]["lot_size"] == ""
