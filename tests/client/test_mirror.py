"""The mirror: what a store says, from memory; kept current, honest about its age, whole after a loss."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import redis

from pkbrokers_redis.client import mirror as mirror_module
from pkbrokers_redis.client import mirror_rows as mirror_rows_module
from pkbrokers_redis.client.mirror import Mirror
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.errors import PkbError, UnknownInterval, UnknownSymbol
from pkbrokers_redis.settings import Settings, load_settings
from tests.client.contract import INFY, NIFTY, OPEN_S, RELIANCE, announce, push, row, write_master
from tests.support import running_server, wait_until
from tests.topologies import running_cluster

VALKEY = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)


@pytest.fixture
def store(client: redis.Redis, settings: Settings) -> CandleStore:
    write_master(client, settings.keys)
    return CandleStore(settings, client)


def at(number: int) -> int:
    return OPEN_S + 300 * number


def close(store: CandleStore, number: int, price: float, token: int = INFY, rev: int = 0) -> None:
    """A candle closes as the aggregator does it: into the list, and announced."""
    if rev == 0:
        push(store.client, store.keys, token, "5m", [row(at(number), price)])
    announce(store.client, store.keys, token, "5m", row(at(number), price), rev)


def prices(mirror: Mirror, symbol: str = "INFY", **options: bool) -> list[float]:
    return [float(price) for price in mirror.rows(symbol, "5m", 99, **options)[:, 4]]


def test_a_mirror_returns_what_the_store_returns(store: CandleStore) -> None:
    push(store.client, store.keys, INFY, "5m", [row(at(n), 10 + n, flag="gap" * (n == 2)) for n in range(5)])
    push(store.client, store.keys, RELIANCE, "5m", [row(at(0), 7, oi=5, volume=0.5)])
    store.client.hset(store.keys.current(INFY), "5m", row(at(5), 99))
    mirror = Mirror(store, ["INFY", "RELIANCE", "NIFTY 50"], ["5m"], count=4)
    for name in ("INFY", "NSE:RELIANCE", str(NIFTY)):
        for current in (False, True):
            assert mirror.candles(name, "5m", 4, current) == store.get_candles(name, "5m", 4, current)
    mirrored = mirror.bulk(["INFY", "RELIANCE", "NIFTY 50"], "5m", 4, include_current=True)
    stored = store.bulk(["INFY", "RELIANCE", "NIFTY 50"], "5m", 4, include_current=True)
    np.testing.assert_array_equal(mirrored.rows, stored.rows)
    assert (
        mirrored.flags.tolist() == stored.flags.tolist()
        and mirrored.offsets.tolist() == stored.offsets.tolist()
    )
    assert mirror.symbols == ["NSE:INFY", "NSE:NIFTY 50", "NSE:RELIANCE"]
    assert mirror.bulk(interval="5m").symbols == ["NSE:INFY", "NSE:RELIANCE"]


@VALKEY
def test_rows_are_views_and_a_bulk_of_an_unchanged_mirror_is_the_same_one(store: CandleStore) -> None:
    push(store.client, store.keys, INFY, "5m", [row(at(n), 10 + n) for n in range(5)])
    mirror = Mirror(store, ["INFY"], ["5m"])
    one, other = mirror.rows("INFY", "5m"), mirror.rows("INFY", "5m", 2)
    assert np.shares_memory(one, other)
    bulk = mirror.bulk(["INFY"], "5m")
    assert mirror.bulk(["INFY"], "5m") is bulk
    close(store, 5, 15)
    mirror.poll()
    assert mirror.bulk(["INFY"], "5m") is not bulk and len(bulk.rows) == 5


@VALKEY
def test_a_poll_applies_closed_and_amended_candles(store: CandleStore) -> None:
    close(store, 0, 10)
    mirror = Mirror(store, ["INFY"], ["5m"])
    close(store, 1, 11)
    close(store, 0, 10.5, rev=1)
    close(store, 1, 77, token=RELIANCE)
    announce(store.client, store.keys, INFY, "1m", row(at(9), 99))
    assert mirror.poll() == 2
    assert prices(mirror) == [10.5, 11] and mirror.missed == mirror.resyncs == 0


@VALKEY
def test_a_current_candle_is_read_on_demand(store: CandleStore) -> None:
    close(store, 0, 10)
    mirror = Mirror(store, ["INFY"], ["5m"], current_seconds=0)
    store.client.hset(store.keys.current(INFY), "5m", row(at(1), 11))
    assert prices(mirror) == [10] and prices(mirror, include_current=True) == [10, 11]
    store.client.hset(store.keys.current(INFY), "5m", row(at(1), 11.5))
    assert prices(mirror, include_current=True) == [10, 11.5]
    # It rolls: the list has its last word before anything is announced.
    push(store.client, store.keys, INFY, "5m", [row(at(1), 11.75)])
    store.client.hset(store.keys.current(INFY), "5m", row(at(2), 12))
    assert prices(mirror, include_current=True) == [10, 11.75, 12]
    push(store.client, store.keys, INFY, "5m", [row(at(2), 12.5)])
    store.client.hdel(store.keys.current(INFY), "5m")
    assert prices(mirror, include_current=True) == [10, 11.75, 12.5]


@VALKEY
@pytest.mark.parametrize("uptime_seconds", [0.5, 1e6])
def test_a_young_current_candle_is_not_read_again_however_long_the_machine_is_up(
    store: CandleStore, monkeypatch: pytest.MonkeyPatch, uptime_seconds: float
) -> None:
    boot = time.monotonic() - uptime_seconds
    clock = SimpleNamespace(monotonic=lambda real=time.monotonic: real() - boot)
    for module in (mirror_module, mirror_rows_module):
        monkeypatch.setattr(module, "time", clock)
    mirror = Mirror(store, ["INFY"], ["5m"], current_seconds=3600)
    assert mirror.lag_ms < 60_000
    store.client.hset(store.keys.current(INFY), "5m", row(at(1), 11))
    assert prices(mirror, include_current=True) == [11]
    store.client.hset(store.keys.current(INFY), "5m", row(at(1), 12))
    assert prices(mirror, include_current=True) == [11]


@VALKEY
def test_a_thread_keeps_the_mirror_current(store: CandleStore) -> None:
    close(store, 0, 10)
    with Mirror(store, ["INFY"], ["5m"], current_seconds=0.02) as mirror:
        store.client.hset(store.keys.current(INFY), "5m", row(at(2), 12))
        close(store, 1, 11)
        wait_until(lambda: prices(mirror) == [10, 11], what="the announced candle")
        assert prices(mirror, include_current=True) == [10, 11, 12]
        store.client.hset(store.keys.current(INFY), "5m", row(at(2), 13))
        memory = mirror.memory.buffers["5m"][INFY]
        wait_until(
            lambda: memory.last(1, True)[0][0, 4] == 13, what="the thread to refresh the current candle"
        )
        wait_until(lambda: mirror.lag_ms < 2_000, what="a current mirror")
    assert all(thread.name != "pkb-mirror" for thread in threading.enumerate())


@VALKEY
def test_mirroring_every_instrument_includes_later_ones(store: CandleStore) -> None:
    close(store, 0, 10)
    mirror = Mirror(store, None, ["5m"])
    announce(store.client, store.keys, 999, "5m", row(at(0), 5), symbol="NSE:NEW")
    mirror.poll()
    assert prices(mirror, "NSE:NEW") == prices(mirror, "NEW") == [5]
    assert "NSE:NEW" in mirror.symbols


@VALKEY
def test_add_mirrors_more_instruments_and_more_rows(store: CandleStore) -> None:
    push(store.client, store.keys, INFY, "5m", [row(at(n), n + 1) for n in range(9)])
    push(store.client, store.keys, RELIANCE, "5m", [row(at(n), n + 1) for n in range(9)])
    mirror = Mirror(store, ["INFY"], ["5m"], count=2)
    assert prices(mirror) == [8, 9] and mirror.has("INFY", "5m", 2) and not mirror.has("INFY", "5m", 3)
    mirror.add(["RELIANCE"], "5m", 4)
    assert prices(mirror) == prices(mirror, "RELIANCE") == [6, 7, 8, 9]
    close(store, 9, 10)
    mirror.poll()
    assert prices(mirror) == [7, 8, 9, 10]


@VALKEY
def test_a_mirror_that_missed_announcements_fills_itself_again(store: CandleStore) -> None:
    mirror = Mirror(store, ["INFY", "RELIANCE"], ["5m"])
    for number in range(20):
        close(store, number, 100 + number)
    store.client.xtrim(store.keys.closed(store.keys.shard_of(INFY)), maxlen=3, approximate=False)
    close(store, 0, 55, token=RELIANCE)

    def is_whole() -> bool:
        mirror.poll()
        return prices(mirror) == [100 + number for number in range(20)]

    # A reader learns of the loss once it was behind; until then it has only what was left.
    mirror._process.follower.checks_due = 1  # type: ignore[union-attr]
    wait_until(is_whole, what="all rows")
    assert mirror.missed == 17 and mirror.resyncs == 1 and prices(mirror, "RELIANCE") == [55]


@VALKEY
def test_a_recreated_store_is_detected(store: CandleStore) -> None:
    for number in range(5):
        close(store, number, 100 + number)
    mirror = Mirror(store, ["INFY"], ["5m"])
    store.client.delete(store.keys.closed(store.keys.shard_of(INFY)), store.keys.candles(INFY, "5m"))
    fields = {"token": INFY, "interval": "5m", "row": row(at(0), 42), "rev": 0}
    store.client.xadd(store.keys.closed(store.keys.shard_of(INFY)), fields, id="5-0")
    push(store.client, store.keys, INFY, "5m", [row(at(0), 42)])
    mirror._process.follower.checks_due = 1  # type: ignore[union-attr]
    wait_until(lambda: mirror.poll() >= 0 and prices(mirror) == [42], what="the new store's row")


@VALKEY
def test_a_cleared_store_is_detected(store: CandleStore) -> None:
    for number in range(9):
        close(store, number, 100 + number)
    mirror = Mirror(store, ["INFY"], ["5m"])
    deleted = store.keys.closed(store.keys.shard_of(INFY)), store.keys.candles(INFY, "5m")
    store.client.delete(*deleted)
    close(store, 20, 42)  # announced with a later id
    mirror.poll()
    mirror._process.follower.checks_due = 1  # type: ignore[union-attr]
    wait_until(lambda: mirror.poll() >= 0 and prices(mirror) == [42], what="only the new store's row")
    store.client.delete(*deleted)
    mirror._process.follower.checks_due = 1  # type: ignore[union-attr]
    wait_until(lambda: mirror.poll() >= 0 and prices(mirror) == [], what="no rows")
    assert mirror.resyncs == 2


@VALKEY
def test_malformed_announcements_are_counted_and_skipped(store: CandleStore) -> None:
    mirror = Mirror(store, ["INFY"], ["5m"], current_seconds=0)
    stream = store.keys.closed(store.keys.shard_of(INFY))
    store.client.xadd(stream, {"what": "ever"})
    store.client.xadd(stream, {"token": INFY, "interval": "5m", "row": "[1,2"})
    close(store, 1, 11)
    assert mirror.poll() == 1 and prices(mirror) == [11] and mirror.rows_refused == 2
    store.client.set(store.keys.current(INFY), "mine")
    assert prices(mirror, include_current=True) == [11]


@VALKEY
def test_reading_what_is_not_mirrored_raises_an_error_with_a_hint(store: CandleStore) -> None:
    mirror = Mirror(store, ["INFY"], ["5m"])
    with pytest.raises(PkbError, match=r"RELIANCE 5m is not mirrored: call `mirror\.add"):
        mirror.rows("RELIANCE", "5m")
    with pytest.raises(PkbError, match="1m is not mirrored"):
        mirror.rows("INFY", "1m")
    with pytest.raises(UnknownInterval):
        mirror.rows("INFY", "7m")
    with pytest.raises(UnknownSymbol):
        mirror.add(["NOBODY"], "5m")
    assert prices(mirror) == []


@VALKEY
def test_the_memory_of_a_mirror_is_bounded(store: CandleStore) -> None:
    with pytest.raises(PkbError, match=r"3 instruments × 100 rows of 5m would exceed 0 MB: mirror fewer"):
        Mirror(store, ["INFY", "RELIANCE", "NIFTY 50"], ["5m"], bytes_max=20_000)
    push(store.client, store.keys, INFY, "5m", [row(at(n)) for n in range(50)])
    mirror = Mirror(store, ["INFY"], ["5m"], count=20)
    for number in range(50, 200):
        close(store, number, 1)
        mirror.poll()
    assert mirror.size_bytes <= 20 * 64 * 3


@VALKEY
def test_a_failed_add_changes_nothing(store: CandleStore, monkeypatch: pytest.MonkeyPatch) -> None:
    push(store.client, store.keys, INFY, "5m", [row(at(n), n + 1) for n in range(9)])
    mirror = Mirror(store, ["INFY"], ["5m"], count=2, bytes_max=100_000)
    with pytest.raises(PkbError, match="would exceed"):
        mirror.add(["INFY"], "5m", 10_000_000)
    with pytest.raises(PkbError, match="would exceed"):
        mirror.add(None, "5m", 1_000)
    with monkeypatch.context() as patch:
        patch.setattr(store, "client", redis.Redis(port=1))
        patch.setattr(store, "resolve_all", lambda texts: [(INFY, "NSE:INFY")])
        with pytest.raises(redis.ConnectionError):
            mirror.add(["INFY"], "5m", 4)
    assert prices(mirror) == [8, 9] and not mirror.has("INFY", "5m", 3) and not mirror.memory.all_instruments
    mirror.add(["RELIANCE"], "5m", 2)
    mirror._process.needs_resync = True
    mirror.poll()
    assert mirror.resyncs == 1 and prices(mirror) == [8, 9]
    mirror.add(["INFY"], "5m", 4)
    assert prices(mirror) == [6, 7, 8, 9]


@VALKEY
@pytest.mark.parametrize("is_whole", [False, True])
def test_a_name_that_moves_to_another_token_is_followed(
    store: CandleStore, monkeypatch: pytest.MonkeyPatch, is_whole: bool
) -> None:
    close(store, 0, 10)
    mirror = Mirror(store, None if is_whole else ["INFY", "infy", INFY], ["5m"])
    store.client.hset(store.keys.symbols(), "NSE:INFY", 2953217)
    close(store, 0, 55, token=2953217)
    mirror.poll()
    assert prices(mirror) == [10]
    monkeypatch.setattr("pkbrokers_redis.client.mirror.NAMES_SECONDS", -1)
    mirror.poll()
    assert prices(mirror) == prices(mirror, "NSE:INFY") == prices(mirror, "infy") == [55]
    assert prices(mirror, str(INFY)) == [10] and {str(INFY), "NSE:INFY"} <= set(mirror.symbols)
    close(store, 1, 56, token=2953217)
    assert mirror.poll() == 1 and prices(mirror) == [55, 56]


@VALKEY
def test_a_mirror_continues_in_a_forked_child(store: CandleStore) -> None:
    close(store, 0, 10)
    with Mirror(store, ["INFY"], ["5m"], current_seconds=0) as mirror:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:  # the child: the parent's thread and locks are not here
            try:
                assert prices(mirror, include_current=True) == [10]
                os.write(write, b"r")
                wait_until(lambda: prices(mirror, include_current=True) == [10, 11], what="the next candle")
                os.write(write, b"y")
            finally:
                os._exit(0)
        assert os.read(read, 1) == b"r"
        close(store, 1, 11)
        os.close(write)
        assert os.read(read, 1) == b"y"
        os.waitpid(pid, 0)


@pytest.mark.xdist_group("servers")
def test_reads_continue_while_redis_is_unavailable_and_lag_grows(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "server"
    with running_server(folder, "--appendonly", "yes") as port:
        store = CandleStore(load_settings(redis_url=f"redis://127.0.0.1:{port}", data_dir=tmp_path))
        write_master(store.client, store.keys)
        close(store, 0, 10)
        mirror = Mirror(store, ["INFY"], ["5m"], current_seconds=0).start()
        wait_until(lambda: mirror.lag_ms < 2_000, what="a current mirror")
    try:
        wait_until(lambda: mirror._process.needs_resync, what="the loss to be noticed")
        before = mirror.lag_ms
        assert prices(mirror, include_current=True) == [10]
        wait_until(lambda: mirror.lag_ms > before + 50, what="time to pass")
        with running_server(folder, "--appendonly", "yes", "--port", str(port)):
            with redis.Redis(port=port) as other:
                push(other, store.keys, INFY, "5m", [row(at(1), 11)])
                announce(other, store.keys, INFY, "5m", row(at(1), 11))  # before or after the reconnect
            wait_until(lambda: prices(mirror) == [10, 11], what="the rows written meanwhile")
            assert mirror.resyncs >= 1
    finally:
        mirror.close()


@pytest.mark.xdist_group("heavy")
def test_mirror_and_async_follower_work_on_a_cluster(tmp_path: Path) -> None:
    with running_cluster(tmp_path / "cluster") as cluster:
        store = CandleStore(load_settings(redis_url=cluster.url, data_dir=tmp_path / "data"))
        write_master(store.client, store.keys)
        tokens = [INFY, RELIANCE, NIFTY]
        for token in tokens:
            close(store, 0, 10, token)
        mirror = Mirror(store, tokens, ["5m"], current_seconds=0)

        async def follow() -> list[int]:
            async with store.follow_async(block_seconds=5) as follower:
                for token in tokens:
                    close(store, 1, 11, token)
                return [(await anext(follower)).token for _ in tokens]

        assert sorted(asyncio.run(follow())) == sorted(tokens)
        for token in tokens:
            store.client.hset(store.keys.current(token), "5m", row(at(2), 12))
        wait_until(lambda: mirror.poll(0.05) >= 0 and prices(mirror, "INFY") == [10, 11], what="news")
        for token in tokens:
            wait_until(
                lambda token=token: mirror.poll() >= 0 and len(mirror.rows(token, "5m")) == 2, what="news"
            )
            assert mirror.rows(token, "5m", 99, include_current=True)[:, 4].tolist() == [10, 11, 12]
