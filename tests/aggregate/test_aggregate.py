"""The aggregator on a real store: malformed input, repeats, restarts, clocks, outages of Redis."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from pkbrokers_redis.aggregate import worker as aggregate_module
from pkbrokers_redis.aggregate.worker import Aggregator
from pkbrokers_redis.client.replay import lag_entries
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import connect
from tests.support import running_server, wait_until

INFY, RELIANCE, TCS = 408065, 738561, 2953217
START_S = 1_767_584_700  # 2026-01-05 09:15 in Kolkata, a Monday
EVENT = {"sessions": "always", "clock": "event", "intervals_text": "1m,5m,60m,day", "lease_seconds": 60}
Row = list[Any]


def tick(second: float, price: float, volume: int, token: int = INFY) -> Row:
    """A trade `second` seconds after 09:15."""
    return [token, price, 1, volume, None, None, None, None, int((START_S + second) * 1000)]


def minute(n: float, *prices: float, volume: int, ticks: int) -> Row:
    """The 1m row of minute `n` after 09:15: open, high, low, close."""
    return [START_S + int(60 * n), *prices, volume, None, ticks]


class Clock:
    """The wall clock of an aggregator, in the test's hand."""

    def __init__(self, second: float = 0) -> None:
        self.ms = 0.0
        self.set(second)

    def set(self, second: float) -> None:
        self.ms = (START_S + second) * 1000

    def __call__(self) -> float:
        return self.ms


class Store:
    """A feed into the tick streams, aggregators on them, and what they left in Redis."""

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        self.client, self.settings, self.keys = client, settings, settings.keys
        self.clock = Clock()
        self.seqs: dict[str, int] = {}
        self.started: list[Aggregator] = []

    def send(self, *rows: Row, source: str = "s", seq: int | None = None, at_ms: int | None = None) -> None:
        """One frame: an entry a shard."""
        self.seqs[source] = seq = self.seqs.get(source, 0) + 1 if seq is None else seq
        shards: dict[int, list[Row]] = {}
        for row in rows:
            shards.setdefault(self.keys.shard_of(row[0]), []).append(row)
        for shard, part in shards.items():
            at = part[-1][8] + 300 if at_ms is None else at_ms
            text = json.dumps(part, separators=(",", ":"))
            fields: dict[Any, Any] = {"src": source, "seq": seq, "at": at, "n": len(part), "ticks": text}
            self.client.xadd(self.keys.ticks(shard), fields)

    def foreign(self, fields: dict[Any, Any], token: int = INFY) -> None:
        self.client.xadd(self.keys.ticks(self.keys.shard_of(token)), fields)

    def aggregator(self) -> Aggregator:
        """A new aggregator that owns all shards: the leases of earlier ones are deleted."""
        self.evict()
        new = Aggregator(
            lambda: connect(self.settings), self.settings, now_ms=self.clock, machine_ms=self.clock
        )
        new.start()
        self.started.append(new)
        return new

    def evict(self) -> None:
        """The leases and the signs of life of all aggregators run out."""
        self.client.delete(*(self.keys.lease(s) for s in range(self.keys.shards)), self.keys.workers())

    def drain(self, aggregator: Aggregator | None = None) -> Aggregator:
        aggregator = aggregator or self.aggregator()
        while aggregator.step(block_ms_max=1) or any(
            worker.pending for worker in aggregator.workers.values()
        ):
            pass
        return aggregator

    def rows(self, token: int = INFY, interval: str = "1m") -> list[Row]:
        """Completed rows, then the current one."""
        rows: Any = [*self.client.lrange(self.keys.candles(token, interval), 0, -1)]  # type: ignore[misc]
        current = self.client.hget(self.keys.current(token), interval)
        return [json.loads(row) for row in (*rows, *([current] if current else []))]

    def all_rows(self) -> dict[str, Any]:
        """Every row of the store, by key."""
        found: dict[str, Any] = {}
        for key in self.client.scan_iter(f"{self.settings.prefix}:*"):
            name = key.decode().removeprefix(self.settings.prefix)
            if ":candles:" in name:
                found[name] = self.client.lrange(key, 0, -1)
            elif ":current:" in name:
                found[name] = self.client.hgetall(key)
        return found

    def closed(
        self, token: int | None = None, interval: str | None = None
    ) -> list[tuple[int, str, int, int]]:
        """(token, interval, start, rev) as announced, shard after shard."""
        found: list[tuple[int, str, int, int]] = []
        for shard in range(self.keys.shards):
            for _, each in self.client.xrange(self.keys.closed(shard)):  # type: ignore[union-attr]
                start = json.loads(each[b"row"])[0]
                found.append((int(each[b"token"]), each[b"interval"].decode(), start, int(each[b"rev"])))
        return [each for each in found if token in (None, each[0]) and interval in (None, each[1])]

    def lag(self, token: int = INFY) -> int | None:
        groups: Any = self.client.xinfo_groups(self.keys.ticks(self.keys.shard_of(token)))
        return groups[0]["lag"]  # type: ignore[no-any-return]


