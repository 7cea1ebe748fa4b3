"""Do the volumes add up? An instrument's candles sum up to its last cumulative volume minus the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import redis

from pkbrokers_redis.core.intervals import DAY, Interval
from pkbrokers_redis.core.keys import Keys

INSTRUMENTS_AT_ONCE = 500


@dataclass
class VolumeCheck:
    """How many instruments were added up, and those that did not: token → (sum, last − baseline).

    `cut`: the list is full, so that rows of today may be gone. `odd`: keys that somebody else wrote to.
    """

    checked: int = 0
    wrong: dict[int, tuple[float, float]] = field(default_factory=dict)
    cut: int = 0
    odd: int = 0


def widest(intervals: Sequence[Interval]) -> Interval:
    """The interval whose list reaches back furthest, `day` aside: its rows are the most to add up."""
    return max(intervals, key=lambda each: each.seconds * each.keep if each.name != DAY else 0)


def check_volumes(
    client: redis.Redis, keys: Keys, interval: str = "1m", *, keep: int | None = None
) -> VolumeCheck:
    """Add up every instrument of the store, also while aggregators work: a commit is one step, as is a look.

    `keep` is how many completed rows of the interval the lists hold at most.
    """
    result = VolumeCheck()
    for shard in range(keys.shards):
        fields: Any = client.hkeys(keys.state(shard))
        tokens = [int(name) for name in fields if name.isdigit()]
        for first in range(0, len(tokens), INSTRUMENTS_AT_ONCE):
            chunk = tokens[first : first + INSTRUMENTS_AT_ONCE]
            pipeline = client.pipeline(transaction=True)
            for token in chunk:
                pipeline.hget(keys.state(shard), str(token))
                pipeline.lrange(keys.candles(token, interval), 0, -1)
                pipeline.hget(keys.current(token), interval)
            replies = pipeline.execute(raise_on_error=False)
            for n, token in enumerate(chunk):
                try:
                    _add_up(result, token, *replies[3 * n : 3 * n + 3], keep=keep)
                except (ValueError, TypeError, IndexError):  # not JSON, not our rows, WRONGTYPE
                    result.odd += 1
    return result


def _add_up(
    result: VolumeCheck, token: int, hot: bytes, rows: list[bytes], current: bytes | None, *, keep: int | None
) -> None:
    _, _, _, day_s, seen, baseline, *_ = msgspec.json.decode(hot)
    if seen is None:
        return  # an index has no volume
    texts = [*rows, *([current] if current else [])]
    of_today = [row for row in map(msgspec.json.decode, texts) if row[0] >= day_s]
    if keep is not None and keep <= len(rows) == len(of_today) - bool(current):
        result.cut += 1
        return
    total = round(sum(row[5] for row in of_today), 8)
    result.checked += 1
    if abs(total - (seen - baseline)) > 1e-6:
        result.wrong[token] = total, seen - baseline
