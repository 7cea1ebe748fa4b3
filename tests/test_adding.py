"""Run the examples of docs/adding.md as they stand."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import redis

from pkbrokers_redis.bot.context import COMMANDS
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.settings import Settings

ADDING = (Path(__file__).parents[1] / "docs" / "adding.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)


def example(heading: str, **names: Any) -> dict[str, Any]:
    """The names that a section's indented code defines; `names` exist before it runs."""
    section = ADDING.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    code = "\n".join(re.findall(r"^(?: {4}.*|)$", section, re.M))
    assert code.strip(), heading
    exec(compile(dedent(code), "adding.md", "exec"), names)
    return names


def test_another_brokers_messages_become_ticks_and_quotes(
    client: redis.Redis, make_settings: Callable[..., Settings]
) -> None:
    settings = make_settings(sessions="always")
    said = [
        {"price": 101.5, "day_volume": 700, "epoch_s": 1_785_728_700},
        {"price": 102.25, "day_volume": 900, "epoch_s": 1_785_728_701},
    ]
    code = example("Another broker's socket", messages=lambda stop: iter(said))
    code["another_broker"](settings, threading.Event())
    token = code["TOKEN"]
    entries = client.xrange(settings.keys.ticks(settings.keys.shard_of(token)))
    assert [fields[b"ticks"] for _, fields in entries] == [
        b"[[%d,101.5,0,700,0,null,null,null,1785728700000]]" % token,
        b"[[%d,102.25,0,900,0,null,null,null,1785728701000]]" % token,
    ]
    with CandleStore(settings, client) as store:
        assert store.get_quote("NSE:MINE")["last_price"] in (101.5, 102.25)  # the second within half a second


def test_bot_command_example_of_the_docs_is_a_working_command(server_kind: str) -> None:
    example("A bot command, in ten lines")
    assert COMMANDS.pop("spread").usage == "/spread SYMBOL"
