"""From `PKB_REDIS_URL` to a client that has answered, or to a one-line error that says why not.

    redis://[user:password@]host[:6379][/database]          one server; rediss:// with TLS
    unix://[user:password@]/path/to/redis.sock[?db=0]       one server on this machine
    redis+sentinel://[user:password@]host[:26379],…/service[/database]
    redis+cluster://[user:password@]host[:6379],…/          any node; the client finds the others

`rediss+sentinel` and `rediss+cluster` use TLS with every server, Sentinels included. After a `?` follow
redis-py's own options (`ssl_ca_certs=…`), and `sentinel_username`, `sentinel_password`.

No message shows a password: messages name the place (`describe`). Errors raised while a URL is parsed are not
chained, because their texts quote parts of it.
"""

from __future__ import annotations

import ssl
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

import redis
import redis.cluster
import redis.connection
import redis.sentinel
from redis.backoff import ExponentialBackoff
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

from pkbrokers_redis.errors import PkbError, RedisUnavailable, RedisUnsuitable, SettingsError
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.cluster import ClusterClient, use_raw_replies
from pkbrokers_redis.store.embedded import attach, reader_data_dir, store_folder

REDIS_PORT, SENTINEL_PORT = 6379, 26379
SENTINEL_SECONDS_MAX = 1.0  # a Sentinel that hangs must not delay the request to the next one
NODES_MAX = 100  # of a URL

Opener = Callable[[str, dict[str, Any]], redis.Redis]  # (URL, redis-py's connection options) → client

# Any: these have no types.
_ClusterNode: Any = redis.cluster.ClusterNode
_Sentinel: Any = redis.sentinel.Sentinel
_parse_url: Any = redis.connection.parse_url

_WRITE_URL = "write redis://:password@host:6379/0, with / # ? @ : in the password as %2F %23 %3F %40 %3A"
_WRITE_SENTINEL = "write redis+sentinel://:password@host:26379,host:26379/service"


def open_url(url: str, options: dict[str, Any]) -> redis.Redis:
    """Return the client of a URL, not yet connected."""
    opener = OPENERS.get(split(url).scheme)
    if opener is None:
        raise SettingsError(
            "PKB_REDIS_URL begins with an unknown scheme",
            "begin it with " + ", ".join(f"{scheme}://" for scheme in OPENERS),
        )
    return opener(url, options)


def place_of(url: str) -> str:
    """Return scheme, hosts, ports and path of a URL. A URL that cannot be parsed is not shown at all."""
    try:
        parts = split(url)
    except SettingsError:
        return "PKB_REDIS_URL"
    servers = parts.netloc.rpartition("@")[2]
    if parts.scheme not in OPENERS or ("+" in parts.scheme and not servers):
        return "PKB_REDIS_URL"
    path = "" if parts.scheme.endswith("+cluster") else unquote(parts.path)
    return f"{parts.scheme}://{servers}{path}"


def split(url: str) -> SplitResult:
    """Split a URL. Raise SettingsError, without a part of the URL, when it cannot be parsed."""
    try:
        parts = urlsplit(url)
        servers = parts.netloc.rpartition("@")[2]
        for server in servers.split(",") if "+" in parts.scheme else [servers]:
            _ = urlsplit(f"//{server}").port  # parsed on access
    except ValueError:
        raise _unreadable("its host or port cannot be read", _WRITE_URL) from None
    # A socket's path may hold an @, but behind a password it may be the password's.
    if "@" in parts.path + parts.query + parts.fragment and (parts.scheme != "unix" or parts.netloc):
        raise _unreadable("a special character cuts it short", _WRITE_URL)
    if parts.scheme == "unix" and parts.netloc and "@" not in parts.netloc:
        raise _unreadable("a unix socket needs an absolute path", "write unix:///path/to/redis.sock?db=0")
    return parts


def _open_one(url: str, options: dict[str, Any]) -> redis.Redis:
    parts = split(url)
    if parts.scheme == "unix":
        if not parts.path:
            raise _unreadable("it names no socket", "write unix:///path/to/redis.sock?db=0")
    else:
        _database(parts.path.strip("/"))
    try:
        client = redis.Redis.from_url(url, **options)
        use_raw_replies(client)
    except (TypeError, ValueError):
        raise _unknown_option() from None
    return client


