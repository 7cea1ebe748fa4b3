"""An ingest worker put together from settings: its session, its list, its queue of jobs."""

from __future__ import annotations

import threading

import redis

from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.core.errors import SettingsError
from pkbrokers_redis.pipeline.assign import sessions_of
from pkbrokers_redis.pipeline.feed_session import FeedSession
from pkbrokers_redis.pipeline.ingest import Ingest
from pkbrokers_redis.pipeline.wanted_jobs import WantedJobs
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.queue import open_queue
from pkbrokers_redis.store.watch import instrument_list, list_version

WRITER_SECONDS_MAX = 5.0  # what ingest waits for an answer of Redis before it keeps frames itself


class WatchedList:
    """PKB_INSTRUMENTS with the live changes of `P:watch` and the master (`store/watch.py`)."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def version(self, client: redis.Redis) -> str:
        """Another one whenever `read` may say something else."""
        return list_version(client, self._settings)

    def read(self, client: redis.Redis) -> list[tuple[int, str]]:
        """`(token, symbol)` of each instrument. Raises UnknownSymbol, InputFileError."""
        return instrument_list(client, self._settings)


def make_ingest(settings: Settings, client: redis.Redis, worker_id: str, stop: threading.Event) -> Ingest:
    """A worker that is ready to `run`. Logs in where that is needed. Raises PkbError for what a person must
    mend: no session, no instruments, too many of them."""

    def connect_beside() -> redis.Redis:
        return connect(settings, socket_timeout_seconds=max(settings.lease_seconds, 1.0))

    instruments = instrument_list(client, settings)
    if not instruments:
        raise SettingsError(
            "there is nothing to stream", "set PKB_INSTRUMENTS, e.g. NSE:INFY,NSE:TCS, or a file of tokens"
        )
    sessions = [FeedSession(each, connect_beside) for each in sessions_of(settings)]
    for session in sessions:
        session.open(stop)
    # History is asked with the session: a local feed that needs none has none to ask.
    has_history = any(session.session is not None for session in sessions)
    jobs = WantedJobs(connect_beside, lambda: open_queue(settings), settings.keys) if has_history else None
    return Ingest(
        lambda: connect(settings, socket_timeout_seconds=WRITER_SECONDS_MAX),  # hung is as good as away
        settings,
        instruments,
        now_ms=market_clock(settings),
        worker_id=worker_id,
        connect_leases=connect_beside,
        list_source=WatchedList(settings),
        sessions=sessions,
        jobs=jobs,
    )
