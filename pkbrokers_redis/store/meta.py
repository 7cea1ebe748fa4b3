"""`P:meta`: the settings that a store was created with, written once by its first worker.

    schema        "2"                    version of the keys' layout
    shards        "8"                    where an instrument's keys are
    intervals     "1m,2m,…,day"          which lists and hash fields exist
    max_candles   "390,195,…,365"        completed rows kept, in the order of `intervals`
    created_at    ISO 8601

Workers must agree with it: otherwise two of them would write the same instrument to different shards. Readers
adopt it, so that a reader needs no setting but the URL.

Schema 1 is converted by the first worker of this release, once no worker of the previous one is alive:

    P:heard          → P:feed_progress          P:{bot}:armed                → P:{bot}:alert_state
    P:wanted-jobs    → P:job_outbox             `<token>:marks` of P:{S}:state → `<token>:candles`

Each step can be repeated and never replaces a newer value, so that a conversion may be killed at any point,
and two workers may convert at once. `schema` is written last.
"""

from __future__ import annotations

from typing import Any, cast

import redis
from redis.exceptions import NoPermissionError, ResponseError

from pkbrokers_redis import logs
from pkbrokers_redis.candles.model import parse_intervals
from pkbrokers_redis.errors import MetaMismatch, PkbError, SettingsError, WrongKeyType
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.errors import expect_type, is_wrong_type, type_of
from pkbrokers_redis.store.functions import fcall, load_functions

SCHEMA, PREVIOUS_SCHEMA = "2", "1"
ALIVE_MS_MAX = 10_000  # a worker without a heartbeat for longer is dead
ROWS_AT_ONCE = 1_000

_HINTS = {
    "schema": "run the version of pkbrokers-redis that made it, or choose another PKB_PREFIX",
    "shards": "set PKB_SHARDS to the store's, or choose another PKB_PREFIX for a new store",
    "intervals": "set PKB_INTERVALS to the store's, or choose another PKB_PREFIX for a new store",
    "max_candles": "write PKB_INTERVALS with the store's numbers (5m:78), or choose another PKB_PREFIX",
}

log = logs.get("store")


def ensure_meta(client: redis.Redis, settings: Settings, now_iso: str) -> None:
    """Write the meta of these settings, or check that the store's is the same. Convert schema 1."""
    stored = read_meta(client, settings.prefix)
    if stored is not None and stored.get("schema") == PREVIOUS_SCHEMA:
        _compare({**stored, "schema": SCHEMA}, settings)
        _convert(client, settings.keys)
        stored = read_meta(client, settings.prefix)
    if stored is None:
        stored = _write(client, settings.keys.meta(), _fields_of(settings), now_iso)
    _compare(stored, settings)


def keep_meta(client: redis.Redis, settings: Settings, now_iso: str) -> None:
    """Write `P:meta` again where a running worker finds it gone (FLUSHALL, a restart without AOF).

    So a worker with another PKB_SHARDS cannot begin a second store beside this one. Raise MetaMismatch when
    such a one was faster.
    """
    stored = read_meta(client, settings.prefix)
    if stored is None:
        stored = _write(client, settings.keys.meta(), _fields_of(settings), now_iso)
        log.warning("meta_written_again", key=settings.keys.meta(), reason="Redis has lost it")
    _compare(stored, settings)


def check_meta(client: redis.Redis, settings: Settings) -> bool:
    """Return whether there is a store. Write nothing; raise as `ensure_meta` when its settings differ."""
    stored = read_meta(client, settings.prefix)
    if stored is not None:
        _compare(stored, settings)
    return stored is not None


def _compare(stored: dict[str, str], settings: Settings) -> None:
    for field, value in _fields_of(settings).items():
        if stored.get(field) != value:
            raise MetaMismatch(field, stored.get(field, ""), value, _HINTS[field])


def _write(client: redis.Redis, key: str, fields: dict[str, str], now_iso: str) -> dict[str, str]:
    """Write all fields in one step, and return the result: one of two first workers writes all of it."""
    with client.pipeline(transaction=True) as transaction:
        for field, value in {**fields, "created_at": now_iso}.items():
            transaction.hsetnx(key, field, value)
        transaction.hgetall(key)
        replies = transaction.execute(raise_on_error=False)
    for reply in replies:
        if is_wrong_type(reply):
            raise WrongKeyType(key, type_of(client, key), "hash") from reply
        if isinstance(reply, Exception):
            raise reply
    return _decode(replies[-1])


