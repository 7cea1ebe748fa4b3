"""`pkb redis-cli …`: redis-cli on the store in use, the embedded one too, without looking up its socket.

Where no redis-cli is installed a small shell runs each command and prints the bare values, one a line.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import redis
import typer
from redis.sentinel import SentinelConnectionPool

from pkbrokers_redis.cli.common import open_client
from pkbrokers_redis.store.cluster import cluster_of, connection_options, master_pool

PROGRAMS = ("redis-cli", "valkey-cli")
STREAMING = {"SUBSCRIBE", "PSUBSCRIBE", "SSUBSCRIBE", "MONITOR", "SYNC", "PSYNC"}


def redis_cli(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARGS", help="as for redis-cli: a command, or nothing")
    ] = None,
) -> None:
    """Run redis-cli on the store in use. Without it installed, a small shell of our own does."""
    words = arguments or []
    with open_client() as (client, _):
        program = next(filter(None, map(shutil.which, PROGRAMS)), None)
        if program is None:
            raise typer.Exit(run_shell(client, words))
        options, secrets = cli_arguments(client)
        # A child, not exec: the embedded server lives as long as this process holds it. Ctrl-C is the
        # child's business; a handler (not SIG_IGN) is what exec resets to the default there.
        before = signal.signal(signal.SIGINT, lambda *_: None)
        try:
            environment = {**os.environ, **secrets}
            code = subprocess.run([program, *options, *words], env=environment, check=False).returncode
        finally:
            signal.signal(signal.SIGINT, before)
    raise typer.Exit(code if code >= 0 else 128 - code)


def cli_arguments(client: redis.Redis) -> tuple[list[str], dict[str, str]]:
    """Return redis-cli's options for a client's server, and what goes into its environment.

    With Sentinel that is the master of the moment; on a cluster any node, and `-c` to follow where it points.
    The password is only in the environment: arguments can be read in `ps` by everybody.
    """
    pool: Any = _pool_of(client, "")
    kwargs = connection_options(pool)
    options = [] if cluster_of(client) is None else ["-c"]
    if issubclass(type(pool), SentinelConnectionPool):
        kwargs["host"], kwargs["port"] = pool.get_master_address()
    if kwargs.get("path"):
        options += ["-s", str(kwargs["path"])]
    else:
        options += ["-h", str(kwargs.get("host", "localhost")), "-p", str(kwargs.get("port", 6379))]
    named = {"db": "-n", "username": "--user"}
    if issubclass(pool.connection_class, redis.SSLConnection):
        named |= {"ssl_ca_certs": "--cacert", "ssl_certfile": "--cert", "ssl_keyfile": "--key"}
    for name, option in named.items():
        if kwargs.get(name):
            options += [option, str(kwargs[name])]
    if issubclass(pool.connection_class, redis.SSLConnection):
        options.append("--tls")
        if str(kwargs.get("ssl_cert_reqs", "required")).lower() == "none":
            options.append("--insecure")
    password = kwargs.get("password")
    return options, {"REDISCLI_AUTH": str(password)} if password else {}


def _pool_of(client: redis.Redis, key: str) -> Any:
    """Return the connections to a client's server; on a cluster those to the master of the key."""
    cluster = cluster_of(client)
    return client.connection_pool if cluster is None else master_pool(cluster, key)


def run_shell(client: redis.Redis, words: list[str]) -> int:
    """Run one command, or without words those of stdin until its end or `quit`; return the exit code."""
    pool = _pool_of(client, words[1] if len(words) > 1 else "")
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


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  what makes input() remember and edit lines
    with contextlib.suppress(EOFError):
        while True:
            yield input("redis> ")


def _run(connection: Any, words: list[str]) -> int:
    if words[0].upper() in STREAMING:
        print(f"(error) {words[0].upper()} streams: install redis-cli for it")
        return 1
    try:
        connection.send_command(*words)
        print(raw(connection.read_response()))
    except redis.ResponseError as error:
        print(error)
        return 1
    return 0


def raw(reply: Any) -> str:
    """Return the values of a reply, one a line."""
    if reply is None:
        return ""
    if isinstance(reply, list):
        return "\n".join(map(raw, reply))
    return reply.decode(errors="surrogateescape") if isinstance(reply, bytes) else str(reply)
