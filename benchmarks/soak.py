"""Memory over time: does anything grow that should not?

    python -m benchmarks.soak [SECONDS] [TICKS_PER_SECOND]

Samples the resident memory of ingest and aggregator and the memory of Redis every ten seconds. Redis grows
with the candles it keeps and, in the first two minutes, with the ticks it retains; the workers should not.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection

from benchmarks.harness import INSTRUMENTS, committed, machine, private_store, running, wait_for, worker_env
from pkbrokers_redis.simulator.market import Market
from pkbrokers_redis.simulator.universe import universe
from pkbrokers_redis.simulator.websocket_server import SimulatorServer

EVERY_SECONDS = 10.0
WARM_UP_SECONDS = 150.0  # the retention of the streams, and everything compiled and loaded


def market(ticks_per_second: float, link: Connection) -> None:
    """A simulator in a process of its own; tells its URL, ends when the other side does."""
    rows = universe(INSTRUMENTS)
    server = SimulatorServer(Market(rows, int(time.time() * 1000), rate=ticks_per_second))
    server.start()
    link.send((server.url, [row["instrument_token"] for row in rows]))
    link.recv()
    server.stop()


def measure(seconds: float = 600.0, ticks_per_second: float = 20_000.0) -> list[dict[str, float]]:
    """Samples: `at` seconds, MiB of each process and of Redis, the lag and the entries so far."""
    parent, child = multiprocessing.Pipe()
    feeder = multiprocessing.Process(target=market, args=(ticks_per_second, child), daemon=True)
    feeder.start()
    url, tokens = parent.recv()
    samples: list[dict[str, float]] = []
    with private_store() as (settings, client):
        env = worker_env(settings, PKB_KITE_WS_URL=url, PKB_INSTRUMENTS=",".join(map(str, tokens)))
        with running("aggregate", env) as aggregator, running("ingest", env) as ingest:
            wait_for("the first ticks", lambda: committed(client, settings)[0] > 0)
            began = time.monotonic()
            while (at := time.monotonic() - began) < seconds:
                entries, lag = committed(client, settings)
                samples.append(
                    {
                        "at": round(at),
                        "ingest": ingest.memory_info().rss / 2**20,
                        "aggregate": aggregator.memory_info().rss / 2**20,
                        "redis": int(client.info("memory")["used_memory"]) / 2**20,
                        "lag": lag,
                        "entries": entries,
                    }
                )
                time.sleep(EVERY_SECONDS)
            workers = client.scan_iter(match=f"{settings.prefix}:worker:*", count=10_000)
            for fields in [client.hgetall(key) for key in workers]:
                if fields[b"role"] == b"aggregate":
                    samples[-1]["ticks"] = float(fields[b"ticks_total"])
    parent.send("end")
    feeder.join(10)
    return samples


def main() -> None:
    """Print the first sample after the warm-up, the last one, and what grew between."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 600.0
    rate = float(sys.argv[2]) if len(sys.argv) > 2 else 20_000.0
    print(machine())
    samples = measure(seconds, rate)
    first = next((each for each in samples if each["at"] >= min(WARM_UP_SECONDS, seconds / 2)), samples[0])
    last = samples[-1]
    for name in ("ingest", "aggregate", "redis"):
        print(
            f"{name:10} {first[name]:7.1f} → {last[name]:7.1f} MiB, {first['at']:.0f} to {last['at']:.0f} s"
        )
    lag = max(each["lag"] for each in samples)
    print(f"{last.get('ticks', 0):,.0f} ticks, {last['entries']:,.0f} entries, lag at most {lag} entries")
    print(json.dumps(samples[:: max(1, len(samples) // 12)]))


if __name__ == "__main__":
    main()
