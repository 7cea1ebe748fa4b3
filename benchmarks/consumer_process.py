"""One consumer as a process of its own: a bulk reader, a mirror or a follower, until its standard input ends.

    python -m benchmarks.consumer_process bulk|mirror|follow       (settings from the environment)

Prints a line when it reads, and a JSON line with what it saw at the end.
"""

from __future__ import annotations

import json
import random
import sys
import threading
from typing import Any

from pkbrokers_redis.client.mirror import Mirror
from pkbrokers_redis.client.store import CandleStore

BULK_EVERY_SECONDS = 5.0
ASK_EVERY_SECONDS = 0.1
ASKED_AT_ONCE = 50


def bulk(store: CandleStore, stop: threading.Event) -> dict[str, Any]:
    """A screener: everything, every few seconds."""
    reads = 0
    while not stop.wait(BULK_EVERY_SECONDS):
        reads += len(store.bulk(None, "1m", 100, include_current=True)) > 0
    return {"reads": reads}


def mirror(store: CandleStore, stop: threading.Event) -> dict[str, Any]:
    """A dashboard: all instruments in two intervals, fifty of them looked at all the time."""
    rng = random.Random(1)
    lag_ms_max = 0.0
    with Mirror(store, None, ["1m", "5m"]) as copy:
        names = [token for token, _ in store.instruments()]
        looked_at = rng.sample(names, min(ASKED_AT_ONCE, len(names)))
        while not stop.wait(ASK_EVERY_SECONDS):
            for token in looked_at:
                copy.rows(token, "1m", 100, include_current=True)
            lag_ms_max = max(lag_ms_max, copy.lag_ms)
        return {"lag_ms_max": round(lag_ms_max), "missed": copy.missed, "resyncs": copy.resyncs}


def follow(store: CandleStore, stop: threading.Event) -> dict[str, Any]:
    """A strategy: each closed candle once, in order."""
    follower = store.follow(position="0", block_seconds=0.2)
    last: dict[tuple[int, str], int] = {}
    seen = out_of_order = amended = 0
    while not stop.is_set():
        for closed in follower:
            seen += 1
            if closed.rev:
                amended += 1
                continue
            key = closed.token, closed.interval
            out_of_order += last.get(key, 0) >= closed.candle.start  # a second one would be none, too
            last[key] = closed.candle.start
            if stop.is_set():
                break
    for _ in follower:
        seen += 1
    return {"seen": seen, "out_of_order": out_of_order, "amended": amended, "missed": follower.missed}


def main() -> None:
    """Read until the other side closes our input."""
    stop = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    with CandleStore() as store:
        print("reading", flush=True)
        print(json.dumps({"bulk": bulk, "mirror": mirror, "follow": follow}[sys.argv[1]](store, stop)))


if __name__ == "__main__":
    main()
