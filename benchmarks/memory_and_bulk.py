"""Bytes a completed candle, and reading 200,000 rows in one call.

python -m benchmarks.memory_and_bulk
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
import numpy as np
import redis

from benchmarks.harness import INSTRUMENTS, Row, machine, private_store, tokens
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.meta import ensure_meta
from pkbrokers_redis.store.symbols import save_instruments

ROWS = 100
START = 1_784_691_900


def fill(client: redis.Redis, settings: Settings) -> int:
    """100 completed rows of every interval for 2,000 instruments; returns the bytes Redis took for them."""
    ensure_meta(client, settings, "2026-01-01T00:00:00+00:00")
    save_instruments(
        client,
        settings.keys,
        (
            {"instrument_token": t, "tradingsymbol": f"SIM{n:05}", "exchange": "NSE", "segment": "NSE"}
            for n, t in enumerate(tokens().tolist())
        ),
    )
    rng = np.random.default_rng(1)
    before = int(client.info("memory")["used_memory"])
    for n, token in enumerate(tokens().tolist()):
        pipeline = client.pipeline(transaction=False)
        price = 100 + n
        for interval in settings.intervals:
            walk = (price * 20 + np.cumsum(rng.integers(-20, 21, (ROWS, 4)), axis=0)) / 20
            volumes = rng.integers(100, 100_000, ROWS)
            rows = [
                msgspec.json.encode(
                    [START + r * (interval.seconds or 86_400), float(o), float(max(o, h, lo, c)),
                     float(min(o, h, lo, c)), float(c), int(v), 0, int(v % 60) + 1]
                )
                for r, ((o, h, lo, c), v) in enumerate(zip(walk, volumes, strict=True))
            ]  # fmt: skip
            for first in range(0, ROWS, 10):  # as commits do: a few at a time, never one big push
                pipeline.rpush(settings.keys.candles(token, interval.name), *rows[first : first + 10])
        pipeline.execute()
    return int(client.info("memory")["used_memory"]) - before


def hash_bytes(client: redis.Redis) -> float:
    """The reference: Redis's own figure for one candle as a hash with named fields."""
    row = {"start": START, "open": 1500.05, "high": 1501.5, "low": 1499.9, "close": 1500.6}
    client.hset("named:408065:5m:1784691900", mapping={**row, "volume": 48211, "oi": 0, "ticks": 57})
    return float(client.memory_usage("named:408065:5m:1784691900"))


def naive_bulk(client: redis.Redis, settings: Settings) -> int:
    """The reference: one LRANGE after the other, json.loads row by row."""
    import json

    count = 0
    for token in tokens().tolist()[::10]:
        rows: Any = client.lrange(settings.keys.candles(token, "5m"), 0, -1)
        count += len([json.loads(row) for row in rows])
    return count


def run() -> list[Row]:
    """Memory with both settings, bulk with the default."""
    rows: list[Row] = []
    for compact, goal in ((False, 60), (True, 45)):
        with private_store(compact=compact) as (settings, client):
            size = fill(client, settings) / (INSTRUMENTS * len(settings.intervals) * ROWS)
            name = "bytes a completed candle, " + ("PKB_COMPACT=1" if compact else "default")
            named = hash_bytes(client)
            reference, ratio = f"a hash of named fields a candle {named:.0f} bytes", f"1/{named / size:.1f}"
            rows.append(Row(name, f"{size:.1f} bytes", reference, ratio, f"≤ {goal}", size <= goal))
            with CandleStore(settings, client=client) as store:
                store.bulk(None, "5m", ROWS).to_pandas()  # imports, once a process
                arrays, frames = [], []
                for _ in range(5):
                    began = time.perf_counter()
                    bulk = store.bulk(None, "5m", ROWS)
                    arrays.append(time.perf_counter() - began)
                    frame = bulk.to_pandas()
                    frames.append(time.perf_counter() - began)
                    assert len(frame) == INSTRUMENTS * ROWS
                began = time.perf_counter()
                naive = naive_bulk(client, settings)
                reference = (time.perf_counter() - began) * INSTRUMENTS * ROWS / naive
                median = float(np.median(arrays))
                rows.append(
                    Row(
                        f"bulk of {INSTRUMENTS * ROWS:,} rows" + (", PKB_COMPACT=1" if compact else ""),
                        f"{median * 1000:.0f} ms numpy, {float(np.median(frames)) * 1000:.0f} ms DataFrame",
                        f"LRANGE by LRANGE and json.loads {reference * 1000:,.0f} ms",
                        f"{reference / median:.1f} ×",
                        "" if compact else "≤ 250 ms",
                        None if compact else median <= 0.25,
                    )
                )
    return rows


if __name__ == "__main__":
    print(machine())
    for row in run():
        print(row.name, f"{row.figure}  {row.reference}  {row.ratio}", sep="\n  ")
