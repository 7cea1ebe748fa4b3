"""Emptying a store: the keys of one prefix, one by one, and only while nobody writes them.

Kept are the layout (`P:meta`), the instrument master, sessions and jobs: all that is no market data.
"""

from __future__ import annotations

from typing import Any

import redis

from pkbrokers_redis.core.errors import PkbError
from pkbrokers_redis.core.keys import Keys

KEYS_AT_ONCE = 1_000
SHARD_KEYS = ("ticks", "closed", "cursor", "state", "repairs")
INSTRUMENT_KEYS = ("candles", "current", "quote")


def clear_store(client: redis.Redis, keys: Keys) -> int:
    """Delete the market data of this prefix; returns how many keys. Never FLUSHes.

    Raises PkbError while an aggregator owns a shard: what it has in memory it would write again.
    """
    for shard in range(keys.shards):
        owner: Any = client.get(keys.lease(shard))
        if owner:
            raise PkbError(
                f"the store is in use: {owner.decode(errors='replace')} owns shard {shard}",
                "stop the workers first (`pkb up`, `pkb aggregate`)",
            )
    deleted = 0
    for shard in range(keys.shards):
        root = f"{keys.prefix}:{{{shard}}}:"
        doomed: list[Any] = [root + name for name in SHARD_KEYS]
        for kind in INSTRUMENT_KEYS:
            for key in client.scan_iter(match=_escape(f"{root}{kind}:") + "*", count=KEYS_AT_ONCE):
                doomed.append(key)
                if len(doomed) >= KEYS_AT_ONCE:  # one slot, so that a cluster takes them in one command
                    deleted += int(client.unlink(*doomed))
                    doomed = []
        if doomed:
            deleted += int(client.unlink(*doomed))
    return deleted


def _escape(text: str) -> str:
    """For SCAN's pattern: a prefix may hold nothing special, but braces are ours."""
    return "".join(f"\\{letter}" if letter in "[]*?\\^" else letter for letter in text)
