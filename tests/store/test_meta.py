"""`P:meta`: written once, agreed to by workers, adopted by readers."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import redis

from pkbrokers_redis.candles.model import DEFAULT_INTERVALS
from pkbrokers_redis.errors import MetaMismatch, SettingsError, WrongKeyType
from pkbrokers_redis.settings import DEFAULT_INTERVALS_TEXT, Settings
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.meta import adopt_meta, ensure_meta, keep_meta, read_meta

NOW = "2026-08-03T09:00:00+05:30"
Make = Callable[..., Settings]


def test_the_first_worker_writes_what_the_store_is_made_with(client: redis.Redis, settings: Settings) -> None:
    assert read_meta(client, "pkb") is None
    ensure_meta(client, settings, NOW)
    assert client.hgetall("pkb:meta") == {
        b"schema": b"2",
        b"shards": b"8",
        b"intervals": ",".join(each.name for each in DEFAULT_INTERVALS).encode(),
        b"max_candles": ",".join(str(each.keep) for each in DEFAULT_INTERVALS).encode(),
        b"created_at": NOW.encode(),
    }
    meta = read_meta(client, "pkb")
    assert meta is not None and (meta["shards"], meta["created_at"]) == ("8", NOW)


def test_the_intervals_that_readers_rely_on_are_among_the_default_ones() -> None:
    kept = {
        "1m": 390,
        "2m": 195,
        "3m": 130,
        "4m": 98,
        "5m": 78,
        "10m": 39,
        "15m": 26,
        "30m": 13,
        "60m": 7,
        "day": 365,
    }
    assert kept.items() <= {each.name: each.keep for each in DEFAULT_INTERVALS}.items()


def test_the_second_worker_changes_nothing(client: redis.Redis, settings: Settings) -> None:
    ensure_meta(client, settings, NOW)
    ensure_meta(client, settings, "2030-01-01T00:00:00+05:30")
    assert client.hget("pkb:meta", "created_at") == NOW.encode()


def test_a_running_worker_writes_meta_again_and_refuses_a_second_store_beside_its_own(
    client: redis.Redis, make_settings: Make
) -> None:
    mine, other = make_settings(), make_settings(shards=4)
    ensure_meta(client, mine, NOW)
    client.flushall()
    keep_meta(client, mine, NOW)
    with pytest.raises(MetaMismatch, match="shards"):
        ensure_meta(client, other, NOW)
    client.flushall()
    ensure_meta(client, other, NOW)  # it was faster
    with pytest.raises(MetaMismatch, match="shards"):
        keep_meta(client, mine, NOW)


@pytest.mark.parametrize(
    ("field", "overrides"),
    [
        ("shards", {"shards": 4}),
        ("intervals", {"intervals_text": "1m,5m"}),
        ("max_candles", {"intervals_text": DEFAULT_INTERVALS_TEXT.replace("1m,", "1m:7,", 1)}),
    ],
)
def test_worker_with_other_settings_is_refused_with_the_field(
    client: redis.Redis, make_settings: Make, field: str, overrides: dict[str, object]
) -> None:
    ensure_meta(client, make_settings(), NOW)
    before = client.hgetall("pkb:meta")
    with pytest.raises(MetaMismatch) as caught:
        ensure_meta(client, make_settings(**overrides), NOW)
    assert caught.value.field == field and field in str(caught.value) and caught.value.hint
    assert client.hgetall("pkb:meta") == before


def test_a_store_of_another_schema_is_refused_by_workers_and_readers(
    client: redis.Redis, settings: Settings
) -> None:
    ensure_meta(client, settings, NOW)
    client.hset("pkb:meta", "schema", "0")
    with pytest.raises(MetaMismatch) as caught:
        ensure_meta(client, settings, NOW)
    assert caught.value.field == "schema"
    with pytest.raises(MetaMismatch):
        adopt_meta(client, settings)


def test_incomplete_meta_is_refused_and_unchanged(client: redis.Redis, settings: Settings) -> None:
    client.hset("pkb:meta", mapping={"schema": "2", "shards": "8"})
    with pytest.raises(MetaMismatch) as caught:
        ensure_meta(client, settings, NOW)
    assert caught.value.field == "intervals"
    assert client.hlen("pkb:meta") == 2


def test_two_first_workers_with_other_settings_leave_one_complete_meta(
    client: redis.Redis, make_settings: Make
) -> None:
    for _ in range(20):
        client.flushall()
        makes = [make_settings(shards=4, intervals_text="1m"), make_settings(shards=2, intervals_text="5m")]
        clients = [connect(settings) for settings in makes]
        refused: list[str] = []
        together = threading.Barrier(2)

        def work(index: int) -> None:
            together.wait()  # noqa: B023  joined within the round
            try:
                ensure_meta(clients[index], makes[index], NOW)  # noqa: B023
            except MetaMismatch as error:
                refused.append(error.field)  # noqa: B023

        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stored = read_meta(client, "pkb")
        assert stored is not None
        assert (stored["shards"], stored["intervals"]) in {("4", "1m"), ("2", "5m")}
        assert refused == ["shards"]
        for each in clients:
            each.close()


def test_a_key_of_another_type_is_named(client: redis.Redis, settings: Settings) -> None:
    client.set("pkb:meta", "mine")
    for attempt in (
        lambda: ensure_meta(client, settings, NOW),
        lambda: read_meta(client, "pkb"),
        lambda: adopt_meta(client, settings),
    ):
        with pytest.raises(WrongKeyType, match="pkb:meta holds a string, not a hash"):
            attempt()
    assert client.get("pkb:meta") == b"mine"


def test_each_prefix_is_a_separate_store(client: redis.Redis, make_settings: Make) -> None:
    ensure_meta(client, make_settings(), NOW)
    ensure_meta(client, make_settings(prefix="other", shards=2), NOW)
    assert client.hget("other:meta", "shards") == b"2"


def test_a_reader_adopts_the_stores_shards_and_intervals(client: redis.Redis, make_settings: Make) -> None:
    ensure_meta(client, make_settings(shards=3, intervals_text="1m,2h:50"), NOW)
    reader = make_settings()
    assert reader.keys.shards == 8 and len(reader.intervals) == len(
        DEFAULT_INTERVALS
    )  # cached before the adoption
    adopted = adopt_meta(client, reader)
    assert adopted.shards == adopted.keys.shards == 3
    assert [(each.name, each.seconds, each.keep) for each in adopted.intervals] == [
        ("1m", 60, 390),
        ("2h", 7200, 50),
    ]
    assert adopted.redis_url == reader.redis_url
    assert reader.keys.shards == 8


def test_without_a_store_a_readers_settings_stay(client: redis.Redis, settings: Settings) -> None:
    assert adopt_meta(client, settings) is settings


@pytest.mark.parametrize(
    "damage",
    [
        {"shards": "many"},
        {"shards": "0"},
        {"intervals": "1m,often"},
        {"max_candles": "1"},
        {"intervals": b"\xff"},
    ],
)
def test_malformed_meta_is_one_line(
    client: redis.Redis, settings: Settings, damage: dict[str, str | bytes]
) -> None:
    ensure_meta(client, settings, NOW)
    client.hset("pkb:meta", mapping=damage)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="pkb:meta cannot be read"):
        adopt_meta(client, settings)


def make_previous_store(client: redis.Redis, settings: Settings) -> None:
    """A store as the previous release left it."""
    ensure_meta(client, settings, NOW)
    client.hset("pkb:meta", "schema", "1")
    client.hset("pkb:heard", "0", "1785728880124")
    client.hset("pkb:wanted-jobs", "repair_gap-1", "{}")
    client.hset("pkb:{bot}:armed", "3", "[1]")
    client.hset("pkb:{1}:state", mapping={"256265": "[1]", "256265:marks": "[0,[1]]", "256265:revs": "{}"})


def test_first_worker_converts_a_store_of_the_previous_schema(
    client: redis.Redis, settings: Settings
) -> None:
    make_previous_store(client, settings)
    client.hset("pkb:feed_progress", "0", "1785728880999")  # newer: a conversion that was killed and resumed
    with pytest.raises(MetaMismatch, match="start a worker of this release"):
        adopt_meta(client, settings)
    ensure_meta(client, settings, NOW)
    assert client.hget("pkb:meta", "schema") == b"2"
    assert client.hgetall("pkb:{1}:state") == {
        b"256265": b"[1]",
        b"256265:candles": b"[0,[1]]",
        b"256265:revs": b"{}",
    }
    assert client.hget("pkb:feed_progress", "0") == b"1785728880999"
    assert client.hget("pkb:job_outbox", "repair_gap-1") == b"{}"
    assert client.hget("pkb:{bot}:alert_state", "3") == b"[1]"
    assert not client.exists("pkb:heard", "pkb:wanted-jobs", "pkb:{bot}:armed")


def test_store_of_the_previous_schema_is_not_converted_under_a_living_worker(
    client: redis.Redis, settings: Settings
) -> None:
    make_previous_store(client, settings)
    seconds, _ = client.time()  # type: ignore[misc]
    client.zadd("pkb:workers", {"aggregate a": seconds * 1000})
    with pytest.raises(MetaMismatch, match="stop all its workers"):
        ensure_meta(client, settings, NOW)
    assert client.hget("pkb:meta", "schema") == b"1" and client.exists("pkb:heard")
