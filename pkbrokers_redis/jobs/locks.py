"""One job of a kind at a time: a lock in Redis that its holder renews.

P:job:lock:<name>   string, TTL 30 s   who holds it; gone that long after its holder's last sign of life

It keeps two from doing the same work, no more: what they write is whole in any case (renamed files,
`--force-with-lease`, absolute values), so a holder that was asleep for longer does no harm.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import redis
from redis.exceptions import ResponseError

from pkbrokers_redis import logs
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.commit import load_functions
from pkbrokers_redis.store.leases import release_lease, try_lease

TTL_SECONDS = 30.0
RENEWALS = 3  # in a TTL

log = logs.get("jobs")


class Busy(PkbError):
    """Raised when another job of the kind is at work. `.holder` says which."""

    def __init__(self, name: str, holder: str) -> None:
        super().__init__(f"another {name} is at work ({holder})", "wait for its end: `pkb jobs --list`")
        self.holder = holder


@contextmanager
def alone(client: redis.Redis, keys: Keys, name: str, ttl_seconds: float = TTL_SECONDS) -> Iterator[str]:
    """Hold the lock of a kind for a block, renewed by a thread. Raises Busy at once where it is taken."""
    key, owner = keys.job_lock(name), f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    ttl_ms = int(ttl_seconds * 1000)
    if not _try(client, key, owner, ttl_ms):
        holder: Any = client.get(key)
        raise Busy(name, holder.decode(errors="replace") if holder else "just ended")
    over = threading.Event()

    def renew() -> None:
        while not over.wait(ttl_seconds / RENEWALS):
            try:
                if not try_lease(client, key, owner, ttl_ms):
                    log.warning("lock_lost", name=name)
                    return
            except redis.RedisError:
                pass  # Redis is away: the next try may find it, and the TTL bounds what others wait

    thread = threading.Thread(target=renew, name=f"lock-{name}", daemon=True)
    thread.start()
    try:
        yield owner
    finally:
        over.set()
        thread.join()
        with suppress(redis.RedisError):  # then it runs out
            release_lease(client, key, owner)


def _try(client: redis.Redis, key: str, owner: str, ttl_ms: int) -> bool:
    try:
        return try_lease(client, key, owner, ttl_ms)
    except ResponseError as error:
        if "Function not found" not in str(error):
            raise
        load_functions(client)  # a store that no worker has been at yet
        return try_lease(client, key, owner, ttl_ms)
