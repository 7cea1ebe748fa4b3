"""The warm-up: what the ticks need is compiled before they come."""

from __future__ import annotations

import subprocess
import sys

# In a process of its own: the kernels of this one are long compiled.
FIRST_MINUTES = """
import gc, sys
import numpy as np
from pkbrokers_redis.candles.open_candles import close_candles
from pkbrokers_redis.candles.rules import apply_ticks
from pkbrokers_redis.candles.state import ShardState
from pkbrokers_redis.candles.model import DEFAULT_INTERVALS
from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.runtime.warmup import freeze_heap, warm_up

def compiled():
    modules = [m for name, m in sys.modules.items() if name.startswith("pkbrokers_redis.candles.")]
    kernels = {f for module in modules for f in vars(module).values() if hasattr(f, "signatures")}
    return {f"{f.py_func.__name__} {s}" for f in kernels for s in f.signatures}

sessions = load_sessions("always")
warm_up(DEFAULT_INTERVALS)
before = compiled()
book = ShardState(DEFAULT_INTERVALS, sessions)
for minute in range(5):
    ticks = np.full((20, 10), np.nan)
    ticks[:, 0] = 256 * np.arange(1, 21)
    ticks[:, 1], ticks[:, 3], ticks[:, 5], ticks[:, 6] = 100 + minute, 10 * minute, 99, 110
    ticks[:, 8] = ticks[:, 9] = at_ms = 1_784_691_900_000.0 + 60_000 * minute
    taken = apply_ticks(book, ticks, 0, np.array([20]), 500)
    close_candles(book, at_ms + 59_000, book.dirty + 32)
    changes = book.collect()
freeze_heap()
print(taken, len(changes.ops) > 20, len(before) > 3, compiled() - before, gc.get_freeze_count() > 50_000)
"""


def test_the_first_minutes_compile_nothing_and_what_is_loaded_is_frozen() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_MINUTES], capture_output=True, text=True)
    assert done.stdout.strip() == "20 True True set() True", done.stdout + done.stderr
