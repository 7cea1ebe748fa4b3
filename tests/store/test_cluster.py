"""A real cluster of three masters behind `redis+cluster://`."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.crc import key_slot

from pkbrokers_redis.client.replay import lag_entries
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.errors import PkbError, RedisUnavailable, SettingsError
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.runtime.cluster_state import Heartbeat
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store import streams
from pkbrokers_redis.store.cluster import Pipe
from pkbrokers_redis.store.commit import (
    CursorMove,
    ensure_groups,
    finish_commit,
    queue_commit,
    read_cursor,
)
from pkbrokers_redis.store.connect import connect, describe, explain
from pkbrokers_redis.store.functions import load_functions
from pkbrokers_redis.store.leases import lease_shards
from pkbrokers_redis.store.meta import adopt_meta, ensure_meta
from pkbrokers_redis.store.streams import StreamReader, enforce_cap, trim
from pkbrokers_redis.store.symbols import resolve_many, save_instruments
from tests.store.test_connect import SECRET, refusal
from tests.support import running_server, wait_until
from tests.topologies import Cluster, running_cluster

pytestmark = pytest.mark.xdist_group("cluster")
KEYS = Keys()
ACL = Path(__file__).resolve().parents[2] / "docs" / "acl.conf"
ALL_TICKS = [KEYS.ticks(shard) for shard in range(KEYS.shards)]


# -- connecting ----------------------------------------------------------------------------------


def test_one_node_is_enough_to_find_the_cluster(cluster: Cluster) -> None:
    settings = load_settings(redis_url=f"redis+cluster://127.0.0.1:{cluster.ports[1]}")
    with connect(settings) as client:
        for key in ALL_TICKS:
            assert client.xadd(key, {"a": 1})
    assert describe(settings) == f"redis+cluster://127.0.0.1:{cluster.ports[1]}"


def test_unavailable_nodes_are_skipped(cluster: Cluster) -> None:
    url = f"redis+cluster://127.0.0.1:1,127.0.0.1:{cluster.ports[2]}/?socket_timeout=5"
    with connect(load_settings(redis_url=url)) as client:
        assert client.ping()


def test_plain_url_of_a_cluster_node_is_refused_with_the_right_scheme(cluster: Cluster) -> None:
    settings = load_settings(redis_url=f"redis://127.0.0.1:{cluster.ports[0]}")
    with connect(settings) as client, pytest.raises(redis.ResponseError) as caught:
        client.hget(KEYS.ticks(0), "x")  # slot of the third master
    assert "redis+cluster://" in str(explain(caught.value, describe(settings)))


def test_cluster_url_of_a_single_server_is_refused(tmp_path: Path) -> None:
    with running_server(tmp_path / "one", "--requirepass", SECRET) as port:
        error = refusal(f"redis+cluster://:{SECRET}@127.0.0.1:{port}/")
        assert isinstance(error, SettingsError) and "not a Redis Cluster" in str(error)
        assert "refuses the user or password" in str(refusal(f"redis+cluster://:{SECRET}x@127.0.0.1:{port}"))
        assert "requires a password" in str(refusal(f"redis+cluster://127.0.0.1:{port}"))


def test_unreachable_cluster_is_one_line() -> None:
    error = refusal(f"redis+cluster://me:{SECRET}@127.0.0.1:1,127.0.0.1:2/")
    assert isinstance(error, RedisUnavailable)
    assert "127.0.0.1:1,127.0.0.1:2" in str(error) and "refused" in str(error)


@pytest.mark.parametrize(
    "url",
    [
        f"redis+cluster://{SECRET}@",
        f"redis+cluster://:{SECRET}@host:1,host:port/",
        f"redis+cluster://:{SECRET}@host:1,,host:2/",
        f"redis+cluster://:{SECRET}@host:1/3",
        f"redis+cluster://:{SECRET}/@host:1",
        f"redis+cluster://:{SECRET}@host:1/?no_such_option={SECRET}",
        "redis+cluster://" + ",".join(["host:1"] * 101),
        f"redis+sentinel://:{SECRET}@host:1",
        f"redis+sentinel://:{SECRET}@host:1/name/database",
        f"redis+sentinel://:{SECRET}@host:x/name",
        f"redis+sentinel:/{SECRET}",
    ],
)
def test_malformed_url_of_several_servers_is_one_line(url: str) -> None:
    assert isinstance(refusal(url), SettingsError)
    assert SECRET not in describe(load_settings(redis_url=url))


# -- what the workers do -------------------------------------------------------------------------


def test_functions_are_loaded_on_every_master(cluster: Cluster, cluster_client: redis.Redis) -> None:
    load_functions(cluster_client)
    for number in range(3):
        with cluster.node(number) as node:
            assert node.function_list("pkbrokers")


def test_symbols_meta_heartbeat_and_trimming_work_across_the_slots(
    cluster_client: redis.Redis, cluster_settings: Settings
) -> None:
    ensure_meta(cluster_client, cluster_settings, "2026-01-01T00:00:00+00:00")
    ensure_meta(cluster_client, cluster_settings, "2026-01-02T00:00:00+00:00")
    assert adopt_meta(cluster_client, cluster_settings).shards == 8
    rows = [
        {"instrument_token": token, "tradingsymbol": f"S{token}", "exchange": "NSE"}
        for token in range(256, 256 * 40, 256)
    ]
    assert save_instruments(cluster_client, KEYS, rows).saved == 39
    assert len(resolve_many(cluster_client, KEYS, "all")) == 39
    assert resolve_many(cluster_client, KEYS, "512,S768") == [(512, "NSE:S512"), (768, "NSE:S768")]
    heart = Heartbeat(KEYS, "ingest", "ingest-here-1", 0.0)
    heart.beat(cluster_client, 2000.0, 10, {})
    assert cluster_client.hget(heart.key, "ticks_total") == b"10"
    ensure_groups(cluster_client, KEYS)
    for n in range(300):
        for key in ALL_TICKS:
            cluster_client.xadd(key, {"n": n}, id=f"{n + 1}-0")
    trim(cluster_client, KEYS, dict.fromkeys(range(8), "301-0"), 400.0, 0.1)
    assert cluster_client.xlen(ALL_TICKS[0]) == 300  # the group has read nothing: nothing may go
    assert enforce_cap(cluster_client, KEYS, 100) > 0


def test_pipeline_deletes_and_finds_keys_of_any_slot(cluster_client: redis.Redis) -> None:
    names = [f"pkb:test:{n}" for n in range(20)]
    pipeline = cluster_client.pipeline(transaction=False)
    for name in names:
        pipeline.set(name, 1)
    for name in names[:10]:
        pipeline.delete(name)
    for name in names:
        pipeline.exists(name)
    pipeline.unlink(names[10])
    assert pipeline.execute() == [True] * 20 + [1] * 10 + [0] * 10 + [1] * 10 + [1]


def test_candles_are_read_and_followed_from_all_masters(
    cluster_client: redis.Redis, cluster_settings: Settings
) -> None:
    tokens = [256 * n for n in range(1, 33)]
    for token in tokens:
        for minute in range(3):
            row = f"[{1_800_000_000 + 60 * minute},1,2,1,2,10,null,3]"
            cluster_client.rpush(KEYS.candles(token, "1m"), row)
        cluster_client.hset(KEYS.current(token), "1m", "[1800000180,1,2,1,2,10,null,3]")
        cluster_client.hset(KEYS.state(KEYS.shard_of(token)), str(token), "[]")
    store = CandleStore(cluster_settings, client=cluster_client)
    assert len(store.get_candles(256, "1m", include_current=True)) == 4
    bulk = store.bulk(None, "1m", count=2)
    assert (len(bulk), len(bulk.rows)) == (32, 64)
    followed = store.follow(intervals=["1m"], block_seconds=0.2)
    for token in tokens[:16]:
        closed = {"token": token, "symbol": "", "interval": "1m", "rev": 0}
        row = "[1800000180,1,2,1,2,10,null,3]"
        cluster_client.xadd(KEYS.closed(KEYS.shard_of(token)), {**closed, "row": row})
    assert sorted(candle.token for candle in followed) == tokens[:16]


def test_the_users_of_the_acl_file_can_do_their_work_on_a_cluster(cluster: Cluster) -> None:
    users = [line.split()[1:] for line in ACL.read_text().splitlines()]
    for number in range(3):
        with cluster.node(number) as node:
            for name, *rules in users:
                if name not in ("default", "admin"):
                    node.execute_command("ACL SETUSER", name, "reset", *rules)

    def settings_of(user: str) -> Settings:
        return load_settings(redis_url=f"redis+cluster://{user}:change-me-{user}@{cluster.servers}/")

    with connect(settings_of("aggregator")) as client:
        load_functions(client)
        ensure_groups(client, KEYS)
        assert lease_shards(client, KEYS, range(8), "me", 60_000) == (dict.fromkeys(range(8), 1), {})
        assert StreamReader(client).read(dict.fromkeys(ALL_TICKS, "0-0"), 10, 20) == []
    with connect(settings_of("ingest")) as client:
        pipe = Pipe(client)
        for key in ALL_TICKS:
            pipe.add("XADD", key, "*", "a", 1)
        assert len(pipe.execute()) == 8 and enforce_cap(client, KEYS, 100) == 0
    reading = settings_of("reader")
    with connect(reading, for_reading=True) as client:
        assert lag_entries(client, KEYS) == 1
        store = CandleStore(reading, client=client)
        assert list(store.follow(block_seconds=0.01)) == [] and len(store.bulk(None, "1m")) == 0
        with pytest.raises(redis.ResponseError, match="permissions"):
            client.xadd(ALL_TICKS[0], {"a": 1})


# -- slots that move -----------------------------------------------------------------------------


def test_commit_to_a_migrating_slot_waits_and_is_atomic(
    cluster: Cluster, cluster_client: redis.Redis
) -> None:
    """A function may write keys it did not name; half of them would be on the next master already."""
    shard, token = 3, 256 * 3
    slot = key_slot(KEYS.cursor(shard).encode())
    nodes = [cluster.node(number) for number in range(3)]
    names = [node.execute_command("CLUSTER MYID").decode() for node in nodes]
    load_functions(cluster_client)
    ensure_groups(cluster_client, KEYS)
    epochs, _ = lease_shards(cluster_client, KEYS, [shard], "me", 60_000)
    held = read_cursor(cluster_client, KEYS, shard, "me", epochs[shard])

    def commit(close: int) -> list[str]:
        row = b"[1800000000,1,2,1,%d,10,null,3]" % close
        pipe = Pipe(cluster_client)
        puts = [1, token, "1m", 1_800_000_000, 5, row]
        move = CursorMove(held.id, held.read, {})
        queue_commit(
            pipe, KEYS, shard, held, move, 100, [1, token, 1, "1m", row, 0, 0, *puts, 0, 1, token, b"[]"]
        )
        return finish_commit(pipe.execute()[0], held, move)

    try:
        assert commit(1) == []
        cluster_client.xadd(KEYS.closed(shard), {"token": token})  # now all four keys of a commit are there
        nodes[1].execute_command("CLUSTER SETSLOT", slot, "IMPORTING", names[0])
        nodes[0].execute_command("CLUSTER SETSLOT", slot, "MIGRATING", names[1])
        nodes[0].migrate("127.0.0.1", cluster.ports[1], [KEYS.current(token)], 0, 5_000)
        with pytest.raises(redis.ConnectionError):
            commit(2)
        # Readers are sent to where each key is.
        pipeline = cluster_client.pipeline(transaction=False)
        pipeline.lrange(KEYS.candles(token, "1m"), 0, -1)
        pipeline.hgetall(KEYS.current(token))
        assert pipeline.execute() == [
            [b"[1800000000,1,2,1,1,10,null,3]"],
            {b"1m": b"[1800000000,1,2,1,1,10,null,3]"},
        ]
        rest = nodes[0].execute_command("CLUSTER GETKEYSINSLOT", slot, 100)
        nodes[0].migrate("127.0.0.1", cluster.ports[1], rest, 0, 5_000)
        for number in (1, 0, 2):
            nodes[number].execute_command("CLUSTER SETSLOT", slot, "NODE", names[1])
        with pytest.raises(redis.ConnectionError):
            commit(3)  # this is how we learn of it
        assert commit(3) == []
        assert nodes[1].hget(KEYS.current(token), "1m") == b"[1800000000,1,2,1,3,10,null,3]"
    finally:
        for node in nodes:
            node.flushall()
        for number in (0, 1, 2):
            nodes[number].execute_command("CLUSTER SETSLOT", slot, "NODE", names[0])
            nodes[number].close()


# -- blocking reads of many streams --------------------------------------------------------------


class Positions(dict[str, str]):
    """Where a reader stands; `advance` as far as it was given entries."""

    def advance(self, batches: list[Any]) -> list[tuple[str, dict[bytes, bytes]]]:
        seen = []
        for key, entries in batches:
            for entry_id, fields in entries:
                self[key.decode()] = entry_id.decode()
                seen.append((key.decode(), fields))
        return seen


@pytest.fixture
def positions() -> Positions:
    return Positions(dict.fromkeys(ALL_TICKS, "0-0"))


def later(action: Callable[[], Any]) -> threading.Timer:
    timer = threading.Timer(0.1, action)
    timer.start()
    return timer


def test_a_reader_sees_every_stream_and_waits_for_any(
    cluster_client: redis.Redis, positions: Positions
) -> None:
    reader = StreamReader(cluster_client)
    assert reader.read(positions, 10, 20) == []
    for n, key in enumerate(ALL_TICKS):
        cluster_client.xadd(key, {"n": n})
    assert len(positions.advance(reader.read(positions, 10, 5_000))) == 8
    for key in (ALL_TICKS[5], ALL_TICKS[5], ALL_TICKS[0]):
        timer = later(lambda key=key: cluster_client.xadd(key, {"rang": 1}))
        assert positions.advance(reader.read(positions, 10, 60_000)) == [(key, {b"rang": b"1"})]
        timer.join()
    reader.close()


def test_no_entry_is_lost_or_doubled_however_reads_and_writes_interleave(
    cluster_client: redis.Redis, cluster_settings: Settings, positions: Positions
) -> None:
    def write() -> None:
        with connect(cluster_settings) as writer:
            for n in range(1_500):
                writer.xadd(ALL_TICKS[n * 7 % 8], {"n": n})

    thread = threading.Thread(target=write)
    reader = StreamReader(cluster_client)
    seen: list[int] = []
    thread.start()
    while len(seen) < 1_500:
        batches = reader.read(positions, 3, 2_000)
        assert batches, "waited in vain for the writer"
        seen += [int(fields[b"n"]) for _, fields in positions.advance(batches)]
    thread.join()
    assert sorted(seen) == list(range(1_500))
    assert reader.read(positions, 3, 5) == []


def test_reader_follows_a_position_that_moved_back_and_a_deleted_stream(
    cluster_client: redis.Redis, positions: Positions
) -> None:
    reader = StreamReader(cluster_client)
    positions[ALL_TICKS[2]] = "900-0"
    assert reader.read(positions, 10, 20) == []  # a blocking read now waits behind 900
    positions[ALL_TICKS[2]] = "0-0"
    timer = later(lambda: cluster_client.xadd(ALL_TICKS[2], {"a": 1}, id="5-0"))
    assert positions.advance(reader.read(positions, 10, 60_000)) == [(ALL_TICKS[2], {b"a": b"1"})]
    timer.join()
    del positions[ALL_TICKS[3]]
    cluster_client.xadd(ALL_TICKS[3], {"not": "this shard's"})
    assert reader.read(positions, 10, 20) == []
    timer = later(lambda: cluster_client.xadd(ALL_TICKS[4], {"b": 1}))
    assert positions.advance(reader.read(positions, 10, 60_000)) == [(ALL_TICKS[4], {b"b": b"1"})]
    timer.join()


def test_broken_blocking_reads_lose_no_entry(
    cluster: Cluster, cluster_client: redis.Redis, positions: Positions
) -> None:
    reader = StreamReader(cluster_client)
    assert reader.read(positions, 10, 20) == []

    def cut_all() -> None:
        for number in range(3):
            with cluster.node(number) as node:
                node.client_kill_filter(_type="normal", skipme=True)
        with connect(load_settings(redis_url=cluster.url)) as writer:
            writer.xadd(ALL_TICKS[6], {"a": 1})

    timer = later(cut_all)

    def read() -> list[Any]:
        try:
            return positions.advance(reader.read(positions, 10, 1_000))
        except redis.ConnectionError:
            return []

    assert wait_until(read) == [(ALL_TICKS[6], {b"a": b"1"})]
    timer.join()


def test_streams_beyond_the_blocking_reads_are_polled(
    cluster_client: redis.Redis, positions: Positions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "BLOCKING_READS_MAX", 2)
    reader = StreamReader(cluster_client)
    assert reader.read(positions, 10, 20) == []
    timer = later(lambda: cluster_client.xadd(ALL_TICKS[7], {"a": 1}))
    seen = wait_until(lambda: positions.advance(reader.read(positions, 10, 1_000)))
    assert seen == [(ALL_TICKS[7], {b"a": b"1"})]
    timer.join()


def test_key_of_another_type_raises_as_on_one_server(
    cluster_client: redis.Redis, positions: Positions
) -> None:
    cluster_client.set(ALL_TICKS[1], "text")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        StreamReader(cluster_client).read(positions, 10, 20)


# -- a part of it dies ---------------------------------------------------------------------------


def test_dead_master_raises_a_connection_error_and_never_reads_as_an_empty_key(
    tmp_path: Path, positions: Positions
) -> None:
    with running_cluster(tmp_path, 3, "--cluster-node-timeout", "1000") as cluster:
        settings = load_settings(redis_url=f"{cluster.url}?socket_timeout=5")
        client = connect(settings)
        reader = StreamReader(client)
        assert reader.read(positions, 10, 20) == []
        client.hset(KEYS.current(256 * 3), "1m", "[]")
        dead = next(n for n in range(3) if 16_384 * (n + 1) // 3 > key_slot(KEYS.ticks(3).encode()))
        os.kill(cluster.processes[dead].pid, signal.SIGKILL)
        cluster.processes[dead].wait(10)

        pipeline = client.pipeline(transaction=False)
        for token in (256 * 3, 256 * 1):
            pipeline.hgetall(KEYS.current(token))
        with pytest.raises(redis.ConnectionError):
            pipeline.execute(raise_on_error=False)
        with pytest.raises(redis.ConnectionError):
            client.hgetall(KEYS.current(256 * 3))
        with pytest.raises(redis.ConnectionError):
            reader.read(positions, 10, 20)

        def is_broken() -> bool:
            """The rest of the cluster finds out, and refuses everything."""
            try:
                client.hgetall(KEYS.current(256 * 1))
            except redis.ConnectionError:
                return True
            return False

        wait_until(is_broken, timeout_seconds=30)

        def is_reported() -> bool:
            try:
                connect(settings)
            except PkbError as error:
                return "\n" not in str(error)
            return False

        wait_until(is_reported, timeout_seconds=30, what="one line for a new client")