@pytest.fixture
def make_store(client: redis.Redis, make_settings: Callable[..., Settings]) -> Iterator[Callable[..., Store]]:
    """`make_store(shards=1)`: event time, all day long, unless options say otherwise."""
    stores: list[Store] = []

    def make(**overrides: Any) -> Store:
        stores.append(Store(client, make_settings(**{**EVENT, **overrides})))
        return stores[-1]

    yield make
    for store in stores:
        for aggregator in store.started:
            aggregator.close()


@pytest.fixture
def store(make_store: Callable[..., Store]) -> Store:
    return make_store()


def some_frames(seconds: int = 900, tokens: tuple[int, ...] = (INFY, RELIANCE, TCS)) -> list[list[Row]]:
    """A quarter of an hour of trades, a frame every 5 seconds, prices that go up and down."""
    frames = [[tick(-30, 100, 1_000, token) for token in tokens]]
    for n, second in enumerate(range(0, seconds, 5)):
        price = 100 + round(5 * math.sin(n / 3), 2)
        frames.append(
            [tick(second, price + each % 7, 1_000 + 10 * n, each) for each in tokens if (n + each) % 4]
        )
    return frames


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


# -- restarts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dirty_max", [1, 2, 500])
def test_an_aggregator_that_dies_after_any_commit_leaves_what_an_undisturbed_one_would(
    make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch, dirty_max: int
) -> None:
    """Small commits end in the middle of what was read; the next owner goes on from there."""
    whole, torn = make_store(prefix="whole", shards=2), make_store(prefix="torn", shards=2)
    monkeypatch.setattr(aggregate_module, "DIRTY_MAX", dirty_max)
    monkeypatch.setattr(aggregate_module, "ENTRIES_MAX", 7)
    for frame in some_frames():
        for store in (whole, torn):
            store.send(*frame)
    whole.drain()
    lives = 0
    while lag_entries(torn.client, torn.keys):
        torn.aggregator().step(block_ms_max=1)
        lives += 1
    torn.drain()
    assert lives > 10
    assert torn.all_rows() == whole.all_rows()
    assert sorted(torn.closed()) == sorted(whole.closed())
    assert len(set(whole.closed())) == len(whole.closed()) and {rev for *_, rev in whole.closed()} == {0}


def test_a_commit_whose_reply_was_lost_is_not_made_twice(store: Store) -> None:
    for frame in some_frames(120):
        store.send(*frame)
    aggregator = store.drain()
    before = store.all_rows(), store.closed()
    # What it holds is a step behind what Redis has, as if the answer to its last commit had never come.
    worker = aggregator.workers[store.keys.shard_of(INFY)]
    store.send(tick(200, 50, 9_000))
    twin = store.aggregator()
    store.drain(twin)
    after = store.all_rows(), store.closed()
    assert after != before
    store.drain(aggregator)
    assert (store.all_rows(), store.closed()) == after
    assert aggregator.counts["fenced"] + aggregator.counts["stale"] >= 1
    assert aggregator.workers.get(worker.shard) is not worker


def test_of_two_owners_the_older_can_commit_nothing(store: Store) -> None:
    store.send(tick(-10, 100, 1_000))
    older = store.drain()
    newer = store.aggregator()
    store.send(tick(5, 101, 1_010))
    older.step(block_ms_max=1)
    assert older.counts["fenced"] == 1
    assert store.rows() == [] and store.lag() == 1
    store.drain(newer)
    assert newer.counts["fenced"] == 0
    assert store.rows() == [minute(0, 101, 101, 101, 101, volume=10, ticks=1)]


