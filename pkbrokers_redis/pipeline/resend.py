"""After a lost connection: what has this Redis got of ours, and what must it be sent again?

A failover to a replica that lagged, or a restart from an older file, takes back the end of what Redis had
acknowledged, and of each shard's stream on its own: never something from the middle. So per source and
shard one number tells all, the highest seq that is there, and what follows it is sent again in order before
anything newer. An entry that is there all the same is a repeat, which the aggregator skips by its seq; one
that is left out in front of a newer one would be taken for a repeat and be lost. When in doubt, resend.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import redis
from redis.exceptions import ResponseError

from pkbrokers_redis.core.keys import Keys
from pkbrokers_redis.core.model import TOKEN, TickArray
from pkbrokers_redis.kite.wire import parse_frame

KEPT_SECONDS = 30.0  # of acknowledged frames: a replica that lags more is no replica
KEPT_BYTES_MAX = 64 * 2**20  # whichever is reached first; 38 s of 9,000 full ticks a second
FIRST_LOOK = 4  # entries from the end of a stream: with one source the last one is ours
NEXT_LOOKS = 200
ENTRIES_LOOKED_AT_MAX = 5_000  # then only the cursor counts, and more than needed is sent again


class Batch(NamedTuple):
    """One frame, numbered and parsed. `ticks` is float64[n, 10]; `frame` is empty where there was none."""

    source: str
    seq: int
    at_ms: int
    ticks: TickArray
    frame: bytes = b""


class _Kept(NamedTuple):
    source: str
    seq: int
    at_ms: int
    data: bytes | TickArray
    size: int
    kept_at: float


class Kept:
    """The newest frames that Redis has acknowledged, by reference, bounded by bytes and age."""

    def __init__(
        self,
        bytes_max: int = KEPT_BYTES_MAX,
        seconds: float = KEPT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._frames: deque[_Kept] = deque()
        self._bytes_max = bytes_max
        self._seconds = seconds
        self._clock = clock
        self.size_bytes = 0
        self.gone: dict[str, int] = {}  # source → the newest seq that was let go

    def __len__(self) -> int:
        return len(self._frames)

    def add(self, batches: Iterable[Batch]) -> None:
        """Keep batches that Redis acknowledged just now.

        Age is measured against the newest, not against the clock: what was acknowledged right before
        Redis went away is what may be missing when it is back.
        """
        now = self._clock()
        for source, seq, at_ms, ticks, frame in batches:
            size = len(frame) or ticks.nbytes
            self._frames.append(_Kept(source, seq, at_ms, frame or ticks, size, now))
            self.size_bytes += size
        while self._frames and (
            self.size_bytes > self._bytes_max or self._frames[0].kept_at < now - self._seconds
        ):
            oldest = self._frames.popleft()
            self.size_bytes -= oldest.size
            self.gone[oldest.source] = oldest.seq

    def sources(self) -> list[str]:
        """Whose frames are here, oldest first."""
        return list(dict.fromkeys(each.source for each in self._frames))

    def last_seqs(self, source: str, keys: Keys) -> dict[int, int]:
        """Shard → the highest seq that was acknowledged there, as far as we remember."""
        last: dict[int, int] = {}
        for kept in reversed(self._frames):
            if kept.source == source:
                for shard in set(_shards(_ticks(kept), keys).tolist()):
                    last.setdefault(shard, kept.seq)
                if len(last) == keys.shards:
                    break
        return last

    def after(self, source: str, least: Mapping[int, int], keys: Keys) -> Iterator[Batch]:
        """Our frames' ticks of the shards in `least` with a higher seq than it says, in order."""
        first = min(least.values())
        for kept in self._frames:
            if kept.source != source or kept.seq <= first:
                continue
            ticks = _ticks(kept)
            wanted = [shard for shard, seq in least.items() if kept.seq > seq]
            ticks = ticks[np.isin(_shards(ticks, keys), wanted)]
            if len(ticks):
                frame = kept.data if isinstance(kept.data, bytes) else b""
                yield Batch(source, kept.seq, kept.at_ms, ticks, frame)


def _ticks(kept: _Kept) -> TickArray:
    return parse_frame(kept.data, kept.at_ms).ticks if isinstance(kept.data, bytes) else kept.data


def _shards(ticks: TickArray, keys: Keys) -> Any:
    return (ticks[:, TOKEN].astype(np.int64) >> 8) % keys.shards


def missing(client: redis.Redis, keys: Keys, kept: Kept) -> dict[str, dict[int, int]]:
    """What Redis has lost of what it acknowledged: source → shard → the highest seq that is there."""
    found: dict[str, dict[int, int]] = {}
    for source in kept.sources():
        for shard, last in kept.last_seqs(source, keys).items():
            there = highest_seq(client, keys, shard, source, enough=last)
            if there is not None and there < last:
                found.setdefault(source, {})[shard] = there
    return found


def highest_seq(client: redis.Redis, keys: Keys, shard: int, source: str, enough: int) -> int | None:
    """The highest seq of a source that a shard holds, applied or still in its stream; 0 for none.

    Never too high. None: a foreign hand has put something else there, which takes no entries at all. The
    stream is looked at from its end, back to the cursor (what lies before it counts in the cursor's
    `src:` field), and no further than `ENTRIES_LOOKED_AT_MAX`.
    """
    try:
        fields: Any = client.hmget(keys.cursor(shard), f"src:{source}", "id")
        applied, position = fields
        there = int(applied or 0)
        least, newest = (position or b"0-0").decode(), "+"
        looked, most = 0, FIRST_LOOK
        while there < enough and looked < ENTRIES_LOOKED_AT_MAX:
            entries: Any = client.xrevrange(keys.ticks(shard), max=newest, min=least, count=most)
            for _, cells in entries:
                # A source's entries ascend, apart from repeats: the last one is (as good as) the highest.
                if cells.get(b"src") == source.encode() and cells.get(b"seq", b"").isdigit():
                    return max(there, int(cells[b"seq"]))
            if len(entries) < most:
                break
            looked, most = looked + len(entries), NEXT_LOOKS
            newest = f"({entries[-1][0].decode()}"
    except ResponseError as error:
        if "WRONGTYPE" in str(error):
            return None
        raise
    except ValueError:  # somebody wrote into the cursor
        return 0
    return there
