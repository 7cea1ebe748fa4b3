"""Real trades through streams and aggregator, read back from Redis, against the exchange's own candles."""

from __future__ import annotations

import csv
import json
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import redis

from pkbrokers_redis.aggregate.worker import Aggregator
from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.client.replay import Replay, lag_entries
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.client.trade_files import read_trades
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.tick_writer import TickWriter
from tests.e2e.conftest import drain
from tests.support import running_process, settings_env, wait_until

KILLS = 3  # of the aggregator, by kill -9


def replay(settings: Settings, path: Path) -> int:
    """The whole file, as fast as the store takes it; returns the ticks."""
    stop = threading.Event()
    return Replay(lambda: connect(settings), settings, speed=None, stop=stop).run(path).ticks


def kraken_trades(folder: Path, target: Path) -> Path:
    trades = json.loads((folder / "kraken-xbtusdt" / "http_trades.json").read_text())["result"]["XBTUSDT"]
    with target.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("time", "symbol", "price", "quantity"))
        writer.writerows((each[2], "XBTUSDT", each[0], each[1]) for each in trades)
    return target


def lean_trades(archive: Path, target: Path, symbol: str) -> Path:
    """Lean's US ticks: ms since New York's midnight, price × 10,000, size, venue, conditions, suspicious."""
    midnight = datetime(2013, 10, 10, tzinfo=ZoneInfo("America/New_York")).timestamp() * 1000
    with zipfile.ZipFile(archive) as zipped, target.open("w", newline="") as file:
        file.write("time,symbol,price,quantity\n")
        for line in zipped.read(zipped.namelist()[0]).decode().splitlines():
            ms, price, quantity, *_ = line.split(",")
            file.write(f"{int(midnight) + int(ms)},{symbol},{int(price) / 10_000},{quantity}\n")
    return target


