"""Repairs through a real store and the aggregator: exactly once, in order, at any crash in between."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from pkbrokers_redis.aggregate import repairs as repair_module
from pkbrokers_redis.aggregate import worker as aggregate_module
from pkbrokers_redis.aggregate.worker import Aggregator
from pkbrokers_redis.candles.rows import start_of
from pkbrokers_redis.runtime.health import check_volumes
from pkbrokers_redis.store.commit import touched_keys
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.repairs import is_applied, send_gap, send_rows
from tests.aggregate.stores import (
    INFY,
    RELIANCE,
    START_S,
    TCS,
    Row,
    Store,
    make_store,
    minute,
    tick,
)
from tests.store.test_repairs import MALFORMED

__all__ = ["make_store"]  # a fixture

VALKEY = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
WALL = {"clock": "wall", "intervals_text": "1m,5m,60m,day"}


@pytest.fixture(autouse=True)
def _look_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair_module, "READ_EVERY_SECONDS", 0.0)


class Shop(Store):
    """A store whose history can be asked too."""

    def gap(self, first: float, last: float, *tokens: int) -> None:
        send_gap(
            self.client,
            self.keys,
            tokens or [INFY],
            (START_S + first) * 1000,
            (START_S + last) * 1000,
            "mute",
        )

    def rows_from_history(
        self, first: int, last: int, *rows: Row, token: int = INFY, interval: str = "1m"
    ) -> str:
        return send_rows(
            self.client, self.keys, token, interval, START_S + first, START_S + last, rows, "gap"
        )

    def apply_all(self, aggregator: Aggregator) -> Aggregator:
        """Until every repair is applied."""
        last: list[tuple[int, str]] = []
        for shard in range(self.keys.shards):
            found: Any = self.client.xrevrange(self.keys.repairs(shard), count=1)
            last += [(shard << 8, entry_id.decode()) for entry_id, _ in found]
        for _ in range(200):
            aggregator.step(block_ms_max=1)
            if all(is_applied(self.client, self.keys, token, entry_id) for token, entry_id in last):
                return aggregator
        raise AssertionError("repairs are left")

    def adds_up(self) -> bool:
        found = check_volumes(self.client, self.keys)
        return found.checked > 0 and not found.wrong and not found.malformed

    def starts(self, token: int = INFY, interval: str = "1m") -> list[int]:
        return [row[0] for row in self.rows(token, interval)]


@pytest.fixture
def shop(make_store: Callable[..., Store], client: redis.Redis) -> Iterator[Shop]:
    store = make_store(shards=1)
    shop = Shop(client, store.settings)
    yield shop
    for aggregator in shop.started:
        aggregator.close()


@pytest.fixture
def wall_shop(make_store: Callable[..., Store], client: redis.Redis) -> Iterator[Shop]:
    """By the clock, NSE's hours."""
    shop = Shop(client, make_store(shards=1, sessions="market", **WALL).settings)
    yield shop
    for aggregator in shop.started:
        aggregator.close()


def history(n: int, *prices: float, volume: int) -> Row:
    return [START_S + 60 * n, *prices, volume, None]


LOST = (history(1, 103, 109, 99, 106, volume=60), history(2, 106, 106, 105, 105, volume=20))


def with_an_outage(shop: Shop) -> None:
    """09:16:10 to 09:17:05 is lost; what was traded then is in 09:17."""
    shop.send(tick(-10, 100, 1_000))
    shop.send(tick(5, 101, 1_010), tick(50, 102, 1_020), tick(65, 103, 1_030))
    shop.send(tick(130, 105, 1_100), tick(185, 104, 1_110))


def test_an_outage_is_flagged_repaired_and_announced(shop: Shop) -> None:
    with_an_outage(shop)
    aggregator = shop.drain()
    shop.gap(70, 125)
    shop.apply_all(aggregator)
    assert shop.rows() == [
        minute(0, 101, 102, 101, 102, volume=20, ticks=2),
        [*minute(1, 103, 103, 103, 103, volume=10, ticks=1), "gap"],
        [*minute(2, 105, 105, 105, 105, volume=70, ticks=1), "gap"],
        minute(3, 104, 104, 104, 104, volume=10, ticks=1),
    ]
    assert shop.rows(interval="5m")[0][8] == "gap"
    assert shop.rows(interval="60m")[0][8] == "partial"  # it began before we did
    shop.rows_from_history(60, 180, *LOST)
    shop.apply_all(aggregator)
    assert shop.rows() == [
        minute(0, 101, 102, 101, 102, volume=20, ticks=2),
        [*minute(1, 103, 109, 99, 106, volume=60, ticks=1), "backfilled"],
        [*minute(2, 106, 106, 105, 105, volume=20, ticks=1), "backfilled"],
        minute(3, 104, 104, 104, 104, volume=10, ticks=1),
    ]
    assert shop.rows(interval="5m") == [[START_S, 101, 109, 99, 104, 110, None, 5, "backfilled"]]
    assert shop.rows(interval="60m")[0][1:] == [101, 109, 99, 104, 110, None, 5, "partial"]
    assert [rev for _, name, start, rev in shop.closed() if (name, start) == ("1m", START_S + 60)] == [
        0,
        1,
        2,
    ]
    assert shop.adds_up()
    counts = aggregator.figures()
    assert (counts["repairs"], counts["repaired_rows"], counts["malformed_repairs"]) == (2, 5, 0)
    assert counts["gap_marks"] == 3


