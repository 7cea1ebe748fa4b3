"""A job gives way to what serves the ticks, and yet gets on where every core is wanted."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a job is only nice")


@pytest.mark.parametrize(("load", "idle"), [(0.0, True), (1e6, False)])
def test_job_runs_at_idle_priority_only_with_spare_cores(load: float, idle: bool) -> None:
    code = f"""
import os
from pkbrokers_redis.jobs.worker import NICENESS, lower_priority
was = os.nice(0)
lower_priority({load})
print(os.sched_getscheduler(0) == os.SCHED_IDLE, os.nice(0) == min(19, was + NICENESS))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(idle), "True"]
