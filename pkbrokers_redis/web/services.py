"""What the routes work with."""

from __future__ import annotations

import asyncio
from collections import Counter

from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.runtime.cluster_state import Facts
from pkbrokers_redis.runtime.health import Finding, look
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import describe, explain
from pkbrokers_redis.web.reading import Picture, Reading

STREAMS_MAX = 64  # clients of /api/closed, each with a connection to Redis
DOWNLOADS_MAX = 4  # answers of /api/bulk that are made or sent


class Services:
    """The store, the threads that read it, and what is counted. Made inside the event loop."""

    def __init__(self, settings: Settings, store: CandleStore) -> None:
        self.settings = settings
        self.store = store
        self.quick = Reading("quick", threads=4, waiting_max=64)
        self.heavy = Reading("heavy", threads=2, waiting_max=8)
        self.picture = Picture(self.quick, self._look, self.explain)
        self.streams: set[asyncio.Task[None]] = set()
        self.downloads = 0
        self.counts: Counter[str] = Counter(requests=0, refused=0, failed=0, streams_dropped=0)

    def explain(self, error: BaseException) -> PkbError:
        """An error of the store's in one line, without secrets."""
        return explain(error, describe(self.settings, for_reading=True))

    def figures(self) -> dict[str, int]:
        """For the heartbeat and /metrics."""
        return {**self.counts, "streams": len(self.streams), "downloads": self.downloads}

    async def end_streams(self) -> None:
        """Tell all clients of streams that it is over."""
        streams = list(self.streams)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)

    def close(self) -> None:
        self.quick.close()
        self.heavy.close()

    def _look(self) -> tuple[Facts, list[Finding]]:
        return look(self.store.client, self.store.settings)
