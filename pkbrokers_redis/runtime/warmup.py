"""Warm up a process: compile or load the kernels, and exclude what is loaded from garbage collection.

Compiling takes seconds the first time on a machine. An aggregator that took shards before would leave them
without a working owner meanwhile.
"""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from pkbrokers_redis import logs
from pkbrokers_redis.candles import compiled
from pkbrokers_redis.candles.amend import HistoryRows, Outage, apply_history, flag_outage
from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.candles.codec import read_tick_entries, tick_texts
from pkbrokers_redis.candles.model import AT_MS, BATCH_WIDTH, DEFAULT_INTERVALS, TIME_MS, TOKEN, Interval
from pkbrokers_redis.candles.open_candles import close_candles
from pkbrokers_redis.candles.rows import CandleList
from pkbrokers_redis.candles.rules import apply_ticks
from pkbrokers_redis.candles.state import ShardState

log = logs.get("kernels")

_NOON_MS = 1_767_335_400_000  # 2026-01-02 12:00 in Kolkata
_TICKS = [b"[[408065,100.5,1,%d,null,100,101,99,%d]]" % (n, _NOON_MS + n * 60_000) for n in range(1, 7)]


_COMPLETE = "complete"  # a file beside the compiled kernels: all of them are there


def is_compiled() -> bool:
    """Return whether the kernels of this version are compiled, so that a process only loads them."""
    return bool(compiled.folder) and (Path(compiled.folder) / _COMPLETE).exists()


def start_compiling() -> subprocess.Popen[bytes] | None:
    """Compile the kernels in a process of low priority; None where no folder can keep them."""
    if not compiled.folder:
        return None
    argv = (sys.executable, "-c", f"import os; os.nice(5); from {__name__} import main; main()")
    env = {name: value for name, value in os.environ.items() if name != "NUMBA_DISABLE_JIT"}
    return subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    """Compile all kernels, as every role together needs them."""
    warm_up_writer()
    warm_up(DEFAULT_INTERVALS)


def warm_up_writer() -> None:
    """Compile the writer: an ingest worker that compiled with frames waiting would spool them."""
    tick_texts(np.ones((1, BATCH_WIDTH)), 1)


def warm_up(intervals: Sequence[Interval]) -> None:
    """Compile the rules: apply a few minutes of ticks, an outage and its repair to a scratch state."""
    state = ShardState(intervals, load_sessions("always"), event_clock=True)
    ticks, _, _ = read_tick_entries(_TICKS)
    ticks[:, AT_MS] = ticks[:, TIME_MS]
    apply_ticks(state, ticks, 0, np.arange(1, len(ticks) + 1), len(ticks))
    close_candles(state, 0.0, len(ticks))  # the first minutes are over by the last one's tick
    flag_outage(state, Outage([int(ticks[0, TOKEN])], _NOON_MS, _NOON_MS + 1))  # repairs use the kernels, too
    if state.base_interval >= 0:
        minute: list[float | int | str | None] = [_NOON_MS // 1000, 100.0, 101.0, 99.0, 100.0, 1.0, None]
        lists = {k: CandleList((), interval.keep) for k, interval in enumerate(state.intervals)}
        span = HistoryRows(
            int(ticks[0, TOKEN]), state.base_interval, _NOON_MS // 1000, _NOON_MS // 1000 + 60, [minute]
        )
        apply_history(state, span, lists, 0.0)
    state.collect()
    if compiled.folder and os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0"):
        with contextlib.suppress(OSError):
            (Path(compiled.folder) / _COMPLETE).touch()
    if compiled.removed:
        log.warning("kernel_cache_damaged", files=compiled.removed, reason="they were compiled again")


@cache
def freeze_heap() -> None:
    """Exclude what is in memory now from garbage collection, once per process.

    Numba alone leaves 150,000 objects: to collect among them stops the ticks for 60 ms every few seconds. In
    a thread of another program (`KiteTokenWatcher`) it does nothing.
    """
    if threading.current_thread() is threading.main_thread():
        gc.collect()
        gc.freeze()
