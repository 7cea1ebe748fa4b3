"""The table "The way of a tick" of docs/architecture.md names the files that a traced tick really passes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pkbrokers_redis.settings import Settings
from tests.support import settings_env
from tests.tick_trace import Stops

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
# Every step calls these, but they do not handle the tick: names of keys, symbols, intervals; due times.
ALONGSIDE = {
    "keys.py",
    "clock.py",
    "store/errors.py",
    "aggregate/leases.py",
    "aggregate/repairs.py",
    "runtime/roles.py",
    "candles/columns.py",
    "candles/model.py",
    "store/symbols.py",
}
SOCKET = {"kite/websocket.py", "ingest/connections.py"}  # not in the trace
FILES_MAX = 17  # the goal was 15 (decision 0023); only lower it

Row = tuple[str, str, str]


def table() -> list[Row]:
    """Return `(process, file, function)` of each row."""
    section = PAGE.partition("## The way of a tick\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\w+) \| `([\w/.]+)` \| `(\w+)` \|", section, re.MULTILINE)
    assert len(rows) > 15
    return rows


@pytest.fixture
def trace(settings: Settings) -> dict[str, Stops]:
    """Return process → file → functions of one traced tick; the compiler is off."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.tick_trace"],
        env={**os.environ, **settings_env(settings), "NUMBA_DISABLE_JIT": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    stops: dict[str, Stops] = json.loads(done.stdout)
    return stops


@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
def test_table_of_a_tick_lists_exactly_the_files_of_a_traced_tick(trace: dict[str, Stops]) -> None:
    rows = table()
    for process, stops in trace.items():
        listed = {file for name, file, _ in rows if name == process} - SOCKET - {"store/functions.lua"}
        assert listed == set(stops) - ALONGSIDE, process
        missing = [
            row for row in rows if row[0] == process and row[1] in stops and row[2] not in stops[row[1]]
        ]
        assert missing == [], "functions of the table that the tick does not pass"


def test_functions_in_the_table_of_a_tick_exist_and_files_are_few() -> None:
    for _, file, function in table():
        text = (ROOT / "pkbrokers_redis" / file).read_text(encoding="utf-8")
        assert re.search(rf"\b{function}\b", text), (file, function)
    assert len({file for _, file, _ in table()}) <= FILES_MAX
