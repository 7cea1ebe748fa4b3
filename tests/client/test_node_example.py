"""The example in another language does what it says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from urllib.parse import quote

import pytest

from pkbrokers_redis.settings import load_settings
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.meta import ensure_meta
from tests.client.contract import INFY, NIFTY, OPEN_S, RELIANCE, announce, row
from tests.support import running_process, running_server

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "follow.mjs"


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
@pytest.mark.parametrize(
    "form",
    ["redis://:p%40ss@127.0.0.1:{port}", "unix://:p%40ss@{path}", "unix://{path}"],
    ids=["tcp", "socket-password", "socket"],
)
def test_the_node_example_follows_closed_candles(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a socket"
    options = ["--unixsocket", str(path), *(["--requirepass", "p@ss"] if "@" in form else [])]
    with running_server(tmp_path / "server", *options) as port:
        url = form.format(port=port, path=quote(str(path)))
        settings = load_settings(redis_url=url, data_dir=tmp_path, shards=3)
        client = connect(settings)
        ensure_meta(client, settings, "2026-01-05T09:00:00+05:30")
        with running_process("node", EXAMPLE, url, "1m,5m") as node:
            assert node.stdout is not None
            for token in (INFY, RELIANCE, NIFTY):
                announce(
                    client, settings.keys, token, "1m", row(OPEN_S, 10.25, flag="gap"), symbol=f"NSE:€{token}"
                )
                announce(client, settings.keys, token, "60m", row(OPEN_S, 7))
            lines = [json.loads(node.stdout.readline()) for _ in range(3)]
            announce(client, settings.keys, INFY, "5m", row(OPEN_S + 300, 11, oi=5), rev=2, symbol="NSE:INFY")
            last = json.loads(node.stdout.readline())
    assert {line["symbol"] for line in lines} == {f"NSE:€{token}" for token in (INFY, RELIANCE, NIFTY)}
    assert {(line["interval"], line["close"], line["flag"]) for line in lines} == {("1m", 10.25, "gap")}
    assert last == {
        "symbol": "NSE:INFY",
        "interval": "5m",
        "rev": 2,
        "time": "2026-01-05T03:50:00.000Z",
        "open": 11,
        "high": 11,
        "low": 11,
        "close": 11,
        "volume": 10,
        "oi": 5,
        "ticks": 1,
        "flag": "",
    }
