"""Socket to readable current candle, at 9,000 ticks/s over 2,000 instruments.

    python -m benchmarks.latency [SECONDS]

One instrument in twenty is watched: its packet carries a price that no packet carried before, and the clock
stops when a reader that asks Redis all the time sees that price in its `1m` candle. Feeder, ingest, Redis,
aggregator and this reader share the machine's cores.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time

import numpy as np
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
from pkbrokers_redis.kite.wire import encode_full
from pkbrokers_redis.store.connect import connect

TICKS_PER_SECOND = 9_000
FRAME_PACKETS = 90  # a frame every 10 ms
PROBE_TOKEN = int(tokens()[7])
WARM_UP_SECONDS = 3.0


class Feed:
    """Sends frames at an even pace; every third carries the probe with a price of its own."""

    def __init__(self, seconds: float) -> None:
        self.sent: dict[float, float] = {}  # price → when its frame was handed to the socket
        self.port = 0
        self.ready = threading.Event()
        self.done = threading.Event()
        self._seconds = seconds
        threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True).start()
        self.ready.wait(30)

    async def _serve(self) -> None:
        async with serve(self._client, "127.0.0.1", 0, compression=None, ping_interval=None) as server:
            self.port = next(iter(server.sockets)).getsockname()[1]
            self.ready.set()
            await asyncio.get_running_loop().run_in_executor(None, self.done.wait)
            await asyncio.sleep(1.0)  # the workers stop first

    async def _client(self, link: ServerConnection) -> None:
        while '"mode"' not in str(await link.recv()):
            pass
        await asyncio.sleep(0.5)
        ticks = int(TICKS_PER_SECOND * (self._seconds + WARM_UP_SECONDS))
        stream = tick_stream(ticks, INSTRUMENTS, int(time.time()) * 1000, TICKS_PER_SECOND)
        stream = stream[stream[:, 0] != PROBE_TOKEN]
        began = time.monotonic()
        for n, first in enumerate(range(0, len(stream), FRAME_PACKETS)):
            frame = stream[first : first + FRAME_PACKETS].copy()
            price = 0.0
            if n % 3 == 0:
                price = 100 + n / 20
                frame[-1] = PROBE_TOKEN, price, 1, n + 1, 0, 100, 9e6, 1, int(time.time()) * 1000, 0
            wait = began + first / TICKS_PER_SECOND - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            packed = encode_full(frame)
            if price and time.monotonic() - began > WARM_UP_SECONDS:
                self.sent[price] = time.monotonic()
            await link.send(packed)
        await asyncio.sleep(0.5)
        self.done.set()


def measure(seconds: float = 15.0) -> tuple[float, float, float, int]:
    """`(p50, p99, max, probes)` in milliseconds."""
    feed = Feed(seconds)
    seen: dict[float, float] = {}
    with private_store() as (settings, client):
        wanted = ",".join(map(str, tokens().tolist()))
        env = worker_env(settings, PKB_KITE_WS_URL=f"ws://127.0.0.1:{feed.port}", PKB_INSTRUMENTS=wanted)
        key = settings.keys.current(PROBE_TOKEN)
        with running("aggregate", env):
            wait_for("the aggregator", lambda: client.exists(settings.keys.cursor(0)))
            with running("ingest", env):
                reader = connect(settings)
                while not feed.done.is_set():
                    row = reader.hget(key, "1m")
                    now = time.monotonic()
                    if row:
                        price = float(bytes(row).split(b",")[4])  # type: ignore[arg-type]
                        seen.setdefault(price, now)
                    time.sleep(0.0005)
    prices = sorted(feed.sent)
    arrived = np.array(sorted(seen))
    delays = []
    for price in prices:
        later = arrived[np.searchsorted(arrived, price) :]  # it or a newer one: a batch may hold two
        if len(later):
            delays.append((seen[float(later[0])] - feed.sent[price]) * 1000)
    p50, p99 = np.percentile(delays, [50, 99])
    return float(p50), float(p99), float(max(delays)), len(delays)


def run(seconds: float = 15.0) -> list[Row]:
    """The latency row."""
    p50, p99, worst, probes = measure(seconds)
    name = f"socket to readable candle at {TICKS_PER_SECOND:,} ticks/s, {probes} probes"
    figure = f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {worst:.0f} ms"
    return [Row(name, figure, goal="p50 ≤ 5, p99 ≤ 25 ms", met=p50 <= 5 and p99 <= 25)]


if __name__ == "__main__":
    print(machine())
    for row in run(float(sys.argv[1]) if len(sys.argv) > 1 else 15.0):
        print(row.name, row.figure, sep="\n  ")