@VALKEY
def test_a_successor_remembers_the_outage_and_applies_nothing_twice(shop: Shop) -> None:
    with_an_outage(shop)
    shop.gap(70, 250)
    shop.apply_all(shop.drain())
    successor = shop.aggregator()
    shop.send(tick(245, 104, 1_120), tick(305, 104, 1_130))
    shop.drain(successor)
    assert [row[8:] for row in shop.rows()] == [[], ["gap"], ["gap"], ["gap"], ["gap"], []]
    announced = shop.closed()
    shop.apply_all(successor)
    third = shop.apply_all(shop.aggregator())
    assert shop.closed() == announced and third.figures()["repairs"] == 0


@VALKEY
def test_only_the_owner_of_the_shard_repairs_and_does_so_once(shop: Shop) -> None:
    with_an_outage(shop)
    first = shop.drain()
    shop.gap(70, 125)
    shop.rows_from_history(60, 180, *LOST)
    second = shop.aggregator()
    for _ in range(3):
        first.step(block_ms_max=1)
    assert first.figures()["fenced"] == 1 and len(shop.rows()[1]) == 8
    shop.apply_all(second)
    assert second.figures()["repairs"] == 2
    assert [rev for _, name, start, rev in shop.closed() if (name, start) == ("1m", START_S + 60)] == [0, 1]
    assert shop.adds_up()


@VALKEY
def test_a_rolled_back_redis_gets_the_repair_again(shop: Shop) -> None:
    with_an_outage(shop)
    aggregator = shop.drain()
    before = {key: shop.client.dump(key) for key in shop.client.scan_iter()}
    shop.gap(70, 125)
    shop.rows_from_history(60, 180, *LOST)
    shop.apply_all(aggregator)
    repaired = shop.all_rows()
    sent: Any = shop.client.xrange(shop.keys.repairs(0))
    for key, dump in before.items():  # the state of an older moment, but for the entries themselves
        shop.client.restore(key, 0, dump or b"", replace=True)
    shop.send(tick(190, 104, 1_111))
    shop.drain(aggregator)
    assert aggregator.figures()["stale"] >= 1
    shop.apply_all(aggregator)
    assert shop.client.hget(shop.keys.cursor(0), "repair") == sent[-1][0]
    assert (
        shop.rows()[:3] == [json.loads(text) for text in repaired[f":{{0}}:candles:{INFY}:1m"]]
        and shop.adds_up()
    )


