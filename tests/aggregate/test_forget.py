"""A token that another contract has now: nothing of the old one is left, at any crash in between."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from pkbrokers_redis.aggregate import repairs as repair_module
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.store.instruments import swap_master
from pkbrokers_redis.store.repairs import send_forget
from tests.aggregate.stores import START_S, Store, make_store, minute, tick
from tests.aggregate.test_repair import Shop, history

__all__ = ["make_store"]  # a fixture

pytestmark = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)

OPTION, OTHER = 45_000 << 8 | 2, 45_001 << 8 | 2
CALL, PUT = "NIFTY26N1724000CE", "NIFTY26N2426500PE"


@pytest.fixture(autouse=True)
def _look_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair_module, "READ_EVERY_SECONDS", 0.0)


@pytest.fixture
def shop(make_store: Callable[..., Store], client: redis.Redis) -> Iterator[Shop]:
    """Two options with candles, a quote and amended rows."""
    shop = Shop(client, make_store(shards=1).settings)
    name(shop, CALL)
    for token in (OPTION, OTHER):
        client.hset(shop.keys.quote(token), "last_price", "920")
    shop.send(
        *(tick(second, 850, 100 + second, token) for token in (OPTION, OTHER) for second in (0, 10, 70, 130))
    )
    aggregator = shop.drain()
    shop.rows_from_history(0, 60, history(0, 800, 900, 800, 850, volume=5), token=OPTION)
    shop.apply_all(aggregator)
    yield shop
    for each in shop.started:
        each.close()


def name(shop: Shop, option: str) -> int:
    """The master of a day: one token's contract has changed, perhaps."""
    rows = [
        {"instrument_token": str(token), "tradingsymbol": symbol, "exchange": "NFO", "name": "NIFTY"}
        for token, symbol in ((OPTION, option), (OTHER, "NIFTY26DECFUT"))
    ]
    return swap_master(shop.client, shop.keys, rows, ["NFO"]).reassigned


def left(shop: Shop) -> list[str]:
    """Keys and fields that speak of the option, its name aside."""
    fields: Any = shop.client.hkeys(shop.keys.state(0))
    keys = [key.decode() for key in shop.client.scan_iter(f"*:{OPTION}*")]
    return [key for key in keys if ":instrument:" not in key] + [
        field.decode() for field in fields if field.startswith(b"%d" % OPTION)
    ]


def test_nothing_of_the_old_contract_is_left_and_the_new_one_begins(shop: Shop) -> None:
    others = {key: rows for key, rows in shop.all_rows().items() if f":{OTHER}" in key}
    assert len(left(shop)) >= 6
    assert name(shop, PUT) == 1
    aggregator = shop.apply_all(shop.started[-1])
    assert left(shop) == [] and aggregator.figures()["forgotten"] == 1
    assert shop.all_rows() == others
    store = CandleStore(shop.settings, client=shop.client)
    assert store.get_candles(f"NFO:{PUT}", "1m", include_current=True) == []
    shop.clock.set(190)
    for second, price, volume in ((190, 3.1, 75), (250, 3.2, 150), (310, 3.3, 160)):
        shop.send(tick(second, price, volume, OPTION))
    shop.drain(aggregator)
    assert shop.rows(OPTION) == [
        minute(4, 3.2, 3.2, 3.2, 3.2, volume=75, ticks=1), minute(5, 3.3, 3.3, 3.3, 3.3, volume=10, ticks=1),
    ]  # fmt: skip
    announced: Any = [fields for _, fields in shop.client.xrange(shop.keys.closed(0))]  # type: ignore[union-attr]
    symbols = {each[b"symbol"] for each in announced if json.loads(each[b"row"])[0] == START_S + 240}
    assert symbols == {f"NFO:{PUT}".encode()}
    assert shop.adds_up()


def test_a_forget_waits_for_an_aggregator_and_for_the_ticks_before_it(shop: Shop) -> None:
    shop.send(tick(200, 851, 400, OPTION))
    shop.evict()
    name(shop, PUT)
    shop.apply_all(shop.aggregator())
    assert left(shop) == []


def test_forgetting_twice_equals_once_and_a_successor_does_not_repeat_it(shop: Shop) -> None:
    name(shop, PUT)
    send_forget(shop.client, shop.keys, [OPTION], "reassigned")
    shop.apply_all(shop.started[-1])
    shop.send(tick(190, 3.1, 75, OPTION), tick(250, 3.2, 150, OPTION))
    shop.drain(shop.started[-1])
    before = shop.all_rows()
    successor = shop.drain()
    assert shop.all_rows() == before and successor.figures()["forgotten"] == 0


def test_history_before_a_forget_is_deleted_and_history_after_it_stays(shop: Shop) -> None:
    old, new = history(1, 500, 500, 500, 500, volume=9), history(1, 3, 3, 3, 3, volume=7)
    shop.rows_from_history(60, 120, old, token=OPTION)
    name(shop, PUT)
    shop.rows_from_history(60, 120, new, token=OPTION)
    shop.apply_all(shop.started[-1])
    assert [row[:6] for row in shop.rows(OPTION)] == [new[:6]]


def test_only_the_owner_of_the_shard_forgets(shop: Shop) -> None:
    before = left(shop)
    name(shop, PUT)
    first, second = shop.started[-1], shop.aggregator()
    for _ in range(3):
        first.step(block_ms_max=1)
    assert first.figures()["fenced"] == 1 and left(shop) == before
    shop.apply_all(second)
    assert left(shop) == []


def test_an_aggregator_killed_before_the_commit_leaves_the_forget_to_its_successor(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    name(shop, PUT)
    with monkeypatch.context() as patch:
        patch.setattr("pkbrokers_redis.aggregate.worker.queue_commit", die)
        with pytest.raises(KeyboardInterrupt):
            shop.apply_all(shop.started[-1])
    assert left(shop) != []
    shop.apply_all(shop.aggregator())
    assert left(shop) == []
