"""A job gives way to what serves the ticks, and yet gets on where every core is wanted."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a job is only nice")


@pytest.mark.parametrize(("load", "idle"), [(0.0, True), (1e6, False)])
def test_a_job_is_idle_only_where_cores_are_to_spare(load: float, idle: bool) -> None:
    code = f"""
import os
from pkbrokers_redis.jobs.worker import NICENESS, give_way
was = os.nice(0)
give_way({load})
print(os.sched_getscheduler(0) == os.SCHED_IDLE, os.nice(0) == min(19, was + NICENESS))
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == [str(idle), "True"]
