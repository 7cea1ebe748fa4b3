"""The released PKDevTools, unchanged, in a virtual environment of its own, reads live data from our Redis."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from pkbrokers_redis.settings import Settings
from tests.client.contract import INFY, RELIANCE, push, row, tick_frame, write_master
from tests.support import settings_env

ROOT = Path(__file__).resolve().parents[2]
INSTALL_SECONDS_MAX = 240
# What reading needs in addition to PKDevTools' dependencies; see docs/migrating.md for the pins.
READER = ["redis[hiredis]", "msgspec", "pydantic-settings", "platformdirs", "structlog", "psutil", "tzdata"]

SCREENER = """
import json
from PKDevTools.classes.PKDataProvider import get_data_provider
provider = get_data_provider()
frame = provider.get_stock_data("INFY", interval="5m", count=50)
stats = provider.get_stats()
print("RESULT" + json.dumps({
    "realtime": provider.is_realtime_available(),
    "columns": list(frame.columns),
    "dtypes": [str(each) for each in frame.dtypes],
    "index": [str(frame.index.dtype), frame.index.name, frame.index[-1].isoformat()],
    "close": frame["close"].tolist(),
    "price": provider.get_latest_price("INFY"),
    "day": provider.get_realtime_ohlcv("RELIANCE")["close"],
    "all": sorted(provider.get_all_realtime_data()),
    "many": sorted(provider.get_multiple_stocks(["INFY", "RELIANCE", "NOBODY"], "5m", 5)),
    "hits": stats["realtime_hits"],
    "available": stats["pkbrokers_available"],
}))
"""


@pytest.fixture(scope="module")
def screener_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has PKDevTools with its own dependencies, and this package to read with."""
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        pytest.skip("needs uv to make a virtual environment")
    folder = tmp_path_factory.mktemp("pkdevtools") / "venv"
    python = folder / "bin" / "python"
    target = ["--python", str(python), "-q"]
    commands = [
        [uv, "venv", "-q", "--python", sys.executable, str(folder)],
        [uv, "pip", "install", *target, "PKDevTools", *READER],
        [uv, "pip", "install", *target, "--no-deps", "-e", str(ROOT)],
    ]
    for command in commands:
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=INSTALL_SECONDS_MAX, check=False
            )
        except subprocess.TimeoutExpired:
            pytest.skip("no package index answers in time")
        if done.returncode:
            pytest.skip(f"PKDevTools cannot be installed here: {done.stderr.strip().splitlines()[-1][:150]}")
    return python


@pytest.mark.xdist_group("pkdevtools")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
def test_the_released_pkdevtools_reads_live_data(
    screener_python: Path, client: redis.Redis, settings: Settings, tmp_path: Path
) -> None:
    keys = settings.keys
    write_master(client, keys)
    start = int(time.time()) // 300 * 300
    push(client, keys, INFY, "5m", [row(start - 300 * n, 100 - n) for n in range(9, 0, -1)])
    client.hset(keys.current(INFY), "5m", row(start, 123.25))
    client.hset(keys.current(INFY), "1m", row(start, 123.5))
    client.hset(keys.state(keys.shard_of(INFY)), str(INFY), "[]")
    push(client, keys, RELIANCE, "5m", [row(start, 7)])
    client.hset(keys.current(RELIANCE), "day", row(start, 7.5))
    tick_frame(client, keys, keys.shard_of(INFY), [[INFY, 1, 1, 1, None, None, None, None, 1]])
    shim = subprocess.run(
        [str(screener_python), "-m", "pkbrokers_redis.compat"], capture_output=True, text=True, check=True
    ).stdout.strip()
    env = {**os.environ, **settings_env(settings), "PYTHONPATH": shim, "HOME": str(tmp_path)}
    done = subprocess.run(
        [str(screener_python), "-c", SCREENER],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
    )
    line = next((each for each in done.stdout.splitlines() if each.startswith("RESULT")), None)
    assert line is not None, done.stdout + done.stderr
    found = json.loads(line.removeprefix("RESULT"))
    assert found["available"] and found["realtime"] and found["hits"] >= 1
    assert found["close"] == [91, 92, 93, 94, 95, 96, 97, 98, 99, 123.25]
    assert found["columns"] == ["open", "high", "low", "close", "volume"]
    assert found["dtypes"] == ["float64"] * 4 + ["int64"]
    assert found["index"][:2] == ["datetime64[ns, Asia/Kolkata]", "datetime"]
    assert found["index"][2].endswith("+05:30")
    assert found["price"] == 123.5 and found["day"] == 7.5
    assert found["all"] == ["RELIANCE"] and found["many"] == ["INFY", "RELIANCE"]
