"""Socket to readable current candle, at 9,000 ticks/s over 2,000 instruments.

    python -m benchmarks.latency [SECONDS]

Every 30 ms the packet of one of eight instruments, a shard each, carries a price that no packet carried
before. The clock stops when a reader that asks Redis every millisecond sees that price in its `1m` candle.
Feeder, ingest, Redis, aggregator and this reader share the cores of the machine.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection

import numpy as np
import redis
from websockets.asyncio.server import ServerConnection, serve

from benchmarks.harness import (
    INSTRUMENTS,
    Row,
    machine,
    private_store,
    running,
    tick_stream,
    tokens,
    wait_for,
    worker_env,
)
from pkbrokers_redis.kite.protocol import encode_full
from pkbrokers_redis.runtime.warmup import freeze_heap
from pkbrokers_redis.store.cluster import Pipe

TICKS_PER_SECOND = 9_000
FRAME_PACKETS = 90  # a frame every 10 ms
PROBE_TOKENS = tokens()[:8].tolist()  # one in each shard, in turn
WARM_UP_SECONDS = 3.0
LOOK_EVERY_SECONDS = 0.001


def feed(seconds: float, link: Connection) -> None:
    """A process of its own: tells its port, feeds one client at an even pace, tells what it sent when.

    Every third frame carries the probe with a price of its own.
    """

    async def client(socket: ServerConnection) -> None:
        while '"mode"' not in str(await socket.recv()):
            pass
        await asyncio.sleep(0.5)
        ticks = int(TICKS_PER_SECOND * (seconds + WARM_UP_SECONDS))
        stream = tick_stream(ticks, INSTRUMENTS, int(time.time()) * 1000, TICKS_PER_SECOND)
        stream = stream[~np.isin(stream[:, 0], PROBE_TOKENS)]
        sent: dict[float, float] = {}  # price → when its frame was handed to the socket
        began = time.monotonic()
        for n, first in enumerate(range(0, len(stream), FRAME_PACKETS)):
            frame = stream[first : first + FRAME_PACKETS]
            price = 0.0
            if n % 3 == 0:
                price = 100 + n / 20
                frame[-1] = PROBE_TOKENS[n % 8], price, 1, n + 1, 0, 100, 9e6, 1, int(time.time()) * 1000, 0
            packed = encode_full(frame)
            wait = began + first / TICKS_PER_SECOND - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            if price and time.monotonic() - began > WARM_UP_SECONDS:
                sent[price] = time.monotonic()
            await socket.send(packed)
        await asyncio.sleep(0.5)
        link.send(sent)
        await socket.wait_closed()
        done.set()

    async def serve_one() -> None:
        async with serve(client, "127.0.0.1", 0, compression=None, ping_interval=None) as server:
            link.send(next(iter(server.sockets)).getsockname()[1])
            await done.wait()

    done = asyncio.Event()
    asyncio.run(serve_one())


def bare_round_trip_ms(client: redis.Redis) -> float:
    """The reference: the median of an HSET and the HGET that reads it, on the same server."""
    times = []
    for n in range(500):
        began = time.perf_counter()
        client.hset("bare", "1m", n)
        client.hget("bare", "1m")
        times.append((time.perf_counter() - began) * 1000)
    return float(np.median(times))


def measure(seconds: float = 15.0) -> tuple[float, float, float, int, float]:
    """`(p50, p99, max, probes, bare round trip)`, all but the count in milliseconds."""
    freeze_heap()  # neither feeder nor reader may pause for a collection of its own
    parent, child = multiprocessing.Pipe()
    feeder = multiprocessing.Process(target=feed, args=(seconds, child), daemon=True)
    feeder.start()
    seen: dict[float, float] = {}
    with private_store() as (settings, client):
        wanted = ",".join(map(str, tokens().tolist()))
        env = worker_env(settings, PKB_KITE_WS_URL=f"ws://127.0.0.1:{parent.recv()}", PKB_INSTRUMENTS=wanted)
        keys = [settings.keys.current(token) for token in PROBE_TOKENS]
        with running("aggregate", env):
            wait_for("the aggregator", lambda: client.exists(settings.keys.cursor(0)))
            with running("ingest", env):
                while not parent.poll(LOOK_EVERY_SECONDS):
                    pipe = Pipe(client)
                    for key in keys:
                        pipe.add("HGET", key, "1m")
                    rows = pipe.execute()
                    now = time.monotonic()
                    for row in filter(None, rows):
                        seen.setdefault(float(row.split(b",")[4]), now)
                sent: dict[float, float] = parent.recv()
        bare = bare_round_trip_ms(client)
        feeder.join(10)
    delays = [(seen[price] - at) * 1000 for price, at in sent.items() if price in seen]
    missed = len(sent) - len(delays)  # a probe of the same instrument overtook it within one look
    if missed > len(sent) // 100:
        raise AssertionError(f"{missed} of {len(sent)} probes were never seen")
    p50, p99 = np.percentile(delays, [50, 99])
    return float(p50), float(p99), float(max(delays)), len(delays), bare


def run(seconds: float = 15.0) -> list[Row]:
    """The latency row."""
    p50, p99, worst, probes, bare = measure(seconds)
    name = f"socket to readable candle at {TICKS_PER_SECOND:,} ticks/s, {probes} probes"
    figure = f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {worst:.0f} ms"
    reference = f"a bare HSET and HGET, idle server {bare:.2f} ms"
    met = p50 <= 5 and p99 <= 25
    return [Row(name, figure, reference, f"p50 {p50 / bare:.0f} ×", "p50 ≤ 5, p99 ≤ 25 ms", met)]


if __name__ == "__main__":
    print(machine())
    for row in run(float(sys.argv[1]) if len(sys.argv) > 1 else 15.0):
        print(row.name, row.figure, sep="\n  ")
