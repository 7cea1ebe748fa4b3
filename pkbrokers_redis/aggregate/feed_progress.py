"""Until when each instrument's feed was received, as the ingest workers record it (`ingest/outages.py`).

    P:feeds           <version> → JSON, the tokens of each feed; the highest version counts
    P:feed_progress   feed → until when its frames are in Redis, epoch ms; clock:<host> → see `ExchangeClock`

An instrument of no feed (a replay, another producer) has no progress, and its candles wait for none.
"""

from __future__ import annotations

import re
import socket

import msgspec
import numpy as np
import redis
from redis.exceptions import NoPermissionError

from pkbrokers_redis import logs
from pkbrokers_redis.candles import columns as col
from pkbrokers_redis.candles.state import ShardState
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.cluster import Pipe
from pkbrokers_redis.store.errors import is_wrong_type

log = logs.get("aggregate")

TIME_DIGITS_MAX = 15
OFFSET = re.compile(rb"-?[0-9]{1,9}")
_feeds_decoder = msgspec.json.Decoder(list[list[int]])


class FeedProgress:
    """`read` it from Redis, `note` it in the states. What is malformed counts as no feed."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._once = logs.Once()
        self._version = b""
        self._tokens = np.empty(0, np.int64)  # ascending
        self._feed = np.empty(0, np.int64)  # of each token
        self._heard_ms = np.zeros(1)  # of each feed
        self._clock = b"clock:%s" % socket.gethostname().encode()
        self.clock_offset_ms = 0.0  # of this host's clock, ahead of the exchange's

    def read(self, client: redis.Redis) -> None:
        """Read the progress, and the feeds where they changed. Raises what redis-py raises."""
        pipe = Pipe(client)
        pipe.add("HKEYS", self._keys.feeds())
        pipe.add("HGETALL", self._keys.feed_progress())
        names, progress = [None if self._is_refused(reply) else reply for reply in pipe.execute()]
        newest = max((name for name in names or () if name.isdigit()), key=int, default=b"")
        if newest != self._version:
            self._set_feeds(client.hget(self._keys.feeds(), newest.decode()) if newest else None)
            self._version = newest
        if not isinstance(progress, dict):
            progress = dict(zip(progress[::2], progress[1::2], strict=True)) if progress else {}
        offset = progress.get(self._clock, b"0")
        self.clock_offset_ms = float(offset) if OFFSET.fullmatch(offset) else 0.0
        self._heard_ms = np.array(
            [_parse(progress.get(b"%d" % n)) for n in range(int(self._feed.max(initial=0)) + 1)]
        )

    def _is_refused(self, reply: object) -> bool:
        """Return whether a key has another type, or an ACL of an earlier release hides it; log that once."""
        if not isinstance(reply, Exception):
            return False
        if not is_wrong_type(reply) and not isinstance(reply, NoPermissionError):
            raise reply
        if self._once.first(type(reply).__name__):
            hint = "the aggregator's user needs %R~pkb:feeds %R~pkb:feed_progress (docs/acl.conf)"
            log.warning("feed_progress_unreadable", reason=str(reply)[:200], hint=hint)
        return True

    def _set_feeds(self, text: object) -> None:
        try:
            members = _feeds_decoder.decode(text or b"[]")  # type: ignore[arg-type]
            pairs = sorted((token, feed) for feed, tokens in enumerate(members) for token in tokens)
            pairs_array = np.array(pairs, np.int64).reshape(-1, 2)
        except (msgspec.DecodeError, TypeError, OverflowError):
            pairs_array = np.empty((0, 2), np.int64)
        self._tokens, self._feed = pairs_array[:, 0].copy(), pairs_array[:, 1].copy()

    def note(self, state: ShardState) -> None:
        """Note in a state until when its instruments were heard; all of that has been applied."""
        tokens, heard = state.tokens, state.arrays.inst[: len(state), col.HEARD]
        if not len(self._tokens):
            heard[:] = 0.0
            return
        places = np.searchsorted(self._tokens[:-1], tokens)  # within the table, whatever the token
        heard[:] = np.where(self._tokens[places] == tokens, self._heard_ms[self._feed[places]], 0.0)


def _parse(text: bytes | None) -> float:
    return float(text) if text and text.isdigit() and len(text) <= TIME_DIGITS_MAX else 0.0
