"""The kernels' cache: a change anywhere in their sources reaches all of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pkbrokers_redis.candles import compiled as module

PACKAGE = "kernels_of_a_test"
KERNEL = f"""
from {PACKAGE}.candles.columns import WIDTH
from {PACKAGE}.candles.compiled import compiled

@compiled
def width():
    return WIDTH
"""


def test_a_kernel_is_compiled_again_when_another_file_of_its_package_changes(tmp_path: Path) -> None:
    candles, cache = tmp_path / PACKAGE / "candles", tmp_path / "cache"
    candles.mkdir(parents=True)
    shutil.copy(str(module.__file__), candles)
    (candles / "rules.py").write_text(KERNEL)
    env = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "NUMBA_DISABLE_JIT": "0"}
    code = f"from {PACKAGE}.candles.rules import width; print(width(), sum(width.stats.cache_hits.values()))"
    printed = []
    for width in (16, 4, 16):
        (candles / "columns.py").write_text(f"WIDTH = {width}\n")
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert not done.stderr
        printed.append(done.stdout.split())
    assert printed == [["16", "0"], ["4", "0"], ["16", "1"]]  # the result, and how many cache hits


@pytest.mark.parametrize("kept", [0, 1000], ids=["empty", "truncated"])
@pytest.mark.parametrize("pattern", ["*.nbc", "*.nbi"])
def test_a_damaged_cache_file_is_compiled_again(tmp_path: Path, pattern: str, kept: int) -> None:
    candles, cache = tmp_path / PACKAGE / "candles", tmp_path / "cache"
    candles.mkdir(parents=True)
    shutil.copy(str(module.__file__), candles)
    (candles / "rules.py").write_text(KERNEL)
    (candles / "columns.py").write_text("WIDTH = 16\n")
    env = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "NUMBA_DISABLE_JIT": "0"}
    code = f"from {PACKAGE}.candles.rules import width; print(width(), sum(width.stats.cache_hits.values()))"
    printed = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        printed.append(done.stdout.split())
        if len(printed) == 1:
            (path,) = cache.rglob(pattern)
            path.write_bytes(path.read_bytes()[:kept])
    assert printed == [["16", "0"], ["16", "0"], ["16", "1"]]
