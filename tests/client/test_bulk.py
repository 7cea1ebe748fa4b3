"""Bulk: many instruments in one call give exactly what one call each gives."""

from __future__ import annotations

import json

import numpy as np
import pytest
import redis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pkbrokers_redis.candles.model import FLAG_NAMES
from pkbrokers_redis.client import bulk as bulk_module
from pkbrokers_redis.client.bulk import read_bulk
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.errors import UnknownSymbol
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.rows import read_window
from tests.client.contract import INFY, NIFTY, OPEN_S, RELIANCE, push, row, write_master


@pytest.fixture
def store(client: redis.Redis, settings: Settings) -> CandleStore:
    write_master(client, settings.keys)
    return CandleStore(settings, client)


def test_rows_lie_one_instrument_after_the_other(client: redis.Redis, store: CandleStore) -> None:
    push(client, store.keys, INFY, "5m", [row(OPEN_S + 300 * i, 10 + i, oi=5) for i in range(4)])
    push(client, store.keys, RELIANCE, "5m", [row(OPEN_S, 7.25, flag="partial")])
    found = store.bulk(["RELIANCE", "NIFTY 50", "INFY", 408065], "5m", count=3)
    assert found.symbols == ["NSE:RELIANCE", "NSE:NIFTY 50", "NSE:INFY"]
    assert found.tokens.tolist() == [RELIANCE, NIFTY, INFY]
    assert found.offsets.tolist() == [0, 1, 1, 4] and found.counts.tolist() == [1, 0, 3]
    assert found.start.tolist() == [OPEN_S, OPEN_S + 300, OPEN_S + 600, OPEN_S + 900]
    assert found.column("close").tolist() == [7.25, 11, 12, 13]
    assert [FLAG_NAMES[flag] for flag in found.flags] == ["partial", "", "", ""]
    assert np.isnan(found.of("RELIANCE")[0, 6]) and found.of("INFY")[0, 6] == 5
    assert found.of("infy").base is not None  # a view
    assert len(found.of(NIFTY)) == 0
    with pytest.raises(UnknownSymbol):
        found.of("SENSEX")


@pytest.mark.parametrize("count", [0, -5])
@pytest.mark.parametrize("include_current", [False, True])
def test_a_count_below_one_gives_no_rows(
    client: redis.Redis, store: CandleStore, count: int, include_current: bool
) -> None:
    push(client, store.keys, INFY, "5m", [row(OPEN_S + 300 * i, 10 + i) for i in range(4)])
    client.hset(store.keys.current(INFY), "5m", row(OPEN_S + 1200, 99))
    found = store.bulk(["INFY", "RELIANCE"], "5m", count, include_current)
    assert found.symbols == ["NSE:INFY", "NSE:RELIANCE"] and found.offsets.tolist() == [0, 0, 0]
    assert len(found.rows) == len(found.to_pandas()) == 0


def test_a_grid_is_right_aligned(client: redis.Redis, store: CandleStore) -> None:
    push(client, store.keys, INFY, "5m", [row(OPEN_S + 300 * i, 10 + i) for i in range(3)])
    push(client, store.keys, RELIANCE, "5m", [row(OPEN_S + 600, 7)])
    grid = store.bulk(["INFY", "RELIANCE", "NIFTY 50"], "5m").grid("close")
    np.testing.assert_equal(grid, [[10, 11, 12], [np.nan, np.nan, 7], [np.nan] * 3])


def test_a_dataframe_has_symbol_and_kolkata_time(client: redis.Redis, store: CandleStore) -> None:
    push(client, store.keys, INFY, "5m", [row(OPEN_S, 10, 123), row(OPEN_S + 300, 11.5, flag="gap")])
    push(client, store.keys, RELIANCE, "5m", [row(OPEN_S + 300, 7)])
    frame = store.bulk(interval="5m").to_pandas()
    assert frame.index.names == ["symbol", "datetime"]
    assert list(frame.columns) == ["open", "high", "low", "close", "volume", "oi", "ticks", "flag"]
    assert str(frame.index.get_level_values("datetime").tz) == "Asia/Kolkata"
    assert frame.loc["NSE:INFY", "close"].to_list() == [10, 11.5]
    assert frame.loc["NSE:INFY"].index[0].isoformat() == "2026-01-05T09:15:00+05:30"
    assert frame.loc["NSE:INFY", "volume"].dtype == np.int64
    assert frame.loc["NSE:INFY", "flag"].to_list() == ["", "gap"]
    assert frame.loc[("NSE:RELIANCE", "2026-01-05 09:20:00+05:30"), "close"] == 7


def test_fractions_of_a_unit_keep_their_volume(client: redis.Redis, store: CandleStore) -> None:
    push(client, store.keys, INFY, "5m", [row(OPEN_S, 10, 0.25)])
    assert store.bulk(["INFY"]).to_pandas()["volume"].to_list() == [0.25]


def test_none_means_every_instrument_that_has_candles(client: redis.Redis, store: CandleStore) -> None:
    push(client, store.keys, INFY, "5m", [row(OPEN_S)])
    push(client, store.keys, 999, "5m", [row(OPEN_S)])
    client.hset(store.keys.state(store.keys.shard_of(999)), "999", "[]")  # seen, but in no master
    assert store.bulk().symbols == ["999", "NSE:INFY"]


