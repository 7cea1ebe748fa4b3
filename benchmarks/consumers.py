"""Consumers: what a first and a second read cost, and what eight of them cost the pipeline.

    python -m benchmarks.consumers [--reads | --live SECONDS]

Live: 9,000 instruments that tick once a second over three connections; the same feed with and without two
bulk readers, three mirrors and three followers. Compared are the workers' CPU a tick, and how long entries
wait.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import psutil
import redis
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from benchmarks.harness import (
    Row,
    committed,
    cpu_seconds,
    machine,
    private_store,
    running,
    tick_stream,
    tokens,
    wait_for,
    worker_env,
)
from benchmarks.memory_and_bulk import fill
from pkbrokers_redis.compat.candle_store import InMemoryCandleStore
from pkbrokers_redis.compat.data_provider import HighPerformanceDataProvider
from pkbrokers_redis.kite.protocol import encode_full
from pkbrokers_redis.settings import Settings

LIVE_INSTRUMENTS = 9_000
CONNECTIONS = 3
FRAME_PACKETS = 100
CONSUMERS = ("bulk", "bulk", "mirror", "mirror", "mirror", "follow", "follow", "follow")
LOOK_SECONDS = 0.02


def reads() -> list[Row]:
    """First reads from Redis, and the same from the mirror."""
    with private_store() as (settings, client):
        fill(client, settings)
        candle_store = InMemoryCandleStore(settings=settings, client=client)
        provider = HighPerformanceDataProvider(candle_store=candle_store)
        symbols = [f"SIM{n:05}" for n in range(2_000)]
        firsts = [_seconds(lambda s=s: provider.get_stock_data(s, "5m", 100)) for s in symbols[:50]]
        again = [_seconds(lambda s=s: provider.get_stock_data(s, "5m", 100)) for s in symbols[:50] * 20]
        first_bulk = _seconds(lambda: candle_store.store.bulk(symbols, "15m", 100))
        provider.mirror.add(symbols, "15m", 100)
        copies = []
        for n in range(20):
            _touch(provider, n)  # something has changed: a bulk of an unchanged mirror is the same one
            copies.append(_seconds(lambda: provider.mirror.bulk(symbols, "15m", 100)))
        same = _seconds(lambda: provider.mirror.bulk(symbols, "15m", 100))
        first_frames = _seconds(lambda: provider.get_stocks_data(symbols, "10m", 100))
        frames = [_seconds(lambda: provider.get_stocks_data(symbols, "10m", 100)) for _ in range(5)]
        provider.close()
    first, second = float(np.median(firsts)), float(np.median(again))
    copied, many = float(np.median(copies)), float(np.median(frames))
    return [
        Row("first get_stock_data, 100 rows", f"{first * 1000:.2f} ms", goal="≤ 10 ms", met=first <= 0.01),
        Row(
            "the same from the mirror",
            f"{second * 1e6:.0f} µs",
            f"from Redis {first * 1e6:,.0f} µs",
            f"{first / second:.0f} ×",
            "≤ 50 µs",
            second <= 50e-6,
        ),
        Row(
            "2,000 × 100 rows, first", f"{first_bulk * 1000:.0f} ms", goal="≤ 250 ms", met=first_bulk <= 0.25
        ),
        Row(
            f"the same from the mirror (unchanged: {same * 1000:.2f} ms)",
            f"{copied * 1000:.1f} ms",
            f"from Redis {first_bulk * 1000:.0f} ms",
            f"{first_bulk / copied:.0f} ×",
            "≤ 5 ms",
            copied <= 0.005,
        ),
        Row(
            "2,000 DataFrames of 100 rows from the mirror",
            f"{many * 1000:.0f} ms",
            f"first {first_frames * 1000:.0f} ms",
            f"{first_frames / many:.1f} ×",
        ),
    ]


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _touch(provider: HighPerformanceDataProvider, n: int) -> None:
    buffer = next(iter(provider.mirror.memory.buffers["15m"].values()))
    buffer.add(np.array([buffer.last(1)[0][0, 0], 1, 1, 1, n, 1, 0, 1], np.float64), 0)


def feed(link: Connection) -> None:
    """Run in a child process: send each connection a tick a second per instrument, until stopped."""

    async def client(socket: ServerConnection) -> None:
        wanted: list[int] = []
        while True:
            message = json.loads(await socket.recv())
            if message["a"] == "subscribe":
                wanted += message["v"]
            if message["a"] == "mode" and len(wanted) >= LIVE_INSTRUMENTS // CONNECTIONS:
                break
        stream = tick_stream(len(wanted), len(wanted), 0, 1e9)
        stream[:, 0] = wanted
        frames = range(0, len(wanted), FRAME_PACKETS)
        second = 0
        began = time.monotonic()
        while True:
            for n, first in enumerate(frames):
                part = stream[first : first + FRAME_PACKETS]
                part[:, 3] += 10
                part[:, 1] += (second % 3 - 1) * 0.05
                part[:, 8] = int(time.time()) * 1000
                wait = began + second + n / len(frames) - time.monotonic()
                if wait > 0:
                    await asyncio.sleep(wait)
                try:
                    await socket.send(encode_full(part))
                except ConnectionClosed:
                    return
            second += 1

    async def serve_all() -> None:
        async with serve(client, "127.0.0.1", 0, compression=None, ping_interval=None) as server:
            link.send(next(iter(server.sockets)).getsockname()[1])
            await asyncio.get_running_loop().run_in_executor(None, link.recv)

    asyncio.run(serve_all())


def live(seconds: float, consumers: tuple[str, ...]) -> dict[str, Any]:
    """CPU µs a tick by role, the entries' wait in ms, and what the consumers saw."""
    parent, child = multiprocessing.Pipe()
    feeder = multiprocessing.Process(target=feed, args=(child,), daemon=True)
    feeder.start()
    # Streams long enough that nothing is trimmed: followers are compared with all there ever was.
    with private_store(closed_max_entries=1_000_000) as (settings, client):
        wanted = ",".join(map(str, tokens(LIVE_INSTRUMENTS).tolist()))
        env = worker_env(
            settings,
            PKB_KITE_WS_URL=f"ws://127.0.0.1:{parent.recv()}",
            PKB_INSTRUMENTS=wanted,
            PKB_CLOSED_MAX_ENTRIES="1000000",
        )
        with ExitStack() as stack:
            aggregator = stack.enter_context(running("aggregate", env))
            wait_for("the aggregator", lambda: client.exists(settings.keys.cursor(0)))
            ingest = stack.enter_context(running("ingest", env))
            wait_for("the first ticks", lambda: committed(client, settings)[0] > 100)
            readers = [_start(kind, env) for kind in consumers]
            time.sleep(5)  # the first seconds of each are its imports, compiling and first fill
            with suppress(TimeoutError):  # a machine too busy for that shows in the waits below
                nothing_waits = partial(_nothing_waits, client, settings)
                wait_for("the backlog of the start to be applied", nothing_waits, 60, every=0.001)
            workers = {"ingest": ingest, "aggregate": aggregator}
            before = {name: cpu_seconds(each) for name, each in workers.items()}
            server = psutil.Process(int(client.info("server")["process_id"]))
            others = [psutil.Process(reader.pid) for reader in readers]
            others_before = sum(map(cpu_seconds, others))
            redis_before, began = cpu_seconds(server), time.monotonic()
            waits = _watch(client, settings, seconds)
            took = time.monotonic() - began
            ticks = took * LIVE_INSTRUMENTS
            share = (sum(map(cpu_seconds, others)) - others_before) / took
            spent = {name: cpu_seconds(each) - before[name] for name, each in workers.items()}
            spent["redis"] = cpu_seconds(server) - redis_before
            parent.send("enough")
            ingest.terminate()
            wait_for("the last ticks to be applied", lambda: committed(client, settings)[1] == 0)
        saw = [(kind, _end(reader)) for kind, reader in zip(consumers, readers, strict=True)]
        announced = sum(
            int(client.xinfo_stream(settings.keys.closed(shard))["entries-added"])
            for shard in range(settings.shards)
            if client.exists(settings.keys.closed(shard))
        )
    feeder.join(10)
    p50, p99 = np.percentile(waits, [50, 99])
    micros = {name: each / ticks * 1e6 for name, each in spent.items()}
    return {
        "micros": micros,
        "p50": float(p50),
        "p99": float(p99),
        "saw": saw,
        "announced": announced,
        "cores": share,
    }


