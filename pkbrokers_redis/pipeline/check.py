"""Does it add up? The sum of an instrument's candle volumes is its last cumulative volume minus the baseline."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import redis

from pkbrokers_redis.core.keys import Keys

INSTRUMENTS_AT_ONCE = 500


@dataclass
class VolumeCheck:
    """How many instruments were added up, and those that did not: token → (sum, last − baseline)."""

    checked: int
    wrong: dict[int, tuple[float, float]]


def check_volumes(client: redis.Redis, keys: Keys, interval: str = "1m") -> VolumeCheck:
    """Add up every instrument of the store.

    Holds while the lists still keep the whole day, and with no aggregator at work in between.
    """
    result = VolumeCheck(0, {})
    for shard in range(keys.shards):
        fields = client.hgetall(keys.state(shard))
        tokens = [int(name) for name in fields if name.isdigit()]  # type: ignore[union-attr]
        for first in range(0, len(tokens), INSTRUMENTS_AT_ONCE):
            chunk = tokens[first : first + INSTRUMENTS_AT_ONCE]
            pipeline = client.pipeline(transaction=True)
            for token in chunk:
                pipeline.hget(keys.state(shard), str(token))
                pipeline.lrange(keys.candles(token, interval), 0, -1)
                pipeline.hget(keys.current(token), interval)
            replies = pipeline.execute()
            for n, token in enumerate(chunk):
                hot, rows, current = replies[3 * n : 3 * n + 3]
                _, _, _, day_s, seen, baseline, *_ = msgspec.json.decode(hot)
                if seen is None:
                    continue  # an index has no volume
                texts = [*rows, *([current] if current else [])]
                of_today = [row for row in map(msgspec.json.decode, texts) if row[0] >= day_s]
                total = round(sum(row[5] for row in of_today), 8)
                result.checked += 1
                if abs(total - (seen - baseline)) > 1e-6:
                    result.wrong[token] = total, seen - baseline
    return result
