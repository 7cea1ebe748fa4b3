"""`pkb demo` on a machine where nothing is compiled yet."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pkbrokers_redis.cli import demo
from tests.support import run_pkb, wait_until


@pytest.mark.xdist_group("heavy")
def test_the_first_candle_does_not_wait_for_the_compiler(tmp_path: Path) -> None:
    cache = tmp_path / "kernels"
    env = {"NUMBA_CACHE_DIR": str(cache), "PKB_DATA_DIR": str(tmp_path / "data")}
    arguments = ("demo", "--seconds", "1", "--instruments", "20", "--json")
    ended = run_pkb(*arguments, env=env, timeout_seconds=100)
    assert ended.returncode == 0, ended.stderr
    summary = json.loads(ended.stdout)
    assert summary["candles_forming"] > 0
    assert summary["volumes_wrong"] == 0 and summary["volumes_checked"] > 0
    assert not list(cache.rglob("complete")), "it was faster than the compiler, or not cold"


def _compiler() -> subprocess.Popen[bytes]:
    """Compiles until its stdin is closed."""
    return subprocess.Popen((sys.executable, "-c", "import sys; sys.stdin.read()"), stdin=subprocess.PIPE)


def test_the_compiled_aggregator_takes_over_from_the_uncompiled_one(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import os, sys, time; print(os.environ.get('NUMBA_DISABLE_JIT')); time.sleep(600)"
    monkeypatch.setattr(demo, "worker_argv", lambda _: (sys.executable, "-uc", program))
    monkeypatch.setattr(demo, "is_compiled", lambda: False)
    monkeypatch.setattr(demo, "start_compiling", _compiler)
    pipeline = demo.Pipeline({}, ticks_per_second=500)
    pipeline.start()
    try:
        slow = pipeline._slow
        assert slow is not None and pipeline._fast is None
        wait_until(lambda: slow.statuses()[0].last_line == "1")
        pipeline.check()
        assert pipeline.is_compiling
        assert pipeline._compiling is not None and pipeline._compiling.stdin is not None
        pipeline._compiling.stdin.close()
        pipeline._compiling.wait()
        pipeline.check()
        fast = pipeline._fast
        assert fast is not None and not pipeline.is_compiling
        wait_until(lambda: fast.statuses()[0].last_line == "None")
        wait_until(lambda: slow.statuses()[0].state == "stopped")
    finally:
        pipeline.stop()


@pytest.mark.parametrize(("is_compiled", "rate"), [(True, 500), (False, 9_000)])
def test_where_it_is_compiled_or_the_rate_is_high_the_rules_run_compiled(
    is_compiled: bool, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "is_compiled", lambda: is_compiled)
    monkeypatch.setattr(demo, "worker_argv", lambda _: (sys.executable, "-c", "import time; time.sleep(600)"))
    pipeline = demo.Pipeline({}, ticks_per_second=rate)
    pipeline.start()
    try:
        assert pipeline._slow is None and pipeline._fast is not None and not pipeline.is_compiling
    finally:
        pipeline.stop()
