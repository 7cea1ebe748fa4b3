"""The instrument master: what Kite sends is checked, swapped in at once, and cheap to refresh."""

from __future__ import annotations

import csv
import io
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date, datetime
from typing import Any

import pytest
import redis

from pkbrokers_redis.candles.calendar import IST, load_sessions
from pkbrokers_redis.errors import KiteUnavailable, PkbError, SettingsError
from pkbrokers_redis.ingest.worker import WatchedList, _first_list
from pkbrokers_redis.kite.instruments import KiteInstruments, Parsed, parse_instruments
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.simulator.kite import SimulatedKite
from pkbrokers_redis.simulator.universe import universe
from pkbrokers_redis.store.instruments import (
    MasterShrunk,
    load_derivatives,
    read_hours,
    read_manifest,
)
from pkbrokers_redis.store.symbols import instrument_list, load_symbols, read_names, resolve_many
from tests.kite.logins import fields_of
from tests.support import SHARED_DATA

HEADER = (
    "instrument_token,exchange_token,tradingsymbol,name,last_price,expiry,strike,tick_size,lot_size,"
    "instrument_type,segment,exchange"
)
TODAY = date(2026, 11, 23)
NOON = datetime(2026, 11, 23, 12, tzinfo=IST).timestamp()
GOOD = "408065,1594,INFY,INFOSYS,0.0,,0.0,0.05,1,EQ,NSE,NSE"


@pytest.fixture
def server_kind() -> str:
    return "valkey"  # which of them does not matter here


@pytest.fixture
def kite() -> Iterator[SimulatedKite]:
    with SimulatedKite(universe(60)) as kite:
        yield kite


@pytest.fixture
def master(
    kite: SimulatedKite, make_settings: Callable[..., Settings], client: redis.Redis
) -> KiteInstruments:
    return KiteInstruments(settings=make_settings(**fields_of(kite)), client=client)


@pytest.fixture
def alone(settings: Settings, client: redis.Redis) -> KiteInstruments:
    """Without a Kite: tests hand the CSV in."""
    return KiteInstruments(settings=settings, client=client, now=lambda: NOON)


def equity(number: int, symbol: str = "", exchange: str = "NSE") -> dict[str, Any]:
    symbol = symbol or f"EQ{number}"
    low = 1 if exchange == "NSE" else 4
    return {"instrument_token": number << 8 | low, "tradingsymbol": symbol, "name": f"{symbol} LIMITED",
            "exchange": exchange, "segment": exchange, "instrument_type": "EQ", "lot_size": 1}  # fmt: skip


def contract(number: int, underlying: str, expiry: str, exchange: str = "NFO") -> dict[str, Any]:
    low = 2 if exchange == "NFO" else 5
    symbol = f"{underlying}{expiry[2:4]}X{number}FUT"
    return {"instrument_token": number << 8 | low, "tradingsymbol": symbol, "name": underlying,
            "exchange": exchange, "segment": f"{exchange}-FUT", "instrument_type": "FUT",
            "expiry": expiry, "lot_size": 75}  # fmt: skip


def parsed(*rows: dict[str, Any], today: date = TODAY) -> Parsed:
    text = io.StringIO()
    writer = csv.DictWriter(text, HEADER.split(","))
    writer.writeheader()
    writer.writerows(rows)
    return parse_instruments(text.getvalue().encode(), today)


# --- the CSV -------------------------------------------------------------------------------------------


