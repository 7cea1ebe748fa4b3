"""Socket → parser → streams → aggregator → readable candles, with quotes, through a durable Redis.

python -m benchmarks.end_to_end [TICKS]
"""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

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

FRAME_PACKETS = 400


def throughput(ticks: int = 3_000_000, frame_packets: int = FRAME_PACKETS) -> tuple[float, dict[str, float]]:
    """Ticks a second from the first frame sent to the last candle committed, and CPU µs a tick by process."""
    with private_store() as (settings, client):
        argv = [sys.executable, "-m", "benchmarks.feeder", str(ticks), str(frame_packets), "0"]
        feeder = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert feeder.stdout and feeder.stdin
        port = int(feeder.stdout.readline())
        wanted = ",".join(map(str, tokens().tolist()))
        env = worker_env(settings, PKB_KITE_WS_URL=f"ws://127.0.0.1:{port}", PKB_INSTRUMENTS=wanted)
        entries = -(-ticks // frame_packets) * settings.shards
        with running("aggregate", env) as aggregator:
            wait_for("the aggregator", lambda: client.exists(settings.keys.cursor(0)))
            with running("ingest", env) as ingest:
                server = psutil.Process(int(client.info("server")["process_id"]))
                processes = {"ingest": ingest, "redis": server, "aggregate": aggregator}
                wait_for("the first ticks", lambda: committed(client, settings)[0] > 0, every=0.005)
                began = time.monotonic()
                before = {name: cpu_seconds(each) for name, each in processes.items()}
                first = committed(client, settings)[0] / entries * ticks
                ended = wait_for("the last", lambda: committed(client, settings) == (entries, 0), 300)
                spent = {name: cpu_seconds(each) - before[name] for name, each in processes.items()}
        feeder.stdin.close()
        feeder.wait(10)
        count = ticks - first
        assert client.hlen(settings.keys.current(int(tokens()[0]))) == len(settings.intervals)
        return count / (ended - began), {name: s / count * 1e6 for name, s in spent.items()}


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
    for row in run(int(sys.argv[1]) if len(sys.argv) > 1 else 3_000_000):
        print(row.name, row.figure, sep="\n  ")
