"""A simulated Kite of 60 instruments, and the official client pointed at it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

import pytest
from kiteconnect import KiteConnect

from pkbrokers_redis.candles.calendar import IST, load_sessions
from pkbrokers_redis.simulator.kite import SimulatedKite
from pkbrokers_redis.simulator.universe import universe

INFY, NIFTY = 408065, 256265
NOON_MS = datetime(2026, 9, 10, 12, 0, tzinfo=IST).timestamp() * 1000  # a Thursday with closing auctions


@pytest.fixture
def kite() -> Iterator[SimulatedKite]:
    """In its hours, from noon on, one second a second."""
    with SimulatedKite(universe(60), sessions=load_sessions("market"), start_ms=NOON_MS) as kite:
        yield kite


@pytest.fixture
def connect(kite: SimulatedKite) -> KiteConnect:
    """The official client with a session."""
    client = KiteConnect(kite.accounts.first.api_key, root=kite.api_url)
    client.set_access_token(kite.accounts.open_session())
    return client
