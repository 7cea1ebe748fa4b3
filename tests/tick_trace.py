"""Send one tick through the pipeline and print every package file and function that it passes, in order.

    NUMBA_DISABLE_JIT=1 PKB_REDIS_URL=… python -m tests.tick_trace

The compiler is off, so that the rules are traced too. Two ticks are sent without tracing: they create the
shard state, open connections and load the functions. The files of the socket are not part of the trace.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

import pkbrokers_redis
from pkbrokers_redis.aggregate.worker import Aggregator
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.ingest.buffer import FrameBuffer
from pkbrokers_redis.ingest.writer import FrameWriter, forward
from pkbrokers_redis.kite.protocol import encode_full
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.meta import ensure_meta
from pkbrokers_redis.store.symbols import save_instruments

INFY = 408065
PACKAGE = Path(pkbrokers_redis.__file__).parent

Stops = dict[str, list[str]]


def frame(at_ms: int, price: float, volume: int) -> bytes:
    """Return one full packet of INFY."""
    tick = np.full((1, 10), np.nan)
    tick[0, :9] = INFY, price, 1, volume, 0, 1_500, 1_510, 1_490, at_ms
    return encode_full(tick)


def traced(work: Callable[[], object]) -> Stops:
    """Run `work`; return file → functions entered, in the order of their first call."""
    stops: Stops = {}

    def note(called: FrameType, event: str, _: Any) -> None:
        if event == "call" and called.f_code.co_filename.startswith(str(PACKAGE)):
            name = Path(called.f_code.co_filename).relative_to(PACKAGE).as_posix()
            functions = stops.setdefault(name, [])
            if called.f_code.co_name not in functions:
                functions.append(called.f_code.co_name)

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return stops


def trace(settings: Settings) -> dict[str, Stops]:
    """Return the stops of a tick by process: ingest, aggregate, reader."""
    client = connect(settings)
    ensure_meta(client, settings, "2026-01-01T00:00:00+00:00")
    save_instruments(
        client, settings.keys, [{"instrument_token": INFY, "exchange": "NSE", "tradingsymbol": "INFY"}]
    )
    stop = threading.Event()
    writer = FrameWriter(lambda: connect(settings), settings, {INFY: "NSE:INFY"})
    buffer = FrameBuffer.open(settings, writer.source)
    aggregator = Aggregator(lambda: connect(settings), settings, now_ms=lambda: time.time() * 1000)
    aggregator.start()
    store = CandleStore(settings)
    start_ms = int(time.time()) // 300 * 300_000 - 600_000
    times = {n: start_ms + n * 1000 for n in (1, 2, 3)}
    frames = {n: (frame(at_ms, 1_500 + n, 1_000 + n), at_ms) for n, at_ms in times.items()}

    def ingest(n: int) -> None:
        data, at_ms = frames[n]
        buffer.put(data, at_ms)
        forward(buffer, writer, stop, 0.0)

    def apply(n: int) -> None:
        while aggregator.ticks_total < n:
            aggregator.step(block_ms_max=1)

    def read() -> None:
        store.get_candles("INFY", "1m", 5, include_current=True)

    for n in (1, 2):  # without tracing
        ingest(n)
        apply(n)
        read()
    result = {
        "ingest": traced(lambda: ingest(3)),
        "aggregate": traced(lambda: apply(3)),
        "reader": traced(read),
    }
    [candle] = store.get_candles("INFY", "1m", 5, include_current=True)
    assert candle.close == 1_503
    aggregator.close()
    buffer.close()
    return result


if __name__ == "__main__":
    sys.stdout.write(json.dumps(trace(load_settings(shards=1, sessions="always", clock="event"))))