def test_a_flushed_store_starts_again(store: Store) -> None:
    store.send(tick(-10, 100, 1_000))
    store.send(tick(5, 101, 1_010))
    aggregator = store.drain()
    store.client.flushall()
    store.seqs.clear()
    store.send(tick(125, 100, 2_000))
    store.send(tick(130, 102, 2_010))
    wait_until(lambda: aggregator.step(block_ms_max=1) >= 0 and store.rows(), what="a row after the flush")
    assert [row[:6] for row in store.rows()] == [[START_S + 120, 102, 102, 102, 102, 10]]
    assert aggregator.counts["stale"] + aggregator.counts["fenced"] >= 1


def run_in_thread(aggregator: Aggregator) -> tuple[threading.Event, threading.Thread, list[BaseException]]:
    stop, failures = threading.Event(), []  # type: ignore[var-annotated]

    def run() -> None:
        try:
            aggregator.run(stop)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return stop, thread, failures


@contextlib.contextmanager
def running(aggregator: Aggregator) -> Iterator[None]:
    stop, thread, failures = run_in_thread(aggregator)
    try:
        yield
    finally:
        stop.set()
        thread.join(30)
    assert not thread.is_alive() and not failures, failures


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
def test_a_redis_that_is_killed_and_comes_back_costs_nothing(
    make_store: Callable[..., Store], make_settings: Callable[..., Settings], tmp_path: Path, server_kind: str
) -> None:
    whole = make_store()
    frames = some_frames()
    for frame in frames:
        whole.send(*frame)
    whole.drain()
    port = free_port()
    options = ("--port", str(port), "--appendonly", "yes", "--appendfsync", "everysec")
    settings = make_settings(**{**EVENT, "redis_url": f"redis://127.0.0.1:{port}/0", "lease_seconds": 0.5})
    with redis.Redis(port=port) as client:
        torn = Store(client, settings)
        aggregator = Aggregator(lambda: connect(settings), settings, now_ms=lambda: time.time() * 1000)
        with contextlib.ExitStack() as first_life:
            first_life.enter_context(running_server(tmp_path / "aof", *options, kind=server_kind))
            with running(aggregator):
                for frame in frames[:100]:
                    torn.send(*frame)
                wait_until(lambda: aggregator.counts["entries"] > 30, what="some commits")
                first_life.close()  # kill -9
                with running_server(tmp_path / "aof", *options, kind=server_kind):
                    for frame in frames[100:]:
                        torn.send(*frame)
                    wait_until(
                        lambda: torn.all_rows() == whole.all_rows(), what="the rows of an undisturbed run"
                    )
                    assert sorted(torn.closed()) == sorted(whole.closed())


@pytest.mark.parametrize("trouble", ["full", "functions"])
def test_an_aggregator_waits_for_a_redis_that_refuses_writes(store: Store, trouble: str) -> None:
    """Out of memory; its Functions gone: neither ends the worker, neither costs a tick."""
    store.send(tick(-10, 100, 1_000))
    store.drain().close()
    aggregator = Aggregator(
        lambda: connect(store.settings), store.settings, now_ms=lambda: time.time() * 1000
    )
    with running(aggregator):
        wait_until(lambda: len(aggregator.workers) == store.keys.shards, what="the shards")
        store.send(tick(5, 101, 1_010))
        wait_until(store.rows, what="a first row")
        if trouble == "full":
            store.client.config_set("maxmemory", "1")
            try:
                store.client.config_set("maxmemory", "0")
                store.send(tick(6, 102, 1_020))
                store.client.config_set("maxmemory", "1")
                wait_until(lambda: not aggregator.workers or store.lag() == 0, what="it to notice")
            finally:
                store.client.config_set("maxmemory", "0")
        else:
            store.client.function_flush("SYNC")
            store.send(tick(6, 102, 1_020))
        expected = [minute(0, 101, 102, 101, 102, volume=20, ticks=2)]
        wait_until(lambda: store.rows() == expected, what="the second tick")


# -- clocks ------------------------------------------------------------------------------------------


@pytest.fixture
def wall(make_store: Callable[..., Store]) -> Store:
    return make_store(clock="wall", intervals_text="1m,5m")


