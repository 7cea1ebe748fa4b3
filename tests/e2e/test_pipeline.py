"""The whole of it as processes: a Kite server, `workers.ingest`, `workers.aggregate`, and an oracle.

The oracle reads the frames the server sent, a packet at a time and in plain Python, and works out every row
of every interval by the rules of a candle. It shares the packets' decoder with the pipeline, nothing else.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import redis

from pkbrokers_redis.candles.model import Interval
from pkbrokers_redis.client.replay import lag_entries
from pkbrokers_redis.kite.capture import KIND_BINARY, CaptureWriter, read_capture
from pkbrokers_redis.kite.protocol import decode
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.simulator.market import Market
from pkbrokers_redis.simulator.subscriptions import MODE_FULL, frames_for
from pkbrokers_redis.simulator.universe import universe
from pkbrokers_redis.simulator.websocket_server import SimulatorServer
from pkbrokers_redis.store.symbols import save_instruments
from tests.support import run_pkb, running_python, settings_env, wait_until

INSTRUMENTS = 200
MIDNIGHT_S = 1_767_551_400  # 2026-01-05T00:00+05:30
START_S = MIDNIGHT_S + 9 * 3600 + 40 * 60 + 7
STEP_S, STEPS = 5, 240  # twenty minutes
GRACE_S = 2
FRAMES_AHEAD_MAX = 200  # of what the server has handed to its socket; it disconnects who lags by 512
Row = list[Any]
ValkeyOnly = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)


class Capture(CaptureWriter):
    """Counts the binary frames as they leave."""

    frames = 0

    def write(self, at_ms: int, kind: int, frame: bytes) -> None:
        super().write(at_ms, kind, frame)
        self.frames += kind == KIND_BINARY and len(frame) > 1


# -- the oracle --------------------------------------------------------------------------------------


class Statement(NamedTuple):
    """What one packet says. Ordered by time, then volume."""

    time_s: int
    volume: int
    price: float
    oi: int | None
    day: tuple[float, float, float] | None  # open, high, low


def packets_of(frame: bytes) -> Iterator[bytes]:
    position = 2
    for _ in range(int.from_bytes(frame[:2], "big")):
        length = int.from_bytes(frame[position : position + 2], "big")
        yield frame[position + 2 : position + 2 + length]
        position += 2 + length


def statement_of(tick: dict[str, Any]) -> Statement:
    ohlc = tick["ohlc"]
    day = (ohlc["open"], ohlc["high"], ohlc["low"])
    moment: datetime = tick["last_trade_time"] if tick["tradable"] else tick["exchange_timestamp"]
    return Statement(
        int(moment.timestamp()), tick.get("volume_traded", 0), tick["last_price"], tick.get("oi"), day
    )


def rows_of(statements: list[Statement], interval: Interval) -> dict[int, Row]:
    """Start → row, of one instrument's statements as they came."""
    first, *rest = statements
    expected = sorted({each for each in rest if each.time_s >= first.time_s and each != first})
    distinct: dict[tuple[int, int, float], Statement] = {}
    for each in expected:  # a repeated trade is no news; an index has no volume that would show it
        distinct.setdefault((each.time_s, each.volume, each.price if not each.volume else 0), each)
    rows: dict[int, Row] = {}
    before, highest = first, first.volume
    for each in distinct.values():
        length = interval.seconds or 86_400
        start = MIDNIGHT_S + (each.time_s - MIDNIGHT_S) // length * length
        is_day = interval.seconds == 0
        assert each.day is not None and before.day is not None
        row = rows.get(start)
        if row is None:
            row = rows[start] = [start, each.price, each.price, each.price, each.price, 0, None, 0]
            if not is_day and start <= first.time_s < start + length:
                row.append("partial")
        prices = [each.price]
        if is_day:
            row[1], row[5] = each.day[0], each.volume
            prices += each.day[1:]
        elif start <= before.time_s:  # a new extreme of the day, and both in this candle: it was in here
            prices += [each.day[1]] if each.day[1] > before.day[1] else []
            prices += [each.day[2]] if each.day[2] < before.day[2] else []
        row[2], row[3], row[4] = max(row[2], *prices), min(row[3], *prices), each.price
        if not is_day:
            row[5] += max(0, each.volume - highest)
        row[6], row[7] = each.oi, row[7] + 1
        before, highest = each, max(highest, each.volume)
    return rows


def expected_quote(tick: dict[str, Any], symbol: str) -> dict[str, Any]:
    ohlc = tick["ohlc"]
    quote = {
        "symbol": symbol, "last_price": tick["last_price"], "change": tick["change"], "mode": "full",
        **{name: ohlc[name] for name in ("open", "high", "low", "close")},
        "exchange_time": tick["exchange_timestamp"].isoformat(),
    }  # fmt: skip
    if tick["tradable"]:
        quote |= {
            "last_quantity": tick["last_traded_quantity"], "average_price": tick["average_traded_price"],
            "volume": tick["volume_traded"], "buy_quantity": tick["total_buy_quantity"],
            "sell_quantity": tick["total_sell_quantity"], "oi": tick["oi"],
            "oi_day_high": tick["oi_day_high"], "oi_day_low": tick["oi_day_low"],
            "last_trade_time": tick["last_trade_time"].isoformat(), "depth": tick["depth"],
        }  # fmt: skip
    return quote


