"""What comes into a mirror: announced candles, the candles that form in batches, and names that moved."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from pkbrokers_redis.consumers.mirror_rows import MirrorRows
from pkbrokers_redis.consumers.position import Fields
from pkbrokers_redis.consumers.ring import Floats
from pkbrokers_redis.consumers.store import CandleStore
from pkbrokers_redis.core.model import FLAG_NAMES
from pkbrokers_redis.store.read import parse_candle
from pkbrokers_redis.store.symbols import read_tokens

RINGS_A_PIPELINE = 500
TAIL_ROWS = 3  # completed while nobody looked, and not announced yet: at most the grace's worth


def apply_entries(store: CandleStore, memory: MirrorRows, entries: Sequence[Fields]) -> int:
    """Put announced rows into their rings; returns how many were ours. Odd entries are counted."""
    taken = 0
    with memory.lock:
        for fields in entries:
            try:
                token, interval = int(fields[b"token"]), fields[b"interval"].decode()
            except (KeyError, ValueError):
                store.tally.rows_refused += 1
                continue
            if interval not in memory.rings:
                continue  # most of a stream, for a mirror of few: not a row is parsed for them
            ring = memory.ring_of(token, interval, fields.get(b"symbol", b"").decode(errors="replace"))
            if ring is None:
                continue
            parsed = _parse(fields.get(b"row", b""))
            if parsed is None:
                store.tally.rows_refused += 1
                continue
            ring.put(*parsed)
            taken += 1
    return taken


def refresh_currents(store: CandleStore, memory: MirrorRows, wanted: Sequence[tuple[int, str]]) -> None:
    """Ask Redis for the current candle of each (token, interval), and what was completed before a new one.

    Raises redis-py's errors.
    """
    for first in range(0, len(wanted), RINGS_A_PIPELINE):
        some = wanted[first : first + RINGS_A_PIPELINE]
        keys = store.keys
        pipe = store.client.pipeline(transaction=False)
        for token, interval in some:
            pipe.hget(keys.current(token), interval)
        replies = pipe.execute(raise_on_error=False)
        now = time.monotonic()
        rolled: list[tuple[int, str]] = []
        with memory.lock:
            for (token, interval), reply in zip(some, replies, strict=True):
                ring = memory.ring_of(token, interval)
                if ring is None:
                    continue
                if isinstance(reply, Exception):
                    if "WRONGTYPE" not in str(reply):
                        raise reply
                    store.tally.rows_refused += 1
                    reply = None
                row, flag = (_parse(reply) or (None, 0)) if reply else (None, 0)
                ring.current_at = now
                if ring.set_current(row, flag):
                    ring.tail_start = 0.0 if row is None else float(row[0])
                    rolled.append((token, interval))
        if rolled:
            _fetch_tails(store, memory, rolled)


def moved_names(store: CandleStore, memory: MirrorRows) -> dict[int, tuple[int, str]]:
    """Mirrored token → (token, symbol): the other one that the master gives its symbol to by now.

    Raises redis-py's errors.
    """
    symbols = dict(memory.symbols)
    tokens = read_tokens(store.client, store.keys, list(symbols.values()))
    return {
        token: (tokens[symbol], symbol)
        for token, symbol in symbols.items()
        if tokens.get(symbol, token) != token
    }


def _fetch_tails(store: CandleStore, memory: MirrorRows, rolled: Sequence[tuple[int, str]]) -> None:
    """The newest completed rows of rings whose current candle is a new one: its predecessors may not be
    announced yet, and what we saw of them last was not their last tick."""
    keys = store.keys
    pipe = store.client.pipeline(transaction=False)
    for token, interval in rolled:
        pipe.lrange(keys.candles(token, interval), -TAIL_ROWS, -1)
    replies: list[Any] = pipe.execute(raise_on_error=False)
    with memory.lock:
        for (token, interval), rows in zip(rolled, replies, strict=True):
            ring = memory.ring_of(token, interval)
            if ring is None or isinstance(rows, Exception):
                continue
            for text in rows:
                parsed = _parse(text)
                if parsed is not None:
                    ring.put(*parsed)


def _parse(text: bytes) -> tuple[Floats, int] | None:
    candle = parse_candle(text)
    if candle is None:
        return None
    return np.array(candle[:8], np.float64), FLAG_NAMES.index(candle.flag)