def test_a_large_master_is_not_read_instrument_by_instrument(
    client: redis.Redis, store: CandleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pkbrokers_redis.client.store.SYMBOLS_READ_MAX", 3)
    push(client, store.keys, INFY, "5m", [row(OPEN_S)])
    client.hset(store.keys.state(store.keys.shard_of(INFY)), mapping={str(INFY): "[]", f"{INFY}:revs": "{}"})
    assert store.bulk().symbols == ["NSE:INFY"]


def test_nothing_at_all_is_an_empty_bulk(store: CandleStore) -> None:
    found = store.bulk()
    assert (len(found), found.rows.shape, found.offsets.tolist()) == (0, (0, 8), [0])
    assert found.to_pandas().empty and found.grid("close").shape == (0, 0)
    assert store.bulk([]).symbols == []


@pytest.mark.parametrize("moved", [True, False])
def test_the_current_candle_is_the_last_row_and_never_twice(
    client: redis.Redis, store: CandleStore, moved: bool
) -> None:
    push(client, store.keys, INFY, "5m", [row(OPEN_S + 300 * i) for i in range(3)])
    client.hset(store.keys.current(INFY), "5m", row(OPEN_S + (600 if moved else 900)))
    client.hset(store.keys.current(RELIANCE), "5m", row(OPEN_S))
    found = store.bulk(["INFY", "RELIANCE"], count=3, include_current=True)
    last = OPEN_S + (600 if moved else 900)
    assert found.of("INFY")[:, 0].tolist() == [last - 600, last - 300, last]
    assert found.of("RELIANCE")[:, 0].tolist() == [OPEN_S]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "[1]",
        '{"a":1}',
        "[[1,2,3,4,5,6,7,8]]",
        "1,2,3,4,5,6,7,8",
        '"gap"]',
        ',"gap"]',
        "[],[]",
    ],
)
def test_a_malformed_row_costs_only_itself(client: redis.Redis, store: CandleStore, text: str) -> None:
    push(client, store.keys, INFY, "5m", [row(OPEN_S), text, row(OPEN_S + 300, flag="gap")])
    push(client, store.keys, RELIANCE, "5m", [row(OPEN_S)])
    found = store.bulk(["INFY", "RELIANCE"])
    assert found.start.tolist() == [OPEN_S, OPEN_S + 300, OPEN_S]
    assert found.flags.tolist() == [0, 2, 0]
    assert found.rows_refused == store.rows_refused == 1


def test_rows_of_seven_and_nine_cells_are_not_two_rows_of_eight(
    client: redis.Redis, store: CandleStore
) -> None:
    seven, nine = row(OPEN_S + 300).replace(",1]", "]"), row(OPEN_S + 600).replace(",1]", ",1,5]")
    push(client, store.keys, INFY, "5m", [row(OPEN_S), seven, nine])
    push(client, store.keys, RELIANCE, "5m", [seven])
    push(client, store.keys, NIFTY, "5m", [nine])
    found = store.bulk(["INFY", "RELIANCE", "NIFTY 50"])
    assert found.start.tolist() == [OPEN_S] and found.rows_refused == 4


def test_a_key_of_another_type_costs_other_instruments_nothing(
    client: redis.Redis, store: CandleStore
) -> None:
    client.set(store.keys.candles(INFY, "5m"), "mine")
    client.set(store.keys.current(RELIANCE), "mine")
    push(client, store.keys, RELIANCE, "5m", [row(OPEN_S)])
    found = store.bulk(["INFY", "RELIANCE"], include_current=True)
    assert found.counts.tolist() == [0, 1] and found.rows_refused == 2


numbers = st.integers(0, 10**9) | st.floats(0, 1e9, allow_nan=False).map(lambda x: round(x, 2))
cells = st.tuples(
    numbers,
    numbers,
    numbers,
    numbers,
    numbers,
    numbers | st.none(),
    st.integers(0, 99),
    st.sampled_from(FLAG_NAMES),
)


@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
@given(lists=st.lists(st.lists(cells, max_size=6), min_size=1, max_size=5), data=st.data())
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_bulk_returns_what_single_reads_return(
    client: redis.Redis, settings: Settings, lists: list[list[tuple[object, ...]]], data: st.DataObject
) -> None:
    client.flushall()
    count = data.draw(st.integers(1, 5))
    tokens = [256 * (i + 1) + 1 for i in range(len(lists))]
    for token, rows in zip(tokens, lists, strict=True):
        texts = []
        for i, (*values, flag) in enumerate(rows):
            row_cells = [OPEN_S + 300 * i, *values, *([flag] if flag else [])]
            texts.append(json.dumps(row_cells, separators=(",", ":")))
        if texts and data.draw(st.booleans()):
            client.hset(settings.keys.current(token), "5m", texts.pop())
        if texts:
            push(client, settings.keys, token, "5m", texts)
    names = [(token, str(token)) for token in tokens]
    found = read_bulk(client, settings.keys, names, "5m", count, include_current=True)
    for token in tokens:
        done, current = read_window(client, settings.keys, token, "5m", count)
        expected = [*done, *([current] if current else [])][-count:]
        first, end = found.offsets[tokens.index(token)], found.offsets[tokens.index(token) + 1]
        assert [FLAG_NAMES[flag] for flag in found.flags[first:end]] == [candle.flag for candle in expected]
        rows_expected = np.array([candle[:8] for candle in expected], np.float64).reshape(-1, 8)
        np.testing.assert_array_equal(found.of(token), rows_expected)


def test_pipelines_are_joined(
    client: redis.Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_module, "INSTRUMENTS_PER_PIPELINE", 2)
    tokens = [256 * i + 1 for i in range(1, 8)]
    for i, token in enumerate(tokens):
        push(client, settings.keys, token, "1m", [row(OPEN_S + 60 * k, i) for k in range(i + 1)])
    found = read_bulk(client, settings.keys, [(token, str(token)) for token in tokens], "1m", 100)
    assert found.counts.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert all((found.of(token)[:, 4] == i).all() for i, token in enumerate(tokens))