# -- what Redis holds --------------------------------------------------------------------------------


def stored_rows(client: redis.Redis, settings: Settings, token: int, interval: str) -> dict[int, Row]:
    texts: Any = [*client.lrange(settings.keys.candles(token, interval), 0, -1)]  # type: ignore[misc]
    current = client.hget(settings.keys.current(token), interval)
    rows = [json.loads(text) for text in (*texts, *([current] if current else []))]
    starts = [row[0] for row in rows]
    assert starts == sorted(set(starts)), f"{token} {interval}: a start twice, or out of order"
    return {row[0]: row for row in rows}


def stored_quote(client: redis.Redis, settings: Settings, token: int) -> dict[str, Any]:
    quote: dict[str, Any] = {}
    fields: Any = client.hgetall(settings.keys.quote(token))
    for name, value in fields.items():
        text = value.decode()
        plain = name in (b"symbol", b"mode", b"exchange_time", b"last_trade_time", b"received_at")
        quote[name.decode()] = text if plain else json.loads(text)
    assert quote.pop("received_at", None), f"{token} has no quote"
    return quote


def closed_candles(client: redis.Redis, settings: Settings, shard: int) -> list[tuple[int, str, int, int]]:
    return [
        (int(each[b"token"]), each[b"interval"].decode(), json.loads(each[b"row"])[0], int(each[b"rev"]))
        for _, each in client.xrange(settings.keys.closed(shard))  # type: ignore[union-attr]
    ]


def last_seq(client: redis.Redis, settings: Settings) -> int:
    entries: list[Any] = []
    for shard in range(settings.shards):
        entries += client.xrevrange(settings.keys.ticks(shard), count=1)  # type: ignore[arg-type]
    return max((int(fields[b"seq"]) for _, fields in entries), default=0)


# -- the run -----------------------------------------------------------------------------------------


