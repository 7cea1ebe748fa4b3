"""Reads return typed values and skip malformed rows."""

from __future__ import annotations

import json

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from pkbrokers_redis.candles.model import Candle
from pkbrokers_redis.errors import WrongKeyType
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store import rows
from tests.client.contract import INFY, OPEN_S, push, row, tick_frame


def test_candles_are_typed_and_oldest_first(client: redis.Redis, settings: Settings) -> None:
    push(client, settings.keys, INFY, "5m", [row(OPEN_S + 300 * i, 100.5 + i, oi=7) for i in range(5)])
    found = rows.read_candles(client, settings.keys, INFY, "5m", 2)
    assert found == [
        Candle(OPEN_S + 900, 103.5, 103.5, 103.5, 103.5, 10, 7, 1),
        Candle(OPEN_S + 1200, 104.5, 104.5, 104.5, 104.5, 10, 7, 1),
    ]
    assert isinstance(found[0].start, int) and isinstance(found[0].open, float)


@pytest.mark.parametrize("count", [0, -3])
def test_missing_list_has_no_candles(client: redis.Redis, settings: Settings, count: int) -> None:
    push(client, settings.keys, INFY, "5m", [row(OPEN_S)])
    assert rows.read_candles(client, settings.keys, INFY, "5m", count) == []
    assert rows.read_window(client, settings.keys, INFY, "5m", count) == ([], None)


def test_flag_is_kept_and_malformed_row_is_counted(client: redis.Redis, settings: Settings) -> None:
    bad = [
        "",
        "nonsense",
        "{}",
        "[1,2]",
        "[]",
        '["a",1,1,1,1,1,1,1]',
        row(OPEN_S + 60, flag="unknown"),
        "[1e30,1,1,1,1,1,1,1]",
    ]
    push(client, settings.keys, INFY, "1m", [row(OPEN_S, flag="partial"), *bad, row(OPEN_S + 120)])
    tally = rows.Tally()
    found = rows.read_candles(client, settings.keys, INFY, "1m", 50, tally)
    assert [candle.flag for candle in found] == ["partial", ""]
    assert tally.rows_refused == len(bad)


@given(
    st.binary(max_size=60)
    | st.recursive(st.none() | st.floats() | st.text(), st.lists).map(repr).map(str.encode)
)
def test_no_text_makes_the_row_parser_raise(text: bytes) -> None:
    found = rows.parse_candle(text)
    assert found is None or isinstance(found, Candle)


def test_open_candle_that_is_in_the_list_already_is_left_out(client: redis.Redis, settings: Settings) -> None:
    push(client, settings.keys, INFY, "5m", [row(OPEN_S), row(OPEN_S + 300)])
    client.hset(settings.keys.current(INFY), "5m", row(OPEN_S + 300))
    assert rows.read_window(client, settings.keys, INFY, "5m", 5)[1] is None
    client.hset(settings.keys.current(INFY), "5m", row(OPEN_S + 600))
    done, current = rows.read_window(client, settings.keys, INFY, "5m", 1)
    assert [candle.start for candle in done] == [OPEN_S + 300]
    assert current is not None and current.start == OPEN_S + 600


def test_a_key_of_another_type_is_named(client: redis.Redis, settings: Settings) -> None:
    keys = settings.keys
    for key in (
        keys.candles(INFY, "5m"),
        keys.current(INFY),
        keys.quote(INFY),
        keys.ticks(keys.shard_of(INFY)),
    ):
        client.set(key, "mine")
    readers = [
        lambda: rows.read_candles(client, keys, INFY, "5m", 5),
        lambda: rows.read_window(client, keys, INFY, "5m", 5),
        lambda: rows.read_current(client, keys, INFY, "5m"),
        lambda: rows.read_quote(client, keys, INFY),
        lambda: rows.read_ticks(client, keys, INFY, 5),
    ]
    for reader in readers:
        with pytest.raises(WrongKeyType, match=r"holds a string, not a (list|hash|stream)"):
            reader()
    client.delete(keys.current(INFY))
    with pytest.raises(WrongKeyType) as caught:
        rows.read_window(client, keys, INFY, "5m", 5)
    assert caught.value.key == keys.candles(INFY, "5m")


def test_a_quote_is_typed_and_its_depth_decoded(client: redis.Redis, settings: Settings) -> None:
    depth = {"buy": [{"price": 1.5, "quantity": 3, "orders": 1}], "sell": []}
    client.hset(
        settings.keys.quote(INFY),
        mapping={
            "symbol": "NSE:INFY",
            "last_price": "1500.05",
            "volume": "123456",
            "oi": "",
            "close": "broken",
            "buy_quantity": "inf",
            "exchange_time": "2026-01-05T09:15:01+05:30",
            "depth": json.dumps(depth),
        },
    )
    assert rows.read_quote(client, settings.keys, INFY) == {
        "symbol": "NSE:INFY",
        "last_price": 1500.05,
        "volume": 123456,
        "oi": None,
        "close": "broken",
        "buy_quantity": "inf",
        "exchange_time": "2026-01-05T09:15:01+05:30",
        "depth": depth,
    }


def test_ticks_are_those_of_the_instrument_newest_last(
    client: redis.Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "ENTRIES_A_READ", 3)  # several reads
    keys, shard = settings.keys, settings.keys.shard_of(INFY)
    for i in range(10):
        mine = [INFY, 100.0 + i, 1, 10 * i, None, None, None, None, 1000 + i]
        other = [INFY + (settings.shards << 8), 5.0, 1, 1, None, None, None, None, 1]
        tick_frame(client, keys, shard, [other, mine, [*mine[:8], 5000 + i]], at=2000 + i)
        tick_frame(client, keys, shard, [other])
    found = rows.read_ticks(client, keys, INFY, 3)
    assert [tick.time_ms for tick in found] == [5008, 1009, 5009]
    assert found[-1] == rows.Tick(INFY, 109.0, 1, 90, None, None, None, None, 5009, 2009)
    assert len(rows.read_ticks(client, keys, INFY, 1000)) == 20


def test_malformed_frame_is_skipped_alone(client: redis.Redis, settings: Settings) -> None:
    keys, shard = settings.keys, settings.keys.shard_of(INFY)
    for text in (f"[[{INFY},", f"[[{INFY},1]]", f'[[{INFY},"x",1,1,1,1,1,1,1]]', f'{{"a":[{INFY},1]}}'):
        client.xadd(keys.ticks(shard), {"at": "1", "ticks": text})
    client.xadd(keys.ticks(shard), {"other": "fields"})
    tick_frame(client, keys, shard, [[INFY, 1, 1, 1, None, None, None, None, 1]])
    tally = rows.Tally()
    assert len(rows.read_ticks(client, keys, INFY, 10, tally)) == 1
    assert tally.rows_refused == 4
