"""From `PKB_REDIS_URL` to a client that answers, or to one line that says why not.

Nothing here ever shows a password: messages name the place (`describe`), and errors raised while a URL is
taken apart are not chained, because their texts quote pieces of it.
"""

from __future__ import annotations

import ssl
import time
import weakref
from collections.abc import Callable
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

import redis
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    AuthorizationError,
    BusyLoadingError,
    InvalidResponse,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.retry import Retry

from pkbrokers_redis.core.errors import PkbError, RedisUnavailable, RedisUnsuitable, SettingsError
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.embedded import attach, reader_data_dir, store_folder

CONNECT_SECONDS_MAX = 5.0
LOADING_SECONDS_MAX = 60.0  # how long a server that loads its data is waited for
READER_RETRIES = 3
HEALTH_CHECK_SECONDS = 30

Opener = Callable[[str, dict[str, Any]], redis.Redis]  # (URL, redis-py's connection options) → client


def connect(
    settings: Settings, *, for_reading: bool = False, socket_timeout_seconds: float = 30.0
) -> redis.Redis:
    """A client of the configured store, which has answered. Replies are bytes, in RESP2 shapes.

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
        # Stated, because redis-py's default is 2 or 3 by version: raw replies shall not differ with it.
        "protocol": 2,
    }
    place = describe(settings, for_reading=for_reading)
    if settings.redis_url is None:
        data_dir = reader_data_dir(settings)[0] if for_reading else settings.data_dir
        server = attach(settings, data_dir=data_dir)
        client = _open_one(server.url, options)
        weakref.finalize(client.connection_pool, server.close)
    else:
        client = _open(settings.redis_url.get_secret_value(), options)
    try:
        _probe(client, place, for_reading)
    except (RedisError, OSError, UnicodeError) as error:
        client.close()
        raise explain(error, place) from error
    except BaseException:
        client.close()
        raise
    return client


def describe(settings: Settings, *, for_reading: bool = False) -> str:
    """Where the store is, for logs and messages: `redis://cache.local:6379/0`. Never holds a secret."""
    if settings.redis_url is None:
        data_dir = reader_data_dir(settings)[0] if for_reading else settings.data_dir
        return f"the embedded server in {store_folder(data_dir)}"
    return _place(settings.redis_url.get_secret_value())


def explain(error: BaseException, place: str) -> PkbError:
    """What a redis-py error means to an operator, in one line with a mend. `place` is from `describe`."""
    text = " ".join(str(error).split())
    if isinstance(error, PkbError):
        return error
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
        if place.startswith("rediss:"):  # a server without TLS waits for the rest of what we sent
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


def _probe(client: redis.Redis, place: str, for_reading: bool) -> None:
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


def _open(url: str, options: dict[str, Any]) -> redis.Redis:
    opener = OPENERS.get(_split(url).scheme)
    if opener is None:
        raise SettingsError(
            "PKB_REDIS_URL begins with no scheme we know",
            "begin it with " + ", ".join(f"{scheme}://" for scheme in OPENERS),
        )
    return opener(url, options)


def _open_one(url: str, options: dict[str, Any]) -> redis.Redis:
    """redis://, rediss:// and unix://, with redis-py's query options (`?ssl_ca_certs=…`)."""
    parts = _split(url)
    database = parts.path.strip("/")
    if parts.scheme == "unix":
        if not parts.path:
            raise _unreadable("it names no socket", "write unix:///path/to/redis.sock?db=0")
    elif database and not database.isdecimal():
        # redis-py would take database 0 without a word.
        raise _unreadable("its path is no database number", "end it with /0")
    try:
        client = redis.Redis.from_url(url, **options)
        pool = client.connection_pool
        pool.connection_kwargs.update(decode_responses=False, protocol=2)  # whatever the URL says
        pool.connection_class(**pool.connection_kwargs)  # an option nobody knows shows here
    except (TypeError, ValueError):
        raise _unreadable("an option after the ? is not one of redis-py's", "correct or remove it") from None
    return client


# A deployment is a row here: redis+sentinel and redis+cluster need an opener each.
OPENERS: dict[str, Opener] = {"redis": _open_one, "rediss": _open_one, "unix": _open_one}


def _split(url: str) -> SplitResult:
    """`urlsplit`, with SettingsError for what cannot be read, and no piece of the URL in it."""
    mend = "write redis://:password@host:6379/0, with / # ? @ : in the password as %2F %23 %3F %40 %3A"
    try:
        parts = urlsplit(url)
        _ = parts.port  # read now: it is what raises
    except ValueError:
        raise _unreadable("its host or port cannot be read", mend) from None
    _, at, _ = parts.netloc.rpartition("@")
    if "@" in parts.path + parts.query + parts.fragment and parts.scheme != "unix":
        raise _unreadable("a special character cuts it short", mend)
    if parts.scheme == "unix" and parts.netloc and not at:
        raise _unreadable("a unix socket needs an absolute path", "write unix:///path/to/redis.sock?db=0")
    return parts


def _unreadable(why: str, mend: str) -> SettingsError:
    return SettingsError(f"PKB_REDIS_URL cannot be used: {why}", mend)


def _place(url: str) -> str:
    """Scheme, host, port and path only. A URL that cannot be read is not shown: who knows what is in it."""
    try:
        parts = _split(url)
    except SettingsError:
        return "PKB_REDIS_URL"
    if parts.scheme not in OPENERS:
        return "PKB_REDIS_URL"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{unquote(parts.path)}"
