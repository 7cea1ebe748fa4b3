"""From `PKB_REDIS_URL` to a client that answers, or to one line that says why not.

Nothing here ever shows a password: messages name the place (`describe`). `openers` knows the deployments:
one server, Sentinel, Cluster.
"""

from __future__ import annotations

import ssl
import time
import weakref
from typing import Any

import redis
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    AuthorizationError,
    BusyLoadingError,
    InvalidResponse,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError

from pkbrokers_redis.core.errors import PkbError, RedisUnavailable, RedisUnsuitable, SettingsError
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.embedded import attach, reader_data_dir, store_folder
from pkbrokers_redis.store.openers import open_url, place_of

CONNECT_SECONDS_MAX = 5.0
LOADING_SECONDS_MAX = 60.0  # how long a server that loads its data is waited for
READER_RETRIES = 3
HEALTH_CHECK_SECONDS = 30


def connect(
    settings: Settings, *, for_reading: bool = False, socket_timeout_seconds: float = 30.0
) -> redis.Redis:
    """A client of the configured store, which has answered. Replies are bytes, in RESP2 shapes.

    With Sentinel its connections follow the master. On a cluster it is a `store.cluster.ClusterClient`, and
    redis.Redis only in name: its docstring says what differs.

    Without PKB_REDIS_URL it is the embedded server's, which runs as long as the client's connection pool
    exists (or this process). `for_reading` retries lost connections, needs no right to Functions, and looks
    into the demo's store where only that exists. Writers never retry: the reply of an XADD that succeeded
    may be what was lost. Blocking reads must block for less than `socket_timeout_seconds`.

    Raises SettingsError (a URL that cannot be read), RedisUnavailable (no answer, or a refusal) and
    RedisUnsuitable (it has no Functions).
    """
    options: dict[str, Any] = {
        "socket_timeout": socket_timeout_seconds,
        "socket_connect_timeout": CONNECT_SECONDS_MAX,
        "health_check_interval": HEALTH_CHECK_SECONDS,
        "retry": Retry(ExponentialBackoff(cap=1.0, base=0.05), READER_RETRIES)
        if for_reading
        else Retry(NoBackoff(), 0),
        # Stated, because redis-py's default is 2 or 3 by version: raw replies must not differ with it.
        "protocol": 2,
    }
    place = describe(settings, for_reading=for_reading)
    client: redis.Redis | None = None
    try:
        if settings.redis_url is None:
            data_dir = reader_data_dir(settings)[0] if for_reading else settings.data_dir
            server = attach(settings, data_dir=data_dir)
            client = open_url(server.url, options)
            weakref.finalize(client.connection_pool, server.close)
        else:
            client = open_url(settings.redis_url.get_secret_value(), options)
        _probe(client, for_reading)
    except BaseException as error:
        if client is not None:
            client.close()
        if isinstance(error, (RedisError, RedisClusterException, OSError, UnicodeError)):
            raise explain(error, place) from error
        raise
    return client


def describe(settings: Settings, *, for_reading: bool = False) -> str:
    """Where the store is, for logs and messages: `redis://cache.local:6379/0`. Never holds a secret."""
    if settings.redis_url is None:
        data_dir = reader_data_dir(settings)[0] if for_reading else settings.data_dir
        return f"the embedded server in {store_folder(data_dir)}"
    return place_of(settings.redis_url.get_secret_value())


def explain(error: BaseException, place: str) -> PkbError:
    """What a redis-py error means to an operator, in one line with a mend. `place` is from `describe`."""
    text = " ".join(str(error).split())
    if isinstance(error, PkbError):
        return error
    if isinstance(error, RedisClusterException):
        return _explain_cluster(error, text, place)
    if isinstance(error, MasterNotFoundError):
        return _explain_sentinel(text, place)
    if isinstance(error, BusyLoadingError):
        return RedisUnavailable(f"{place} is still loading its data", "try again in a moment")
    if isinstance(error, NoPermissionError) or text.startswith("NOPERM"):
        return RedisUnavailable(
            f"{place} does not permit this user what we need ({text.removeprefix('NOPERM ')[:120]})",
            "give it `~<prefix>:* +@all -@dangerous +info +function +fcall` with ACL SETUSER",
        )
    if isinstance(error, (AuthenticationError, AuthenticationWrongNumberOfArgsError, AuthorizationError)):
        if "called without any password" in text:
            return RedisUnavailable(f"{place} has no password set", "remove it from PKB_REDIS_URL")
        if "required" in text:
            return RedisUnavailable(
                f"{place} wants a password", "put it in PKB_REDIS_URL: redis://:password@…"
            )
        return RedisUnavailable(f"{place} refuses the user or password", "correct it in PKB_REDIS_URL")
    if isinstance(error, InvalidResponse):
        return RedisUnavailable(
            f"{place} answers, but not as Redis does", "correct host and port in PKB_REDIS_URL"
        )
    if isinstance(error, ReadOnlyError):
        return RedisUnavailable(
            f"{place} is a replica, which takes no writes", "point PKB_REDIS_URL at the primary"
        )
    if isinstance(error, OutOfMemoryError):
        return RedisUnavailable(f"{place} is out of memory", "raise its maxmemory, or keep fewer rows")
    if isinstance(error, MovedError):
        return SettingsError(
            f"{place} is a node of a Redis Cluster", "begin PKB_REDIS_URL with redis+cluster://"
        )
    if isinstance(error, ResponseError):
        return _explain_reply(text, place)
    return _explain_network(error, text, place)


