"""The pipeline's roles as threads of this process, for programs that want no others beside them.

    authenticate → instruments → subscribe → process → reconnect

It is what `pkb up` starts as processes: the same roles with the same heartbeats, and they share feeds and
shards with any others on this Redis. They also share one interpreter lock: for thousands of instruments take
processes.
"""

from __future__ import annotations

import threading
from functools import partial

from pkbrokers_redis import logs
from pkbrokers_redis.aggregate.worker import run_aggregate
from pkbrokers_redis.ingest.worker import run_ingest
from pkbrokers_redis.kite.instruments import KiteInstruments
from pkbrokers_redis.runtime.roles import Role, open_store
from pkbrokers_redis.settings import Settings

log = logs.get("watcher")

STOP_SECONDS_MAX = 10.0  # of each role: ingest first, then the aggregator has what it wrote


class RoleThread:
    """A role in a thread. Its end, expected or not, sets `ended`; what it raised is in `failure`."""

    def __init__(self, name: str, role: Role, settings: Settings, ended: threading.Event) -> None:
        self.failure: BaseException | None = None
        self._role = role
        self._settings = settings
        self._ended = ended
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start it."""
        self._thread.start()

    def end(self) -> None:
        """Ask it to stop, and wait."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(STOP_SECONDS_MAX)

    def _run(self) -> None:
        try:
            self._role(self._settings, self._stop)
        except BaseException as error:
            self.failure = error
        finally:
            self._ended.set()


def run_pipeline(settings: Settings, stop: threading.Event, *, aggregate: bool = True) -> None:
    """Stream settings' instruments until `stop` is set; with `aggregate` also make their candles.

    Fetches the instrument master where names are asked for and there is none. Raises what a role raises: a
    PkbError for a missing session, an unknown instrument, a Redis that is away at the start.
    """
    sync_if_needed(settings)
    ended = threading.Event()
    threads = [RoleThread("ingest", partial(run_ingest, restartable=False), settings, ended)]
    if aggregate:
        threads.append(RoleThread("aggregate", run_aggregate, settings, ended))
    try:
        for thread in reversed(threads):  # readers stand ready before writers
            thread.start()
        while not (stop.is_set() or ended.is_set()):
            stop.wait(0.1)
    finally:
        for thread in threads:
            thread.end()
    for thread in threads:
        if thread.failure is not None:
            raise thread.failure


def sync_if_needed(settings: Settings) -> None:
    """Fetch the instrument master where there is none and tokens alone will not do. Raises PkbError."""
    if all(part.strip().isdecimal() for part in settings.instruments.split(",") if part.strip()):
        return
    client = open_store(settings)
    try:
        if not client.exists(settings.keys.symbols()):
            synced = KiteInstruments(settings=settings, client=client).sync()
            log.info("instruments_fetched", rows=synced.rows)
    finally:
        client.close()
