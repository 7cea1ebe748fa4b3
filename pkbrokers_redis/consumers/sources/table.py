"""The sources, one row each, and the order in which they are asked."""

from __future__ import annotations

from pkbrokers_redis.consumers.sources.base import Source
from pkbrokers_redis.consumers.sources.kite import KiteSource
from pkbrokers_redis.consumers.sources.pickles import PickleSource, RemotePickleSource
from pkbrokers_redis.consumers.sources.redis_store import StoreSource
from pkbrokers_redis.consumers.sources.sqlite import SqliteSource
from pkbrokers_redis.consumers.sources.ticks_json import RemoteTicksSource, TicksFileSource

# name → class
SOURCES: dict[str, type[Source]] = {
    source.name: source
    for source in (
        SqliteSource,
        StoreSource,
        KiteSource,
        TicksFileSource,
        RemoteTicksSource,
        PickleSource,
        RemotePickleSource,
    )
}

# While the market is open what is fresh comes first; pickles are yesterday's, for days nobody else has.
MARKET_HOURS = ("sqlite", "store", "kite", "ticks.json", "remote ticks.json", "pickle", "remote pickle")
# After hours the evening's files are complete; the others fill what they lack.
AFTER_HOURS = ("pickle", "remote pickle", "sqlite", "store", "kite", "ticks.json", "remote ticks.json")
