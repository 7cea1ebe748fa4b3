"""`pkb doctor`: check everything that may be wrong with a pipeline, each finding with its fix."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import redis
import typer
from redis.exceptions import ResponseError

from pkbrokers_redis.cli.common import AsJson, dump, require_store
from pkbrokers_redis.cli.pipeline import console, line
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.errors import PkbError, RedisUnavailable
from pkbrokers_redis.runtime.cluster_state import each_server, gather
from pkbrokers_redis.runtime.health import (
    EXIT_CODES,
    FAILED_JOBS,
    SETUP,
    STATUS,
    Finding,
    as_dict,
    check_volumes,
    functions_there,
    health_of,
    jobs_well,
    judge,
    master_well,
    meta_agrees,
    moves,
    streams_small,
    widest,
)
from pkbrokers_redis.settings import Settings, load_settings, unknown_names
from pkbrokers_redis.store.connect import connect, describe
from pkbrokers_redis.store.functions import FUNCTION_NAMES
from pkbrokers_redis.store.instrument_list import instrument_list
from pkbrokers_redis.store.instruments import read_manifest
from pkbrokers_redis.store.meta import adopt_meta, check_meta

LOOK_SECONDS = 1.0  # between the two looks that show whether shards move
LIBRARY = "pkbrokers"
FUNCTIONS = set(FUNCTION_NAMES)
KEYS_AT_ONCE = 1_000
NAMES_MAX = 5


def doctor(as_json: AsJson = False) -> None:
    """Check the whole pipeline and say how to mend what is wrong. Exits as `pkb status` does.

    Takes a second or more: it looks twice whether shards move, and adds up every instrument's volumes.
    """
    settings = load_settings()
    findings: list[Finding] = [*_misspelt()]
    facts = None
    try:
        require_store(settings)
        with connect(settings, for_reading=True) as client:
            findings.append(Finding("redis", "ok", f"{describe(settings, for_reading=True)} answers"))
            findings += _meta(client, settings)
            try:
                settings = adopt_meta(client, settings)
            except PkbError as error:
                findings.append(Finding("meta", "fail", error.message, error.hint))
            earlier = gather(client, settings.keys, "")
            time.sleep(LOOK_SECONDS)
            facts = gather(client, settings.keys, describe(settings, for_reading=True), stream_bytes=True)
            rules = (*STATUS, moves(earlier), streams_small(settings.stream_max_entries), *SETUP)
            findings += _functions(client)
            findings += judge(facts, rules)
            findings += _volumes(client, settings)
            findings += _quotes(client, settings)
            findings += _around(client, settings)
    except RedisUnavailable as error:
        findings.append(Finding("redis", "fail", error.message, error.hint))
    if as_json:
        print(dump(as_dict(facts, findings)))
    else:
        for finding in findings:
            console().print(line(finding))
    raise typer.Exit(EXIT_CODES[health_of(findings)])


def _misspelt() -> Iterator[Finding]:
    """Variables that look like settings of ours and are none."""
    for name, meant in unknown_names().items():
        hint = f"did you mean {meant}?" if meant else "unset it; pkb config lists the settings"
        yield Finding("settings", "warn", f"{name} is no setting", hint)


def _around(client: redis.Redis, settings: Settings) -> Iterator[Finding]:
    """The instrument master and the jobs."""
    from pkbrokers_redis.store.queue import connect_queue, has_queue  # RQ takes its time

    yield master_well(read_manifest(client, settings.keys), market_clock(settings)() / 1000)
    if not has_queue(settings):
        return
    try:
        jobs = client if settings.rq_redis_url is None else connect_queue(settings)
        failed: Any = jobs.zcard(FAILED_JOBS)
        yield jobs_well(int(failed))
    except ResponseError:
        return  # our user may not ask
    except (PkbError, redis.ConnectionError) as error:
        hint = getattr(error, "hint", "") or "start it, or correct PKB_RQ_REDIS_URL"
        yield Finding("jobs", "warn", str(getattr(error, "message", "their Redis does not answer")), hint)


def _meta(client: redis.Redis, settings: Settings) -> Iterator[Finding]:
    try:
        exists, problem = check_meta(client, settings), None
    except PkbError as error:
        exists, problem = True, error
    return meta_agrees(problem, exists)


def _functions(client: redis.Redis) -> Iterator[Finding]:
    missing: set[str] = set()
    try:
        for name, libraries in each_server(client, "function_list", LIBRARY).items():
            loaded = repr(libraries)  # nested lists, whose order differs with the version
            missing |= {f"{each} {name}".strip() for each in FUNCTIONS if f"{each!r}" not in loaded}
    except ResponseError:
        return iter(())  # our user may not ask
    return functions_there(sorted(missing))


def _volumes(client: redis.Redis, settings: Settings) -> Iterator[Finding]:
    """The sum of an instrument's candle volumes is what was traded while we watched."""
    interval = widest(settings.intervals)
    found = check_volumes(client, settings.keys, interval.name, keep=interval.keep)
    right = found.checked - len(found.wrong)
    what = f"{interval.name} candles add up for {right:,} of {found.checked:,} instruments"
    if found.cut:
        what += f" ({found.cut:,} lists do not reach back to the day's begin)"
    if found.odd:
        yield Finding(
            "volumes", "warn", f"{found.odd:,} keys hold what is not ours", "see the aggregators' logs"
        )
    if found.wrong:
        some = ", ".join(map(str, sorted(found.wrong)[:NAMES_MAX]))
        hint = f"look at {some}: backfill them; if they were never touched by hand, report it"
        yield Finding("volumes", "fail", what, hint)
    else:
        yield Finding("volumes", "ok", what)


def _quotes(client: redis.Redis, settings: Settings) -> Iterator[Finding]:
    """Every instrument of PKB_INSTRUMENTS has been seen at least once."""
    if not settings.instruments:
        yield Finding("quotes", "ok", "not checked: PKB_INSTRUMENTS is not set here")
        return
    try:
        instruments = instrument_list(client, settings)
    except PkbError as error:
        yield Finding("quotes", "warn", error.message, error.hint)
        return
    without: list[str] = []
    for first in range(0, len(instruments), KEYS_AT_ONCE):
        chunk = instruments[first : first + KEYS_AT_ONCE]
        pipeline = client.pipeline(transaction=False)
        for token, _ in chunk:
            pipeline.hlen(settings.keys.quote(token))
        replies = pipeline.execute(raise_on_error=False)
        without += [name for (_, name), there in zip(chunk, replies, strict=True) if not there]
    if without:
        some = ", ".join(without[:NAMES_MAX])
        yield Finding(
            "quotes", "warn", f"{len(without):,} of {len(instruments):,} instruments have no quote: {some}",
            "wait for the market to open; else the token is wrong or the instrument has expired",
        )  # fmt: skip
    else:
        yield Finding("quotes", "ok", f"all {len(instruments):,} instruments have one")
