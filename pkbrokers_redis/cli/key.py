"""`pkb key SYMBOL`: where an instrument stands in Redis, and how to look at it with redis-cli."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer

from pkbrokers_redis.cli.output import AsJson, dump
from pkbrokers_redis.cli.reader import open_store
from pkbrokers_redis.cli.redis_cli import cli_arguments


def key(
    symbol: Annotated[str, typer.Argument(metavar="SYMBOL", help="NSE:INFY, INFY or a token")],
    as_json: AsJson = False,
) -> None:
    """Print the Redis keys of an instrument, and redis-cli lines that read them."""
    with open_store() as store:
        token, name = store.resolve(symbol)
        keys, interval = store.keys, store.intervals[0]
        shard = keys.shard_of(token)
        options, secrets = cli_arguments(store.client)
        # The lines show no password. Where one is needed, `pkb redis-cli` knows it.
        program = ["pkb", "redis-cli"] if secrets else ["redis-cli", *options]
        names = {
            "instrument": keys.instrument(token),
            "quote": keys.quote(token),
            "current": keys.current(token),
            **{f"candles {each}": keys.candles(token, each) for each in store.intervals},
            "ticks": keys.ticks(shard),
            "closed": keys.closed(shard),
        }
        examples = [
            ("the latest quote", ["HGETALL", keys.quote(token)]),
            (f"the {interval} candle being formed", ["HGET", keys.current(token), interval]),
            (
                f"the last 5 completed {interval} candles",
                ["LRANGE", keys.candles(token, interval), "-5", "-1"],
            ),
            ("the newest frame of its shard", ["XREVRANGE", keys.ticks(shard), "+", "-", "COUNT", "1"]),
            ("candles as they close", ["XREAD", "BLOCK", "0", "STREAMS", keys.closed(shard), "$"]),
        ]
    lines = [(what, shlex.join([*program, *words])) for what, words in examples]
    if as_json:
        document: dict[str, Any] = {"token": token, "symbol": name, "shard": shard, "keys": names}
        print(dump({**document, "examples": [line for _, line in lines]}))
        return
    print(f"{name}: token {token}, shard {{{shard}}} of {keys.shards}\n")
    for label, each in names.items():
        print(f"  {label:<14}{each}")
    print()
    for what, line in lines:
        print(f"  # {what}\n  {line}")
