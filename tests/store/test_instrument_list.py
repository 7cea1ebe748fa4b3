"""P:watch: what is streamed in addition to PKB_INSTRUMENTS, and what is left out."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import redis

from pkbrokers_redis import logs
from pkbrokers_redis.errors import UnknownSymbol, WrongKeyType
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.instruments import swap_master
from pkbrokers_redis.store.symbols import (
    edit_watch,
    instrument_list,
    list_version,
    load_watch,
    read_instrument_list,
    resolve,
)
from tests.client.contract import INFY, NIFTY, RELIANCE, write_master

INFY_ROW = {"instrument_token": str(INFY), "tradingsymbol": "INFY", "exchange": "NSE"}


@pytest.fixture
def server_kind() -> str:
    return "valkey"  # which of them does not matter here


@pytest.fixture
def mine(make_settings: Callable[..., Settings], client: redis.Redis) -> Settings:
    settings = make_settings(instruments="INFY,NIFTY 50")
    write_master(client, settings.keys)
    return settings


def test_without_changes_it_is_the_setting(client: redis.Redis, mine: Settings) -> None:
    assert instrument_list(client, mine) == [(INFY, "NSE:INFY"), (NIFTY, "NSE:NIFTY 50")]


def test_what_is_added_comes_behind_and_what_is_removed_goes(client: redis.Redis, mine: Settings) -> None:
    before = list_version(client, mine)
    written = edit_watch(client, mine.keys, add=["reliance", "INFY", "999"], remove=["256265"])
    assert written == {"NSE:RELIANCE": "add", "NSE:INFY": "add", "999": "add", "NSE:NIFTY 50": "remove"}
    assert load_watch(client, mine.keys) == written
    wanted = {(INFY, "NSE:INFY"), (RELIANCE, "NSE:RELIANCE"), (999, "999")}
    assert set(instrument_list(client, mine)) == wanted
    assert list_version(client, mine) != before


def test_the_last_word_on_a_symbol_counts(client: redis.Redis, mine: Settings) -> None:
    edit_watch(client, mine.keys, remove=["INFY"])
    edit_watch(client, mine.keys, add=["INFY"])
    assert (INFY, "NSE:INFY") in instrument_list(client, mine)


def test_one_unknown_symbol_and_nothing_is_written(client: redis.Redis, mine: Settings) -> None:
    with pytest.raises(UnknownSymbol, match="NSE:RELIANCE"):
        edit_watch(client, mine.keys, add=["INFY", "RELIANC"])
    assert load_watch(client, mine.keys) == {}


def test_a_contract_that_expired_stops_nobody_and_can_be_removed(client: redis.Redis, mine: Settings) -> None:
    edit_watch(client, mine.keys, add=["RELIANCE"])
    client.hset(mine.keys.watch(), mapping={"NFO:GONE24DECFUT": "add", "NSE:SGBAUG28-GB": "sell"})
    assert (RELIANCE, "NSE:RELIANCE") in instrument_list(client, mine)
    assert len(instrument_list(client, mine)) == 3
    assert edit_watch(client, mine.keys, remove=["nfo:gone24decfut"]) == {"NFO:GONE24DECFUT": "remove"}


def test_names_that_the_master_lacks_cost_only_themselves(client: redis.Redis, mine: Settings) -> None:
    texts = "INFY,NSE:OLDNAME,inffy,0,99999999999,nfo-nifti,NIFTY 50"
    both = mine.model_copy(update={"instruments": texts})
    found = read_instrument_list(client, both)
    assert instrument_list(client, both) == found.instruments == [(INFY, "NSE:INFY"), (NIFTY, "NSE:NIFTY 50")]
    assert set(found.unknown) == {"NSE:OLDNAME", "inffy", "0", "99999999999", "nfo-nifti"}
    assert "did you mean NSE:INFY" in found.unknown["inffy"].hint
    with pytest.raises(UnknownSymbol, match="OLDNAME"):
        instrument_list(client, mine.model_copy(update={"instruments": "NSE:OLDNAME"}))
    with pytest.raises(UnknownSymbol, match="INFX"):
        edit_watch(client, mine.keys, add=["INFX"])


def test_an_expired_contract_leaves_the_list_by_itself(
    client: redis.Redis,
    mine: Settings,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logs._output, "level", logging.INFO)
    name = "NFO:INFY24DECFUT"
    future = {"instrument_token": "514", "tradingsymbol": "INFY24DECFUT", "exchange": "NFO", "name": "INFY"}
    swap_master(client, mine.keys, [future], ["NFO"])
    listed = mine.model_copy(update={"instruments": f"INFY,{name}"})
    assert len(instrument_list(client, listed)) == 2
    swap_master(client, mine.keys, [{**future, "tradingsymbol": "INFY25JANFUT"}], ["NFO"])
    for _ in range(2):
        found = read_instrument_list(client, listed)
        assert (found.instruments, found.unknown) == ([(INFY, "NSE:INFY")], {})
    assert capsys.readouterr().err.count("contract_expired") == 1


def test_a_renamed_share_is_followed_by_its_token(client: redis.Redis, mine: Settings) -> None:
    share = {"instrument_token": "4267265", "tradingsymbol": "ZOMATO", "exchange": "NSE"}
    swap_master(client, mine.keys, [share], ["BSE"])  # another scope than the fixture's rows
    edit_watch(client, mine.keys, add=["ZOMATO"])
    renamed = {**share, "tradingsymbol": "ETERNAL"}
    swap_master(client, mine.keys, [renamed, INFY_ROW], ["NSE"])
    for name in ("NSE:ZOMATO", "zomato", "ETERNAL"):
        assert resolve(client, mine.keys, name) == (4267265, "NSE:ETERNAL")
    found = read_instrument_list(client, mine.model_copy(update={"instruments": "INFY"}))
    assert (found.instruments, found.unknown) == ([(INFY, "NSE:INFY"), (4267265, "NSE:ETERNAL")], {})
    swap_master(client, mine.keys, [INFY_ROW], ["NSE"])  # delisted: neither name leads to it
    with pytest.raises(UnknownSymbol):
        resolve(client, mine.keys, "ZOMATO")


def test_the_version_stays_while_nothing_changes_and_follows_the_master(
    client: redis.Redis, mine: Settings
) -> None:
    version = list_version(client, mine)
    assert list_version(client, mine) == version
    client.hset(mine.keys.master(), "changed_at", "2026-11-23T08:30:00+05:30")
    assert list_version(client, mine) != version


def test_key_of_another_type_is_named(client: redis.Redis, mine: Settings) -> None:
    client.set(mine.keys.watch(), "x")
    with pytest.raises(WrongKeyType, match="pkb:watch holds a string"):
        instrument_list(client, mine)
