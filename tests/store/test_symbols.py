"""Typed names resolve to tokens; unknown names raise with similar ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis

from pkbrokers_redis.errors import InputFileError, PkbError, UnknownSymbol
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.symbols import (
    load_symbols,
    nearest_names,
    resolve,
    resolve_all,
    resolve_many,
    save_instruments,
)
from tests.client.contract import INFY, NIFTY, RELIANCE, SENSEX, write_master


@pytest.fixture(autouse=True)
def _master(client: redis.Redis, settings: Settings) -> None:
    write_master(client, settings.keys)


@pytest.mark.parametrize(
    ("text", "token", "symbol"),
    [
        ("NSE:INFY", INFY, "NSE:INFY"),
        ("INFY", INFY, "NSE:INFY"),
        (" infy ", INFY, "NSE:INFY"),
        ("nse:Infy", INFY, "NSE:INFY"),
        ("BSE:INFY", 128053508, "BSE:INFY"),
        ("NIFTY 50", NIFTY, "NSE:NIFTY 50"),
        ("nifty 50", NIFTY, "NSE:NIFTY 50"),
        ("SENSEX", SENSEX, "BSE:SENSEX"),
        ("408065", INFY, "NSE:INFY"),
        ("999", 999, "999"),
    ],
)
def test_typed_names_resolve_to_tokens(
    client: redis.Redis, settings: Settings, text: str, token: int, symbol: str
) -> None:
    assert resolve(client, settings.keys, text) == (token, symbol)


def test_a_name_that_the_exchange_writes_in_mixed_case_is_found(
    client: redis.Redis, settings: Settings
) -> None:
    row = {"instrument_token": 777, "exchange": "NSE", "tradingsymbol": "Nifty Div Point"}
    save_instruments(client, settings.keys, [row])
    assert resolve(client, settings.keys, "NIFTY DIV POINT") == (777, "NSE:Nifty Div Point")


@pytest.mark.parametrize("text", ["INFYY", "IFNY", "NSE:INF", "infosy"])
def test_unknown_symbol_names_similar_ones(client: redis.Redis, settings: Settings, text: str) -> None:
    with pytest.raises(UnknownSymbol) as caught:
        resolve(client, settings.keys, text)
    assert "NSE:INFY" in caught.value.nearest or text == "infosy"
    assert len(caught.value.nearest) <= 3


@pytest.mark.parametrize(
    "text", ["0", "4294967296", "99999999999999", "-1", "", "٣٤", "a" * 5000, "NSE:", "\x00"]
)
def test_nonsense_is_an_unknown_symbol_and_no_crash(
    client: redis.Redis, settings: Settings, text: str
) -> None:
    with pytest.raises(UnknownSymbol) as caught:
        resolve(client, settings.keys, text)
    assert len(str(caught.value)) < 200


def test_similar_names_of_the_same_exchange_come_first() -> None:
    names = ["BSE:TATASTEEL", "NSE:TATASTEEL", "NFO:TATASTEEL26FUT", "NSE:TATAPOWER"]
    assert nearest_names(names, "TATASTEL")[0] == "NSE:TATASTEEL"
    assert nearest_names(names, "BSE:TATASTEL")[0] == "BSE:TATASTEEL"


def test_many_keep_their_order_and_may_repeat(client: redis.Redis, settings: Settings) -> None:
    found = resolve_all(client, settings.keys, ["RELIANCE", 408065, "INFY", "nse:reliance"])
    assert [token for token, _ in found] == [RELIANCE, INFY, INFY, RELIANCE]


def test_a_setting_lists_symbols_tokens_files_and_groups(
    client: redis.Redis, settings: Settings, tmp_path: Path
) -> None:
    listing = tmp_path / "mine.txt"
    listing.write_text("# my shares\nRELIANCE  # energy\n\n  NIFTY 50\n408065\n")
    chosen = resolve_many(client, settings.keys, f"INFY, {listing} ,BSE:INFY")
    assert chosen == [
        (INFY, "NSE:INFY"),
        (RELIANCE, "NSE:RELIANCE"),
        (NIFTY, "NSE:NIFTY 50"),
        (128053508, "BSE:INFY"),
    ]


def test_nse_equity_is_shares_without_bonds_and_indices(client: redis.Redis, settings: Settings) -> None:
    names = {symbol for _, symbol in resolve_many(client, settings.keys, "nse-equity")}
    assert names == {"NSE:INFY", "NSE:RELIANCE", "NSE:BAJAJ-AUTO", "NSE:CENTRALBK-BE"}


def test_all_is_the_whole_master(client: redis.Redis, settings: Settings) -> None:
    assert dict(resolve_many(client, settings.keys, "all")) == load_symbols(client, settings.keys)


@pytest.mark.parametrize("text", ["all", "NSE-Equity", "nfo-nifty", "INFY", "BSE:INFY"])
def test_empty_master_has_a_hint(client: redis.Redis, settings: Settings, text: str) -> None:
    client.delete(settings.keys.symbols())
    with pytest.raises(PkbError, match=r"master is empty.*pkb instruments sync"):
        resolve_many(client, settings.keys, text)


def test_unknown_symbol_has_a_hint_to_search(client: redis.Redis, settings: Settings) -> None:
    for text in ("INFYY", "QQQQQQQ"):
        with pytest.raises(UnknownSymbol, match="pkb instruments search"):
            resolve(client, settings.keys, text)


CONTRACTS = ["NFO:NIFTY26DECFUT", "NFO:NIFTY2612524500CE", "NFO:NIFTYNXT5026DECFUT", "NFO:M&M26DECFUT",
             "MCX:CRUDEOIL26DECFUT", "CDS:USDINR26DECFUT"]  # fmt: skip


@pytest.mark.parametrize(
    ("group", "wanted"),
    [
        ("nse-indices", {"NSE:NIFTY 50"}),
        ("bse-indices", {"BSE:SENSEX"}),
        ("indices", {"NSE:NIFTY 50", "BSE:SENSEX"}),
        ("bse-equity", {"BSE:INFY"}),
        ("nfo", {*CONTRACTS[:4]}),
        ("NFO-NIFTY", {*CONTRACTS[:2]}),
        ("nfo-m&m", {"NFO:M&M26DECFUT"}),
        ("nfo-futures", {CONTRACTS[0], CONTRACTS[2], CONTRACTS[3]}),
        ("mcx", {"MCX:CRUDEOIL26DECFUT"}),
        ("cds-usdinr", {"CDS:USDINR26DECFUT"}),
        ("bcd", set()),
    ],
)
def test_groups_are_chosen_from_the_master(
    client: redis.Redis, settings: Settings, group: str, wanted: set[str]
) -> None:
    segments = {"NFO": 2, "CDS": 3, "MCX": 7}
    rows = [
        {
            "instrument_token": number << 8 | segments[name[:3]],
            "exchange": name[:3],
            "tradingsymbol": name[4:],
        }
        for number, name in enumerate(CONTRACTS, 1)
    ]
    save_instruments(client, settings.keys, rows)
    assert {symbol for _, symbol in resolve_many(client, settings.keys, group)} == wanted


def test_group_adds_each_instrument_once(client: redis.Redis, settings: Settings) -> None:
    chosen = resolve_many(client, settings.keys, "RELIANCE,nse-equity,INFY,nse-equity")
    assert chosen[0] == (RELIANCE, "NSE:RELIANCE") and len(chosen) == len(dict(chosen)) == 4


def test_an_underlying_without_contracts_is_an_unknown_symbol(
    client: redis.Redis, settings: Settings
) -> None:
    with pytest.raises(UnknownSymbol, match=r"'nfo-nifti'.*pkb instruments search"):
        resolve_many(client, settings.keys, "nfo-nifti")
    assert resolve_many(client, settings.keys, "BAJAJ-AUTO") == [(4267265, "NSE:BAJAJ-AUTO")]  # no group


def test_empty_setting_selects_nothing(client: redis.Redis, settings: Settings) -> None:
    assert resolve_many(client, settings.keys, " , ") == []


def test_a_missing_file_is_one_line(client: redis.Redis, settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="no file"):
        resolve_many(client, settings.keys, str(tmp_path / "none.txt"))
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputFileError, match="UTF-8"):
        resolve_many(client, settings.keys, str(binary))
    with pytest.raises(InputFileError, match="cannot read"):
        resolve_many(client, settings.keys, f"{tmp_path}/")


def test_master_row_without_token_or_symbol_is_counted_and_skipped(
    client: redis.Redis, settings: Settings
) -> None:
    rows = [
        {"instrument_token": "11", "exchange": "NSE", "tradingsymbol": "ELEVEN", "expiry": None},
        {"instrument_token": "x", "exchange": "NSE", "tradingsymbol": "X"},
        {"exchange": "NSE", "tradingsymbol": "Y"},
        {"instrument_token": 2**32, "exchange": "NSE", "tradingsymbol": "TOOBIG"},
        {"instrument_token": 12, "exchange": "NSE", "tradingsymbol": ""},
    ]
    assert save_instruments(client, settings.keys, rows) == (1, 4)
    stored = client.hgetall(settings.keys.instrument(11))
    assert stored == {
        b"instrument_token": b"11",
        b"exchange": b"NSE",
        b"tradingsymbol": b"ELEVEN",
        b"expiry": b"",
    }


def test_a_large_master_is_written_and_searched(client: redis.Redis, settings: Settings) -> None:
    rows = [
        {"instrument_token": 256 * i + 2, "exchange": "NFO", "tradingsymbol": f"OPT{i}CE"}
        for i in range(1, 5001)
    ]
    assert save_instruments(client, settings.keys, rows).saved == 5000
    assert len(load_symbols(client, settings.keys)) == 5008
    with pytest.raises(UnknownSymbol) as caught:
        resolve(client, settings.keys, "NFO:OPT4999C")
    assert caught.value.nearest[0] == "NFO:OPT4999CE"
