"""`pkb status`: the pipeline's health in one look, for people, scripts and healthchecks."""

from __future__ import annotations

import socket
import time
from typing import Annotated, NoReturn

import redis
import typer

from pkbrokers_redis.cli.health_view import console, line, view
from pkbrokers_redis.cli.output import AsJson, dump
from pkbrokers_redis.cli.reader import require_store
from pkbrokers_redis.errors import RedisUnavailable
from pkbrokers_redis.runtime.cluster_state import read_workers
from pkbrokers_redis.runtime.health import EXIT_CODES, Finding, as_dict, health_of, here, look
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.meta import adopt_meta


def status(
    as_json: AsJson = False,
    only_here: Annotated[
        bool,
        typer.Option("--here", help="only whether this host's workers live: for a container's healthcheck"),
    ] = False,
) -> None:
    """Show the pipeline's health once: workers, shards, lag, Redis. Exits with 0 healthy, 1 degraded, 2 down.

    Trouble is looked at twice, a second apart: what is there for a moment is a handover.
    """
    settings = load_settings()
    try:
        require_store(settings)
        client = connect(settings, for_reading=True)
    except RedisUnavailable as error:
        if not as_json:
            raise
        print(dump(as_dict(None, [Finding("redis", "fail", error.message, error.hint)])))
        raise typer.Exit(EXIT_CODES["down"]) from None
    with client:
        if only_here:
            _here(client, settings, as_json)
        settings = adopt_meta(client, settings)
        facts, findings = look(client, settings)
    if as_json:
        print(dump(as_dict(facts, findings)))
    else:
        console().print(view(facts, findings))
    raise typer.Exit(EXIT_CODES[health_of(findings)])


def _here(client: redis.Redis, settings: Settings, as_json: bool) -> NoReturn:
    workers = read_workers(client, settings.keys, time.time() * 1000)
    findings = here(workers, socket.gethostname())  # as their heartbeats have it
    if as_json:
        print(dump(as_dict(None, findings)))
    else:
        for finding in findings:
            console().print(line(finding))
    raise typer.Exit(EXIT_CODES[health_of(findings)])
