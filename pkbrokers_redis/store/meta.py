"""`P:meta`: what a store was made with, written once by its first worker.

    schema        "2"
    shards        "8"                    where an instrument's keys are
    intervals     "1m,2m,…,day"          which lists and hash fields exist
    max_candles   "390,195,…,365"        completed rows kept, in the order of `intervals`
    created_at    ISO 8601

Workers must agree with it, else two of them would write the same instrument to different shards. Readers
adopt it: whoever looks needs no settings but the URL.
"""

from __future__ import annotations

from typing import Any, cast

import redis
from redis.exceptions import ResponseError

from pkbrokers_redis.candles.model import parse_intervals
from pkbrokers_redis.errors import MetaMismatch, PkbError, SettingsError, WrongKeyType
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.settings import Settings

SCHEMA = "2"

_MENDS = {
    "schema": "run the version of pkbrokers-redis that made it, or choose another PKB_PREFIX",
    "shards": "set PKB_SHARDS to the store's, or choose another PKB_PREFIX for a new store",
    "intervals": "set PKB_INTERVALS to the store's, or choose another PKB_PREFIX for a new store",
    "max_candles": "write PKB_INTERVALS with the store's numbers (5m:78), or choose another PKB_PREFIX",
}


def ensure_meta(client: redis.Redis, settings: Settings, now_iso: str) -> None:
    """Write the meta of these settings, or check that the store's is the same.

    Raises MetaMismatch, which names the first field that differs, and WrongKeyType.
    """
    if not check_meta(client, settings):
        _compare(_write(client, settings.keys.meta(), _wanted(settings), now_iso), settings)


def check_meta(client: redis.Redis, settings: Settings) -> bool:
    """Whether there is a store. Writes nothing; raises as `ensure_meta` where it is not of these settings."""
    stored = read_meta(client, settings.prefix)
    if stored is not None:
        _compare(stored, settings)
    return stored is not None


def _compare(stored: dict[str, str], settings: Settings) -> None:
    for field, value in _wanted(settings).items():
        if stored.get(field) != value:
            raise MetaMismatch(field, stored.get(field, ""), value, _MENDS[field])


def _write(client: redis.Redis, key: str, wanted: dict[str, str], now_iso: str) -> dict[str, str]:
    """All fields in one step, and what stands there after it: of two first workers one writes all of it."""
    with client.pipeline(transaction=True) as transaction:
        for field, value in {**wanted, "created_at": now_iso}.items():
            transaction.hsetnx(key, field, value)
        transaction.hgetall(key)
        replies = transaction.execute(raise_on_error=False)
    _raise_errors(client, key, replies)
    return _decode(replies[-1])


def read_meta(client: redis.Redis, prefix: str) -> dict[str, str] | None:
    """The store's meta, or None where no worker has ever written. Raises WrongKeyType."""
    key = Keys(prefix).meta()
    try:
        found = client.hgetall(key)
    except ResponseError as error:
        _raise_errors(client, key, [error])
    return _decode(found) or None


def adopt_meta(client: redis.Redis, settings: Settings) -> Settings:
    """These settings with the store's shards and intervals; unchanged where there is no store yet.

    Raises MetaMismatch for a store of another schema, WrongKeyType, and SettingsError for a meta hash that
    somebody edited into nonsense.
    """
    stored = read_meta(client, settings.prefix)
    if stored is None:
        return settings
    if stored.get("schema") != SCHEMA:
        raise MetaMismatch("schema", stored.get("schema", ""), SCHEMA, _MENDS["schema"])
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
            f"look at it with HGETALL {key}; workers write it anew after DEL",
        ) from error
    return _with(settings, shards, text)


def _with(settings: Settings, shards: int, intervals_text: str) -> Settings:
    adopted = settings.model_copy(update={"shards": shards, "intervals_text": intervals_text})
    for cached in ("keys", "intervals"):  # model_copy copies what cached_property left in __dict__
        adopted.__dict__.pop(cached, None)
    return adopted


def _wanted(settings: Settings) -> dict[str, str]:
    return {
        "schema": SCHEMA,
        "shards": str(settings.shards),
        "intervals": ",".join(interval.name for interval in settings.intervals),
        "max_candles": ",".join(str(interval.keep) for interval in settings.intervals),
    }


def _decode(found: Any) -> dict[str, str]:
    pairs = cast("dict[bytes, bytes]", found)
    return {name.decode(errors="replace"): value.decode(errors="replace") for name, value in pairs.items()}


def _raise_errors(client: redis.Redis, key: str, replies: list[Any]) -> None:
    for reply in replies:
        if isinstance(reply, ResponseError) and "WRONGTYPE" in str(reply):
            found = cast("bytes", client.type(key)).decode()
            raise WrongKeyType(key, found, "hash") from reply
        if isinstance(reply, Exception):
            raise reply