def lean_minutes(archive: Path) -> dict[int, int]:
    """Minute → volume of Lean's own bars."""
    midnight = int(datetime(2013, 10, 10, tzinfo=ZoneInfo("America/New_York")).timestamp())
    with zipfile.ZipFile(archive) as zipped:
        lines = zipped.read(zipped.namelist()[0]).decode().splitlines()
    return {midnight + int(line.split(",")[0]) // 1000: int(line.split(",")[5]) for line in lines}


def test_kraken_minutes_equal_the_exchanges_own_candles(
    market_data: Path,
    tmp_path: Path,
    make_settings: Callable[..., Settings],
    client: redis.Redis,
    make_aggregator: Callable[[Settings], Aggregator],
) -> None:
    settings = make_settings(sessions="always", clock="event", intervals_text="1m:1000,5m,60m,day")
    aggregator = make_aggregator(settings)
    assert replay(settings, kraken_trades(market_data, tmp_path / "xbt.csv")) == 1_000
    drain(aggregator, client, settings)

    store = CandleStore(settings, client=client)
    candles = {c.start: c for c in store.get_candles("XBTUSDT", "1m", 1000, include_current=True, fill=True)}
    official = json.loads((market_data / "kraken-xbtusdt" / "http_ohlc.json").read_text())["result"][
        "XBTUSDT"
    ]
    first, last = min(candles), max(candles)
    traded = empty = 0
    for start, *prices, _vwap, volume, count in official:
        if not first < start <= last:  # the first minute is cut by the trades' own beginning
            continue
        candle = candles[start]
        assert [candle.open, candle.high, candle.low, candle.close] == [float(each) for each in prices]
        assert candle.volume == float(volume)
        assert candle.ticks == count
        traded += count > 0
        empty += count == 0
    assert (traded, empty) == (273, 137)


@pytest.mark.parametrize(
    ("name", "ticks", "equal", "minutes"), [("spy", 460_032, 881, 883), ("ibm", 22_415, 430, 434)]
)
def test_replay_of_a_day_at_full_speed_loses_nothing(
    name: str,
    ticks: int,
    equal: int,
    minutes: int,
    market_data: Path,
    tmp_path: Path,
    make_settings: Callable[..., Settings],
    client: redis.Redis,
    make_aggregator: Callable[[Settings], Aggregator],
) -> None:
    settings = make_settings(sessions="always", clock="event", intervals_text="1m:2000,5m:400,60m,day")
    folder = market_data / "lean-us-equity"
    aggregator = make_aggregator(settings)
    stop = threading.Event()
    thread = threading.Thread(target=aggregator.run, args=(stop,))
    thread.start()
    try:
        trades = lean_trades(folder / f"{name}_tick_20131010_trade.zip", tmp_path / "t.csv", name.upper())
        assert replay(settings, trades) == ticks
        wait_until(lambda: lag_entries(client, settings.keys) == 0, what="the aggregator to catch up")
    finally:
        stop.set()
        thread.join()
    counts = aggregator.figures()
    assert counts["ticks"] == ticks + 1  # and the baseline
    assert counts["invalid"] == counts["late_beyond_window"] == counts["malformed_rows"] == 0

    store = CandleStore(settings, client=client)
    candles = store.get_candles(name.upper(), "1m", 2_000, include_current=True)
    volumes = {candle.start: candle.volume for candle in candles}
    official = lean_minutes(folder / f"{name}_minute_20131010_trade.zip")
    assert len(official) == minutes
    assert sum(volumes.get(start) == volume for start, volume in official.items()) == equal
    with trades.open() as file:
        traded = sum(int(each["quantity"]) for each in csv.DictReader(file))
    assert sum(volumes.values()) == traded
    for interval in ("5m", "60m"):
        rows = store.get_candles(name.upper(), interval, 400, include_current=True)
        assert sum(row.volume for row in rows) <= traded


def _all_rows(client: redis.Redis, settings: Settings) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key in client.scan_iter(match=f"{settings.prefix}:*", count=1000):
        name = key.decode()
        if ":candles:" in name:
            rows[name] = client.lrange(name, 0, -1)
        elif ":current:" in name:
            rows[name] = client.hgetall(name)
    return rows


def test_restarted_aggregator_produces_the_same_rows(
    market_data: Path,
    tmp_path: Path,
    make_settings: Callable[..., Settings],
    client: redis.Redis,
    make_aggregator: Callable[[Settings], Aggregator],
) -> None:
    settings = make_settings(
        sessions="always", clock="event", intervals_text="1m:2000,5m:400,60m,day", lease_seconds=0.5
    )
    trades = lean_trades(
        market_data / "lean-us-equity" / "ibm_tick_20131010_trade.zip", tmp_path / "ibm.csv", "IBM"
    )
    aggregator = make_aggregator(settings)
    replay(settings, trades)
    drain(aggregator, client, settings)
    undisturbed = _all_rows(client, settings)
    assert undisturbed

    client.flushall()
    chunks = threading.Semaphore(0)
    feeding = threading.Thread(target=_feed, args=(settings, trades, chunks), daemon=True)
    feeding.start()
    for _ in range(KILLS):  # each time in the middle of a chunk, or behind its end on a slow machine
        before = _applied(client, settings)
        with running_process(
            sys.executable, "-m", "workers.aggregate", env=settings_env(settings)
        ) as process:
            chunks.release()
            wait_until(
                lambda before=before: _applied(client, settings) > before,  # type: ignore[misc]
                timeout_seconds=90,
                what="the aggregator to commit something",
            )
            process.kill()
            process.wait()
    chunks.release()
    feeding.join()
    aggregator = make_aggregator(settings)
    wait_until(
        lambda: aggregator.step(block_ms_max=1) == 0 and lag_entries(client, settings.keys) == 0,
        what="the last aggregator to lease the shards and finish",
    )
    assert _all_rows(client, settings) == undisturbed


def _feed(settings: Settings, trades: Path, chunks: threading.Semaphore) -> None:
    """Write a trade file in frames of 50 ticks; each part of KILLS + 1 waits for its `release`."""
    sessions = load_sessions(settings.sessions, settings.timezone)
    ticks = read_trades(trades, {}, sessions).ticks
    writer = TickWriter(lambda: connect(settings), settings)
    frames = [ticks[first : first + 50] for first in range(0, len(ticks), 50)]
    size = -(-len(frames) // (KILLS + 1))
    for n, frame in enumerate(frames):
        if n % size == 0:
            chunks.acquire()
        at_ms = int(time.time() * 1000)
        writer.write([writer.number(frame, at_ms)], at_ms)
        time.sleep(0.01)  # so that a chunk takes several commits


def _applied(client: redis.Redis, settings: Settings) -> int:
    """Entries committed so far, over all shards."""
    return sum(int(client.hget(settings.keys.cursor(s), "read") or 0) for s in range(settings.shards))
