"""The reading commands against a real server with data written by the contract's keys."""

from __future__ import annotations

import csv
import io
import json
import signal
from pathlib import Path

import pytest
import redis

from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.connect import connect
from tests.cli.conftest import Pkb
from tests.client.contract import INFY, OPEN_S, RELIANCE, announce, push, row, tick_frame, write_master
from tests.support import PKB, running_process, settings_env

pytestmark = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)

DEPTH = '{"buy":[],"sell":[]}'
CANDLE = {
    "time": "2026-01-05T09:15:00+05:30",
    "start": OPEN_S,
    "open": 100.5,
    "high": 100.5,
    "low": 100.5,
    "close": 100.5,
    "volume": 10,
    "oi": None,
    "ticks": 1,
    "flag": "partial",
}


@pytest.fixture(autouse=True)
def _data(client: redis.Redis, store_env: Settings) -> None:
    keys = store_env.keys
    push(client, keys, INFY, "5m", [row(OPEN_S, 100.5, flag="partial"), row(OPEN_S + 600, 102)])
    client.hset(keys.current(INFY), "5m", row(OPEN_S + 900, 103))
    client.hset(
        keys.quote(INFY),
        mapping={
            "symbol": "NSE:INFY",
            "last_price": "1500.05",
            "volume": "7",
            "depth": '{"buy":[],"sell":[]}',
        },
    )


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if stdout were a terminal: it is a file while pytest captures it."""
    monkeypatch.setattr("pkbrokers_redis.cli.read.choose_form", lambda as_json, as_csv: "table")


def test_candles_as_json_have_the_rows_fields_and_the_time(pkb: Pkb) -> None:
    ended = pkb("candles", "infy", "5m", "--json", "-n", "2")
    assert (ended.code, ended.err) == (0, "")
    first, second = json.loads(ended.out)
    assert first == CANDLE
    assert second["start"] == OPEN_S + 600 and second["flag"] == ""


def test_candles_with_the_current_one_and_filled(pkb: Pkb) -> None:
    ended = pkb("candles", "INFY", "5m", "--json", "--current", "--fill", "-n", "3")
    assert [(each["start"] - OPEN_S, each["ticks"]) for each in json.loads(ended.out)] == [
        (300, 0),
        (600, 1),
        (900, 1),
    ]


def test_candles_as_csv_and_in_a_pipe(pkb: Pkb) -> None:
    rows = list(csv.DictReader(io.StringIO(pkb("candles", "INFY", "5m", "--csv").out)))
    assert rows[0] == {name: "" if value is None else str(value) for name, value in CANDLE.items()}
    piped = pkb("candles", "INFY", "5m").out.splitlines()
    assert piped[0].split("\t") == list(CANDLE) and len(piped) == 3


def test_candles_on_a_terminal_are_a_table(pkb: Pkb, on_terminal: None) -> None:
    out = pkb("candles", "INFY", "5m").out
    assert "NSE:INFY 5m" in out and "2026-01-05 09:15 " in out and "100.50" in out and "partial" in out


def test_no_candles_are_an_empty_array_and_a_word(pkb: Pkb) -> None:
    ended = pkb("candles", "RELIANCE", "1h", "--json")
    assert (ended.code, ended.out) == (0, "[]\n")
    assert ended.err == "pkb: no 1h candles of NSE:RELIANCE yet\n"


def test_an_unknown_symbol_is_one_line_with_the_nearest_and_exit_2(pkb: Pkb) -> None:
    ended = pkb("candles", "RELIANSE", "5m")
    assert (ended.code, ended.out) == (2, "")
    asked = "did you mean NSE:RELIANCE? `pkb instruments search` finds more"
    assert ended.err == f"pkb: unknown symbol 'RELIANSE': {asked}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["candles", "INFY", "7m"],
        ["candles", "INFY", "5m", "-n", "0"],
        ["candles", "INFY"],
        ["candles", "INFY", "5m", "--json", "--csv"],
        ["quote"],
        ["closed", "--interval", "7m"],
    ],
)
def test_wrong_usage_is_exit_2_without_a_traceback(pkb: Pkb, arguments: list[str]) -> None:
    ended = pkb(*arguments)
    assert ended.code == 2 and ended.out == "" and "Traceback" not in ended.err


def test_a_quote_is_an_object_and_several_are_an_array(pkb: Pkb) -> None:
    one = json.loads(pkb("quote", "INFY", "--json").out)
    assert one == {
        "token": INFY,
        "symbol": "NSE:INFY",
        "last_price": 1500.05,
        "volume": 7,
        "depth": {"buy": [], "sell": []},
    }
    ended = pkb("quote", "RELIANCE", "408065", "--json")
    assert json.loads(ended.out) == [{"token": RELIANCE, "symbol": "NSE:RELIANCE"}, one]
    assert ended.err == "pkb: no quote of NSE:RELIANCE yet\n"


def test_a_quote_in_a_pipe_and_on_a_terminal(pkb: Pkb, monkeypatch: pytest.MonkeyPatch) -> None:
    header, values = (line.split("\t") for line in pkb("quote", "INFY").out.splitlines())
    assert dict(zip(header, values, strict=True))["last_price"] == "1500.05"
    monkeypatch.setattr("pkbrokers_redis.cli.read.choose_form", lambda as_json, as_csv: "table")
    assert "1,500.05" in pkb("quote", "INFY").out


def test_closed_candles_of_all_shards(pkb: Pkb, client: redis.Redis, store_env: Settings) -> None:
    for i, token in enumerate([INFY, RELIANCE, INFY]):
        text = row(OPEN_S + 60 * i)
        announce(client, store_env.keys, token, "1m", text, rev=i, symbol=f"S{token}")
    found = json.loads(pkb("closed", "--json", "-n", "2", "--interval", "1m").out)
    assert len(found) == 2
    assert {"token", "symbol", "interval", "rev", "time", "start", "close", "flag"} <= set(found[0])
    assert json.loads(pkb("closed", "--json", "--interval", "5m").out) == []
    assert len(pkb("closed", "--csv").out.splitlines()) == 4


def test_followed_candles_come_a_line_each_and_go_on_from_a_position(
    pkb: Pkb, client: redis.Redis, store_env: Settings
) -> None:
    for i in range(3):
        announce(client, store_env.keys, INFY, "1m", row(OPEN_S + 60 * i))
    follow = [*PKB, "closed", "--follow", "--json", "--position"]
    with running_process(*follow, "0", env=settings_env(store_env), stderr_too=False) as process:
        assert process.stdout is not None
        lines = [json.loads(process.stdout.readline()) for _ in range(2)]
    assert [line["start"] - OPEN_S for line in lines] == [0, 60]
    with running_process(
        *follow, lines[-1]["position"], env=settings_env(store_env), stderr_too=False
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert json.loads(process.stdout.readline())["start"] == OPEN_S + 120
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert process.stderr.read() == ""


def test_missed_candles_are_reported(client: redis.Redis, store_env: Settings) -> None:
    for i in range(5):
        announce(client, store_env.keys, INFY, "1m", row(OPEN_S + 60 * i))
    client.xtrim(store_env.keys.closed(store_env.keys.shard_of(INFY)), maxlen=2, approximate=False)
    nothing_read = ";".join(["..0"] * store_env.shards)
    with running_process(
        *PKB, "closed", "--follow", "--position", nothing_read, env=settings_env(store_env), stderr_too=False
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "pkb: missed 3 closed candles: trimmed before they were read\n"


def test_ticks_are_rows_by_name(pkb: Pkb, client: redis.Redis, store_env: Settings) -> None:
    shard = store_env.keys.shard_of(INFY)
    rows = [[INFY, 1500.05, 5, 7, None, 1, 2, 0.5, OPEN_S * 1000 + 250]]
    tick_frame(client, store_env.keys, shard, rows, at=OPEN_S * 1000 + 300)
    (tick,) = json.loads(pkb("ticks", "INFY", "--json").out)
    assert tick["time"] == "2026-01-05T09:15:00.250+05:30" and tick["last_price"] == 1500.05
    assert tick["volume"] == 7 and tick["oi"] is None and tick["at_ms"] == OPEN_S * 1000 + 300
    assert "no ticks of NSE:RELIANCE" in pkb("ticks", "RELIANCE").err


def test_malformed_rows_are_left_out_and_counted(pkb: Pkb, client: redis.Redis, store_env: Settings) -> None:
    push(client, store_env.keys, INFY, "5m", ["?"])
    ended = pkb("candles", "INFY", "5m", "--json")
    assert len(json.loads(ended.out)) == 2
    assert "left out 1 malformed rows" in ended.err


def test_a_key_of_another_type_is_one_line(pkb: Pkb, client: redis.Redis, store_env: Settings) -> None:
    client.set(store_env.keys.candles(INFY, "1m"), "x")
    ended = pkb("candles", "INFY", "1m")
    assert ended.code == 2
    assert ended.err.startswith("pkb: pkb:{2}:candles:408065:1m holds a string, not a list")


def test_reading_without_a_store_is_one_line_and_creates_none(
    pkb: Pkb, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PKB_REDIS_URL")
    monkeypatch.setenv("PKB_DATA_DIR", str(tmp_path / "none"))
    ended = pkb("quote", "INFY")
    assert ended.code == 2 and "pkb demo" in ended.err
    assert not (tmp_path / "none").exists()


def test_the_demos_store_is_read_and_named_where_there_is_no_other(
    pkb: Pkb, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PKB_REDIS_URL")
    monkeypatch.setenv("PKB_DATA_DIR", str(tmp_path / "some"))
    demo = load_settings(data_dir=tmp_path / "some" / "demo")
    with connect(demo) as client:
        write_master(client, demo.keys)
        push(client, demo.keys, INFY, "5m", [row(OPEN_S)])
        ended = pkb("candles", "INFY", "5m", "--json")
    assert ended.code == 0 and json.loads(ended.out)[0]["start"] == OPEN_S
    assert ended.err.startswith("pkb: reading the demo's store in ") and ended.err.count("\n") == 1
