"""`pkb instruments`: the master fetched, searched, and what is streamed changed live."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
import redis

from pkbrokers_redis.settings import Settings
from pkbrokers_redis.simulator.kite import SimulatedKite
from tests.cli.conftest import Pkb
from tests.kite.logins import fields_of, simulated_kite
from tests.support import settings_env


@pytest.fixture
def server_kind() -> str:
    return "valkey"  # which of them does not matter here


@pytest.fixture
def kite() -> Iterator[SimulatedKite]:
    with simulated_kite(60) as kite:
        yield kite


@pytest.fixture
def env(
    kite: SimulatedKite,
    make_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    client: redis.Redis,
) -> Settings:
    """The environment points at the private server, which is empty, and at the Kite."""
    settings = make_settings(**fields_of(kite), instruments="INFY,nfo-nifty")
    for name, value in settings_env(settings).items():
        monkeypatch.setenv(name, value)
    return settings


def test_a_sync_prints_what_changed_and_a_second_one_that_nothing_did(pkb: Pkb, env: Settings) -> None:
    first = pkb("instruments", "sync")
    assert first.code == 0 and "60 instruments in" in first.out and "60 new, 0 removed" in first.out
    assert "unchanged" in pkb("instruments", "sync").out
    found = json.loads(pkb("instruments", "sync", "--exchange", "NSE", "--exchange", "BSE", "--json").out)
    assert found["changed"] and found["rows"] < 60 and found["removed"] == 0


def test_a_search_prints_a_table_and_similar_names(pkb: Pkb, env: Settings) -> None:
    pkb("instruments", "sync")
    found = pkb("instruments", "search", "infosys", "--json")
    assert [row["symbol"] for row in json.loads(found.out)] == ["NSE:INFY", "BSE:INFY"]
    typo = pkb("instruments", "search", "INFYS", "--csv")
    assert typo.out.startswith("token,symbol,name,") and "408065,NSE:INFY,INFOSYS" in typo.out
    assert "similar names" in typo.err and typo.code == 0
    more = pkb("instruments", "search", "a", "-n", "2")
    assert len(more.out.splitlines()) == 3 and "more: -n" in more.err


def test_a_search_in_vain_and_one_in_an_empty_master_are_one_line(pkb: Pkb, env: Settings) -> None:
    empty = pkb("instruments", "search", "infy")
    assert empty.code == 2 and "pkb instruments sync" in empty.err and empty.err.count("\n") == 1
    pkb("instruments", "sync")
    vain = pkb("instruments", "search", "qqqqqqq")
    assert vain.code == 2 and "unknown symbol" in vain.err and vain.err.count("\n") == 1


def test_the_list_follows_what_is_added_and_removed(pkb: Pkb, env: Settings) -> None:
    pkb("instruments", "sync")
    before = {row["symbol"] for row in json.loads(pkb("instruments", "list", "--json").out)}
    assert "NSE:INFY" in before and all(name.startswith(("NSE:INFY", "NFO:NIFTY")) for name in before)
    added = pkb("instruments", "add", "reliance", "TCS")
    assert added.out == "NSE:RELIANCE: added\nNSE:TCS: added\n" and added.code == 0
    assert pkb("instruments", "remove", "INFY").out == "NSE:INFY: removed\n"
    after = pkb("instruments", "list", "--json")
    assert {row["symbol"] for row in json.loads(after.out)} == before - {"NSE:INFY"} | {
        "NSE:RELIANCE",
        "NSE:TCS",
    }
    assert "2 added and 1 removed live" in after.err


def test_a_typo_in_add_names_what_is_near_and_adds_nothing(pkb: Pkb, env: Settings) -> None:
    pkb("instruments", "sync")
    ended = pkb("instruments", "add", "TCS", "RELIANC")
    assert ended.code == 2 and "NSE:RELIANCE" in ended.err and ended.err.count("\n") == 1
    assert "live" not in pkb("instruments", "list").err


@pytest.mark.parametrize(
    ("fault", "words"), [("html", "page instead of data"), ("429", "too often"), ("503", "has a problem")]
)
def test_a_kite_in_trouble_is_one_line(
    pkb: Pkb, env: Settings, kite: SimulatedKite, fault: str, words: str
) -> None:
    kite.faults.add(fault)
    ended = pkb("instruments", "sync")
    assert ended.code == 2 and words in ended.err and ended.err.count("\n") == 1


def test_an_unknown_exchange_and_an_unknown_word_are_mistakes(pkb: Pkb, env: Settings) -> None:
    assert "NYSE" in pkb("instruments", "sync", "--exchange", "nyse").err
    assert pkb("instruments", "dance").code == 2
