"""One row per deployment: the scheme of PKB_REDIS_URL → a redis-py client that is not connected yet.

    redis://[user:password@]host[:6379][/database]          one server; rediss:// with TLS
    unix://[user:password@]/path/to/redis.sock[?db=0]       one server on this machine
    redis+sentinel://[user:password@]host[:26379],…/service[/database]
    redis+cluster://[user:password@]host[:6379],…/          any node; the others are found from it

`rediss+sentinel` and `rediss+cluster` speak TLS with every server, the Sentinels too. Behind a `?` come
redis-py's own options (`ssl_ca_certs=…`), and `sentinel_username`, `sentinel_password`.

Errors raised while a URL is taken apart are not chained: their texts quote pieces of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

import redis
import redis.cluster
import redis.connection
import redis.sentinel

from pkbrokers_redis.core.errors import SettingsError
from pkbrokers_redis.store.cluster import ClusterClient

REDIS_PORT, SENTINEL_PORT = 6379, 26379
SENTINEL_SECONDS_MAX = 1.0  # one that hangs must not hold up the question to the next
NODES_MAX = 100  # of a URL

Opener = Callable[[str, dict[str, Any]], redis.Redis]  # (URL, redis-py's connection options) → client

# Any: these have no types.
_ClusterNode: Any = redis.cluster.ClusterNode
_Sentinel: Any = redis.sentinel.Sentinel
_parse_url: Any = redis.connection.parse_url

_WRITE_URL = "write redis://:password@host:6379/0, with / # ? @ : in the password as %2F %23 %3F %40 %3A"
_WRITE_SENTINEL = "write redis+sentinel://:password@host:26379,host:26379/service"


def open_url(url: str, options: dict[str, Any]) -> redis.Redis:
    """The client of a URL. `options` are redis-py's; those of the URL go before them.

    Raises SettingsError, which names no piece of the URL. A cluster's client asks for the topology at once,
    so that redis-py's errors may come here; the other clients connect with their first command.
    """
    opener = OPENERS.get(split(url).scheme)
    if opener is None:
        raise SettingsError(
            "PKB_REDIS_URL begins with no scheme we know",
            "begin it with " + ", ".join(f"{scheme}://" for scheme in OPENERS),
        )
    return opener(url, options)


def place_of(url: str) -> str:
    """Scheme, hosts, ports and path only. A URL that cannot be read is not shown: who knows what is in it."""
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
    """`urlsplit`, with SettingsError for what cannot be read, and no piece of the URL in it."""
    try:
        parts = urlsplit(url)
        servers = parts.netloc.rpartition("@")[2]
        for server in servers.split(",") if "+" in parts.scheme else [servers]:
            _ = urlsplit(f"//{server}").port  # read now: it is what raises
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
        pool = client.connection_pool
        pool.connection_kwargs.update(decode_responses=False, protocol=2)  # whatever the URL says
        pool.connection_class(**pool.connection_kwargs)  # an option nobody knows shows here
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
    # Cast: what this package asks of a client, both have. `ClusterClient` says what differs.
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


# A deployment is a row here; a new one is an opener and its row.
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
    """The hosts and ports of a URL with several servers."""
    servers: list[tuple[str, int]] = []
    for text in parts.netloc.rpartition("@")[2].split(","):
        server = urlsplit(f"//{text.strip()}")
        if not server.hostname:
            raise _unreadable("it lacks a host", "write host:port, with commas between several")
        servers.append((server.hostname, server.port or default_port))
    if len(servers) > NODES_MAX:
        raise _unreadable(f"it names more than {NODES_MAX} servers", "name a few, they know the others")
    return servers


def _arguments(parts: SplitResult, query: dict[str, str], options: dict[str, Any]) -> dict[str, Any]:
    """User, password and query options of a URL as redis-py's arguments, over `options`. Tried out once."""
    user, at, _ = parts.netloc.rpartition("@")
    scheme = parts.scheme.partition("+")[0]
    try:
        found = _parse_url(f"{scheme}://{user}{at}localhost/?{urlencode(query)}")
        kind = found.pop("connection_class", redis.Connection)
        found.pop("host")
        arguments = {**options, **found, "decode_responses": False, "protocol": 2}
        kind(**arguments)  # an option nobody knows shows here
    except (TypeError, ValueError):
        raise _unknown_option() from None
    return {**arguments, "ssl": True} if scheme == "rediss" else arguments


def _database(text: str) -> int:
    if text and not text.isdecimal():
        raise _unreadable("its path is no database number", "end it with /0")  # redis-py would take 0
    return int(text or 0)


def _unknown_option() -> SettingsError:
    return _unreadable("an option after the ? is not one of redis-py's", "correct or remove it")


def _unreadable(why: str, mend: str) -> SettingsError:
    return SettingsError(f"PKB_REDIS_URL cannot be used: {why}", mend)
