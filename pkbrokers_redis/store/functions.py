"""The function library `functions.lua`: load it, and call its functions.

Redis persists and replicates the library with the data. A worker loads it when it starts; `fcall` loads it
where it is missing: a store that no worker has used yet, or one that lost its data.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any, Literal, get_args

import redis
from redis.exceptions import ResponseError

from pkbrokers_redis.store.errors import is_function_missing

Function = Literal[
    "commit",
    "lease",
    "hold",
    "release",
    "announce",
    "members",
    "limit_take",
    "limit_block",
    "limit_closed",
    "migrate",
]


FUNCTION_NAMES = tuple(f"pkb_{name}" for name in get_args(Function))  # as registered in Redis


def load_functions(client: redis.Redis) -> None:
    """Load the function library, or replace it by this release's."""
    code = resources.files("pkbrokers_redis.store").joinpath("functions.lua").read_text("utf-8")
    client.function_load(code, replace=True)


def fcall(
    client: redis.Redis, function: Function, keys: Sequence[str], *arguments: Any, may_load: bool = True
) -> Any:
    """Call a function of the library, and load the library first where it is missing."""
    call: Any = client.fcall
    try:
        return call(f"pkb_{function}", len(keys), *keys, *arguments)
    except ResponseError as error:
        if not (may_load and is_function_missing(error)):
            raise
    load_functions(client)
    return call(f"pkb_{function}", len(keys), *keys, *arguments)


def fcall_read_only(client: redis.Redis, function: Function, keys: Sequence[str], *arguments: Any) -> Any:
    """Call a function that writes nothing, as a reader may. Raise ResponseError when it is missing."""
    call: Any = client.fcall_ro
    return call(f"pkb_{function}", len(keys), *keys, *arguments)


def queue_fcall(pipeline: Any, function: Function, keys: Sequence[str], *arguments: Any) -> None:
    """Append a call to a pipeline. A missing library is an error among the replies."""
    pipeline.fcall(f"pkb_{function}", len(keys), *keys, *arguments)