def test_kites_sample_is_parsed_completely() -> None:
    path = SHARED_DATA / "rest" / "instruments_all.csv"
    if not path.exists():
        pytest.skip("the recorded answers are not here")
    content = path.read_bytes()
    found = parse_instruments(content, date(2017, 12, 1))
    lines = content.decode().strip().splitlines()[1:]
    assert len(found.rows) == len(lines) - found.refused["repeated"] - found.expired
    assert set(found.refused) <= {"repeated"}
    assert found.rows[0]["tradingsymbol"] == "CENTRALBK-BE"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("x,1594,INFY2,INFOSYS,0.0,,0.0,0.05,1,EQ,NSE,NSE", "token"),
        ("0,1594,INFY2,INFOSYS,0.0,,0.0,0.05,1,EQ,NSE,NSE", "token"),
        ("4294967296,1594,INFY2,INFOSYS,0.0,,0.0,0.05,1,EQ,NSE,NSE", "token"),
        ("\u0663\u0664,1594,INFY2,INFOSYS,0.0,,0.0,0.05,1,EQ,NSE,NSE", "token"),
        ("999,1594,,INFOSYS,0.0,,0.0,0.05,1,EQ,NSE,NSE", "symbol"),
        ("999,1594,\x1b[31mINFY,INFOSYS,0.0,,0.0,0.05,1,EQ,NSE,NSE", "symbol"),
        (f"999,1594,{'X' * 65},INFOSYS,0.0,,0.0,0.05,1,EQ,NSE,NSE", "symbol"),
        ("999,1594,INFY2,INFOSYS,0.0,,0.0,0.05,1,EQ,NSE,", "exchange"),
        ("999,1594,INFY2,INFOSYS,0.0,,0.0,0.05,1,EQ,NSE,pkb:meta", "exchange"),
        ("999,1594,INFY2,INFOSYS,nan,,0.0,0.05,1,EQ,NSE,NSE", "last_price"),
        ("999,1594,INFY2,INFOSYS,0.0,,inf,0.05,1,EQ,NSE,NSE", "strike"),
        ("999,1594,INFY2,INFOSYS,0.0,,0.0,0.05,many,EQ,NSE,NSE", "lot_size"),
        ("999,1594,INFY2,INFOSYS,0.0,31-12-2026,0.0,0.05,1,EQ,NSE,NSE", "expiry"),
        (f"999,1594,INFY2,{'N' * 300},0.0,,0.0,0.05,1,EQ,NSE,NSE", "text"),
        ("999,1594,INFY2", "columns"),
        ("999,1594,INFY2,INFOSYS,0.0,,0.0,0.05,1,EQ,NSE,NSE,more", "columns"),
        ("408065,1594,INFY2,INFOSYS,0.0,,0.0,0.05,1,EQ,NSE,NSE", "repeated"),
        ("999,1594,INFY,INFOSYS,0.0,,0.0,0.05,1,EQ,NSE,NSE", "repeated"),
        (f'999,1594,"{"Q" * 200_000}",INFOSYS,0.0,,0.0,0.05,1,EQ,NSE,NSE', "unreadable"),
    ],
)
def test_an_invalid_row_is_counted_and_valid_rows_are_kept(line: str, why: str) -> None:
    last = "738561,2885,RELIANCE,RELIANCE INDUSTRIES,0.0,,0.0,0.05,1,EQ,NSE,NSE"
    found = parse_instruments("\n".join([HEADER, GOOD, line, "", last]).encode(), TODAY)
    assert [row["tradingsymbol"] for row in found.rows] == ["INFY", "RELIANCE"]
    assert found.refused == Counter({why: 1}) and found.expired == 0


def test_columns_are_found_by_name_and_a_new_one_is_kept() -> None:
    text = "exchange,moon_phase,tradingsymbol,instrument_token\r\nNSE,full,INFY,0408065\r\n"
    assert parse_instruments(b"\xef\xbb\xbf" + text.encode(), TODAY).rows == [
        {"exchange": "NSE", "moon_phase": "full", "tradingsymbol": "INFY", "instrument_token": "408065"}
    ]


@pytest.mark.parametrize("more", ["", ",ISIN", ",freeze qty", ",name", ",Robert'); DROP", ",isin,"])
def test_columns_of_other_names_are_ignored(more: str) -> None:
    cells = more.replace(",", ",x") if more.strip(",") else ""
    found = parse_instruments(f"{HEADER}{more}\n{GOOD}{cells.removesuffix(',x')}\n".encode(), TODAY)
    assert [row["tradingsymbol"] for row in found.rows] == ["INFY"]
    assert not found.refused


