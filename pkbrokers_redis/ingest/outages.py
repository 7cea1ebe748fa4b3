"""Outages: told to the aggregators, mended by jobs, and remembered so that none is lost with a process.

    P:feed_progress          hash   feed → until when what it said is in Redis, written every second
    P:{S}:repairs    a notice for each outage that is over (`store/repairs.py`)
    P:job_outbox    its backfill, and the warm start of instruments never seen

The order makes it safe: first the notice, then its job, then `P:feed_progress`. If the process dies between
these writes, `P:feed_progress` is older than the truth. The next reader reports a longer outage: safe.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import redis
from redis.exceptions import ResponseError

from pkbrokers_redis import logs
from pkbrokers_redis.candles.calendar import MARKET_TIMEZONE, TIME_MS_MAX, Sessions
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.ingest.connections import Reading
from pkbrokers_redis.ingest.feeds import Feed
from pkbrokers_redis.ingest.job_outbox import WantedJobs
from pkbrokers_redis.ingest.liveness import FeedLife, Outage, notices
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.repairs import send_gap

log = logs.get("ingest")

EVERY_SECONDS = 1.0
JOINED_MS = 5_000  # an instrument that a new cut brings ticks within so long, whoever reads it
STRAYS_MAX = 1_000  # outages of single instruments not yet told; then the oldest are given up
READ_AT_ONCE = 1_000
MARKET_ZONE = ZoneInfo(MARKET_TIMEZONE)

Stray = tuple[str, tuple[int, ...], Outage]  # why, instruments


class Outages:
    """`open_feed`, `close_feed`, `welcome` and `join` in the leases' thread, `add` in any, `run` in its own.

    `jobs` None: nothing can be asked of Kite's history, outages are only marked. `feeds` says how many there
    are; `unsent_ms`, when the oldest frame was received that is in memory only, None when there is none.
    Times are market time.
    """

    def __init__(
        self,
        connect: Callable[[], redis.Redis],
        keys: Keys,
        sessions: Sessions,
        schedule_of: Callable[[int], int],
        *,
        now_ms: Callable[[], float],
        readings: Callable[[], Sequence[Reading]],
        feeds: Callable[[], int],
        unsent_ms: Callable[[], int | None],
        jobs: WantedJobs | None,
    ) -> None:
        self._connect = connect
        self._client: redis.Redis | None = None
        self._keys = keys
        self._sessions = sessions
        self._schedule_of = schedule_of
        self._now_ms = now_ms
        self._readings = readings
        self._feeds = feeds
        self._unsent_ms = unsent_ms
        self._jobs = jobs
        self._lock = threading.Lock()  # over telling: each outage once
        self._strays: deque[Stray] = deque(maxlen=STRAYS_MAX)
        self._once = logs.Once()
        self.counts = dict.fromkeys(("outages", "gap_notices", "new_instruments"), 0)

    # --- the leases' thread --------------------------------------------------------------------------

    def open_feed(self, client: redis.Redis, feed: Feed) -> FeedLife:
        """What is known of a feed that is about to be read; instruments never seen are warmed.

        Raises what redis-py raises.
        """
        seen = self.welcome(client, feed.tokens)
        found: Any = None
        try:
            found = client.hget(self._keys.feed_progress(), str(feed.number))
        except ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
        heard_ms = _time_of(found) or max(seen.values(), default=None)
        return FeedLife(heard_ms)

    def join(self, client: redis.Redis, tokens: Collection[int]) -> None:
        """A new cut of ours has these instruments, the one before had not. Raises what redis-py raises.

        Who was streamed before, and then was not, has had an outage of its own.
        """
        now_ms = int(self._now_ms()) + JOINED_MS
        for token, seen_ms in self._last_seen(client, tokens).items():
            self.add("not streamed", (token,), Outage(int(seen_ms), now_ms))

    def close_feed(self, client: redis.Redis, reading: Reading) -> None:
        """A feed that we read no more, and that is still ours: tell and note the last. Raises as above."""
        with self._lock:
            self._tell(client, reading)
            self._note(client, [reading])

    def welcome(self, client: redis.Redis, tokens: Collection[int]) -> dict[int, float]:
        """When instruments that we begin to read were last seen, by their quotes; the others are warmed.

        Raises what redis-py raises.
        """
        seen = self._last_seen(client, tokens)
        fresh = sorted(set(tokens) - seen.keys())
        if fresh:
            self.counts["new_instruments"] += len(fresh)
            log.info("new_instruments", instruments=len(fresh), warmed=self._jobs is not None)
            if self._jobs is not None:
                # The day makes it another request than yesterday's, which RQ still remembers.
                day = datetime.fromtimestamp(self._now_ms() / 1000, MARKET_ZONE).date()
                self._jobs.want(client, "warm_start", {"tokens": fresh, "why": f"warm {day}"})
        return seen

    def _last_seen(self, client: redis.Redis, tokens: Collection[int]) -> dict[int, float]:
        seen: dict[int, float] = {}
        ordered = sorted(tokens)
        for first in range(0, len(ordered), READ_AT_ONCE):
            some = ordered[first : first + READ_AT_ONCE]
            pipeline = client.pipeline(transaction=False)
            for token in some:
                pipeline.hget(self._keys.quote(token), "received_at")
            for token, found in zip(some, pipeline.execute(raise_on_error=False), strict=True):
                if isinstance(found, Exception) and "WRONGTYPE" not in str(found):
                    raise found
                if found is not None:
                    seen[token] = _moment_of(found) if isinstance(found, bytes) else 0.0
        # A quote without a readable time was seen, we know not when: as if just now.
        return {token: at_ms or self._now_ms() for token, at_ms in seen.items()}

    # --- any thread ----------------------------------------------------------------------------------

    def add(self, why: str, tokens: tuple[int, ...], outage: Outage) -> None:
        """An outage of single instruments, while their feed was well."""
        self._strays.append((why, tokens, outage))

    def run(self, stop: threading.Event) -> None:
        """`look` every second."""
        while not stop.wait(EVERY_SECONDS):
            self.look()

    def look(self) -> None:
        """Tell what is over, note who was heard. While Redis is away everything waits."""
        with self._lock:
            try:
                client = self._client = self._client or self._connect()
                readings = self._readings()
                for reading in readings:
                    self._tell(client, reading)
                while self._strays:
                    self._send(client, *self._strays[0])
                    self._strays.popleft()
                self._note(client, readings)
            except (redis.RedisError, PkbError) as error:
                self._client = None
                if "WRONGTYPE" in str(error) and self._once.first(str(error)):
                    hint = f"look at {self._keys.feed_progress()} and {self._keys.repairs(0)}, …"
                    log.error("outages_wait", why=str(error)[:200], hint=hint)

    def _tell(self, client: redis.Redis, reading: Reading) -> None:
        life = reading.life
        while outage := life.first_outage:
            self._send(client, "not heard", reading.feed.tokens, outage)
            life.settle()

    def _send(self, client: redis.Redis, why: str, tokens: tuple[int, ...], outage: Outage) -> None:
        self.counts["outages"] += 1
        for notice in notices(self._sessions, self._schedule_of, tokens, outage):
            span = {"from_ms": notice.from_ms, "to_ms": notice.to_ms}
            self.counts["gap_notices"] += send_gap(client, self._keys, notice.tokens, **span, why=why)
            if self._jobs is not None:
                self._jobs.want(client, "repair_gap", {"tokens": list(notice.tokens), **span})
            log.warning(
                "outage", why=why, instruments=len(notice.tokens), **span, seconds=round(
                    (notice.to_ms - notice.from_ms) / 1000, 1), backfill=self._jobs is not None,
            )  # fmt: skip

    def _note(self, client: redis.Redis, readings: Sequence[Reading]) -> None:
        unsent_ms = self._unsent_ms()
        heard: dict[Any, Any] = {}
        for reading in readings:
            times = [reading.life.heard_ms]
            times += [outage.from_ms for outage in [reading.life.first_outage] if outage is not None]
            times += [unsent_ms] if unsent_ms is not None else []
            if min(times) > 0:
                heard[reading.feed.number] = int(min(times))
        if heard:
            client.hset(self._keys.feed_progress(), mapping=heard)
            # A number that is used again some day says nothing of the time between.
            numbers: Any = client.hkeys(self._keys.feed_progress())
            if gone := [name for name in numbers if name.isdigit() and int(name[:9]) >= self._feeds()]:
                client.hdel(self._keys.feed_progress(), *gone)


def _time_of(found: bytes | None) -> float | None:
    """A field of `P:feed_progress`; None where there is none, or it is no time."""
    text = (found or b"").decode(errors="replace")
    return float(text) if text.isascii() and text.isdigit() and 0 < int(text[:15]) < TIME_MS_MAX else None


def _moment_of(found: bytes) -> float:
    """An ISO time as epoch ms; 0 for anything else."""
    try:
        return datetime.fromisoformat(found.decode()).timestamp() * 1000
    except (ValueError, OverflowError):
        return 0.0
