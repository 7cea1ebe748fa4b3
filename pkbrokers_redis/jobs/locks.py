"""One job of a kind at a time: a lease in Redis that its holder renews.

P:job:lock:<name>   string, TTL 30 s   the job that holds it

The lease prevents double work. It is not needed for correctness: what jobs write is complete in any case
(renamed files, `--force-with-lease`, absolute values), so a holder that was suspended does no harm.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import redis

from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.leases import LeaderLease, LeaseTaken

TTL_SECONDS = 30.0


class AlreadyRunning(PkbError):
    """Raised when another job of the kind is running. `.holder` says which."""

    def __init__(self, name: str, holder: str) -> None:
        super().__init__(f"another {name} is running ({holder})", "wait for its end: `pkb jobs --list`")
        self.holder = holder


@contextmanager
def exclusive(client: redis.Redis, keys: Keys, name: str, ttl_seconds: float = TTL_SECONDS) -> Iterator[str]:
    """Hold the lock of a kind of job within the block. Yield the owner id; raise AlreadyRunning when it is taken."""
    owner = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    lease = LeaderLease(client, keys.job_lock(name), owner, ttl_seconds)
    try:
        with lease.hold():
            yield owner
    except LeaseTaken as error:
        if error.key != keys.job_lock(name):
            raise
        raise AlreadyRunning(name, error.holder or "just ended") from None