def read_meta(client: redis.Redis, prefix: str) -> dict[str, str] | None:
    """Return the store's meta, or None when no worker has ever written. Raise WrongKeyType."""
    key = Keys(prefix).meta()
    with expect_type(client, key, "hash"):
        found = client.hgetall(key)
    return _decode(found) or None


def adopt_meta(client: redis.Redis, settings: Settings) -> Settings:
    """Return these settings with the store's shards and intervals; unchanged while there is no store."""
    stored = read_meta(client, settings.prefix)
    if stored is None:
        return settings
    if stored.get("schema") == PREVIOUS_SCHEMA:
        hint = "start a worker of this release (`pkb aggregate`): it converts the store"
        raise MetaMismatch("schema", PREVIOUS_SCHEMA, SCHEMA, hint)
    if stored.get("schema") != SCHEMA:
        raise MetaMismatch("schema", stored.get("schema", ""), SCHEMA, _HINTS["schema"])
    key = settings.keys.meta()
    try:
        shards = int(stored["shards"])
        names, keeps = stored["intervals"].split(","), stored["max_candles"].split(",")
        text = ",".join(f"{name}:{keep}" for name, keep in zip(names, keeps, strict=True))
        parse_intervals(text)
        if shards < 1:
            raise ValueError(shards)
    except (KeyError, ValueError, PkbError) as error:
        raise SettingsError(
            f"{key} cannot be read ({error})",
            f"look at it with HGETALL {key}; after DEL a worker writes it again",
        ) from error
    adopted = settings.model_copy(update={"shards": shards, "intervals_text": text})
    for cached in ("keys", "intervals"):  # model_copy copies what cached_property left in __dict__
        adopted.__dict__.pop(cached, None)
    return adopted


def _fields_of(settings: Settings) -> dict[str, str]:
    return {
        "schema": SCHEMA,
        "shards": str(settings.shards),
        "intervals": ",".join(interval.name for interval in settings.intervals),
        "max_candles": ",".join(str(interval.keep) for interval in settings.intervals),
    }


def _decode(found: Any) -> dict[str, str]:
    pairs = cast("dict[bytes, bytes]", found)
    return {name.decode(errors="replace"): value.decode(errors="replace") for name, value in pairs.items()}


def _convert(client: redis.Redis, keys: Keys) -> None:
    """Rename the keys and fields of schema 1, unless a worker of the previous release is alive."""
    seconds, _ = client.time()
    living: Any = client.zcount(keys.workers(), seconds * 1000 - ALIVE_MS_MAX, "+inf")
    if living:
        hint = f"stop all its workers ({living} alive), then start this release: it converts the store"
        raise MetaMismatch("schema", PREVIOUS_SCHEMA, SCHEMA, hint)
    prefix = keys.prefix
    renamed = {
        f"{prefix}:heard": keys.feed_progress(),
        f"{prefix}:wanted-jobs": keys.job_outbox(),
        f"{prefix}:{{bot}}:armed": keys.bot_alert_state(),
    }
    try:
        load_functions(client)
        for old, new in renamed.items():
            _move_hash(client, old, new)
        for shard in range(keys.shards):
            fcall(client, "migrate", [keys.state(shard)])
    except NoPermissionError as error:
        hint = "start `pkb aggregate` once with a Redis user that has all rights on the prefix"
        raise MetaMismatch("schema", PREVIOUS_SCHEMA, SCHEMA, hint) from error
    client.hset(keys.meta(), "schema", SCHEMA)
    log.info("store_converted", schema=SCHEMA)


def _move_hash(client: redis.Redis, old: str, new: str) -> None:
    """Move the fields of a hash; RENAME would need both keys in one cluster slot."""
    try:
        fields = list(cast("dict[bytes, bytes]", client.hgetall(old)).items())
        for first in range(0, len(fields), ROWS_AT_ONCE):
            pipeline = client.pipeline(transaction=False)
            for name, value in fields[first : first + ROWS_AT_ONCE]:
                pipeline.hsetnx(new, cast("str", name), cast("str", value))
            pipeline.execute()
        client.delete(old)
    except ResponseError as error:
        if not is_wrong_type(error):
            raise  # a key of another type is not this store's: it stays as it is