def _open_cluster(url: str, options: dict[str, Any]) -> redis.Redis:
    parts = split(url)
    if parts.path.strip("/") not in ("", "0"):
        raise _unreadable("a cluster has neither databases nor services", "end it with /")
    arguments = _arguments(parts, dict(parse_qsl(parts.query)), options)
    arguments.pop("db", None)
    retry = arguments.pop("retry")
    nodes = [_ClusterNode(host, port) for host, port in _servers(parts, REDIS_PORT)]
    # Cast: both have what this package uses. `ClusterClient` documents the differences.
    return cast("redis.Redis", ClusterClient(startup_nodes=nodes, retry=retry, **arguments))


def _open_sentinel(url: str, options: dict[str, Any]) -> redis.Redis:
    parts = split(url)
    service, _, database = unquote(parts.path).strip("/").partition("/")
    if not service:
        raise _unreadable("it names no service", _WRITE_SENTINEL)
    query = dict(parse_qsl(parts.query))
    names = {
        "username": query.pop("sentinel_username", None),
        "password": query.pop("sentinel_password", None),
    }
    arguments = _arguments(parts, query, options)
    if database:
        arguments["db"] = _database(database)
    of_sentinels = {
        **{name: value for name, value in arguments.items() if name.startswith("ssl")},
        **{name: value for name, value in names.items() if value},
        "socket_timeout": SENTINEL_SECONDS_MAX,
        "socket_connect_timeout": SENTINEL_SECONDS_MAX,
        "retry": options["retry"],
        "protocol": 2,
    }
    sentinel = _Sentinel(_servers(parts, SENTINEL_PORT), sentinel_kwargs=of_sentinels)
    client: redis.Redis = sentinel.master_for(service, **arguments)
    return client


# A new kind of deployment is an opener and a row here.
OPENERS: dict[str, Opener] = {
    "redis": _open_one,
    "rediss": _open_one,
    "unix": _open_one,
    "redis+sentinel": _open_sentinel,
    "rediss+sentinel": _open_sentinel,
    "redis+cluster": _open_cluster,
    "rediss+cluster": _open_cluster,
}


def _servers(parts: SplitResult, default_port: int) -> list[tuple[str, int]]:
    """Return the hosts and ports of a URL with several servers."""
    servers: list[tuple[str, int]] = []
    for text in parts.netloc.rpartition("@")[2].split(","):
        server = urlsplit(f"//{text.strip()}")
        if not server.hostname:
            raise _unreadable("it lacks a host", "write host:port, with commas between several")
        servers.append((server.hostname, server.port or default_port))
    if len(servers) > NODES_MAX:
        raise _unreadable(f"it names more than {NODES_MAX} servers", "name a few; the client finds the rest")
    return servers


def _arguments(parts: SplitResult, query: dict[str, str], options: dict[str, Any]) -> dict[str, Any]:
    """Return redis-py's arguments: `options`, overridden by user, password and options of a URL."""
    user, at, _ = parts.netloc.rpartition("@")
    scheme = parts.scheme.partition("+")[0]
    try:
        found = _parse_url(f"{scheme}://{user}{at}localhost/?{urlencode(query)}")
        kind = found.pop("connection_class", redis.Connection)
        found.pop("host")
        arguments = {**options, **found, "decode_responses": False, "protocol": 2}
        kind(**arguments)  # raises TypeError for an unknown option
    except (TypeError, ValueError):
        raise _unknown_option() from None
    return {**arguments, "ssl": True} if scheme == "rediss" else arguments


def _database(text: str) -> int:
    if text and not text.isdecimal():
        raise _unreadable("its path is no database number", "end it with /0")  # redis-py would take 0
    return int(text or 0)


def _unknown_option() -> SettingsError:
    return _unreadable("an option after the ? is not one of redis-py's", "correct or remove it")


def _unreadable(reason: str, hint: str) -> SettingsError:
    return SettingsError(f"PKB_REDIS_URL cannot be used: {reason}", hint)


CONNECT_SECONDS_MAX = 2.5
ANSWER_SECONDS = 2.5  # commands name a server that hangs within five seconds, their own start included
LOADING_SECONDS_MAX = 60.0  # how long to wait for a server that loads its data
READER_RETRIES = 3
HEALTH_CHECK_SECONDS = 30


def client_options(socket_timeout_seconds: float, retries: int) -> dict[str, Any]:
    """Return redis-py's options. A writer never retries: the lost reply may be that of a successful XADD."""
    return {
        "socket_timeout": socket_timeout_seconds,
        "socket_connect_timeout": CONNECT_SECONDS_MAX,
        "health_check_interval": HEALTH_CHECK_SECONDS,
        # Not after a timeout: a server that hangs would be waited for again and again.
        "retry": Retry(ExponentialBackoff(cap=1.0, base=0.05), retries, (redis.ConnectionError,)),
        # Stated, because redis-py's default differs by version and raw replies must not.
        "protocol": 2,
    }


