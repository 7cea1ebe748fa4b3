"""The examples in the docstrings of the classes that users meet run as written."""

from __future__ import annotations

import asyncio
import doctest
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import redis

from pkbrokers_redis.client import bulk, follow, mirror, producer, replay, store
from pkbrokers_redis.compat import (
    candle_store,
    data_manager,
    data_provider,
    json_writer,
    tick_processor,
    token_watcher,
    websocket,
)
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.meta import ensure_meta
from tests.client.contract import INFY, OPEN_S, RELIANCE, announce, push, row, write_master

MODULES = [
    bulk,
    follow,
    mirror,
    producer,
    replay,
    store,
    candle_store,
    data_manager,
    data_provider,
    json_writer,
    tick_processor,
    token_watcher,
    websocket,
]

# Readers, PKDevTools' environment among them, have none of these.
NOT_FOR_READERS = (
    "numba websocket kiteconnect aiohttp pyotp rq telegram typer rich tenacity matplotlib pyarrow"
    " prometheus_client"
)
READER_MODULES = "client.store client.follow client.mirror compat.candle_store compat.data_provider"


@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.split(".")[-1])
def test_docstring_examples_run(
    module: Any, client: redis.Redis, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = settings.keys
    ensure_meta(client, settings, "2026-01-05T09:00:00+05:30")
    write_master(client, keys)
    for interval in ("5m", "day"):
        push(client, keys, INFY, interval, [row(OPEN_S, 1512.5)])
    push(client, keys, RELIANCE, "5m", [row(OPEN_S, 9)])
    announce(client, keys, INFY, "1m", row(OPEN_S, 1512.5), symbol="NSE:INFY")
    assert settings.redis_url is not None
    for name, value in {
        "PKB_REDIS_URL": settings.redis_url.get_secret_value(),
        "PKB_DATA_DIR": str(tmp_path),
        "PKB_FILES_DIR": str(tmp_path),
        "PKB_TIME_SHIFT": f"{OPEN_S + 3600},{time.time()},1",  # on the day of the rows
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(candle_store, "_instance", None)
    trades = ("10:00:00,ABC,100,5", "10:01:00,ABC,105,4", "10:02:00,ABC,103,3", "10:03:00,ABC,104,2")
    lines = [f"2026-01-05T{trade}" for trade in trades]
    (tmp_path / "trades.csv").write_text("\n".join(["time,symbol,price,quantity", *lines]))
    monkeypatch.chdir(tmp_path)
    names = {
        **vars(module),
        "store": store.CandleStore(settings, client),
        "settings": settings,
        "path": tmp_path / "ticks.json",
        "connect": connect,
        "asyncio": asyncio,
        "queue": queue,
        "threading": threading,
        "Path": Path,
    }
    runner = doctest.DocTestRunner(verbose=False)
    output: list[str] = []
    for test in doctest.DocTestFinder(recurse=True).find(module, globs=names):
        runner.run(test, out=output.append)
    assert not runner.failures, "".join(output)
    assert runner.tries


def test_readers_need_no_library_of_the_pipeline() -> None:
    code = f"""
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {NOT_FOR_READERS.split()!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
for module in {READER_MODULES.split()!r}:
    importlib.import_module("pkbrokers_redis." + module)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