def terminate(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0, process.stdout and process.stdout.read()


@ValkeyOnly
def test_rows_and_quotes_equal_the_frames_after_the_aggregator_is_killed(
    make_settings: Callable[..., Settings], client: redis.Redis, tmp_path: Path
) -> None:
    instruments = universe(INSTRUMENTS)
    market = Market(instruments, START_S * 1000)
    capture = Capture(tmp_path / "sent.pkbcap")
    kite = SimulatorServer(None, capture=capture)
    kite.start()
    settings = make_settings(
        sessions="always", clock="event", lease_seconds=0.5, kite_ws_url=kite.url,
        instruments=",".join(map(str, market.tokens.tolist())), stream_retention_seconds=3600,
    )  # fmt: skip
    save_instruments(client, settings.keys, instruments)
    env = settings_env(settings)
    published: list[bytes] = []

    def publish(steps: range) -> None:
        everybody = np.full(INSTRUMENTS, MODE_FULL, np.int8)
        for n in steps:
            rows = market.step((START_S + n * STEP_S) * 1000)
            for frame in frames_for(market, rows, everybody, packets_max=60):
                for _ in range(1 + (n % 7 == 0)):  # some frames come twice
                    kite.publish(frame)
                    published.append(frame)
            wait_until(lambda: len(published) - capture.frames < FRAMES_AHEAD_MAX, what="the server to send")

    try:
        with (
            running_python("-m", "workers.ingest", env=env) as ingest,
            running_python("-m", "workers.aggregate", env=env) as doomed,
            running_python("-m", "workers.aggregate", env=env) as survivor,
        ):
            wait_until(lambda: kite.clients == 1, timeout_seconds=60, what="ingest to connect")
            publish(range(1, STEPS // 2))
            wait_until(
                lambda: client.hlen(settings.keys.state(0)) and client.hlen(settings.keys.state(7)),
                timeout_seconds=60, what="the aggregators to commit",
            )  # fmt: skip
            doomed.kill()
            publish(range(STEPS // 2, STEPS))
            wait_until(lambda: capture.frames == len(published), what="the server to send everything")
            wait_until(
                lambda: last_seq(client, settings) == len(published), what="ingest to write everything"
            )
            terminate(ingest)
            wait_until(lambda: lag_entries(client, settings.keys) == 0, what="the rest to be applied")
            terminate(survivor)
    finally:
        kite.stop()
        capture.close()

    statements: dict[int, list[Statement]] = defaultdict(list)
    latest: dict[int, dict[str, Any]] = {}
    for _, kind, frame in read_capture(capture.path):
        if kind == KIND_BINARY and len(frame) > 1:
            for tick in map(decode, packets_of(frame)):
                statements[tick["instrument_token"]].append(statement_of(tick))
                latest[tick["instrument_token"]] = tick
    assert len(statements) == INSTRUMENTS
    symbols = {
        each["instrument_token"]: f"{each['exchange']}:{each['tradingsymbol']}" for each in instruments
    }
    compared = 0
    due: dict[int, set[tuple[int, str, int, int]]] = {shard: set() for shard in range(settings.shards)}
    may: dict[int, set[tuple[int, str, int, int]]] = {shard: set() for shard in range(settings.shards)}
    watermark: dict[int, int] = defaultdict(int)
    for token, said in statements.items():
        shard = settings.keys.shard_of(token)
        watermark[shard] = max(watermark[shard], *(each.time_s for each in said))
    for token, said in statements.items():
        shard = settings.keys.shard_of(token)
        for interval in settings.intervals:
            expected = rows_of(said, interval)
            assert stored_rows(client, settings, token, interval.name) == expected, (token, interval.name)
            compared += len(expected)
            for start in expected:
                candle = (token, interval.name, start, 0)
                may[shard].add(candle)
                if start + (interval.seconds or 86_400) + GRACE_S <= watermark[shard]:
                    due[shard].add(candle)
        assert stored_quote(client, settings, token) == expected_quote(latest[token], symbols[token])
    assert compared > INSTRUMENTS * 40
    for shard in range(settings.shards):
        announced = closed_candles(client, settings, shard)
        assert len(announced) == len(set(announced)), "a candle was announced twice"
        assert due[shard] <= set(announced) <= may[shard]


# -- what a user gets wrong --------------------------------------------------------------------------


def assert_one_line(done: subprocess.CompletedProcess[str], *says: str) -> None:
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.startswith("pkb: ") and done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr and "geheim" not in done.stderr
    for word in says:
        assert word in done.stderr


KITE = {"PKB_KITE_WS_URL": "ws://127.0.0.1:1", "PKB_INSTRUMENTS": "NSE:INFY"}


@pytest.mark.parametrize(
    ("role", "env", "says"),
    [
        ("ingest", {"PKB_REDIS_URL": "redis://:geheim@127.0.0.1:1/0"}, ["127.0.0.1:1", "cannot be reached"]),
        (
            "aggregate",
            {"PKB_REDIS_URL": "redis://:geheim@127.0.0.1:1/0"},
            ["127.0.0.1:1", "cannot be reached"],
        ),
        ("aggregate", {"PKB_REDIS_URL": "http://geheim@127.0.0.1"}, ["PKB_REDIS_URL"]),
        ("ingest", {"PKB_SHARDS": "0"}, ["PKB_SHARDS"]),
        ("aggregate", {"PKB_SHARDS": "many"}, ["PKB_SHARDS"]),
        ("ingest", {"PKB_INTERVALS": "5m,7x"}, ["PKB_INTERVALS", "7x"]),
        ("aggregate", {"PKB_INTERVALS": "5m:none"}, ["PKB_INTERVALS", "5m:none"]),
        ("aggregate", {"PKB_TIMEZONE": "Mars/Phobos"}, ["PKB_TIMEZONE"]),
    ],
)
def test_invalid_setting_or_unreachable_redis_prints_one_line(
    role: str, env: dict[str, str], says: list[str]
) -> None:
    assert_one_line(run_pkb(role, env={**KITE, **env}), *says)


@ValkeyOnly
@pytest.mark.parametrize("role", ["ingest", "aggregate"])
def test_wrong_password_prints_one_line(
    role: str, server: Any, client: redis.Redis, settings: Settings
) -> None:
    path = server.url.removeprefix("unix://").partition("?")[0]
    env = {**KITE, "PKB_REDIS_URL": f"unix://nobody:geheim@{path}"}
    assert_one_line(run_pkb(role, env=env), "refuses the user or password", "PKB_REDIS_URL")


@ValkeyOnly
@pytest.mark.parametrize("role", ["ingest", "aggregate"])
def test_store_with_other_settings_prints_one_line(
    role: str, make_settings: Callable[..., Settings], client: redis.Redis
) -> None:
    settings = make_settings()
    client.hset(settings.keys.meta(), mapping={"schema": "2", "shards": "8"})
    env = {**KITE, **settings_env(settings), "PKB_SHARDS": "4"}
    assert_one_line(run_pkb(role, env=env), "shards=8", "shards=4", "PKB_SHARDS")


@ValkeyOnly
@pytest.mark.parametrize(
    ("instruments", "says"),
    [
        ("NSE:INFI", ["NSE:INFI", "NSE:INFY"]),
        ("99999999999", ["99999999999"]),
        ("none/such/file.txt", ["none/such/file.txt"]),
        ("", ["PKB_INSTRUMENTS"]),
        ("all", ["all"]),
    ],
)
def test_unknown_instrument_prints_one_line(
    instruments: str, says: list[str], settings: Settings, client: redis.Redis
) -> None:
    if instruments != "all":  # which needs a master; this store has none
        save_instruments(client, settings.keys, universe(10))
    env = {**KITE, **settings_env(settings), "PKB_INSTRUMENTS": instruments}
    assert_one_line(run_pkb("ingest", env=env), *says)


@ValkeyOnly
def test_missing_kite_session_prints_one_line(settings: Settings, client: redis.Redis) -> None:
    save_instruments(client, settings.keys, universe(10))
    env = {**settings_env(settings), "PKB_INSTRUMENTS": "NSE:INFY"}
    assert_one_line(run_pkb("ingest", env=env), "Kite session", "pkb login")