def test_a_candle_nobody_trades_in_any_more_closes_at_its_end_and_grace(wall: Store) -> None:
    wall.clock.set(4 * 60 + 1)
    wall.send(tick(-10, 100, 1_000))
    wall.send(tick(4 * 60 + 5, 101, 1_010))
    aggregator = wall.drain()
    wall.clock.set(5 * 60 + 1.999)
    aggregator.step(block_ms_max=1)
    assert wall.closed() == []
    wall.clock.set(5 * 60 + 2)
    aggregator.step(block_ms_max=1)
    assert sorted(wall.closed()) == [(INFY, "1m", START_S + 240, 0), (INFY, "5m", START_S, 0)]
    assert wall.client.hgetall(wall.keys.current(INFY)) == {}
    assert [row[0] for row in wall.rows()] == [START_S + 240]


def test_a_candle_that_was_open_when_its_aggregator_died_is_closed_by_the_next(wall: Store) -> None:
    wall.send(tick(-10, 100, 1_000))
    wall.send(tick(5, 101, 1_010))
    wall.drain()
    wall.clock.set(3600)
    wall.drain()
    assert sorted(wall.closed()) == [(INFY, "1m", START_S, 0), (INFY, "5m", START_S, 0)]


@pytest.mark.parametrize("restart", [False, True])
def test_a_backlog_is_not_closed_early_by_the_wall_clock(
    wall: Store, monkeypatch: pytest.MonkeyPatch, restart: bool
) -> None:
    """An hour late, read in pieces: what waits in the stream belongs into its candle before that is final."""
    monkeypatch.setattr(aggregate_module, "ENTRIES_MAX", 10)
    other = INFY + (wall.keys.shards << 8)
    wall.send(tick(-10, 100, 1_000), tick(-10, 100, 1_000, other))
    for second in range(55):
        wall.send(tick(second, 100 + second, 1_001 + second))
    for second in range(55):  # the same minute of another one, behind it in the stream
        wall.send(tick(second, 100 + second, 1_001 + second, other))
    wall.clock.set(3600)
    aggregator = wall.aggregator()
    while wall.lag():
        assert wall.closed() == []
        if restart:
            aggregator = wall.aggregator()
        aggregator.step(block_ms_max=1)
    wall.drain(aggregator)
    assert sorted(wall.closed(interval="1m")) == [(INFY, "1m", START_S, 0), (other, "1m", START_S, 0)]
    assert wall.rows(other) == [minute(0, 100, 154, 100, 154, volume=55, ticks=55)]


