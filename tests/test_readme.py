"""Run README's Inspect lines and Python against a store that the pipeline filled."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import redis

from pkbrokers_redis.aggregate.worker import Aggregator
from pkbrokers_redis.client.replay import lag_entries
from pkbrokers_redis.ingest.writer import FrameWriter
from pkbrokers_redis.kite.protocol import encode_full
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.meta import ensure_meta
from pkbrokers_redis.store.symbols import save_instruments
from tests.support import settings_env

README = (Path(__file__).parents[1] / "README.md").read_text()
INFY = 408065


def block(after: str, language: str = "") -> str:
    """The first code block behind a heading."""
    found = re.search(rf"{re.escape(after)}.*?```{language}\n(.*?)```", README, re.DOTALL)
    assert found, f"README has no code block behind {after!r}"
    return found[1]


@pytest.fixture
def server_kind() -> str:
    """One kind is enough to run README's lines."""
    return "valkey"


@pytest.fixture
def filled(make_settings: Callable[..., Settings], client: redis.Redis) -> Settings:
    """Six minutes of INFY, a tick a second, through the real writer and aggregator."""
    settings = make_settings(sessions="always", clock="event")
    ensure_meta(client, settings, "2026-01-01T00:00:00+00:00")
    row = {"instrument_token": INFY, "exchange": "NSE", "tradingsymbol": "INFY", "segment": "NSE"}
    save_instruments(client, settings.keys, [row])
    start_ms = int(time.time()) // 300 * 300_000 - 600_000
    ticks = np.full((360, 10), np.nan)
    ticks[:, 0], ticks[:, 2], ticks[:, 4] = INFY, 1, 0
    ticks[:, 1] = 1_500 + np.arange(360) % 7
    ticks[:, 3] = np.arange(360) + 1_000
    ticks[:, 5:8] = 1_500, 1_510, 1_490
    ticks[:, 8] = start_ms + np.arange(360) * 1000
    writer = FrameWriter(lambda: connect(settings), settings, {INFY: "NSE:INFY"})
    frames = [(encode_full(tick[np.newaxis]), int(tick[8]) + 200) for tick in ticks]
    writer.write(writer.parse_new(frames), int(time.time() * 1000))
    aggregator = Aggregator(lambda: connect(settings), settings, now_ms=lambda: time.time() * 1000)
    aggregator.start()
    while aggregator.step(block_ms_max=1) or lag_entries(client, settings.keys):
        pass
    aggregator.close()
    return settings


def test_inspect_lines_of_the_readme_print_text(filled: Settings, client: redis.Redis) -> None:
    lines = [line.partition("#")[0].strip() for line in block("## Inspect").splitlines()]
    assert len(lines) >= 7
    for line in filter(None, lines):
        words = shlex.split(line.replace("pkb:", f"{filled.prefix}:"))
        reply = client.execute_command(*words)
        assert reply, f"{line} shows nothing"
        str(reply).encode("ascii" if b"depth" not in str(reply).encode() else "utf-8")


def test_python_of_the_readme_runs(filled: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in settings_env(filled).items():
        monkeypatch.setenv(name, value)
    code = block("## From Python", "python")
    setup, _, loop = code.partition("for closed in")
    assert "store.follow" in loop
    space: dict[str, object] = {}
    exec(compile(setup, "README.md", "exec"), space)
    assert space["store"].get_candles("INFY", "5m", count=50)  # type: ignore[attr-defined]
    for candle in space["store"].follow(intervals=["1m"], position="0", block_seconds=0.1):  # type: ignore[attr-defined]
        assert candle.symbol == "NSE:INFY"
        assert candle.candle.close
        assert candle.position
        break


def test_every_file_linked_in_the_readme_exists() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (Path(__file__).parents[1] / link).exists()] == []


def test_commands_of_the_readme_are_makefile_targets() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", block("# pkbrokers-redis"), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
