"""The master, and the session, on a cluster, where no command may need keys of two slots."""

from __future__ import annotations

import threading
import time

import pytest
import redis
from pydantic import SecretStr

from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.kite.session import SessionManager
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store import instruments
from pkbrokers_redis.store.auth import Session, forget_session, load_session, save_session
from pkbrokers_redis.store.instruments import (
    Manifest,
    is_current,
    read_hours,
    read_manifest,
    read_rows,
    search_instruments,
    swap_master,
    write_manifest,
)
from pkbrokers_redis.store.repairs import Forget, read_repair
from pkbrokers_redis.store.symbols import edit_watch, load_symbols, load_watch
from tests.kite.logins import WEB, fields_of, simulated_kite

CLUSTER = pytest.mark.xdist_group("cluster")
VALKEY = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)

STOCKS = [
    {"instrument_token": str(n << 8 | 1), "tradingsymbol": f"EQ{n}", "exchange": "NSE"} for n in range(1, 200)
]
FUTURE = {"instrument_token": "514", "tradingsymbol": "EQ526DECFUT", "exchange": "NFO", "name": "EQ5"}


def forgotten(client: redis.Redis, keys: Keys) -> list[int]:
    """The tokens that the repair streams say are other instruments now."""
    found: list[int] = []
    for shard in range(keys.shards):
        for _, fields in client.xrange(keys.repairs(shard)):  # type: ignore[union-attr]
            entry = read_repair(fields)
            assert isinstance(entry, Forget)
            found += entry.tokens
    return found


@CLUSTER
def test_a_master_is_swapped_and_searched_on_a_cluster(
    cluster_client: redis.Redis, cluster_settings: Settings
) -> None:
    keys = cluster_settings.keys
    assert swap_master(cluster_client, keys, [*STOCKS, FUTURE], ["NSE", "NFO"]).added == 200
    sessions = load_sessions("market")
    assert read_hours(cluster_client, keys, sessions)
    assert sessions.derivatives == {5 << 8 | 1}
    put = {**FUTURE, "tradingsymbol": "EQ526DEC100PE"}
    assert swap_master(cluster_client, keys, [put], ["NFO"]).reassigned == 1
    assert forgotten(cluster_client, keys) == [514]
    swap_master(cluster_client, keys, [FUTURE], ["NFO"])
    swapped = swap_master(cluster_client, keys, STOCKS[1:], ["NSE"])
    assert (swapped.names, swapped.added, swapped.removed) == (198, 0, 1)
    assert len(load_symbols(cluster_client, keys)) == 199
    assert [row["tradingsymbol"] for row in read_rows(cluster_client, keys, [257, 513, 514])] == [
        "EQ2", "EQ526DECFUT",
    ]  # fmt: skip
    assert search_instruments(cluster_client, keys, "EQ199").rows[0]["token"] == 199 << 8 | 1
    assert (
        edit_watch(cluster_client, keys, add=["EQ7"])
        == load_watch(cluster_client, keys)
        == {"NSE:EQ7": "add"}
    )


@CLUSTER
def test_a_session_is_shared_marked_and_renewed_on_a_cluster(
    cluster_client: redis.Redis, cluster_settings: Settings
) -> None:
    keys = cluster_settings.keys
    with simulated_kite() as kite:
        settings = cluster_settings.model_copy(update={
            name: SecretStr(value) if name in ("kite_password", "kite_totp_secret") else value
            for name, value in fields_of(kite, *WEB).items()
        })  # fmt: skip
        dead = save_session(
            cluster_client, keys, Session("", enctoken=SecretStr("dead"), login_at=time.time())
        )
        manager = SessionManager(settings, lambda: cluster_client)
        renewed = manager.renew(dead, threading.Event())
        assert renewed.is_same(load_session(cluster_client, keys)) and kite.accounts.logins == 1
    forget_session(cluster_client, keys, renewed)
    assert load_session(cluster_client, keys) is None


@CLUSTER
def test_malformed_manifest_is_none_or_outdated(
    cluster_client: redis.Redis, cluster_settings: Settings
) -> None:
    keys = cluster_settings.keys
    assert read_manifest(cluster_client, keys) is None
    cluster_client.hset(keys.master(), mapping={"synced_at": "yesterday", "rows": "many", "sha256": "x"})
    manifest = read_manifest(cluster_client, keys)
    assert manifest is not None and manifest.age_seconds(0) is None
    assert not is_current(cluster_client, keys, "x", "all")
    write_manifest(cluster_client, keys, Manifest("2026-11-23T08:30:00+05:30", "", 1, 0, "x", "all"))
    assert not is_current(cluster_client, keys, "x", "all")  # no name stands there
    manifest = read_manifest(cluster_client, keys)
    assert manifest is not None and manifest.age_seconds(1_795_402_801) == 1.0


def contract(token: int, name: str, exchange: str = "NFO") -> dict[str, str]:
    return {"instrument_token": str(token), "tradingsymbol": name, "exchange": exchange, "name": "NIFTY"}


@VALKEY
def test_reassigned_token_is_reported_for_deletion(client: redis.Redis, settings: Settings) -> None:
    keys, first, second, third = settings.keys, 45_000 << 8 | 2, 45_001 << 8 | 2, 45_002 << 8 | 7
    masters = [
        [contract(first, "NIFTY26N1724000CE"), contract(second, "NIFTY26N1724000PE")],
        [contract(first, "NIFTY26N2426500PE")],  # at once
        [contract(first, "NIFTY26N2426500PE")],  # the second is unused for a while
        [contract(first, "NIFTY26N2426500PE"), contract(second, "NIFTY26D0124000CE")],
    ]
    counts = [swap_master(client, keys, rows, ["NFO"]).reassigned for rows in masters]
    assert counts == [0, 1, 0, 1] and sorted(forgotten(client, keys)) == [first, second]
    assert swap_master(client, keys, [contract(third, "GOLD26DECFUT", "MCX")], ["MCX"]).reassigned == 0
    assert swap_master(client, keys, masters[-1], ["NFO"]).reassigned == 0


@VALKEY
def test_renamed_share_and_relisted_contract_keep_their_candles(
    client: redis.Redis, settings: Settings
) -> None:
    keys, option = settings.keys, contract(45_000 << 8 | 2, "NIFTY26N1724000CE")
    renamed = {**STOCKS[0], "tradingsymbol": "NEWNAME"}
    for stock, *contracts in ((STOCKS[0], option), (renamed,), (renamed, option)):
        swapped = swap_master(client, keys, [stock, *contracts], ["NSE", "NFO"])
        assert swapped.reassigned == 0
    assert forgotten(client, keys) == []


@VALKEY
@pytest.mark.parametrize("step", ["_write", "_note_expired", "_swap_names"])
def test_killed_sync_leaves_no_contract_with_the_candles_of_another(
    client: redis.Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    keys, token, other = settings.keys, 45_000 << 8 | 2, 45_001 << 8 | 2
    swap_master(client, keys, [contract(token, "NIFTY26N1724000CE"), contract(other, "X26NFUT")], ["NFO"])

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(instruments, step, die)
        with pytest.raises(KeyboardInterrupt):
            swap_master(client, keys, [contract(token, "NIFTY26N2426500PE")], ["NFO"])
    assert forgotten(client, keys) == ([token] if step == "_swap_names" else [])
    assert swap_master(client, keys, [contract(token, "NIFTY26N2426500PE")], ["NFO"]).reassigned == 1
    assert swap_master(client, keys, [contract(other, "Y26DFUT")], ["NFO"]).reassigned == 1
    assert set(forgotten(client, keys)) == {token, other}
