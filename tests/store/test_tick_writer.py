"""What a writer does after a lost connection: asks what Redis has of its frames, and sends the rest again."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import redis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pkbrokers_redis.ingest.writer import FrameWriter
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.kite.protocol import encode_full
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store import tick_writer
from pkbrokers_redis.store.cluster import PinnedConnections
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.tick_writer import (
    LOOK_ENTRIES_MAX,
    AckedBuffer,
    TickBatch,
    TickWriter,
    highest_seq,
)

SHARDS = 3
TOKENS = [(1_000 + n) * 256 + 1 for n in range(6)]  # two a shard
AT_MS = 1_767_584_705_000


def ticks(seq: int, tokens: list[int] = TOKENS) -> Any:
    rows = np.full((len(tokens), 10), np.nan)
    rows[:, 0] = tokens
    rows[:, 1] = 100 + seq
    rows[:, 2:5] = 1
    rows[:, 3] = seq
    rows[:, 5:8] = 100
    rows[:, 8] = rows[:, 9] = AT_MS
    return rows


def batch(seq: int, source: str = "a", tokens: list[int] = TOKENS) -> TickBatch:
    return TickBatch(source, seq, AT_MS, ticks(seq, tokens))


@pytest.fixture
def server_kind() -> str:
    """One kind says it all."""
    return "valkey"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tick_writer, "RETRY_SECONDS_MIN", 0.001)


@pytest.fixture
def settings(make_settings: Callable[..., Settings]) -> Settings:
    return make_settings(shards=SHARDS)


@pytest.fixture
def writer(settings: Settings) -> TickWriter:
    return TickWriter(lambda: connect(settings), settings, source="a")


def write(writer: TickWriter, *seqs: int, source: str = "a") -> None:
    assert writer.write([batch(seq, source) for seq in seqs], AT_MS)


def seqs(client: redis.Redis, keys: Keys, shard: int, source: str = "a") -> list[int]:
    entries: Any = client.xrange(keys.ticks(shard))
    return [int(each[b"seq"]) for _, each in entries if each[b"src"] == source.encode()]


def take_back(client: redis.Redis, keys: Keys, shard: int, entries: int) -> None:
    """The end of a stream is gone, as after a failover to a replica that lagged."""
    if entries:
        found: Any = client.xrevrange(keys.ticks(shard), count=entries)
        client.xdel(keys.ticks(shard), *[each for each, _ in found])


def cut_connections(client: redis.Redis) -> None:
    client.client_kill_filter(_type="normal", skipme=True)


def test_after_a_cut_connection_nothing_is_sent_again_that_is_there(
    writer: TickWriter, client: redis.Redis, settings: Settings
) -> None:
    write(writer, 1, 2, 3)
    cut_connections(client)
    write(writer, 4)
    assert [seqs(client, settings.keys, shard) for shard in range(SHARDS)] == [[1, 2, 3, 4]] * SHARDS
    assert writer.counts["restored_entries"] == 0
    assert writer.counts["resent_batches"] == 1, "redis-py must not have reconnected silently"


def test_what_redis_lost_is_sent_again_before_anything_newer_and_only_that(
    writer: TickWriter, client: redis.Redis, settings: Settings
) -> None:
    write(writer, *range(1, 9))
    write(writer, 9, 10)
    take_back(client, settings.keys, 0, 3)
    take_back(client, settings.keys, 2, 10)
    cut_connections(client)
    write(writer, 11)
    assert [seqs(client, settings.keys, shard) for shard in range(SHARDS)] == [list(range(1, 12))] * SHARDS
    assert writer.counts["restored_entries"] == 3 + 10
    for shard in range(SHARDS):
        entries: Any = client.xrange(settings.keys.ticks(shard))
        for _, each in entries:
            rows = json.loads(each[b"ticks"])
            assert [settings.keys.shard_of(row[0]) for row in rows] == [shard, shard]
            assert [row[3] for row in rows] == [int(each[b"seq"])] * 2


def test_a_shard_whose_entries_are_all_applied_and_trimmed_is_not_sent_again(
    writer: TickWriter, client: redis.Redis, settings: Settings
) -> None:
    write(writer, 1, 2, 3)
    client.hset(settings.keys.cursor(1), mapping={"id": "0-0", "src:a": 3})
    client.xtrim(settings.keys.ticks(1), maxlen=0)
    cut_connections(client)
    write(writer, 4)
    assert seqs(client, settings.keys, 1) == [4]


def test_an_emptied_redis_gets_all_that_is_kept(
    writer: TickWriter, client: redis.Redis, settings: Settings
) -> None:
    write(writer, 1, 2, 3)
    client.flushall()
    cut_connections(client)
    write(writer, 4)
    assert [seqs(client, settings.keys, shard) for shard in range(SHARDS)] == [[1, 2, 3, 4]] * SHARDS


def test_quotes_that_redis_lost_are_written_again(client: redis.Redis, settings: Settings) -> None:
    writer = FrameWriter(lambda: connect(settings), settings, {}, source="a")
    for seq in (1, 2):
        assert writer.write(writer.parse_new([(encode_full(ticks(seq)), AT_MS)]), AT_MS + seq * 1_000)
    assert client.hget(settings.keys.quote(TOKENS[0]), "last_price") == b"102.0"
    client.flushall()
    cut_connections(client)
    writer.write([], AT_MS + 3_000)
    writer.write([], AT_MS + 4_000)
    assert client.hget(settings.keys.quote(TOKENS[0]), "last_price") == b"102.0"


def test_a_dead_process_frames_are_asked_for_under_its_own_name(
    writer: TickWriter, client: redis.Redis, settings: Settings
) -> None:
    write(writer, 7, 8, 9, source="dead")
    write(writer, 1, 2)
    for shard in range(SHARDS):
        take_back(client, settings.keys, shard, 3)
    cut_connections(client)
    write(writer, 3)
    for shard in range(SHARDS):
        assert seqs(client, settings.keys, shard, "dead") == [7, 8, 9]
        assert seqs(client, settings.keys, shard) == [1, 2, 3]


def test_a_stream_that_a_foreign_hand_replaced_takes_nothing_and_stops_nothing(
    writer: TickWriter, client: redis.Redis, settings: Settings
) -> None:
    write(writer, 1, 2)
    client.set(settings.keys.ticks(0), "no stream")
    client.hset(settings.keys.cursor(1), mapping={"id": "nonsense", "src:a": "nonsense"})
    cut_connections(client)
    write(writer, 3)
    assert client.get(settings.keys.ticks(0)) == b"no stream"
    assert seqs(client, settings.keys, 1) == [1, 2, 1, 2, 3], "in doubt, again"
    assert seqs(client, settings.keys, 2) == [1, 2, 3]


def test_a_read_only_redis_is_waited_for_and_then_asked(
    writer: TickWriter, client: redis.Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(writer, 1, 2, 3)
    client.replicaof("127.0.0.1", 1)

    class Stop:
        """The writer pauses for the first time."""

        def wait(self, _seconds: float) -> bool:
            client.replicaof("NO", "ONE")
            for shard in range(SHARDS):
                take_back(client, settings.keys, shard, 2)
            return False

    stop: Any = Stop()
    assert writer.write([batch(4)], AT_MS, stop)
    assert [seqs(client, settings.keys, shard) for shard in range(SHARDS)] == [[1, 2, 3, 4]] * SHARDS


@given(
    losses=st.lists(st.tuples(*[st.integers(0, 12)] * SHARDS), min_size=1, max_size=4),
    shares=st.lists(st.lists(st.sampled_from(TOKENS), min_size=1, max_size=4, unique=True), min_size=8),
    applied=st.lists(st.integers(0, 8), min_size=SHARDS, max_size=SHARDS),
)
@hypothesis_settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_taken_back_the_first_sight_of_each_entry_is_in_order_and_whole(
    losses: list[tuple[int, ...]],
    shares: list[list[int]],
    applied: list[int],
    client: redis.Redis,
    settings: Settings,
) -> None:
    """The aggregator takes an entry if its seq is above all before: then none may be missing."""
    client.flushall()
    writer = TickWriter(lambda: connect(settings), settings, source="a")
    sent: dict[int, list[int]] = {shard: [] for shard in range(SHARDS)}
    seq = 0
    for lost in losses:
        for tokens in shares:
            seq += 1
            assert writer.write([batch(seq, tokens=tokens)], AT_MS)
            for shard in {settings.keys.shard_of(token) for token in tokens}:
                sent[shard].append(seq)
        for shard in range(SHARDS):
            everything: Any = client.xrange(settings.keys.ticks(shard))
            entries = everything[: applied[shard]]
            if entries:  # an aggregator had committed so far; a failover never takes back less than that
                last, cells = entries[-1]
                client.hset(settings.keys.cursor(shard), mapping={"id": last, "src:a": cells[b"seq"]})
            take_back(client, settings.keys, shard, min(lost[shard], len(everything) - len(entries)))
        cut_connections(client)
    assert writer.write([], AT_MS) is True
    assert writer.write([batch(seq + 1)], AT_MS)
    for shard in range(SHARDS):
        seen: list[int] = []
        for each in seqs(client, settings.keys, shard):
            if not seen or each > seen[-1]:
                seen.append(each)
        assert seen == [*sent[shard], seq + 1]


# -- the parts -----------------------------------------------------------------------------------


def test_the_last_entry_of_a_source_is_found_among_others(
    writer: TickWriter, client: redis.Redis, settings: Settings
) -> None:
    write(writer, 1, 2, 3)
    write(writer, *range(1, 600), source="b")
    assert highest_seq(client, settings.keys, 1, "a", enough=3) == 3
    assert highest_seq(client, settings.keys, 1, "b", enough=599) == 599
    assert highest_seq(client, settings.keys, 1, "nobody", enough=1) == 0


def test_a_stream_is_looked_through_only_so_far(client: redis.Redis, settings: Settings) -> None:
    key = settings.keys.ticks(0)
    client.xadd(key, {"src": "a", "seq": 5})
    pipeline = client.pipeline(transaction=False)
    for n in range(LOOK_ENTRIES_MAX + 500):
        pipeline.xadd(key, {"src": "b", "seq": n})
    pipeline.execute()
    client.hset(settings.keys.cursor(0), "src:a", 4)
    assert highest_seq(client, settings.keys, 0, "a", enough=9) == 4


def test_kept_frames_are_bounded_in_bytes_and_by_the_age_of_the_newest() -> None:
    now = 0.0
    kept = AckedBuffer(bytes_max=10 * batch(1).ticks.nbytes, seconds=30.0, clock=lambda: now)
    kept.add([batch(seq) for seq in range(1, 26)])
    assert (len(kept), kept.dropped) == (10, {"a": 15})
    assert kept.size_bytes == 10 * batch(1).ticks.nbytes
    now = 3_600.0  # Redis was away for an hour: what it had acknowledged before is what counts
    assert kept.last_seqs("a", Keys("pkb", SHARDS)) == dict.fromkeys(range(SHARDS), 25)
    kept.add([batch(26)])
    assert (len(kept), kept.dropped) == (1, {"a": 25})


def test_acked_batches_are_sent_again_from_where_each_shard_stands() -> None:
    kept = AckedBuffer()
    kept.add([batch(1), batch(2)])
    again = list(kept.after("a", {0: 0, 1: 1}, Keys("pkb", SHARDS)))
    assert [each.seq for each in again] == [1, 2]
    shards = [{Keys("pkb", SHARDS).shard_of(int(token)) for token in each.ticks[:, 0]} for each in again]
    assert shards == [{0}, {0, 1}]


def test_a_shut_gate_lets_no_connection_through_but_the_open_ones(settings: Settings) -> None:
    client = connect(settings)
    gate = PinnedConnections(client, 5.0)
    assert client.ping()
    gate.pin()
    assert client.ping()
    client.connection_pool.disconnect()
    with pytest.raises(redis.ConnectionError):
        client.ping()
