"""The aggregator on a real store: rows, malformed input, repeats, keys of another type."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from pkbrokers_redis.aggregate import worker as aggregate_module
from tests.aggregate.stores import (
    INFY,
    RELIANCE,
    START_S,
    TCS,
    Store,
    make_store,
    minute,
    some_frames,
    store,
    tick,
)

__all__ = ["make_store", "store"]  # fixtures


# -- what a tick becomes -----------------------------------------------------------------------------


def test_ticks_become_rows_of_every_interval_and_are_announced_when_they_are_over(store: Store) -> None:
    store.client.hset(store.keys.instrument(INFY), mapping={"exchange": "NSE", "tradingsymbol": "INFY"})
    store.send(tick(-10, 100, 1_000))
    store.send(tick(5, 101, 1_010), tick(20, 99, 1_020))
    store.send(tick(61, 102, 1_030))
    store.drain()
    assert store.rows() == [
        minute(0, 101, 101, 99, 99, volume=20, ticks=2),
        minute(1, 102, 102, 102, 102, volume=10, ticks=1),
    ]
    assert store.rows(interval="5m") == [[START_S, 101, 102, 99, 102, 30, None, 3]]
    assert store.client.llen(store.keys.candles(INFY, "1m")) == 1
    assert store.closed() == []  # 09:16:01: within the grace a straggler may come
    store.send(tick(62, 102, 1_031))
    store.drain(store.started[-1])
    assert store.closed() == [(INFY, "1m", START_S, 0)]
    fields: Any = store.client.xrange(store.keys.closed(store.keys.shard_of(INFY)))[0][1]  # type: ignore[index]
    assert fields[b"symbol"] == b"NSE:INFY"
    assert fields[b"row"] == store.client.lindex(store.keys.candles(INFY, "1m"), 0)
    assert store.lag() == 0


def test_candle_volumes_add_up_to_the_traded_volume_in_every_interval(store: Store) -> None:
    for frame in some_frames():
        store.send(*frame)
    store.drain()
    for token in (INFY, RELIANCE, TCS):
        sums = {
            interval: sum(row[5] for row in store.rows(token, interval)) for interval in ("1m", "5m", "60m")
        }
        assert len(set(sums.values())) == 1 and sums["1m"] > 1_000


# -- what another writer writes ----------------------------------------------------------------------

GOOD = json.dumps([tick(30, 105, 1_020)])


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"hello": "world"}, "malformed_entries"),
        ({"src": "x", "seq": "1"}, "malformed_entries"),
        ({"seq": "1", "ticks": GOOD}, "malformed_entries"),
        ({"src": "x", "ticks": GOOD}, "malformed_entries"),
        ({"src": "x", "seq": "one", "ticks": GOOD}, "malformed_entries"),
        ({"src": "x", "seq": "-1", "ticks": GOOD}, "malformed_entries"),
        ({"src": "x", "seq": "9" * 5000, "ticks": GOOD}, "malformed_entries"),
        ({"src": "", "seq": "1", "ticks": GOOD}, "malformed_entries"),
        ({b"\xff\xfe": b"\x00" * 5000, "seq": "²"}, "malformed_entries"),
        ({"src": "x", "seq": "1", "ticks": ""}, "malformed_rows"),
        ({"src": "x", "seq": "1", "ticks": "garbage"}, "malformed_rows"),
        ({"src": "x", "seq": "1", "ticks": b'[["\xff"]]'}, "malformed_rows"),
        ({"src": "x", "seq": "1", "ticks": "[" * 100_000}, "malformed_rows"),
        ({"src": "x", "seq": "1", "ticks": "[[1,2,3]]"}, "malformed_rows"),
        ({"src": "x", "seq": "1", "ticks": "[[1,1,1,1,1,1,1,1,1e999]]"}, "malformed_rows"),
        ({"src": "x", "seq": "1", "ticks": "[[" + "9" * 400 + ",1,1,1,1,1,1,1,1]]"}, "malformed_rows"),
        ({"src": "x", "seq": "1", "ticks": f"[[{INFY},0,1,1,1,1,1,1,{START_S}000]]"}, "invalid"),
        ({"src": "x", "seq": "1", "ticks": f"[[{INFY},5,1,1,1,1,1,1,0]]"}, "invalid"),
        ({"src": "x", "seq": "1", "ticks": f"[[{INFY},5,1,1e13,1,1,1,1,{START_S}000]]"}, "invalid"),
        ({"src": "x", "seq": "1", "ticks": f"[[{INFY},5,1,1e300,1,1,1,1,{START_S}000]]"}, "malformed_rows"),
        ({"src": "x", "seq": "1", "ticks": f"[[{INFY},5,1,-1,1,1,1,1,{START_S}000]]"}, "invalid"),
        ({"src": "x", "seq": "1", "ticks": f"[[-1,5,1,1,1,1,1,1,{START_S}000]]"}, "invalid"),
        ({"src": "x", "seq": "1", "ticks": f"[[1.5,5,1,1,1,1,1,1,{START_S}000]]"}, "invalid"),
        ({"src": "x", "seq": "1", "ticks": f"[[1e19,5,1,1,1,1,1,1,{START_S}000]]"}, "invalid"),
        ({"src": "x", "seq": "1", "ticks": f"[[null,5,1,1,1,1,1,1,{START_S}000]]"}, "invalid"),
        ({"src": "x", "seq": "1", "ticks": "[[408065,null,null,null,null,null,null,null,null]]"}, "invalid"),
    ],
)
@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
def test_a_malformed_entry_is_counted_logged_once_and_changes_no_row(
    store: Store, fields: dict[Any, Any], count: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store.send(tick(-10, 100, 1_000))
    store.send(tick(5, 101, 1_010))
    aggregator = store.aggregator()
    for _ in range(3):
        store.foreign(fields)
    store.send(tick(20, 99, 1_020))
    store.drain(aggregator)
    assert aggregator.figures()[count] >= (3 if count == "malformed_entries" else 1)
    assert store.rows() == [minute(0, 101, 101, 99, 99, volume=20, ticks=2)]
    assert store.lag() == 0
    events = ("malformed_entry", "malformed_rows", "invalid_tick")
    lines = [line for line in capsys.readouterr().err.splitlines() if any(word in line for word in events)]
    assert len(lines) == 1
    assert len(lines[0]) < 600 and ("evidence=" in lines[0] or "tick=" in lines[0])


def test_a_wrong_count_and_unknown_fields_do_not_affect_valid_ticks(store: Store) -> None:
    store.send(tick(-10, 100, 1_000))
    ticks = json.dumps([tick(5, 101, 1_010)], indent=2)
    store.foreign({"src": "x", "seq": 1, "at": "noon", "n": "many", "ticks": ticks, "colour": "red"})
    aggregator = store.drain()
    assert store.rows() == [minute(0, 101, 101, 101, 101, volume=10, ticks=1)]
    assert aggregator.counts["malformed_entries"] == aggregator.counts["malformed_rows"] == 0


def test_the_valid_rows_of_a_malformed_entry_are_applied(store: Store) -> None:
    store.send(tick(-10, 100, 1_000))
    store.foreign({"src": "x", "seq": 1, "ticks": json.dumps([["no"], tick(5, 101, 1_010), {}, 7])})
    aggregator = store.drain()
    assert store.rows() == [minute(0, 101, 101, 101, 101, volume=10, ticks=1)]
    assert aggregator.counts["malformed_rows"] == 3


# -- repeats and order -------------------------------------------------------------------------------


def test_a_producers_retry_is_skipped_by_its_number(store: Store) -> None:
    store.send(tick(-10, 100, 1_000), seq=1)
    store.send(tick(5, 101, 1_010), seq=2)
    store.send(tick(5, 101, 1_010), seq=2)
    store.send(tick(6, 500, 1_011), seq=1)  # same number, other ticks: the number decides
    aggregator = store.drain()
    store.send(tick(7, 600, 1_012), seq=2)  # and beyond the batch
    store.drain(aggregator)
    assert aggregator.counts["repeated_entries"] == 3
    assert aggregator.counts["entries"] == 5
    assert store.rows() == [minute(0, 101, 101, 101, 101, volume=10, ticks=1)]
    again = store.aggregator()
    store.send(tick(8, 700, 1_013), seq=2)  # and beyond the process
    store.drain(again)
    assert again.counts["repeated_entries"] == 1
    assert store.rows() == [minute(0, 101, 101, 101, 101, volume=10, ticks=1)]


def test_a_commit_that_ends_inside_a_retry_remembers_the_highest_number(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aggregate_module, "ENTRIES_MAX", 4)
    for seq in (1, 2, 3, 1, 2, 3):  # a read ends behind the repeated 1
        store.send(tick(seq, 100, 1_000 + 10 * seq), seq=seq)
    store.aggregator().step(block_ms_max=1)
    cursor = store.keys.cursor(store.keys.shard_of(INFY))
    assert store.client.hget(cursor, "src:s") == b"3"
    assert store.drain().counts["repeated_entries"] == 2


def test_each_source_has_its_own_sequence_numbers(store: Store) -> None:
    store.send(tick(-10, 100, 1_000), source="a", seq=100)
    store.send(tick(5, 101, 1_010), source="b", seq=1)
    store.send(tick(6, 102, 1_020), source="a", seq=101)
    store.send(tick(7, 103, 1_030), source="b", seq=2)
    assert store.drain().counts["repeated_entries"] == 0
    assert store.rows() == [minute(0, 101, 103, 101, 103, volume=30, ticks=3)]


def test_two_sources_of_the_same_ticks_in_any_order_give_the_same_rows(
    make_store: Callable[..., Store],
) -> None:
    one, both = make_store(prefix="one"), make_store(prefix="both")
    frames = some_frames(300)
    for n, frame in enumerate(frames):
        one.send(*frame)
        both.send(*frame, source="a")
        if n:  # b lags by a frame, and swaps neighbours
            both.send(*frames[n if n % 2 else n - 1], source="b")
    one.drain()
    both.drain()
    assert both.all_rows() == one.all_rows()
    assert both.closed() == one.closed()


# -- keys that hold another type ---------------------------------------------------------------------


def test_a_tick_stream_of_another_type_stops_only_its_shard_until_it_is_repaired(
    store: Store,
) -> None:
    key = store.keys.ticks(store.keys.shard_of(INFY))
    assert store.keys.shard_of(INFY) != store.keys.shard_of(RELIANCE)
    store.send(tick(-10, 100, 1_000), tick(-10, 100, 1_000, RELIANCE))
    store.send(tick(5, 101, 1_010))
    aggregator = store.drain()
    store.client.delete(key)
    store.client.set(key, "mine")
    store.send(tick(6, 102, 1_020, RELIANCE))
    store.drain(aggregator)
    store.drain(aggregator)  # the round that met the key reads nothing
    assert store.rows(RELIANCE) == [minute(0, 102, 102, 102, 102, volume=20, ticks=1)]
    assert aggregator.counts["refused_keys"] == 1
    store.client.delete(key)
    store.send(tick(7, 103, 1_030))
    store.clock.ms += 2_000
    store.drain(aggregator)
    assert store.rows() == [minute(0, 101, 103, 101, 103, volume=30, ticks=2)]
    assert store.lag() == 0


@pytest.mark.parametrize("what", ["current", "candles"])
def test_an_instruments_key_of_another_type_is_refused_alone_and_named(
    store: Store, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    key = store.keys.current(INFY) if what == "current" else store.keys.candles(INFY, "1m")
    store.client.set(key, "mine")
    for second in (-10, 5, 65, 125):
        store.send(*(tick(second, 100, 2_000 + second, token) for token in (INFY, RELIANCE)))
        store.drain(store.started[-1] if store.started else None)
    aggregator = store.started[-1]
    assert [row[0] - START_S for row in store.rows(RELIANCE)] == [0, 60, 120]
    assert store.client.get(key) == b"mine"
    assert aggregator.counts["refused_keys"] >= 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "key_refused" in line]
    assert len(lines) == 1 and key in lines[0] and f"DEL {key}" in lines[0]
    assert store.lag() == 0
    store.client.delete(key)
    for second in (185, 245):
        store.send(tick(second, 100, 2_000 + second))
    store.drain(aggregator)
    assert [row[0] - START_S for row in store.rows()][-2:] == [180, 240]


@pytest.mark.parametrize("what", ["cursor", "state"])
def test_a_shard_with_keys_of_another_type_waits_alone_until_they_are_repaired(
    store: Store, what: str
) -> None:
    shard = store.keys.shard_of(INFY)
    key = getattr(store.keys, what)(shard)
    store.client.set(key, "mine")
    store.send(tick(-10, 100, 1_000), tick(-10, 100, 1_000, RELIANCE))
    store.send(tick(5, 101, 1_010), tick(5, 101, 1_010, RELIANCE))
    aggregator = store.drain()
    assert store.rows(RELIANCE) == [minute(0, 101, 101, 101, 101, volume=10, ticks=1)]
    assert store.rows() == [] and shard not in aggregator.workers
    assert aggregator.counts["refused_keys"] >= 1
    assert store.client.get(key) == b"mine"
    store.client.delete(key)
    store.clock.ms += 2_000
    aggregator.leases.renew_now()
    store.drain(aggregator)
    assert store.rows() == [minute(0, 101, 101, 101, 101, volume=10, ticks=1)]


def test_a_cursor_that_is_overwritten_under_way_costs_its_shard_only(store: Store) -> None:
    shard = store.keys.shard_of(INFY)
    store.send(tick(-10, 100, 1_000), tick(-10, 100, 1_000, RELIANCE))
    aggregator = store.drain()
    store.client.delete(store.keys.cursor(shard))
    store.client.set(store.keys.cursor(shard), "mine")
    store.send(tick(5, 101, 1_010), tick(5, 101, 1_010, RELIANCE))
    store.drain(aggregator)
    assert store.rows(RELIANCE) == [minute(0, 101, 101, 101, 101, volume=10, ticks=1)]
    assert shard not in aggregator.workers
    assert set(aggregator.workers) == set(range(store.keys.shards)) - {shard}


@pytest.mark.parametrize(
    "fields",
    [
        {"007": "[1]", "9" * 30: "[1]", "-5": "x", "x:revs": "{}", "5:revs": "not json", "note": "hi"},
        {str(INFY): "garbage"},
        {str(INFY): b"\xff"},
        {str(INFY): "[]"},
        {str(INFY): "{}"},
        {str(INFY): "[" * 100_000},
        {str(INFY): "[" + "9" * 400 + "]"},
        {str(INFY): '["a","b","c","d","e","f"]'},
        {str(INFY): "[" + ",".join(["1"] * 400) + "]"},
        {f"{INFY}:candles": "[0]"},
        {f"{INFY}:candles": "[0,[1e300,0,0,0,0]]"},
        {f"{INFY}:candles": "[99,[1,2,3,4,5]]"},
        {f"{INFY}:candles": "[0,[1,2,3]]"},
        {f"{INFY}:revs": "[1,2]"},
        {f"{INFY}:revs": '{"1m": "x"}'},
    ],
)
@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
def test_a_malformed_state_costs_at_most_its_instrument(store: Store, fields: dict[str, Any]) -> None:
    neighbour = INFY + (store.keys.shards << 8)
    assert store.keys.shard_of(neighbour) == store.keys.shard_of(INFY)
    store.send(tick(-10, 100, 1_000), tick(-10, 100, 1_000, neighbour))
    store.send(tick(5, 101, 1_010), tick(5, 101, 1_010, neighbour))
    store.drain()
    store.client.hset(store.keys.state(store.keys.shard_of(INFY)), mapping=fields)  # type: ignore[arg-type]
    again = store.aggregator()
    store.send(tick(65, 102, 1_020), tick(65, 102, 1_020, neighbour))
    store.send(tick(66, 103, 1_030), tick(66, 103, 1_030, neighbour))
    store.drain(again)
    assert store.rows(neighbour) == [
        minute(0, 101, 101, 101, 101, volume=10, ticks=1), minute(1, 102, 103, 102, 103, volume=20, ticks=2),
    ]  # fmt: skip
    assert store.rows()[-1][:5] in ([START_S + 60, 102, 103, 102, 103], [START_S + 60, 103, 103, 103, 103])
    assert [row[0] for row in store.rows()] == sorted({row[0] for row in store.rows()})
