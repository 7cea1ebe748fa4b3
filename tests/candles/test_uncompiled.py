"""The rules are Python first: the same tests pass with the compiler switched off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_the_rules_hold_uncompiled_too() -> None:
    names = ("test_rules.py", "test_off_session.py", "test_days.py")
    tests = [str(Path(__file__).with_name(name)) for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *tests],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTEST_ADDOPTS": ""},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
