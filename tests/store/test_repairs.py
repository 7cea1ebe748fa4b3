"""The repair streams' writers: one entry a shard, parts of bounded size, and what is no repair is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import redis

from pkbrokers_redis.aggregate.worker import Aggregator
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store import repairs
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.repairs import (
    Forget,
    Gap,
    Rows,
    is_applied,
    read_repair,
    send_forget,
    send_gap,
    send_rows,
    wait_applied,
)
from tests.support import wait_until

KEYS = Keys("pkb", 4)
INFY, RELIANCE = 408065, 738561
OPEN_S = 1_767_584_700  # 2026-01-05 09:15 in Kolkata
MINUTE: list[Any] = [OPEN_S, 100.5, 101, 99, 100, 10, None]

VALKEY = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)


def entries(client: redis.Redis, token: int) -> list[tuple[bytes, dict[bytes, bytes]]]:
    return client.xrange(KEYS.repairs(KEYS.shard_of(token)))  # type: ignore[return-value]


@VALKEY
def test_an_outage_is_one_entry_in_each_shard_concerned(client: redis.Redis) -> None:
    assert KEYS.shard_of(INFY) != KEYS.shard_of(RELIANCE)
    assert (
        send_gap(
            client, KEYS, [INFY, RELIANCE, INFY + 1024], OPEN_S * 1000 + 0.7, OPEN_S * 1000 + 9e6, "mute"
        )
        == 2
    )
    ((_, infy),) = entries(client, INFY)
    assert infy[b"why"] == b"mute" and json.loads(infy[b"tokens"]) == [INFY, INFY + 1024]
    ((_, fields),) = entries(client, RELIANCE)
    assert read_repair(fields) == Gap([RELIANCE], OPEN_S * 1000, OPEN_S * 1000 + 9_000_000)


@VALKEY
def test_empty_outage_sends_nothing(client: redis.Redis) -> None:
    assert send_gap(client, KEYS, [INFY], 5_000, 5_000, "mute") == 0
    assert send_gap(client, KEYS, [], 5_000, 6_000, "mute") == 0
    assert entries(client, INFY) == []


@VALKEY
def test_entries_round_trip(client: redis.Redis) -> None:
    entry_id = send_rows(client, KEYS, INFY, "1m", OPEN_S, OPEN_S + 60, [MINUTE], "gap")
    ((found, fields),) = entries(client, INFY)
    assert found.decode() == entry_id
    assert read_repair(fields) == Rows(INFY, "1m", OPEN_S, OPEN_S + 60, [MINUTE])


@VALKEY
def test_span_without_rows_is_sent(client: redis.Redis) -> None:
    send_rows(client, KEYS, INFY, "1m", OPEN_S, OPEN_S + 60, [], "gap")
    ((_, fields),) = entries(client, INFY)
    assert read_repair(fields) == Rows(INFY, "1m", OPEN_S, OPEN_S + 60, [])
    with pytest.raises(PkbError, match="empty span"):
        send_rows(client, KEYS, INFY, "1m", OPEN_S, OPEN_S, [], "gap")


@VALKEY
def test_many_rows_and_tokens_are_split_without_a_hole(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repairs, "ROWS_MAX", 2)
    monkeypatch.setattr(repairs, "TOKENS_MAX", 2)
    rows = [[OPEN_S + 60 * n, *MINUTE[1:]] for n in range(5)]
    last = send_rows(client, KEYS, INFY, "1m", OPEN_S - 600, OPEN_S + 900, rows, "warm")
    found = [read_repair(fields) for _, fields in entries(client, INFY)]
    assert [(each.from_s - OPEN_S, each.to_s - OPEN_S, each.rows) for each in found] == [  # type: ignore[union-attr]
        (180, 900, rows[3:]), (60, 180, rows[1:3]), (-600, 60, rows[:1]),
    ]  # fmt: skip
    assert entries(client, INFY)[-1][0].decode() == last
    assert send_gap(client, KEYS, [INFY + 1024 * n for n in range(5)], 5_000, 6_000, "mute") == 3


@VALKEY
def test_forget_entries_have_a_bounded_size(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repairs, "FORGET_MAX", 2)
    assert send_forget(client, KEYS, [], "reassigned") == 0
    assert send_forget(client, KEYS, [INFY, RELIANCE, INFY + 1024, INFY + 2048], "reassigned") == 3
    assert [read_repair(fields) for _, fields in entries(client, INFY)] == [
        Forget([INFY, INFY + 1024]), Forget([INFY + 2048]),
    ]  # fmt: skip


@VALKEY
def test_job_can_wait_until_its_entry_is_applied(client: redis.Redis) -> None:
    entry_id = send_rows(client, KEYS, INFY, "1m", OPEN_S, OPEN_S + 60, [MINUTE], "gap")
    assert not is_applied(client, KEYS, INFY, entry_id)
    assert not wait_applied(client, KEYS, INFY, entry_id, timeout_seconds=0)
    client.hset(KEYS.cursor(KEYS.shard_of(INFY)), "repair", "5-0")
    assert not is_applied(client, KEYS, INFY, entry_id)
    client.hset(KEYS.cursor(KEYS.shard_of(INFY)), "repair", entry_id)
    assert wait_applied(client, KEYS, INFY, entry_id, timeout_seconds=0)


GAP = {"kind": "gap", "from": OPEN_S * 1000, "to": OPEN_S * 1000 + 5, "tokens": f"[{INFY}]"}
ROWS = {"kind": "rows", "token": INFY, "interval": "1m", "from": OPEN_S, "to": OPEN_S + 60, "rows": "[]"}
MALFORMED: list[dict[str, Any]] = [
    {},
    {"hello": "world"},
    {**GAP, "kind": "hole"},
    {**GAP, "from": "soon"},
    {**GAP, "from": "²"},
    {**GAP, "to": GAP["from"]},
    {**GAP, "from": 0},
    {**GAP, "from": OPEN_S * 1000 - 11 * 86_400_000},
    {**GAP, "to": "9" * 17},
    {**GAP, "tokens": "408065"},
    {**GAP, "tokens": '["408065"]'},
    {**GAP, "tokens": "[1.5]"},
    {**GAP, "tokens": "[-1]"},
    {**GAP, "tokens": "[" + "9" * 400 + "]"},
    {**GAP, "tokens": b"\xff"},
    {**GAP, "tokens": "[" * 100_000},
    {**GAP, "tokens": str([1] * 5_001)},
    {**GAP, "tokens": "[1" + " " * (1 << 20) + "]"},
    {"kind": "forget"},
    {"kind": "forget", "tokens": "[0]"},
    {"kind": "forget", "tokens": f'["{INFY}"]'},
    {**ROWS, "token": "INFY"},
    {**ROWS, "token": "0"},
    {**ROWS, "token": 2**32},
    {**ROWS, "to": OPEN_S},
    {**ROWS, "from": OPEN_S * 1000, "to": OPEN_S * 1000 + 60},
    {**ROWS, "rows": "garbage"},
    {**ROWS, "rows": "[[NaN]]"},
    {**ROWS, "rows": '[{"a":1}]'},
    {**ROWS, "rows": "[[[1]]]"},
    {**ROWS, "rows": "[" * 100_000},
    {**ROWS, "rows": str([[1]] * 2_001)},
    {key: value for key, value in ROWS.items() if key != "rows"},
]


@pytest.mark.parametrize("fields", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_entry_is_refused_with_its_reason(fields: dict[str, Any]) -> None:
    entry = {
        key.encode(): value if isinstance(value, bytes) else str(value).encode()
        for key, value in fields.items()
    }
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        read_repair(entry)


@pytest.mark.xdist_group("cluster")
def test_repairs_are_applied_on_a_cluster(cluster_client: redis.Redis, cluster_settings: Settings) -> None:
    keys, tokens = cluster_settings.keys, [256 * n + 1 for n in range(1, 9)]
    rows = [[OPEN_S + 60 * n, *MINUTE[1:]] for n in range(40)]
    for token in tokens:
        last = send_rows(cluster_client, keys, token, "1m", OPEN_S, OPEN_S + 2_400, rows, "warm")
    aggregator = Aggregator(
        lambda: connect(cluster_settings), cluster_settings, now_ms=lambda: (OPEN_S + 9_000) * 1000.0
    )
    aggregator.start()
    try:
        wait_until(
            lambda: (
                aggregator.step(block_ms_max=1) == 0
                and all(is_applied(cluster_client, keys, token, last) for token in tokens[-1:])
                and aggregator.figures()["repairs"] == len(tokens)
            )
        )
        send_gap(cluster_client, keys, tokens, (OPEN_S + 2_400) * 1000, (OPEN_S + 2_500) * 1000, "mute")
        wait_until(lambda: aggregator.step(block_ms_max=1) == 0 and aggregator.figures()["repairs"] == 16)
        send_forget(cluster_client, keys, tokens[:1], "reassigned")
        wait_until(lambda: aggregator.step(block_ms_max=1) == 0 and aggregator.figures()["forgotten"] == 1)
    finally:
        aggregator.close()
    assert not cluster_client.exists(*(keys.candles(tokens[0], name) for name in ("1m", "5m", "day")))
    for token in tokens[1:]:
        assert cluster_client.llen(keys.candles(token, "1m")) == 40
        assert cluster_client.llen(keys.candles(token, "5m")) == 8
