"""The master and the session on a cluster: no command of theirs needs two keys in one slot."""

from __future__ import annotations

import threading
import time

import pytest
import redis
from pydantic import SecretStr

from pkbrokers_redis.kite.session import SessionKeeper
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.auth import Session, forget_session, load_session, save_session
from pkbrokers_redis.store.master import (
    Manifest,
    is_current,
    load_derivative_tokens,
    read_manifest,
    read_rows,
    swap_master,
    write_manifest,
)
from pkbrokers_redis.store.search import search_instruments
from pkbrokers_redis.store.symbols import load_symbols
from pkbrokers_redis.store.watch import edit_watch, load_watch
from tests.kite.logins import WEB, fields_of, simulated_kite

pytestmark = pytest.mark.xdist_group("cluster")

STOCKS = [
    {"instrument_token": str(n << 8 | 1), "tradingsymbol": f"EQ{n}", "exchange": "NSE"} for n in range(1, 200)
]
FUTURE = {"instrument_token": "514", "tradingsymbol": "EQ526DECFUT", "exchange": "NFO", "name": "EQ5"}


def test_a_master_is_swapped_and_searched_on_a_cluster(
    cluster_client: redis.Redis, cluster_settings: Settings
) -> None:
    keys = cluster_settings.keys
    assert swap_master(cluster_client, keys, [*STOCKS, FUTURE], ["NSE", "NFO"]).added == 200
    assert load_derivative_tokens(cluster_client, keys) == {5 << 8 | 1}
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
        keeper = SessionKeeper(settings, lambda: cluster_client)
        renewed = keeper.renew(dead, threading.Event())
        assert renewed.is_same(load_session(cluster_client, keys)) and kite.accounts.logins == 1
    forget_session(cluster_client, keys, renewed)
    assert load_session(cluster_client, keys) is None


def test_a_manifest_of_a_foreign_hand_is_none_or_out_of_date(
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
