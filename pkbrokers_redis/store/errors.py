"""One classification of redis-py's errors, so that nothing else compares their texts.

is_transient          the same command may succeed later: connection lost, loading, out of memory, …
is_wrong_type         the key holds another Redis type
is_function_missing   the function library is not loaded: a new store, or one that lost its data
expect_type           turns WRONGTYPE into a WrongKeyType that names the key
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
from redis.exceptions import (
    BusyLoadingError,
    ClusterDownError,
    ExecAbortError,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TryAgainError,
)

from pkbrokers_redis.errors import WrongKeyType

# Replies that redis-py has a class for lose their code; the others keep it at the start of their text.
_TRANSIENT_REPLIES = (
    BusyLoadingError,
    ClusterDownError,
    ExecAbortError,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    TryAgainError,
)
_TRANSIENT_CODES = ("MISCONF ", "BUSY ", "NOREPLICAS ", "UNBLOCKED ")
_CONNECTION_ERRORS = (redis.ConnectionError, redis.TimeoutError, OSError)


def is_transient(error: BaseException) -> bool:
    """Return whether the same command may succeed later, without a change of keys or settings."""
    if isinstance(error, (*_CONNECTION_ERRORS, *_TRANSIENT_REPLIES)):
        return True
    return isinstance(error, ResponseError) and str(error).startswith(_TRANSIENT_CODES)


def is_wrong_type(error: object) -> bool:
    """Return whether a command met a key of another Redis type."""
    return isinstance(error, ResponseError) and "WRONGTYPE" in str(error)


def is_function_missing(error: object) -> bool:
    """Return whether the function library is not loaded. `functions.load_functions` loads it."""
    return isinstance(error, ResponseError) and "unction not found" in str(error)


def reason_of(error: BaseException, length_max: int = 200) -> str:
    """Return the first line of an error's text, bounded, for the field `reason` of a log event."""
    return str(error).partition("\n")[0][:length_max]


def type_of(client: redis.Redis, key: str) -> str:
    """Return the Redis type of a key, `none` where it does not exist."""
    found: Any = client.type(key)
    return str(found.decode())


@contextmanager
def expect_type(client: redis.Redis, key: str, expected: str) -> Iterator[None]:
    """Turn WRONGTYPE within the block into a WrongKeyType that names the key and both types."""
    try:
        yield
    except ResponseError as error:
        if not is_wrong_type(error):
            raise
        raise WrongKeyType(key, type_of(client, key), expected) from error