def _explain_reply(text: str, place: str) -> PkbError:
    lowered = text.lower()
    if "unknown command" in lowered or "unknown subcommand" in lowered:
        return RedisUnsuitable(
            f"{place} has no Functions (Redis before 7 has none)",
            "use Redis 7 or later, or Valkey, or unset PKB_REDIS_URL for the embedded server",
        )
    if text.startswith("MISCONF"):
        return RedisUnavailable(
            f"{place} refuses writes, because it cannot save to its disk",
            "make room there or mend its permissions; its log has the cause",
        )
    if "db index is out of range" in lowered or "invalid db index" in lowered:
        return SettingsError(f"{place} has no such database number", "correct the end of PKB_REDIS_URL")
    if "max number of clients" in lowered:
        return RedisUnavailable(f"{place} has no connection left for us", "raise its maxclients")
    return RedisUnavailable(f"{place} answers with an error ({text[:120]})", "see its log")


def _explain_cluster(error: RedisClusterException, text: str, place: str) -> PkbError:
    """redis-py wraps what the last node it asked for the topology had answered."""
    cause = error.__cause__
    if isinstance(cause, RedisClusterException):  # "Cluster mode is not enabled", for any refusal
        refusal = cause.__context__
        if isinstance(refusal, NoPermissionError):
            return explain(refusal, place)
        return SettingsError(f"{place} is no Redis Cluster", "begin PKB_REDIS_URL with redis://")
    if cause is not None:
        return explain(cause, place)
    if "not covered" in text:
        return RedisUnavailable(
            f"{place} is not whole: some slots have no master", "look at CLUSTER NODES, start what is missing"
        )
    return RedisUnavailable(f"{place} cannot be used ({text[:120]})", "look at CLUSTER NODES")


def _explain_sentinel(text: str, place: str) -> PkbError:
    """redis-py only has the texts of what each Sentinel had to say."""
    said = text.partition("' : ")[2]
    if "Authentication" in said or "NoPermission" in said:
        return RedisUnavailable(
            f"{place}: a Sentinel wants another user or password",
            "add ?sentinel_password=… (and sentinel_username) to PKB_REDIS_URL",
        )
    if "Error" in said:
        return RedisUnavailable(
            f"{place}: no Sentinel answers that knows a master", "start them, correct hosts"
        )
    return RedisUnavailable(
        f"{place}: the Sentinels know no living master of that name",
        "correct the name at the end of PKB_REDIS_URL, or wait for the failover",
    )


def _explain_network(error: BaseException, text: str, place: str) -> PkbError:
    cause = error.__cause__ or error.__context__
    if isinstance(error, UnicodeError):
        return SettingsError(f"{place} is no host name", "correct PKB_REDIS_URL")
    if isinstance(cause, ssl.SSLCertVerificationError):
        return RedisUnavailable(
            f"{place} shows a certificate we do not trust ({cause.verify_message})",
            "add ?ssl_ca_certs=<file> to PKB_REDIS_URL, or correct its host name",
        )
    if isinstance(cause, ssl.SSLError) or "[SSL" in text:
        reason = getattr(cause, "reason", None) or "handshake failed"
        return RedisUnavailable(
            f"{place} does not speak TLS with us ({reason})", "use redis:// where the server has no TLS"
        )
    if "max number of clients" in text:
        return RedisUnavailable(f"{place} has no connection left for us", "raise its maxclients")
    if isinstance(error, (redis.TimeoutError, TimeoutError)):
        mend = "is it up, and is the port open to us?"
        if place.startswith("rediss"):  # a server without TLS waits for the rest of what we sent
            mend = "is it up, and does it speak TLS? Use redis:// where it does not"
        return RedisUnavailable(f"{place} does not answer in time", mend)
    if "closed by server" in text or "reset by peer" in text:
        return RedisUnavailable(
            f"{place} closed the connection", "is it Redis, and does it want rediss:// (TLS)?"
        )
    reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else "connection lost"
    return RedisUnavailable(
        f"{place} cannot be reached ({reason})", "start it, or unset PKB_REDIS_URL for the embedded server"
    )


def _probe(client: redis.Redis, for_reading: bool) -> None:
    """Wait while it loads, then ask for a capability, not for a version: forks number themselves freely."""
    deadline = time.monotonic() + LOADING_SECONDS_MAX
    while True:
        try:
            # The name matches no library: only whether the command exists matters.
            client.function_list("pkb-probe")
            return
        except NoPermissionError:
            if not for_reading:
                raise
            return  # a reader's user may well be confined to reading
        except BusyLoadingError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
