"""The hot pipeline: everything in one write a server, replies in the order of the commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import redis
from redis.crc import key_slot

import pkbrokers_redis
from pkbrokers_redis.clock import Backoff
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.cluster import Pipe
from pkbrokers_redis.store.embedded import EmbeddedServer
from pkbrokers_redis.store.errors import is_function_missing, is_transient, is_wrong_type
from tests.topologies import Cluster

KEYS = Keys()
on_cluster = pytest.mark.xdist_group("cluster")


def test_replies_come_in_the_order_of_the_commands(client: redis.Redis) -> None:
    pipe = Pipe(client)
    for n in range(20):
        pipe.add("RPUSH", "list", n)
    assert len(pipe) == 20
    assert pipe.execute() == list(range(1, 21))
    assert pipe.execute() == []


def test_a_refused_command_is_an_exception_in_its_place(client: redis.Redis) -> None:
    client.set("text", "x")
    pipe = Pipe(client)
    pipe.add("RPUSH", "list", 1)
    pipe.add("RPUSH", "text", 1)
    pipe.add("RPUSH", "list", 2)
    first, refused, last = pipe.execute()
    assert (first, last) == (1, 2)
    assert isinstance(refused, redis.ResponseError) and "WRONGTYPE" in str(refused)


def test_lost_connection_raises_and_the_next_one_reads_its_own_replies(
    client: redis.Redis, server: EmbeddedServer
) -> None:
    client.ping()  # a connection lies in the pool
    with redis.Redis.from_url(server.url) as other:
        other.client_kill_filter(_type="normal", skipme=True)
    pipe = Pipe(client)
    pipe.add("RPUSH", "list", "a")
    # redis-py notices a closed connection when it takes it out of the pool; one that dies later raises.
    try:
        assert pipe.execute() == [1]
    except redis.ConnectionError:
        pass
    pipe.add("ECHO", "mine")
    assert pipe.execute() == [b"mine"]


@on_cluster
def test_on_a_cluster_each_master_gets_its_own_and_the_order_stays(
    cluster: Cluster, cluster_client: redis.Redis
) -> None:
    pipe = Pipe(cluster_client)
    for n in range(24):
        pipe.add("RPUSH", KEYS.ticks(n % KEYS.shards), f"entry {n}")
    assert pipe.execute() == [1 + n // KEYS.shards for n in range(24)]
    held = []
    for number in range(3):
        with cluster.node(number) as node:
            held.append(sorted(node.keys()))
    assert all(held) and sum(map(len, held)) == KEYS.shards


@on_cluster
def test_on_a_cluster_a_transaction_stays_in_one_piece(cluster_client: redis.Redis) -> None:
    pipe = Pipe(cluster_client)
    for shard in range(KEYS.shards):
        pipe.add("MULTI")
        pipe.add("SET", KEYS.lease(shard), shard)
        pipe.add("GET", KEYS.lease(shard))
        pipe.add("EXEC")
    replies = pipe.execute()
    assert replies[3::4] == [[b"OK", b"%d" % shard] for shard in range(KEYS.shards)]


@on_cluster
def test_moved_slot_raises_a_connection_error_and_is_found_the_next_time(
    cluster: Cluster, cluster_client: redis.Redis
) -> None:
    key = KEYS.ticks(3)
    slot = key_slot(key.encode())
    nodes = [cluster.node(number) for number in range(3)]
    names = [node.execute_command("CLUSTER MYID").decode() for node in nodes]

    def give_to(owner: int) -> None:
        for number in (owner, *{0, 1, 2} - {owner}):
            nodes[number].execute_command("CLUSTER SETSLOT", slot, "NODE", names[owner])

    pipe = Pipe(cluster_client)
    pipe.add("SET", KEYS.ticks(1), "elsewhere")
    pipe.execute()
    try:
        give_to(2)
        pipe.add("SET", KEYS.ticks(1), "too")
        pipe.add("SET", key, "here")
        with pytest.raises(redis.ConnectionError):
            pipe.execute()
        pipe.add("SET", key, "there")
        assert pipe.execute() == [b"OK"]
        assert nodes[2].get(key) == b"there"
        nodes[2].delete(key)
    finally:
        give_to(0)
        for node in nodes:
            node.close()


def test_private_parts_of_redis_py_are_used_in_one_module() -> None:
    private = re.compile(r"nodes_manager|commands_parser|\._sock\b|connection_kwargs|response_callbacks")
    modules = Path(pkbrokers_redis.__file__).parent.rglob("*.py")
    assert [path.name for path in modules if private.search(path.read_text("utf-8"))] == ["cluster.py"]


def test_redis_errors_are_classified() -> None:
    transient = [
        redis.ConnectionError("lost"),
        redis.TimeoutError("slow"),
        redis.exceptions.OutOfMemoryError("command not allowed"),
        redis.exceptions.ReadOnlyError("You can't write against a read only replica."),
        redis.ResponseError("MISCONF Redis is configured to save RDB snapshots"),
    ]
    assert all(map(is_transient, transient))
    assert not is_transient(redis.ResponseError("ERR unknown command")) and not is_transient(
        ValueError("BUSY ")
    )
    assert is_wrong_type(redis.ResponseError("WRONGTYPE Operation against a key"))
    assert not is_wrong_type(b"WRONGTYPE")
    assert is_function_missing(redis.ResponseError("Function not found"))


def test_backoff_doubles_up_to_its_maximum_and_starts_again_after_a_success() -> None:
    backoff = Backoff(0.5, 3.0)
    assert [backoff.next() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    backoff.reset()
    assert backoff.next() == 0.5
