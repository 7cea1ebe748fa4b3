"""`pkb redis-cli …`: redis-cli on the store in use, the embedded one too, without looking up its socket."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from typing import Annotated, Any

import redis
import typer
from redis.sentinel import SentinelConnectionPool

from pkbrokers_redis.cli.reader import require_store
from pkbrokers_redis.cli.redis_shell import run_shell
from pkbrokers_redis.settings import load_settings
from pkbrokers_redis.store.cluster import cluster_of
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
    kwargs: dict[str, Any] = dict(pool.connection_kwargs)
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