def test_a_comma_at_the_end_of_the_header_costs_no_row() -> None:
    other = GOOD.replace("408065", "2305").replace("INFY", "B")
    found = parse_instruments(f"{HEADER},\n{GOOD}\n{other},\n".encode(), TODAY)
    assert [row["tradingsymbol"] for row in found.rows] == ["INFY", "B"]


def test_an_unclosed_quote_costs_its_own_line_only() -> None:
    lines = [f"{n << 8 | 1},{n},EQ{n},NAME,0.0,,0.0,0.05,1,EQ,NSE,NSE" for n in range(1, 1001)]
    lines[500] = lines[500].replace("NAME", '"NAME')
    lines[700] = lines[700].replace("NAME", '"NAME, LTD"')
    found = parse_instruments("\n".join([HEADER, *lines]).encode(), TODAY)
    assert len(found.rows) == 999
    assert found.refused == Counter(unreadable=1)


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>maintenance</html>", b"\x00\xff\x1f\x8b", b"a,b\n1,2\n", HEADER.encode() + b",x" * 40],
)
def test_other_content_than_the_csv_is_unavailable(content: bytes) -> None:
    with pytest.raises(KiteUnavailable):
        parse_instruments(content, TODAY)


def test_a_contract_expires_the_day_after_its_expiry() -> None:
    row = contract(1, "NIFTY", "2026-11-23")
    assert len(parsed(row).rows) == 1
    after = parsed(row, today=date(2026, 11, 24))
    assert (after.rows, after.expired) == ([], 1)


# --- in Redis ------------------------------------------------------------------------------------------


def test_a_sync_stores_the_master_in_the_documented_keys(
    master: KiteInstruments, kite: SimulatedKite, client: redis.Redis
) -> None:
    synced = master.sync()
    keys = master.settings.keys
    listed = [row for row in kite.instruments.rows if not row["expiry"] or row["expiry"] > "2026-01-01"]
    assert synced.rows == synced.added == len(listed) and synced.expired > 0 and synced.refused == 0
    assert load_symbols(client, keys) == {
        row["instrument_token"]: f"{row['exchange']}:{row['tradingsymbol']}" for row in listed
    }
    for row in listed[:5]:
        stored: Any = client.hgetall(keys.instrument(row["instrument_token"]))
        assert {name.decode(): value.decode() for name, value in stored.items()} == {
            name: str(value) for name, value in row.items()
        }


def test_an_unchanged_list_is_not_stored_again(master: KiteInstruments, client: redis.Redis) -> None:
    master.sync()
    before = read_manifest(client, master.settings.keys)
    client.hset(master.settings.keys.instrument(408065), "name", "TOUCHED")
    assert not master.sync().changed
    assert client.hget(master.settings.keys.instrument(408065), "name") == b"TOUCHED"
    assert master.sync(force=True).changed
    assert client.hget(master.settings.keys.instrument(408065), "name") == b"INFOSYS"
    after = read_manifest(client, master.settings.keys)
    assert before is not None and after is not None and before.sha256 == after.sha256
    client.delete(master.settings.keys.symbols())
    assert master.sync().changed  # the manifest names them, but the names are missing


def test_a_sync_needs_no_live_session(
    kite: SimulatedKite, make_settings: Callable[..., Settings], client: redis.Redis
) -> None:
    settings = make_settings(**fields_of(kite))
    dead = KiteInstruments("key", "dead-token", settings=settings, client=client)
    assert dead.sync(["NSE"]).rows > 0
    assert KiteInstruments(settings=settings, client=client).sync(["bse", "NFO"]).rows > 0


def test_ingest_fetches_the_master_itself_where_there_never_was_one(
    kite: SimulatedKite, make_settings: Callable[..., Settings], client: redis.Redis
) -> None:
    settings = make_settings(instruments="nse-equity", kite_user_id="SIM001", **fields_of(kite))
    found = _first_list(settings, client, WatchedList(settings))
    assert found == instrument_list(client, settings) and len(found) > 3
    assert read_manifest(client, settings.keys) is not None


