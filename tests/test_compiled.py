"""The kernels' cache: a change anywhere in their sources reaches all of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from pkbrokers_redis.candles import compiled as module

PACKAGE = "kernels_of_a_test"
KERNEL = f"""
from {PACKAGE}.compiled import compiled
from {PACKAGE}.core.tables import WIDTH

@compiled
def width():
    return WIDTH
"""


def test_a_kernel_sees_what_changed_in_another_file(tmp_path: Path) -> None:
    core, cache = tmp_path / PACKAGE / "core", tmp_path / "cache"
    core.mkdir(parents=True)
    shutil.copy(str(module.__file__), tmp_path / PACKAGE)
    (core / "ring.py").write_text(KERNEL)
    env = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "NUMBA_DISABLE_JIT": "0"}
    code = f"from {PACKAGE}.core.ring import width; print(width(), sum(width.stats.cache_hits.values()))"
    said = []
    for width in (16, 4, 16):
        (core / "tables.py").write_text(f"WIDTH = {width}\n")
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert not done.stderr
        said.append(done.stdout.split())
    assert said == [["16", "0"], ["4", "0"], ["16", "1"]]  # what it answers, and whether from the cache
