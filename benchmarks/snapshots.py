"""Files of 9,000 instruments: how long each kind of snapshot takes, and the memory it needs.

python -m benchmarks.snapshots [INSTRUMENTS]
python -m benchmarks.snapshots --latency [SECONDS]   what they cost the ticks (snapshots_latency.py)
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import redis

from benchmarks import snapshots_latency
from benchmarks.harness import machine, private_store, tokens
from pkbrokers_redis.jobs.snapshots import open_run, snapshot
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.meta import ensure_meta
from pkbrokers_redis.store.symbols import save_instruments

INSTRUMENTS = 9_000
OPEN_S = 1_795_146_300  # 2026-11-20 09:15 in Kolkata
MINUTES, DAYS = 375, 251
COLUMNS = ("snapshot", "first s", "its CPU s", "again s", "rows", "MB", "peak MB (before)", "goal s")
GOALS = {"ticks": 2.0, "pickle": 10.0, "parquet": 10.0}
DEPTH = '{"buy":[%s],"sell":[%s]}' % ((",".join(['{"quantity":120,"price":1500.05,"orders":3}'] * 5),) * 2)


def fill(client: redis.Redis, settings: Settings, count: int) -> None:
    """A trading day's minutes, a year's days and a full quote of each instrument."""
    keys = settings.keys
    ensure_meta(client, settings, "2026-11-20T09:00:00+05:30")
    wanted = tokens(count).tolist()
    rows = [
        {"instrument_token": t, "tradingsymbol": f"SIM{n:05}", "exchange": "NSE", "segment": "NSE"}
        for n, t in enumerate(wanted)
    ]
    save_instruments(client, keys, rows)
    texts = [
        (
            [
                f"[{OPEN_S + 60 * i},{p},{p + 1.5},{p - 0.5},{p + 0.25},{1000 + i},0,{i % 60 + 1}]"
                for i in range(MINUTES)
            ],
            [
                f"[{OPEN_S - 86_400 * (DAYS - i)},{p},{p + 9},{p - 9},{p + 1.05},{10**6 + i},0,9]"
                for i in range(DAYS - 1)
            ],
        )
        for p in (100.05 + 7.35 * n for n in range(50))
    ]
    stamp = "2026-11-20T15:29:59+05:30"
    quote: dict[Any, Any] = {
        "last_price": 1500.05, "volume": 1_234_567, "open": 1490, "high": 1510, "low": 1480.5, "close": 1485,
        "buy_quantity": 100, "sell_quantity": 200, "oi": 0, "depth": DEPTH, "last_trade_time": stamp,
        "exchange_time": stamp, "received_at": stamp,
    }  # fmt: skip
    for n, token in enumerate(wanted):
        minutes, days = texts[n % 50]
        pipe = client.pipeline(transaction=False)
        pipe.rpush(keys.candles(token, "1m"), *minutes)
        pipe.rpush(keys.candles(token, "day"), *days)
        pipe.hset(keys.current(token), "day", f"[{OPEN_S},1490,1510,1480.5,1500.05,1234567,0,4000]")
        pipe.hset(keys.quote(token), mapping={**quote, "symbol": f"NSE:SIM{n:05}"})
        pipe.execute()


def measure(kind: str, url: str, folder: str, shift: str, results: Any) -> None:
    """One snapshot in a process of its own, so that the peak is its own."""
    settings = load_settings(redis_url=url, files_dir=Path(folder), sessions="always", time_shift=shift)
    with open_run(settings) as run:
        before, cpu = peak_mb(), time.process_time()
        found = snapshot(kind, run=run)
        cpu = time.process_time() - cpu
        again = snapshot(kind, run=run)["seconds"]
    # A pickle has two names.
    files = {(Path(folder) / name).stat().st_ino: name for name in found["files"]}
    size = sum((Path(folder) / name).stat().st_size for name in files.values())
    rows = sum(found["files"][name] for name in files.values())
    figures = (
        f"{found['seconds']:.2f}",
        f"{cpu:.2f}",
        f"{again:.2f}",
        f"{rows:,}",
        f"{size / 2**20:,.0f}",
        f"{peak_mb():.0f} ({before:.0f})",
    )
    results.put(figures)


def peak_mb() -> float:
    """The most this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def latency(seconds: float) -> None:
    """Run the pipeline while each kind of snapshot is written."""
    with private_store() as (settings, client):
        print(machine())
        fill(client, settings, snapshots_latency.INSTRUMENTS)
        snapshots_latency.run(settings, client, seconds)


def main() -> None:
    """Print a table."""
    if "--latency" in sys.argv:
        latency(float(sys.argv[2]) if len(sys.argv) > 2 else snapshots_latency.PHASE_SECONDS)
        return
    count = int(sys.argv[1]) if len(sys.argv) > 1 else INSTRUMENTS
    spawn = multiprocessing.get_context("spawn")
    with private_store() as (settings, client), tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        fill(client, settings, count)
        print(f"{machine()}\n{count:,} instruments, filled in {time.monotonic() - began:.0f} s\n")
        print(f"| {' | '.join(COLUMNS)} |\n|---{'|--:' * (len(COLUMNS) - 1)}|")
        shift = f"{OPEN_S + 6.5 * 3600},{datetime.now(UTC).timestamp()},1"
        url = "unix://" + str(client.connection_pool.connection_kwargs["path"])
        for kind in ("ticks", "pickle", "parquet", "sqlite"):
            results: Any = spawn.Queue()
            process = spawn.Process(target=measure, args=(kind, url, folder, shift, results))
            process.start()
            print(f"| {' | '.join([kind, *results.get(), str(GOALS.get(kind, ''))])} |")
            process.join()


if __name__ == "__main__":
    main()