def connect(
    settings: Settings, *, for_reading: bool = False, socket_timeout_seconds: float = 30.0
) -> redis.Redis:
    """Return a client of the configured store, which has answered.

    Replies are bytes, in RESP2 shapes. Sentinel's connections follow the master. On a cluster the client is a
    `cluster.ClusterClient`, whose docstring states the differences. Without PKB_REDIS_URL the client uses the
    embedded server, which runs as long as the client's connection pool exists (or this process). A reader
    retries lost connections, needs no right to Functions, and uses the demo's store when only that exists.
    """
    options = client_options(socket_timeout_seconds, READER_RETRIES if for_reading else 0)
    place = describe(settings, for_reading=for_reading)
    client: redis.Redis | None = None
    try:
        if settings.redis_url is None:
            data_dir, silence_seconds = _data_dir(settings, for_reading), 0.75 * socket_timeout_seconds
            server = attach(settings, data_dir=data_dir, silence_seconds_max=silence_seconds)
            url = server.url
        else:
            server, url = None, settings.redis_url.get_secret_value()
        with open_url(url, client_options(min(socket_timeout_seconds, ANSWER_SECONDS), 0)) as probe:
            _probe(probe, for_reading)
        client = open_url(url, options)
        if server is not None:
            weakref.finalize(client.connection_pool, server.close)
    except BaseException as error:
        if client is not None:
            client.close()
        if isinstance(error, (RedisError, RedisClusterException, OSError, UnicodeError)):
            raise explain(error, place) from error
        raise
    return client


def describe(settings: Settings, *, for_reading: bool = False) -> str:
    """Return the store's address for logs and messages, without a secret: `redis://cache.local:6379/0`."""
    if settings.redis_url is None:
        return f"the embedded server in {store_folder(_data_dir(settings, for_reading))}"
    return place_of(settings.redis_url.get_secret_value())


def _data_dir(settings: Settings, for_reading: bool) -> Path:
    return reader_data_dir(settings)[0] if for_reading else settings.data_dir


_LOGIN_ERRORS = (AuthenticationError, AuthenticationWrongNumberOfArgsError, AuthorizationError)
_NO_FUNCTIONS = "has no Functions (Redis before 7 has none)"
_GET_FUNCTIONS = "use Redis 7 or later, or Valkey, or unset PKB_REDIS_URL for the embedded server"

# What identifies a refusal (class, part of the text in lower case) → error class, what happened, hint.
# The first row that matches counts.
_REFUSALS: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str, type[PkbError], str, str], ...] = (
    (BusyLoadingError, "", RedisUnavailable, "is still loading its data", "try again in a moment"),
    (_LOGIN_ERRORS, "called without any password", RedisUnavailable,
     "has no password set", "remove it from PKB_REDIS_URL"),
    (_LOGIN_ERRORS, "required", RedisUnavailable,
     "requires a password", "put it in PKB_REDIS_URL: redis://:password@…"),
    (_LOGIN_ERRORS, "", RedisUnavailable, "refuses the user or password", "correct it in PKB_REDIS_URL"),
    (InvalidResponse, "", RedisUnavailable,
     "answers, but is not Redis", "correct host and port in PKB_REDIS_URL"),
    (ReadOnlyError, "", RedisUnavailable,
     "is a replica and refuses writes", "point PKB_REDIS_URL at the primary"),
    (OutOfMemoryError, "", RedisUnavailable, "is out of memory", "raise its maxmemory, or keep fewer rows"),
    (MovedError, "", SettingsError,
     "is a node of a Redis Cluster", "begin PKB_REDIS_URL with redis+cluster://"),
    (ResponseError, "unknown command", RedisUnsuitable, _NO_FUNCTIONS, _GET_FUNCTIONS),
    (ResponseError, "unknown subcommand", RedisUnsuitable, _NO_FUNCTIONS, _GET_FUNCTIONS),
    (ResponseError, "misconf", RedisUnavailable, "refuses writes, because it cannot save to its disk",
     "free space there or repair its permissions; its log names the cause"),
    (ResponseError, "db index", SettingsError,
     "has no such database number", "correct the end of PKB_REDIS_URL"),
    (RedisError, "max number of clients", RedisUnavailable, "has no connection left", "raise its maxclients"),
)  # fmt: skip


