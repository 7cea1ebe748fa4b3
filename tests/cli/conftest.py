"""The command line in this process: what it prints, and with which code it ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import redis

from pkbrokers_redis.cli import main
from pkbrokers_redis.settings import Settings
from tests.client.contract import write_master
from tests.support import settings_env


class Ended(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


Pkb = Callable[..., Ended]


@pytest.fixture
def pkb(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Pkb:
    """`pkb("quote", "INFY")`: one command, run by the console entry itself."""

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["pkb", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main.run()
        out, err = capfd.readouterr()
        return Ended(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture
def store_env(settings: Settings, client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The environment points at the private server, which holds a small master."""
    for name, value in settings_env(settings).items():
        monkeypatch.setenv(name, value)
    write_master(client, settings.keys)
    return settings
