"""Socket → parser → streams → aggregator → readable candles, with quotes, through a durable Redis.

python -m benchmarks.end_to_end [TICKS | --scale]
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections import Counter

import psutil
import redis

from benchmarks.harness import (
    INSTRUMENTS,
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
from benchmarks.kernels import dicts_per_second
from pkbrokers_redis.settings import Settings

FRAME_PACKETS = 400


def throughput(
    ticks: int = 3_000_000, frame_packets: int = FRAME_PACKETS, aggregators: int = 1
) -> tuple[float, dict[str, float]]:
    """Ticks a second from the first frame sent to the last candle committed, and CPU µs a tick by role."""
    with private_store() as (settings, client):
        argv = [sys.executable, "-m", "benchmarks.feeder", str(ticks), str(frame_packets), "0"]
        feeder = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert feeder.stdout and feeder.stdin
        port = int(feeder.stdout.readline())
        wanted = ",".join(map(str, tokens().tolist()))
        env = worker_env(settings, PKB_KITE_WS_URL=f"ws://127.0.0.1:{port}", PKB_INSTRUMENTS=wanted)
        entries = -(-ticks // frame_packets) * settings.shards
        with contextlib.ExitStack() as stack:
            workers = [stack.enter_context(running("aggregate", env)) for _ in range(aggregators)]
            wait_for(
                "an even share", lambda: _shares(client, settings) == _even(settings.shards, aggregators)
            )
            with running("ingest", env) as ingest:
                server = psutil.Process(int(client.info("server")["process_id"]))
                processes = {"ingest": [ingest], "redis": [server], "aggregate": workers}
                wait_for("the first ticks", lambda: committed(client, settings)[0] > 0, every=0.005)
                began = time.monotonic()
                before = {name: sum(map(cpu_seconds, each)) for name, each in processes.items()}
                first = committed(client, settings)[0] / entries * ticks
                ended = wait_for("the last", lambda: committed(client, settings) == (entries, 0), 300)
                spent = {name: sum(map(cpu_seconds, each)) - before[name] for name, each in processes.items()}
        feeder.stdin.close()
        feeder.wait(10)
        count = ticks - first
        assert client.hlen(settings.keys.current(int(tokens()[0]))) == len(settings.intervals)
        return count / (ended - began), {name: s / count * 1e6 for name, s in spent.items()}


def _shares(client: redis.Redis, settings: Settings) -> list[int]:
    """How many shards each aggregator holds, most first."""
    owners = Counter(client.get(settings.keys.lease(shard)) for shard in range(settings.shards))
    return sorted((count for owner, count in owners.items() if owner), reverse=True)


def _even(shards: int, aggregators: int) -> list[int]:
    return [shards // aggregators + (n < shards % aggregators) for n in range(aggregators)]


def scale(ticks: int = 1_000_000) -> None:
    """CPU a tick of 1, 2 and 4 aggregators: what more workers cost, the scaling two cores can show."""
    for aggregators in (1, 2, 4):
        speed, cpu = throughput(ticks, aggregators=aggregators)
        print(f"{aggregators} aggregators: {cpu['aggregate']:.2f} µs a tick, {speed:,.0f} ticks/s")


def run(ticks: int = 3_000_000) -> list[Row]:
    """The throughput row."""
    speed, cpu = throughput(ticks)
    detail = ", ".join(f"{name} {micros:.1f}" for name, micros in cpu.items())
    name = f"end to end, {INSTRUMENTS:,} instruments × 10 intervals (CPU µs a tick: {detail})"
    dicts = dicts_per_second(tick_stream(100_000, INSTRUMENTS, 1_784_691_900_000, 100_000))
    reference = f"plain-Python dicts in memory {dicts:,.0f} ticks/s"
    ratio = f"{speed / dicts:.1f} ×"
    return [Row(name, f"{speed:,.0f} ticks/s", reference, ratio, "≥ 100,000", speed >= 100_000)]


if __name__ == "__main__":
    print(machine())
    if "--scale" in sys.argv:
        scale()
        sys.exit()
    for row in run(int(sys.argv[1]) if len(sys.argv) > 1 else 3_000_000):
        print(row.name, row.figure, sep="\n  ")
