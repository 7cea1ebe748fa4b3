"""`pkb doctor`: check everything that may be wrong with a pipeline, each finding with its fix."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import redis
import typer
from redis.exceptions import ResponseError

from pkbrokers_redis.cli.common import AsJson, dump, require_store
from pkbrokers_redis.cli.pipeline import print_findings
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.errors import PkbError, RedisUnavailable
from pkbrokers_redis.runtime import health
from pkbrokers_redis.runtime.cluster_state import call_each_master, read_cluster_state
from pkbrokers_redis.runtime.health import EXIT_CODES, Finding, health_document, health_of
from pkbrokers_redis.settings import Settings, load_settings, unknown_names
from pkbrokers_redis.store.connect import connect, describe
from pkbrokers_redis.store.functions import FUNCTION_NAMES
from pkbrokers_redis.store.instrument_list import instrument_list
from pkbrokers_redis.store.instruments import read_manifest
from pkbrokers_redis.store.meta import adopt_meta, check_meta

LOOK_SECONDS = 1.0  # between the two reads that show whether shards move
LIBRARY = "pkbrokers"
FUNCTIONS = set(FUNCTION_NAMES)
KEYS_AT_ONCE = 1_000
NAMES_MAX = 5


def doctor(as_json: AsJson = False) -> None:
    """Check the whole pipeline and print how to fix what is wrong. Exits as `pkb status` does.

    It takes a second or more: it reads twice whether shards move, and adds up every instrument's volumes.
    """
    settings = load_settings()
    findings: list[Finding] = [*_settings_findings()]
    cluster = None
    try:
        require_store(settings)
        place = describe(settings, for_reading=True)
        with connect(settings, for_reading=True) as client:
            findings.append(Finding("redis", "ok", f"{place} answers"))
            findings.append(_meta_finding(client, settings))
            try:
                settings = adopt_meta(client, settings)
            except PkbError as error:
                findings.append(Finding("meta", "fail", error.message, error.hint))
            earlier = read_cluster_state(client, settings.keys, place)
            time.sleep(LOOK_SECONDS)
            cluster = read_cluster_state(client, settings.keys, place, stream_bytes=True)
            checks = (
                *health.STATUS_CHECKS,
                health.progress_since(earlier),
                health.streams_below(settings.stream_max_entries),
                *health.SETUP_CHECKS,
            )
            findings += _function_findings(client)
            findings += health.run_checks(cluster, checks)
            findings += _volume_findings(client, settings)
            findings.append(_quote_finding(client, settings))
            manifest = read_manifest(client, settings.keys)
            findings.append(health.check_master(manifest, market_clock(settings)() / 1000))
            findings += _job_findings(client, settings)
    except RedisUnavailable as error:
        findings.append(Finding("redis", "fail", error.message, error.hint))
    if as_json:
        print(dump(health_document(cluster, findings)))
    else:
        print_findings(findings)
    raise typer.Exit(EXIT_CODES[health_of(findings)])


def _settings_findings() -> Iterator[Finding]:
    """Variables that look like settings and are none."""
    for name, meant in unknown_names().items():
        hint = f"did you mean {meant}?" if meant else "unset it; pkb config lists the settings"
        yield Finding("settings", "warn", f"{name} is not a setting", hint)


def _meta_finding(client: redis.Redis, settings: Settings) -> Finding:
    try:
        return health.check_settings(None, check_meta(client, settings))
    except PkbError as error:
        return health.check_settings(error, True)


def _function_findings(client: redis.Redis) -> Iterator[Finding]:
    missing: set[str] = set()
    try:
        for name, libraries in call_each_master(client, "function_list", LIBRARY).items():
            loaded = repr(libraries)  # nested lists, whose order differs with the version
            missing |= {f"{each} {name}".strip() for each in FUNCTIONS if f"{each!r}" not in loaded}
    except ResponseError:
        return  # the user has no permission
    yield health.check_functions(sorted(missing))


def _job_findings(client: redis.Redis, settings: Settings) -> Iterator[Finding]:
    from pkbrokers_redis.store.queue import connect_queue, has_queue  # RQ takes long to import

    if not has_queue(settings):
        return
    try:
        jobs = client if settings.rq_redis_url is None else connect_queue(settings)
        failed: Any = jobs.zcard(health.FAILED_JOBS)
        yield health.check_jobs(int(failed))
    except ResponseError:
        return  # the user has no permission
    except (PkbError, redis.ConnectionError) as error:
        hint = getattr(error, "hint", "") or "start it, or correct PKB_RQ_REDIS_URL"
        yield Finding("jobs", "warn", str(getattr(error, "message", "their Redis does not answer")), hint)


def _volume_findings(client: redis.Redis, settings: Settings) -> Iterator[Finding]:
    """An instrument's candle volumes add up to what was traded while it was streamed."""
    interval = health.longest_interval(settings.intervals)
    result = health.check_volumes(client, settings.keys, interval.name, keep=interval.keep)
    right = result.checked - len(result.wrong)
    message = f"{interval.name} candles add up for {right:,} of {result.checked:,} instruments"
    if result.truncated:
        message += f" ({result.truncated:,} lists do not reach back to the start of the day)"
    if result.malformed:
        hint = "see the aggregators' logs"
        yield Finding("volumes", "warn", f"{result.malformed:,} keys were changed by another writer", hint)
    if result.wrong:
        names = ", ".join(map(str, sorted(result.wrong)[:NAMES_MAX]))
        hint = f"look at {names}: backfill them; if nobody edited them by hand, report it"
        yield Finding("volumes", "fail", message, hint)
    else:
        yield Finding("volumes", "ok", message)


def _quote_finding(client: redis.Redis, settings: Settings) -> Finding:
    """Every instrument of PKB_INSTRUMENTS has a quote."""
    if not settings.instruments:
        return Finding("quotes", "ok", "not checked: PKB_INSTRUMENTS is not set here")
    try:
        instruments = instrument_list(client, settings)
    except PkbError as error:
        return Finding("quotes", "warn", error.message, error.hint)
    without: list[str] = []
    for first in range(0, len(instruments), KEYS_AT_ONCE):
        chunk = instruments[first : first + KEYS_AT_ONCE]
        pipeline = client.pipeline(transaction=False)
        for token, _ in chunk:
            pipeline.hlen(settings.keys.quote(token))
        sizes = pipeline.execute(raise_on_error=False)
        without += [name for (_, name), size in zip(chunk, sizes, strict=True) if not size]
    if not without:
        return Finding("quotes", "ok", f"all {len(instruments):,} instruments have one")
    names = ", ".join(without[:NAMES_MAX])
    return Finding(
        "quotes", "warn", f"{len(without):,} of {len(instruments):,} instruments have no quote: {names}",
        "wait for the market to open; otherwise the token is wrong or the instrument has expired",
    )  # fmt: skip