def test_without_a_network_what_needs_no_master_streams_and_the_rest_is_one_line(
    make_settings: Callable[..., Settings], client: redis.Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"kite_api_url": "http://127.0.0.1:1", "kite_api_key": "key"}
    settings = make_settings(instruments="408065,NSE:TCS", **fields)
    assert [token for token, _ in _first_list(settings, client, WatchedList(settings))] == [408065]
    settings = make_settings(instruments="nse-equity", **fields)
    with pytest.raises(PkbError, match="the instrument master is empty"):
        _first_list(settings, client, WatchedList(settings))
    assert "event=master_not_fetched" in capsys.readouterr().err


def test_an_unknown_exchange_is_a_settings_error(master: KiteInstruments) -> None:
    with pytest.raises(SettingsError, match=r"no exchange 'NYSE'.*NSE, BSE"):
        master.sync(["nyse"])


def test_expired_contracts_are_removed_with_their_rows(alone: KiteInstruments, client: redis.Redis) -> None:
    keys = alone.settings.keys
    rows = [
        equity(1),
        equity(2, exchange="BSE"),
        contract(3, "EQ1", "2026-11-20"),
        contract(4, "EQ1", "2026-12-31"),
    ]
    alone.store(parsed(*rows, today=date(2026, 11, 1)))
    assert len(read_names(client, keys)) == 4
    synced = alone.store(parsed(*rows))
    assert (synced.rows, synced.added, synced.removed, synced.expired) == (3, 0, 1, 1)
    assert not client.exists(keys.instrument(3 << 8 | 2)) and client.exists(keys.instrument(4 << 8 | 2))


def test_a_symbol_with_a_new_token_leaves_no_old_row(alone: KiteInstruments, client: redis.Redis) -> None:
    keys = alone.settings.keys
    alone.store(parsed(equity(1, "INFY")))
    assert alone.store(parsed(equity(2, "INFY"))).added == 1
    assert read_names(client, keys) == {"NSE:INFY": 2 << 8 | 1}
    assert not client.exists(keys.instrument(1 << 8 | 1))
    assert alone.store(parsed(equity(2, "INFY26"))).removed == 1  # renamed: the token stays, and its row
    assert client.hget(keys.instrument(2 << 8 | 1), "tradingsymbol") == b"INFY26"


def test_a_sync_of_one_exchange_keeps_the_other_exchanges(
    alone: KiteInstruments, client: redis.Redis
) -> None:
    alone.store(parsed(equity(1), equity(2, exchange="BSE")))
    alone.store(parsed(equity(3), equity(9, exchange="BSE")), ["NSE"])
    assert set(read_names(client, alone.settings.keys)) == {"NSE:EQ3", "BSE:EQ2"}


def test_a_truncated_or_empty_list_is_refused(alone: KiteInstruments, client: redis.Redis) -> None:
    alone.store(parsed(*(equity(number) for number in range(1, 2001))))
    few = parsed(*(equity(number) for number in range(1, 900)))
    with pytest.raises(MasterShrunk, match=r"899 rows where 2,000 were.*--force"):
        alone.store(few)
    with pytest.raises(PkbError, match="empty"):
        alone.store(parsed())
    assert len(read_names(client, alone.settings.keys)) == 2000
    assert alone.store(few, force=True).removed == 1101


def test_stocks_with_derivatives_are_found_by_their_exchanges_contracts(
    alone: KiteInstruments, client: redis.Redis
) -> None:
    keys = alone.settings.keys
    index = {**equity(5, "SENSEX", "BSE"), "instrument_token": 265, "segment": "INDICES"}
    rows = [
        equity(1, "INFY"), equity(2, "TCS"), equity(3, "INFY", "BSE"), equity(4, "M&M"), index,
        contract(6, "INFY", "2026-12-31"), contract(7, "NIFTY", "2026-12-31"),
        contract(8, "M&M", "2026-11-01"), contract(9, "SENSEX", "2026-12-31", "BFO"),
    ]  # fmt: skip
    alone.store(parsed(*rows, today=date(2026, 11, 1)))
    assert load_derivatives(client, keys) == {"NSE:INFY", "NSE:M&M"}
    sessions = load_sessions("market")
    assert read_hours(client, keys, sessions)
    assert sessions.derivatives == {1 << 8 | 1, 4 << 8 | 1}
    alone.store(parsed(*rows))  # M&M's only contract has expired
    assert load_derivatives(client, keys) == {"NSE:INFY"}
    alone.store(parsed(contract(10, "TCS", "2026-12-31")), ["NFO"])  # by exchange: the stocks are in Redis
    assert load_derivatives(client, keys) == {"NSE:TCS"}
    alone.store(parsed(equity(2, "TCS")), ["NSE"])
    assert load_derivatives(client, keys) == {"NSE:TCS"}


