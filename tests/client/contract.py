"""Data as the contract's key table has it, written by hand: what every writer leaves in Redis."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import redis

from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.symbols import save_instruments

INFY, RELIANCE, NIFTY, SENSEX = 408065, 738561, 256265, 265
OPEN_S = 1_767_584_700  # 2026-01-05 (a Monday) 09:15 in Kolkata
MASTER = [
    {"instrument_token": INFY, "exchange": "NSE", "tradingsymbol": "INFY", "segment": "NSE"},
    {"instrument_token": RELIANCE, "exchange": "NSE", "tradingsymbol": "RELIANCE", "segment": "NSE"},
    {"instrument_token": NIFTY, "exchange": "NSE", "tradingsymbol": "NIFTY 50", "segment": "INDICES"},
    {"instrument_token": SENSEX, "exchange": "BSE", "tradingsymbol": "SENSEX", "segment": "INDICES"},
    {"instrument_token": 128053508, "exchange": "BSE", "tradingsymbol": "INFY", "segment": "BSE"},
    {"instrument_token": 4267265, "exchange": "NSE", "tradingsymbol": "BAJAJ-AUTO", "segment": "NSE"},
    {"instrument_token": 3813889, "exchange": "NSE", "tradingsymbol": "CENTRALBK-BE", "segment": "NSE"},
    {"instrument_token": 5506049, "exchange": "NSE", "tradingsymbol": "SGBAUG28-GB", "segment": "NSE"},
]


def write_master(client: redis.Redis, keys: Keys) -> None:
    save_instruments(client, keys, MASTER)


def row(start: int, close: float = 100.0, volume: float = 10, flag: str = "", **cells: Any) -> str:
    """A candle row's text."""
    values = {"open": close, "high": close, "low": close, "oi": None, "ticks": 1, **cells}
    row = [start, values["open"], values["high"], values["low"], close, volume, values["oi"], values["ticks"]]
    return json.dumps([*row, flag] if flag else row, separators=(",", ":"))


def push(client: redis.Redis, keys: Keys, token: int, interval: str, rows: Iterable[str]) -> None:
    client.rpush(keys.candles(token, interval), *rows)


def announce(
    client: redis.Redis, keys: Keys, token: int, interval: str, text: str, rev: int = 0, symbol: str = ""
) -> None:
    fields: dict[Any, Any] = {"token": token, "symbol": symbol, "interval": interval, "row": text, "rev": rev}
    client.xadd(keys.closed(keys.shard_of(token)), fields)


def tick_frame(client: redis.Redis, keys: Keys, shard: int, rows: list[list[Any]], at: int = 0) -> None:
    text = json.dumps(rows, separators=(",", ":"))
    client.xadd(keys.ticks(shard), {"src": "t", "seq": 1, "at": at, "n": len(rows), "ticks": text})
