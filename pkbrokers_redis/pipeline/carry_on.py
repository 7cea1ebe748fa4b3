"""A trade file whose instruments the store knows already: what is new in it, and what to count on from.

no first sight yet      a baseline of 0, as `read_trades` made it
an earlier date         left out and counted: its rows are settled
the store's own date    later trades count on from the volume there; the same trades again change nothing;
                        other trades of a time we have are refused
a later date            starts from 0, as on Kite
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import redis

from pkbrokers_redis.core import tables as t
from pkbrokers_redis.core.book import Book
from pkbrokers_redis.core.errors import InputFileError
from pkbrokers_redis.core.keys import Keys
from pkbrokers_redis.core.model import TIME_MS, TOKEN, VOLUME
from pkbrokers_redis.core.sessions import Sessions
from pkbrokers_redis.pipeline.trades import TradeFile, days_of
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.ids import id_order
from pkbrokers_redis.store.pipe import Pipe

TOKENS_AT_ONCE = 1_000


class Known(NamedTuple):
    """What the store has of an instrument. Times are epoch ms; `seen` is NaN without volumes."""

    first_ms: float  # of its first sight: nothing older makes a candle
    day_ms: float  # midnight of the date it stands at
    seen: float  # that date's volume so far
    newest_ms: float  # of its latest trade


def load_known(
    client: redis.Redis, settings: Settings, sessions: Sessions, tokens: Sequence[int]
) -> dict[int, Known]:
    """Those of the instruments that the aggregators have seen; as of their last commits."""
    keys = settings.keys
    book = Book(settings.intervals[:1], sessions, instruments=max(1, len(tokens)))
    known: dict[int, Known] = {}
    pipe = Pipe(client)
    for first in range(0, len(tokens), TOKENS_AT_ONCE):
        chunk = tokens[first : first + TOKENS_AT_ONCE]
        for token in chunk:
            pipe.add("HGET", keys.state(keys.shard_of(token)), token)
        for token, hot in zip(chunk, pipe.execute(), strict=True):
            if not isinstance(hot, bytes):
                continue
            try:
                book.restore(token, hot, None, {})
            except ValueError:
                continue  # a foreign hand's: its aggregator starts anew, too
            i = book.index(token)
            inst = book.tables.inst[i]
            if inst[t.FIRST_AT]:
                first_ms, day_ms = inst[t.FIRST_TIME] // 1000 * 1000, inst[t.DAY_S] * 1000
                newest_ms = book.tables.ring[i, 0, t.R_TIME] if inst[t.RING_SIZE] else first_ms
                seen, outside_ms = inst[t.SEEN], inst[t.OUTSIDE_TIME]
                if outside_ms >= day_ms:  # said outside the windows, and nothing inside since
                    seen, newest_ms = max(inst[t.OUTSIDE_VOLUME], seen), max(newest_ms, outside_ms)
                known[token] = Known(first_ms, day_ms, seen, newest_ms)
    return known


def carry_on(trades: TradeFile, known: Mapping[int, Known], sessions: Sessions, name: str) -> TradeFile:
    """The file's ticks for a store that knows `known`; `name` is the file's, for people.

    Raises InputFileError for other trades of a time that the store has.
    """
    baselines, ticks = trades.ticks[: trades.baselines], trades.ticks[trades.baselines :].copy()
    baselines = baselines[[int(token) not in known for token in baselines[:, TOKEN]]]
    times, days = ticks[:, TIME_MS], days_of(ticks[:, TIME_MS], sessions)
    order = np.argsort(ticks[:, TOKEN], kind="stable")
    stays = np.ones(len(ticks), bool)
    for rows in np.split(order, np.flatnonzero(np.diff(ticks[order, TOKEN])) + 1):
        token = int(ticks[rows[0], TOKEN])
        if (held := known.get(token)) is None:
            continue
        stays[rows] = (days[rows] >= held.day_ms) & (times[rows] >= held.first_ms)
        today = rows[days[rows] == held.day_ms]
        volumes = ticks[today, VOLUME]
        if not len(today) or np.isnan(held.seen) or (trades.cumulative and volumes[0] >= held.seen):
            continue
        if times[today[0]] > held.newest_ms:
            ticks[today, VOLUME] = np.round(volumes + held.seen, 8)
        elif not trades.cumulative and not _stood_at(volumes[times[today] >= held.newest_ms], held.seen):
            date = sessions.date_of(int(times[today[0]]))
            symbol = trades.symbols[trades.tokens.index(token)]
            raise InputFileError(
                f"{name}: the store has other trades of {symbol} on {date}, or later ones",
                "replay a date's files in order of time, or all into another PKB_PREFIX",
            )
    return replace(
        trades,
        ticks=np.concatenate([baselines, ticks[stays]]),
        baselines=len(baselines),
        rows_older=int(len(ticks) - stays.sum()),
    )


def _stood_at(volumes: Any, seen: float) -> bool:
    """Whether the day's volume was `seen` at some time: then these are the trades that the store has."""
    return bool(np.isclose(volumes, seen, rtol=1e-9, atol=1e-8).any())


def newest_entries(client: redis.Redis, keys: Keys, shards: Sequence[int]) -> dict[int, str]:
    """The newest entry of each shard's tick stream; none for an empty one."""
    pipe = Pipe(client)
    for shard in shards:
        pipe.add("XREVRANGE", keys.ticks(shard), "+", "-", "COUNT", 1)
    replies = zip(shards, pipe.execute(), strict=True)
    return {shard: reply[0][0].decode() for shard, reply in replies if isinstance(reply, list) and reply}


def are_applied(client: redis.Redis, keys: Keys, entries: Mapping[int, str]) -> bool:
    """Whether the aggregators' commits are past these entries."""
    pipe = Pipe(client)
    for shard in entries:
        pipe.add("HGET", keys.cursor(shard), "id")
    done = [reply.decode() if isinstance(reply, bytes) else "0-0" for reply in pipe.execute()]
    return all(id_order(at) >= id_order(entry) for at, entry in zip(done, entries.values(), strict=True))
