"""What the reading commands share: opening the store, and saying what was odd in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pkbrokers_redis.cli.output import note
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.errors import RedisUnavailable
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.embedded.server import reader_data_dir, store_folder


def require_store(settings: Settings) -> None:
    """Where no Redis is configured: say which embedded store is read, or that there is none.

    Reading must not make one: an empty store would then hide the demo's from all readers.
    """
    if settings.redis_url is not None:
        return
    folder, is_demo = reader_data_dir(settings)
    if not store_folder(folder).exists():
        raise RedisUnavailable(
            f"there is no store in {folder} yet", "run `pkb demo` or `pkb up`, or set PKB_REDIS_URL"
        )
    if is_demo:
        note(f"reading the demo's store in {folder}; set PKB_REDIS_URL or run `pkb up` for another")


@contextmanager
def open_store() -> Iterator[CandleStore]:
    """The configured store for reading. Tells of the demo's store, and of rows that had to be left out."""
    settings = load_settings()
    require_store(settings)
    with CandleStore(settings) as store:
        yield store
        if store.rows_refused:
            note(f"left out {store.rows_refused} rows in Redis that are not what they should be")