def test_a_tick_from_the_future_is_put_at_its_receipt_and_closes_nothing(
    wall: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    wall.clock.set(10)
    wall.send(tick(-10, 100, 1_000), tick(-10, 100, 1_000, RELIANCE))
    wall.send(tick(5, 101, 1_010, RELIANCE))
    at_ms = (START_S + 6) * 1000
    wall.send(tick(86_400 * 365, 102, 1_020), at_ms=at_ms)
    aggregator = wall.drain()
    assert aggregator.figures()["future_clamped"] == 1
    logged = [line for line in capsys.readouterr().err.splitlines() if "future_clamped_tick" in line]
    assert len(logged) == 1 and "408065" in logged[0]
    assert wall.closed() == []
    assert wall.rows() == [minute(0, 102, 102, 102, 102, volume=20, ticks=1)]


def test_a_straggler_within_the_grace_amends_in_silence_and_a_late_one_is_announced(store: Store) -> None:
    store.send(tick(-10, 100, 1_000))
    store.send(tick(5, 101, 1_010))
    store.send(tick(61, 102, 1_030))
    store.send(tick(59, 103, 1_020))  # within the grace
    aggregator = store.drain()
    assert store.closed() == []
    store.send(tick(63, 102, 1_031))
    store.drain(aggregator)
    assert store.closed(interval="1m") == [(INFY, "1m", START_S, 0)]
    store.send(tick(58, 90, 1_015))  # too late: it is final, and is corrected
    store.drain(aggregator)
    assert store.closed(interval="1m") == [(INFY, "1m", START_S, 0), (INFY, "1m", START_S, 1)]
    assert store.rows()[0] == minute(0, 101, 103, 90, 103, volume=20, ticks=3)


def test_ticks_late_beyond_the_window_amend_their_rows_with_a_raised_rev_that_survives_a_restart(
    store: Store,
) -> None:
    for n in range(8):
        store.send(tick(60 * n + 5, 100, 1_000 + 10 * n))
    store.drain()
    first = store.rows()
    for life, price in enumerate((110, 120, 130), 1):
        store.send(tick(60 * 2 + 5 + life / 10, price, 1_020))
        store.drain()  # a new aggregator each time
        assert store.closed(interval="1m")[-1] == (INFY, "1m", START_S + 120, life)
        row = next(row for row in store.rows() if row[0] == START_S + 120)
        assert row[2] == price and row[7] == 1 + life
    assert [row[0] for row in store.rows()] == [row[0] for row in first]
    assert sum(row[5] for row in store.rows()) == sum(row[5] for row in first)


def test_the_volume_that_a_late_tick_adds_is_taken_from_the_next_open_candle(store: Store) -> None:
    for n in range(8):
        store.send(tick(60 * n + 5, 100, 1_000 + 10 * n))
    aggregator = store.drain()
    for life, n in enumerate((5, 4, 3, 5)):
        store.send(tick(60 * n + 30 + life, 101, 1_000 + 10 * n + 4 + life))
        aggregator = store.drain(aggregator if life % 2 else None)  # by the same, and by its successor
    volumes = {(row[0] - START_S) // 60: row[5] for row in store.rows()}
    assert volumes == {1: 10, 2: 10, 3: 16, 4: 9, 5: 12, 6: 3, 7: 10}


def test_a_minute_that_was_empty_gets_its_row_in_its_place(store: Store) -> None:
    for n in (0, 1, 4, 5, 6, 7):
        store.send(tick(60 * n + 5, 100, 1_000 + 10 * n))
    aggregator = store.drain()
    store.send(tick(60 * 2 + 5, 95, 1_020))
    store.drain(aggregator)
    starts = [row[0] - START_S for row in store.rows()]
    assert starts == sorted(set(starts)) and 120 in starts
    assert sum(row[5] for row in store.rows()) == 70
    store.send(tick(60 * 2 + 15, 94, 1_021))
    store.drain(aggregator)
    announced = [rev for _, _, start, rev in store.closed(interval="1m") if start == START_S + 120]
    assert announced == [0, 1]  # its first tick is its first announcement


def test_a_tick_older_than_the_first_row_opens_its_candle_while_the_list_has_room(store: Store) -> None:
    store.send(tick(5, 100, 1_000))
    for n in range(3, 8):
        store.send(tick(60 * n + 5, 100, 1_000 + 10 * n))
    aggregator = store.drain()
    store.send(tick(60 + 5, 95, 1_010), tick(20, 90, 1_005))
    store.drain(aggregator)
    assert store.rows()[:2] == [
        [*minute(0, 90, 90, 90, 90, volume=5, ticks=1), "partial"],
        minute(1, 95, 95, 95, 95, volume=5, ticks=1),
    ]
    assert sum(row[5] for row in store.rows()) == 70


# -- streams -----------------------------------------------------------------------------------------


def test_applied_entries_are_trimmed_and_waiting_ones_are_not(make_store: Callable[..., Store]) -> None:
    store = make_store(shards=1, stream_retention_seconds=0.001)
    for n in range(1_000):
        store.send(tick(n / 10, 100, 1_000 + n))
    store.clock.ms = time.time() * 1000 + 60_000
    aggregator = store.drain()
    store.clock.ms += 10_000
    aggregator.step(block_ms_max=1)
    assert store.client.xlen(store.keys.ticks(0)) <= 100  # one node
    for n in range(1_000):
        store.send(tick(100 + n / 10, 100, 2_000 + n))
    store.clock.ms += 10_000
    aggregator.close()  # nobody applies
    assert store.lag() == 1_000
    assert store.client.xlen(store.keys.ticks(0)) >= 1_000


def test_a_stream_cut_by_the_hard_cap_shows_no_lag_once_it_is_read(make_store: Callable[..., Store]) -> None:
    store = make_store(shards=1)
    store.send(tick(-10, 100, 1_000))
    aggregator = store.drain()
    for n in range(1_000):
        store.send(tick(n / 10, 100, 1_001 + n))
    store.client.xtrim(store.keys.ticks(0), maxlen=100, approximate=False)
    store.drain(aggregator)
    assert store.lag() == 0 and lag_entries(store.client, store.keys) == 0
    store.send(tick(200, 100, 5_000))
    assert store.lag() == 1
    store.drain(aggregator)
    assert store.lag() == 0
    assert sum(row[5] for row in store.rows()) == 4_000  # cumulative volumes bridge the hole
