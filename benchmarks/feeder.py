"""A Kite websocket that only pushes prepared frames: its own cost must be negligible.

    python -m benchmarks.feeder TICKS FRAME_PACKETS TICKS_PER_SECOND(0 = as fast as they are taken)

Prints its port, waits for a client to subscribe, sends, prints `done <seconds>`, and waits for the end of
its standard input.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from benchmarks.harness import INSTRUMENTS, tick_stream
from pkbrokers_redis.kite.protocol import encode_full


def frames(ticks: int, packets: int, ticks_per_second: float) -> list[bytes]:
    """All frames of a run, encoded ahead."""
    start_ms = int(time.time()) * 1000
    stream = tick_stream(ticks, INSTRUMENTS, start_ms, ticks_per_second or 200_000.0)
    return [encode_full(stream[first : first + packets]) for first in range(0, ticks, packets)]


async def feed(ticks: int, packets: int, ticks_per_second: float) -> None:
    """Serve one client."""
    prepared = frames(ticks, packets, ticks_per_second)
    done = asyncio.Event()

    async def client(link: ServerConnection) -> None:
        while '"mode"' not in str(await link.recv()):
            pass
        await asyncio.sleep(0.5)  # further subscribe batches
        began = time.monotonic()
        for n, frame in enumerate([] if done.is_set() else prepared):  # once, also if the client reconnects
            if ticks_per_second:
                wait = began + n * packets / ticks_per_second - time.monotonic()
                if wait > 0:
                    await asyncio.sleep(wait)
            await link.send(frame)
        print("done", time.monotonic() - began, flush=True)
        done.set()
        with contextlib.suppress(ConnectionClosed):
            while True:  # a slow pipeline must not take the end for a lost connection
                await link.send(b"\0")
                await asyncio.sleep(1)

    async with serve(client, "127.0.0.1", 0, compression=None, max_queue=None, ping_interval=None) as server:
        print(next(iter(server.sockets)).getsockname()[1], flush=True)
        await done.wait()
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(feed(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