def _start(kind: str, env: dict[str, str]) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "benchmarks.consumer_process", kind]
    reader = subprocess.Popen(argv, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert reader.stdout and reader.stdout.readline() == "reading\n"
    return reader


def _end(reader: subprocess.Popen[str]) -> dict[str, Any]:
    text, _ = reader.communicate(timeout=60)  # closes its input
    found: dict[str, Any] = json.loads(text)
    return found


def _watch(client: redis.Redis, settings: Settings, seconds: float) -> list[float]:
    """How old the oldest entry is that is not applied, shard by shard, in ms; 0 where all is applied."""
    waits: list[float] = []
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at:
        oldest = _oldest_waiting(client, settings)
        now_ms = time.time() * 1000
        waits += [now_ms - int(each[0][0].split(b"-")[0]) if each else 0.0 for each in oldest]
        time.sleep(LOOK_SECONDS)
    return waits


def _oldest_waiting(client: redis.Redis, settings: Settings) -> list[Any]:
    """Of each shard the first entry behind the cursor, [] where there is none."""
    shards, keys = range(settings.shards), settings.keys
    pipe = client.pipeline(transaction=False)
    for shard in shards:
        pipe.hget(keys.cursor(shard), "id")
    cursors: list[Any] = pipe.execute()
    for shard, cursor in zip(shards, cursors, strict=True):
        pipe.xrange(keys.ticks(shard), b"(" + (cursor or b"0-0"), count=1)
    oldest: list[Any] = pipe.execute()
    return oldest


def _nothing_waits(client: redis.Redis, settings: Settings) -> bool:
    return not any(_oldest_waiting(client, settings))


def run(seconds: float = 75.0) -> list[Row]:
    """The live rows: at least one minute ends in each run."""
    alone = live(seconds, ())
    busy = live(seconds, CONSUMERS)
    rows: list[Row] = []
    for role in ("ingest", "aggregate", "redis"):
        ratio = busy["micros"][role] / alone["micros"][role]
        goal, met = ("≤ 1.10", ratio <= 1.1) if role != "redis" else ("", None)
        rows.append(
            Row(
                f"{role} while {len(CONSUMERS)} consumers read, {LIVE_INSTRUMENTS:,} instruments live",
                f"{busy['micros'][role]:.1f} µs a tick",
                f"alone {alone['micros'][role]:.1f} µs",
                f"{ratio:.2f}",
                goal,
                met,
            )
        )
    rows.append(
        Row(
            "entries wait to be applied",
            f"p50 {busy['p50']:.0f} ms, p99 {busy['p99']:.0f} ms",
            f"alone p50 {alone['p50']:.0f} ms, p99 {alone['p99']:.0f} ms",
        )
    )
    rows.append(Row("CPU of the eight consumers together", f"{busy['cores'] * 100:.0f} % of a core"))
    followers = [saw for kind, saw in busy["saw"] if kind == "follow"]
    seen = [saw["seen"] for saw in followers]
    good = all(not saw["out_of_order"] and not saw["missed"] for saw in followers)
    rows.append(
        Row(
            "closed candles each follower saw, once and in order",
            ", ".join(f"{count:,}" for count in seen),
            f"announced {busy['announced']:,}",
            goal="all",
            met=good and set(seen) == {busy["announced"]},
        )
    )
    mirrors = [saw for kind, saw in busy["saw"] if kind == "mirror"]
    lag = max(saw["lag_ms_max"] for saw in mirrors)
    rows.append(Row("the mirrors' largest lag", f"{lag:,} ms", f"resyncs {[s['resyncs'] for s in mirrors]}"))
    return rows


if __name__ == "__main__":
    print(machine())
    found = [] if "--live" in sys.argv else reads()
    if "--reads" not in sys.argv:
        found += run(float(sys.argv[-1]) if sys.argv[-1].replace(".", "").isdigit() else 75.0)
    for each in found:
        print(each.name, f"{each.figure}  {each.reference}  {each.ratio}  {each.goal} {each.met}", sep="\n  ")