def explain(error: BaseException, place: str) -> PkbError:
    """Return what a redis-py error means to an operator, with a hint. `place` is from `describe`."""
    text = " ".join(str(error).split())
    if isinstance(error, PkbError):
        return error
    if isinstance(error, RedisClusterException):
        return _explain_cluster(error, text, place)
    if isinstance(error, MasterNotFoundError):
        return _explain_sentinel(text, place)
    if isinstance(error, NoPermissionError) or text.startswith("NOPERM"):
        return RedisUnavailable(
            f"{place} denies this user a command it needs ({text.removeprefix('NOPERM ')[:120]})",
            "give it `~<prefix>:* +@all -@dangerous +info +function +fcall` with ACL SETUSER",
        )
    lowered = text.lower()
    for kinds, part, explained_as, what, hint in _REFUSALS:
        if isinstance(error, kinds) and part in lowered:
            return explained_as(f"{place} {what}", hint)
    if isinstance(error, ResponseError):
        return RedisUnavailable(f"{place} answers with an error ({text[:120]})", "see its log")
    return _explain_network(error, text, place)


def _explain_cluster(error: RedisClusterException, text: str, place: str) -> PkbError:
    """Unwrap redis-py's error: it holds the answer of the last node that was asked for the topology."""
    cause = error.__cause__
    if isinstance(cause, RedisClusterException):  # "Cluster mode is not enabled", for any refusal
        refusal = cause.__context__
        if isinstance(refusal, NoPermissionError):
            return explain(refusal, place)
        return SettingsError(f"{place} is not a Redis Cluster", "begin PKB_REDIS_URL with redis://")
    if cause is not None:
        return explain(cause, place)
    if "not covered" in text:
        return RedisUnavailable(
            f"{place} is incomplete: some slots have no master",
            "look at CLUSTER NODES, and start the missing nodes",
        )
    return RedisUnavailable(f"{place} cannot be used ({text[:120]})", "look at CLUSTER NODES")


def _explain_sentinel(text: str, place: str) -> PkbError:
    """Classify by redis-py's text, which quotes the error of each Sentinel."""
    errors = text.partition("' : ")[2]
    if "Authentication" in errors or "NoPermission" in errors:
        return RedisUnavailable(
            f"{place}: a Sentinel refuses the user or password",
            "add ?sentinel_password=… (and sentinel_username) to PKB_REDIS_URL",
        )
    if "Error" in errors:
        return RedisUnavailable(
            f"{place}: no Sentinel answers that knows a master",
            "start the Sentinels, or correct the hosts in PKB_REDIS_URL",
        )
    return RedisUnavailable(
        f"{place}: the Sentinels know no running master of that name",
        "correct the name at the end of PKB_REDIS_URL, or wait for the failover",
    )


def _explain_network(error: BaseException, text: str, place: str) -> PkbError:
    cause = error.__cause__ or error.__context__
    if isinstance(error, UnicodeError):
        return SettingsError(f"{place} is not a valid host name", "correct PKB_REDIS_URL")
    if isinstance(cause, ssl.SSLCertVerificationError):
        return RedisUnavailable(
            f"{place} has a certificate that is not trusted ({cause.verify_message})",
            "add ?ssl_ca_certs=<file> to PKB_REDIS_URL, or correct its host name",
        )
    if isinstance(cause, ssl.SSLError) or "[SSL" in text:
        reason = getattr(cause, "reason", None) or "handshake failed"
        return RedisUnavailable(
            f"the TLS handshake with {place} failed ({reason})", "use redis:// where the server has no TLS"
        )
    if isinstance(error, (redis.TimeoutError, TimeoutError)):
        hint = "is it running, and is its port open to this host?"
        if place.startswith("rediss"):  # a server without TLS waits for the rest of the handshake
            hint = "is it running, and does it use TLS? Without TLS write redis://"
        return RedisUnavailable(f"{place} does not answer in time", hint)
    if "closed by server" in text or "reset by peer" in text:
        return RedisUnavailable(
            f"{place} closed the connection", "is it Redis, and does it require rediss:// (TLS)?"
        )
    reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else "connection lost"
    return RedisUnavailable(
        f"{place} cannot be reached ({reason})", "start it, or unset PKB_REDIS_URL for the embedded server"
    )


def _probe(client: redis.Redis, for_reading: bool) -> None:
    """Wait while the server loads, then check a capability: versions of forks are not comparable."""
    deadline = time.monotonic() + LOADING_SECONDS_MAX
    while True:
        try:
            # The name matches no library: only the command's existence matters.
            client.function_list("pkb-probe")
            return
        except NoPermissionError:
            if not for_reading:
                raise
            return  # a reader's user may be restricted to reading
        except BusyLoadingError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