@VALKEY
def test_a_repair_that_redis_never_had_is_not_committed(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    with_an_outage(shop)
    aggregator = shop.drain()
    shop.gap(70, 125)
    (worker,) = aggregator.workers.values()
    aggregator._repairs.read(shop.client, [worker])
    assert len(worker.repairs) == 1
    shop.client.delete(shop.keys.repairs(0))  # it was a replica's, which does not know it
    for _ in range(3):
        aggregator.step(block_ms_max=1)
    assert aggregator.figures()["stale"] == 1
    assert [len(row) for row in shop.rows()] == [8] * 4
    assert shop.client.hget(shop.keys.cursor(0), "repair") is None


@VALKEY
def test_history_waits_for_the_ticks_that_were_there_before_it(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aggregate_module, "ENTRIES_MAX", 1)
    shop.send(tick(-10, 100, 1_000))
    for n in range(5):
        shop.send(tick(60 * n + 5, 101, 1_010 + 10 * n))
    shop.rows_from_history(
        0, 120, history(0, 101, 102, 100, 101, volume=10), history(1, 101, 101, 101, 101, volume=10)
    )
    aggregator = shop.aggregator()
    while shop.client.hget(shop.keys.cursor(0), "repair") is None:
        aggregator.step(block_ms_max=1)
    assert [row[1:6] for row in shop.rows()] == [[101, 102, 100, 101, 10], *[[101, 101, 101, 101, 10]] * 4]
    assert shop.adds_up() and aggregator.figures()["already_backfilled"] == 0


# -- warm start --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_first", [True, False])
@VALKEY
def test_a_restart_at_noon_has_the_morning_and_only_its_own_volume(wall_shop: Shop, rows_first: bool) -> None:
    shop, noon = wall_shop, 165 * 60
    morning = [history(n, 100, 101, 99, 100, volume=10) for n in range(165)]
    shop.clock.set(noon + 30)
    aggregator = shop.aggregator()
    if rows_first:
        shop.rows_from_history(0, noon, *morning)
        aggregator = shop.apply_all(aggregator)
    shop.send(tick(noon + 20, 100, 5_000))
    shop.drain(aggregator)
    if not rows_first:
        shop.rows_from_history(0, noon, *morning)
        shop.apply_all(aggregator)
    shop.send(tick(noon + 40, 102, 5_030))
    shop.drain(aggregator)
    assert len(shop.rows()) == 166 and shop.adds_up()
    assert shop.rows()[-1] == [*minute(165, 102, 102, 102, 102, volume=30, ticks=1), "partial"]
    assert [row[5] for row in shop.rows(interval="60m")] == [600, 600, 480]
    assert all(rev == 1 for _, name, start, rev in shop.closed() if start < START_S + noon)
    assert len([each for each in shop.closed() if each[1] == "1m"]) == 165

    shop.clock.set(noon + 63)
    shop.rows_from_history(noon, noon + 60, history(165, 101, 102, 98, 102, volume=130))
    shop.apply_all(aggregator)
    assert shop.rows()[-1][1:] == [101, 102, 98, 102, 130, None, 1, "backfilled"]
    assert sum(row[5] for row in shop.rows()) == 1_780 and shop.adds_up()
    assert [row[5] for row in shop.rows(interval="60m")] == [600, 600, 580]
    assert shop.rows(interval="60m")[-1][8] == "backfilled"


@VALKEY
def test_a_reader_sees_every_start_once_and_in_order_while_rows_are_repaired(shop: Shop) -> None:
    for n in range(-1, 200, 2):
        shop.send(tick(60 * n + 5, 100, 1_000 + n))
    aggregator = shop.drain()
    trouble: list[Any] = []
    seen: set[int] = set()
    stop = threading.Event()

    def read() -> None:
        with connect(shop.settings) as reader:
            while not stop.is_set():
                texts: Any = reader.lrange(shop.keys.candles(INFY, "1m"), 0, -1)
                starts = [start_of(text) or 0 for text in texts]
                seen.add(len(starts))
                if starts != sorted(set(starts)) or len(starts) < 99:
                    trouble.append(starts)

    thread = threading.Thread(target=read)
    thread.start()
    for first in range(0, 190, 10):
        span = range(first, first + 10)
        shop.rows_from_history(
            60 * first, 60 * first + 600, *(history(n, 100, 101, 99, 100, volume=2) for n in span)
        )
    shop.apply_all(aggregator)
    stop.set()
    thread.join()
    assert trouble == [] and seen
    assert shop.starts() == sorted(set(shop.starts())) and len(shop.starts()) > 190
    assert shop.adds_up()


@VALKEY
def test_revisions_only_rise_however_many_rows_are_repaired(shop: Shop) -> None:
    for n in range(-1, 100):
        shop.send(tick(60 * n + 5, 100, 1_000 + n))
    aggregator = shop.drain()
    for high in (101, 102, 103):
        rows = [history(n, 100, high, 99, 100, volume=1) for n in range(97)]
        shop.rows_from_history(0, 97 * 60, *rows)
        shop.apply_all(aggregator)
        aggregator = shop.aggregator()
    revs: dict[tuple[str, int], list[int]] = {}
    for _, name, start, rev in shop.closed():
        revs.setdefault((name, start), []).append(rev)
    assert all(each == sorted(set(each)) for each in revs.values())
    assert sum(len(each) == 4 for (name, _), each in revs.items() if name == "1m") == 97


@pytest.mark.parametrize("minutes", [3, 40])  # rows put one by one, and lists written as a whole
def test_rows_of_another_writer_in_a_list_stay(shop: Shop, minutes: int) -> None:
    for n in range(-1, 60):
        shop.send(tick(60 * n + 5, 100, 1_000 + n))
    aggregator = shop.drain()
    key = shop.keys.candles(INFY, "1m")
    shop.client.linsert(key, "AFTER", str(shop.client.lindex(key, 1), "ascii"), "not\na row")  # type: ignore[arg-type]
    shop.rows_from_history(
        0, 60 * minutes, *(history(n, 100, 101, 99, 100, volume=1) for n in range(minutes))
    )
    shop.apply_all(aggregator)
    texts: Any = shop.client.lrange(key, 0, -1)
    assert texts.index(b"not\na row") == 2
    assert [json.loads(text)[8:] for text in texts if text != b"not\na row"][:minutes] == [
        ["backfilled"]
    ] * minutes


# -- what another writer writes ----------------------------------------------------------------------

HOSTILE: list[dict[str, Any]] = [
    *MALFORMED,
    {"kind": "rows", "token": INFY, "interval": "7m", "from": START_S, "to": START_S + 60, "rows": "[]"},
    {"kind": "rows", "token": INFY, "interval": "\x00", "from": START_S, "to": START_S + 60, "rows": "[]"},
    {"kind": "rows", "token": INFY, "interval": "1m", "from": START_S, "to": START_S + 60,
     "rows": f"[[{START_S},1,2,3,4,5,6],[{START_S + 1},1,1,1,1,1,1],[{'9' * 300},1,1,1,1,1,1],"
             f"[{START_S},1e999,1,1,1,1,1]]"},
]  # fmt: skip


@VALKEY
def test_malformed_repairs_are_counted_logged_once_and_skipped(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    with_an_outage(shop)
    aggregator = shop.drain()
    before = shop.all_rows()
    for fields in HOSTILE:
        shop.client.xadd(shop.keys.repairs(0), fields or {"": ""})  # type: ignore[arg-type]
    shop.apply_all(aggregator)
    assert aggregator.figures()["malformed_repairs"] == len(HOSTILE)
    assert shop.all_rows() == before
    assert capsys.readouterr().err.count("event=malformed_repair") == 1
    shop.rows_from_history(60, 180, *LOST)
    shop.apply_all(aggregator)
    assert shop.rows()[1][8] == "backfilled" and shop.adds_up()


@VALKEY
def test_a_repair_in_the_wrong_shard_is_malformed(make_store: Callable[..., Store]) -> None:
    store = make_store(shards=8)
    shop = Shop(store.client, store.settings)
    with_an_outage(shop)
    aggregator = store.drain()
    other = shop.keys.repairs(shop.keys.shard_of(RELIANCE))
    shop.rows_from_history(60, 180, *LOST)
    (entry,) = shop.client.xrange(shop.keys.repairs(shop.keys.shard_of(INFY)))  # type: ignore[misc]
    shop.client.rename(shop.keys.repairs(shop.keys.shard_of(INFY)), other)
    shop.gap(70, 125, INFY, TCS, 123_456 << 8)
    shop.apply_all(aggregator)
    assert entry and aggregator.figures()["malformed_repairs"] == 1
    assert [row[8:] for row in shop.rows()] == [[], ["gap"], ["gap"], []]


@VALKEY
def test_a_repair_key_of_another_type_is_logged_and_the_other_shards_continue(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(repair_module, "WRONG_TYPE_RETRY_SECONDS", 0.0)
    shop.client.set(shop.keys.repairs(0), "mine")
    with_an_outage(shop)
    aggregator = shop.drain()
    assert len(shop.rows()) == 4
    assert capsys.readouterr().err.count("event=wrong_type") == 1
    shop.client.delete(shop.keys.repairs(0))
    shop.gap(70, 125)
    shop.apply_all(aggregator)
    assert shop.rows()[1][8] == "gap"


@VALKEY
def test_applied_repairs_are_trimmed_except_the_last(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregate_module, "TRIM_EVERY_MS", 0)
    with_an_outage(shop)
    aggregator = shop.drain()
    for _ in range(30):
        shop.gap(70, 125)
    shop.apply_all(aggregator)
    aggregator.step(block_ms_max=1)
    assert shop.client.xlen(shop.keys.repairs(0)) == 1
    assert len(shop.rows()[1]) == 9 and aggregator.figures()["gap_marks"] == 3


@VALKEY
def test_an_old_outage_of_many_instruments_marks_their_lists(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repair_module, "LISTS_AT_ONCE", 4)
    tokens = [INFY + (n << 8) for n in range(10)]
    for n in range(-1, 20):
        shop.send(*(tick(60 * n + 5, 100, 1_000 + n, token) for token in tokens))
    aggregator = shop.drain()
    shop.gap(130, 250, *tokens)
    shop.apply_all(aggregator)
    for token in tokens:
        marked = [(row[0] - START_S) // 60 for row in shop.rows(token) if row[8:] == ["gap"]]
        assert marked == [2, 3, 4]
        assert [row[8:] for row in shop.rows(token, "5m")] == [["gap"], [], [], []]


def test_the_keys_a_repair_writes_are_named_for_a_cluster() -> None:
    sections = [0, 0, 1, 7, "1m", 2, b"[60]", b"[120]", 1, 7, "5m", 300, 78, b"[300]", 0, 0]
    assert touched_keys("pkb:{0}:", sections) == ["pkb:{0}:candles:7:1m", "pkb:{0}:candles:7:5m"]
