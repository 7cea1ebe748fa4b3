"""`pkb redis-cli …`: redis-cli on the store in use, the embedded one too, without looking up its socket.

The shell behind `pkb redis-cli` where no redis-cli is installed: one reply per command, printed like its.

On a terminal replies look like `1) "INFY"` and `(integer) 3`; in a pipe they are the bare values.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from typing import Annotated, Any

import redis
import typer
from redis.sentinel import SentinelConnectionPool

from pkbrokers_redis.cli.common import require_store
from pkbrokers_redis.settings import load_settings
from pkbrokers_redis.store.cluster import cluster_of, connection_options, master_pool
from pkbrokers_redis.store.connect import connect

PROGRAMS = ("redis-cli", "valkey-cli")


def redis_cli(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARGS", help="as for redis-cli: a command, or nothing")
    ] = None,
) -> None:
    """Run redis-cli on the store in use. Without it installed, a small shell of our own does."""
    words = arguments or []
    settings = load_settings()
    require_store(settings)
    with connect(settings, for_reading=True) as client:
        program = next(filter(None, map(shutil.which, PROGRAMS)), None)
        if program is None:
            raise typer.Exit(run_shell(client, words))
        options, secrets = cli_arguments(client)
        # A child, not exec: the embedded server lives as long as this process holds it. Ctrl-C is the
        # child's business; a handler (not SIG_IGN) is what exec resets to the default there.
        before = signal.signal(signal.SIGINT, lambda *_: None)
        try:
            code = subprocess.run(
                [program, *options, *words], env={**os.environ, **secrets}, check=False
            ).returncode
        finally:
            signal.signal(signal.SIGINT, before)
    raise typer.Exit(code if code >= 0 else 128 - code)


def server_pool(client: redis.Redis) -> tuple[Any, list[str]]:
    """The connection pool of a client's server, and the options redis-cli needs for its kind."""
    cluster: Any = cluster_of(client)
    if cluster is None:
        return client.connection_pool, []
    return cluster.get_redis_connection(cluster.get_primaries()[0]).connection_pool, ["-c"]


def cli_arguments(client: redis.Redis) -> tuple[list[str], dict[str, str]]:
    """redis-cli's options for a client's server, and what goes into its environment.

    With Sentinel that is the master of the moment; on a cluster any node, and `-c` to follow where it points.
    The password is only in the environment: arguments can be read in `ps` by everybody.
    """
    pool, options = server_pool(client)
    kwargs = connection_options(pool)
    if issubclass(type(pool), SentinelConnectionPool):
        kwargs["host"], kwargs["port"] = pool.get_master_address()
    if kwargs.get("path"):
        options += ["-s", str(kwargs["path"])]
    else:
        options += ["-h", str(kwargs.get("host", "localhost")), "-p", str(kwargs.get("port", 6379))]
    if kwargs.get("db"):
        options += ["-n", str(kwargs["db"])]
    if kwargs.get("username"):
        options += ["--user", str(kwargs["username"])]
    if issubclass(pool.connection_class, redis.SSLConnection):
        options.append("--tls")
        files = {"ssl_ca_certs": "--cacert", "ssl_certfile": "--cert", "ssl_keyfile": "--key"}
        for name, option in files.items():
            if kwargs.get(name):
                options += [option, str(kwargs[name])]
        if str(kwargs.get("ssl_cert_reqs", "required")).lower() == "none":
            options.append("--insecure")
    password = kwargs.get("password")
    return options, {"REDISCLI_AUTH": str(password)} if password else {}


STATUSES = {b"OK", b"PONG", b"QUEUED"}
STREAMING = {"SUBSCRIBE", "PSUBSCRIBE", "SSUBSCRIBE", "MONITOR", "SYNC", "PSYNC"}


def run_shell(client: redis.Redis, words: list[str]) -> int:
    """One command and its exit code; without words, commands from stdin until its end or `quit`."""
    pool = _pool_of(client, words)
    connection = pool.get_connection()
    try:
        if words:
            return _run(connection, words)
        code = 0
        for line in _lines():
            try:
                words = shlex.split(line)
            except ValueError:
                print("Invalid argument(s)")
                continue
            if words and words[0].lower() in ("quit", "exit"):
                return 0
            if words:
                code = _run(connection, words)
        return code
    finally:
        pool.release(connection)


def _pool_of(client: redis.Redis, words: list[str]) -> Any:
    """Where a command goes; on a cluster to the master of its key, a session to one master for good."""
    cluster = cluster_of(client)
    if cluster is None:
        return client.connection_pool
    return master_pool(cluster, words[1] if len(words) > 1 else "")


def _lines() -> Any:
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  what makes input() remember and edit lines
    while True:
        try:
            yield input("redis> ")
        except EOFError:
            print()
            return


def _run(connection: Any, words: list[str]) -> int:
    if words[0].upper() in STREAMING:
        print(f"(error) {words[0].upper()} streams: install redis-cli for it")
        return 1
    try:
        connection.send_command(*words)
        reply = connection.read_response()
    except redis.ResponseError as error:
        print(f"(error) {error}" if sys.stdout.isatty() else str(error))
        return 1
    print(pretty(reply) if sys.stdout.isatty() else raw(reply))
    return 0


def pretty(reply: Any, indent: str = "") -> str:
    """A reply as redis-cli shows it to people."""
    if reply is None:
        return "(nil)"
    if isinstance(reply, int):
        return f"(integer) {reply}"
    if isinstance(reply, Exception):
        return f"(error) {reply}"
    if isinstance(reply, list):
        if not reply:
            return "(empty array)"
        width = len(str(len(reply)))
        inner = indent + " " * (width + 2)
        shown = [f"{n:>{width}}) {pretty(item, inner)}" for n, item in enumerate(reply, 1)]
        return f"\n{indent}".join(shown)
    return reply.decode() if reply in STATUSES else _quoted(bytes(reply))


def raw(reply: Any) -> str:
    """A reply for pipes: bare values, one per line."""
    if reply is None:
        return ""
    if isinstance(reply, list):
        return "\n".join(map(raw, reply))
    return reply.decode(errors="surrogateescape") if isinstance(reply, bytes) else str(reply)


def _quoted(value: bytes) -> str:
    escapes = {34: '\\"', 92: "\\\\", 10: "\\n", 13: "\\r", 9: "\\t"}
    return '"' + "".join(escapes.get(c) or (chr(c) if 32 <= c < 127 else f"\\x{c:02x}") for c in value) + '"'