def test_a_reader_sees_the_old_master_or_the_new_one(alone: KiteInstruments, client: redis.Redis) -> None:
    keys = alone.settings.keys
    generations = [
        parsed(*(equity(number, f"{letter}{number}") for number in range(first, first + 3000)))
        for letter, first in (("A", 1), ("B", 10_001))
    ]
    alone.store(generations[0])
    done = threading.Event()
    seen: list[set[str]] = []
    pool = client.connection_pool

    def read() -> None:
        with redis.Redis(connection_pool=pool) as own:
            while not done.is_set():
                names: Any = own.hkeys(keys.symbols())  # one command: one consistent state
                seen.append({name[4:5].decode() + str(len(names)) for name in names})
                first: Any = own.hget(keys.symbols(), "NSE:A1")
                if first is not None and not own.exists(keys.instrument(int(first))):
                    assert own.hget(keys.symbols(), "NSE:A1") is None  # it was removed between the two reads

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(6):
        alone.store(generations[(turn + 1) % 2], force=True)
    done.set()
    reader.join()
    assert len(seen) > 3 and {frozenset(names) for names in seen} <= {
        frozenset({"A3000"}),
        frozenset({"B3000"}),
    }


# --- upstream's names ----------------------------------------------------------------------------------


def test_upstreams_methods_read_from_redis(master: KiteInstruments, client: redis.Redis) -> None:
    tokens = master.get_or_fetch_instrument_tokens()  # an empty master is fetched first
    shares = {token for token, _ in resolve_many(client, master.settings.keys, "nse-equity")}
    indices = {token for token, _ in resolve_many(client, master.settings.keys, "nse-indices")}
    assert set(tokens) == shares | indices and 408065 in shares and 256265 in indices
    assert set(master.get_or_fetch_instrument_tokens(only_nse_stocks=True)) == shares
    assert master.get_instrument_count() == len(load_symbols(client, master.settings.keys))
    assert master.get_nse_stock_count() == len(master.get_nse_stocks()) == len(shares)
    infy = master.get_instrument(408065)
    assert infy is not None and infy["nse_stock"] is True and infy["lot_size"] == 1 and infy["expiry"] is None
    assert master.get_instrument(1) is None
    futures = master.get_equities("instrument_token,expiry,lot_size", segment="NFO-FUT")
    assert futures and all(row["expiry"] and row["lot_size"] > 1 for row in futures)
    with pytest.raises(ValueError, match="no such columns: password"):
        master.get_equities("instrument_token, password")


def test_upstreams_methods_fetch_and_store(master: KiteInstruments, client: redis.Redis) -> None:
    fetched = master.fetch_instruments()
    assert {row.exchange for row in fetched} == {"NSE"}
    assert master.sync_instruments(fetched[:7], force_fetch=False)
    assert master.get_instrument_count() == 7
    assert master.sync_instruments()  # fresh enough: nothing is done
    assert master.get_instrument_count() == 7
    assert master.update_nse_stock_status("INFY", is_nse_stock=False)
    assert 408065 not in {row["instrument_token"] for row in master.get_nse_stocks() if row["nse_stock"]}
    assert not master.update_nse_stock_status("NOBODY", is_nse_stock=True)
    assert master.get_instrument_tokens([{"instrument_token": "5"}, {}, {"instrument_token": None}]) == [5]
    assert master.migrate_to_nse_stock_column()


def test_a_failed_sync_returns_false_and_keeps_the_master(
    master: KiteInstruments, kite: SimulatedKite
) -> None:
    kite.faults.add("html")
    assert master.sync_instruments() is False
    assert master.get_instrument_count() == 0
