"""The instruments and their feeds as all ingest workers have them: `P:feeds`, followed while we run.

    P:feeds   hash   <version> → JSON, the tokens of each feed: [[256265, 408065], [738561]]

The highest version counts. Whoever has a new list writes the next version with HSETNX, so that of two only
one does, and the other reads it: one command on one key, the same on every deployment. All workers thus read
the same cut, and an instrument added moves no other (`cut.recut`).

A worker writes when its own list changes while it runs (`P:watch`, the master). Where it merely finds another
list, as after a start, it writes only if no living worker has that one: somebody who starts a worker with a
shorter PKB_INSTRUMENTS by mistake must not stop the others' streams. `pkb doctor` names both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import msgspec
import redis
from redis.exceptions import ResponseError

from pkbrokers_redis import logs
from pkbrokers_redis.core.errors import PkbError, SettingsError
from pkbrokers_redis.core.keys import Keys
from pkbrokers_redis.core.model import TOKEN_MAX
from pkbrokers_redis.pipeline.cut import Feed, cut_feeds, feeds_needed, feeds_of, list_id, recut

log = logs.get("ingest")

LOOK_SECONDS = 1.0
VERSION_DIGITS_MAX = 15
Instruments = Sequence[tuple[int, str]]


class InstrumentSource(Protocol):
    """Where a worker's own list comes from: `version` is cheap, and differs whenever `read` may."""

    def version(self, client: redis.Redis) -> str: ...
    def read(self, client: redis.Redis) -> Instruments: ...


class Roster:
    """The feeds as last seen. `look` brings them up to date; it is called by one thread, read by any."""

    def __init__(
        self,
        keys: Keys,
        instruments: Instruments,
        sessions: int,
        source: InstrumentSource | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`instruments`: our own list so far. Raises SettingsError when `sessions` api keys are too few."""
        self._keys = keys
        self._sessions = sessions
        self._source = source
        self._clock = clock
        self._next_look = float("-inf")
        self._list_version: str | None = None  # of our own list
        self._version = 0  # of `feeds`, 0: not Redis's
        self.added: frozenset[int] = frozenset()  # by cuts that we wrote; who has told of them empties it
        self._once = logs.Once()
        self.symbols = dict(instruments)
        self.own_id = list_id(self.symbols)
        self.feeds: list[Feed] = cut_feeds(self.symbols, sessions)
        self._checked: list[Feed] | None = None  # the feeds that _feeds_id names
        self._feeds_id = ""

    def look(self, client: redis.Redis, others: Collection[str] = ()) -> bool:
        """Read, and write where our list is another. True: `feeds` are others than before.

        `others` are the other living workers. Raises what redis-py raises; a list that cannot be had, and a
        key of a foreign hand, are logged once.
        """
        if self._clock() < self._next_look:
            return False
        self._next_look = self._clock() + LOOK_SECONDS
        before = self.feeds
        is_first = self._version == 0
        has_changed = self._read_own(client) and not is_first
        try:
            is_published = self._read(client)
            if not is_published or has_changed or (self._differs() and not self._is_theirs(client, others)):
                # Nobody reads yet: then the cut may be as small as it can be.
                self._write(client, is_published, anew=is_first and not others)
        except ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            if self._once.first("wrong type"):
                key = self._keys.feeds()
                log.error("feeds_unreadable", key=key, mend=f"look at it, then `DEL {key}`")
        return self.feeds != before

    def _read_own(self, client: redis.Redis) -> bool:
        """Whether our own list is another than before."""
        if self._source is None:
            return False
        try:
            version = self._source.version(client)
            if version == self._list_version:
                return False
            instruments = dict(self._source.read(client))
            feeds_needed(len(instruments), self._sessions)
        except PkbError as error:
            if self._once.first(str(error)):
                log.error("list_unreadable", why=error.message, mend=error.mend, kept=len(self.symbols))
            return False
        before, self._list_version = self.own_id, version
        self.symbols, self.own_id = instruments, list_id(instruments)
        return self.own_id != before

    def _differs(self) -> bool:
        """Whether the feeds have other instruments than our list."""
        if self._checked is not self.feeds:
            self._checked = self.feeds
            self._feeds_id = list_id({token for feed in self.feeds for token in feed.tokens})
        return self._feeds_id != self.own_id

    def _is_theirs(self, client: redis.Redis, others: Collection[str]) -> bool:
        """Whether another living worker has the list of the feeds, by its heartbeat."""
        ids: list[Any] = [client.hget(self._keys.worker(other), "list") for other in others]
        if self._feeds_id.encode() not in ids:
            return False
        if self._once.first(("theirs", self._feeds_id, self.own_id)):
            log.error(
                "another_list", ours=len(self.symbols), streamed=sum(len(feed.tokens) for feed in self.feeds),
                mend="give all ingest workers the same PKB_INSTRUMENTS; other workers' list is streamed",
            )  # fmt: skip
        return True

    def _read(self, client: redis.Redis) -> bool:
        """Make the published cut ours. False: there is none that we can use."""
        fields: Any = client.hkeys(self._keys.feeds())
        newest = max((int(name) for name in fields if _is_version(name)), default=0)
        if newest in (0, self._version):
            self._version = newest
            return newest > 0
        found: Any = client.hget(self._keys.feeds(), str(newest))
        if found is None:
            return True  # written over just now: the next look sees it
        self._version = newest
        cut = _decode(found)
        if not self._is_allowed(cut):
            if self._once.first(("odd cut", newest)):
                log.warning("feeds_refused", version=newest, why="not a cut that our api keys may stream")
            return False
        self.feeds = feeds_of(cut)
        return True

    def _is_allowed(self, cut: list[list[int]]) -> bool:
        """Whether it is a cut, and our api keys may stream it: they may be fewer than another worker's."""
        try:
            feeds = recut(cut, [token for each in cut for token in each], self._sessions)
        except SettingsError:
            return False
        return bool(feeds) and feeds == feeds_of(cut)

    def _write(self, client: redis.Redis, is_published: bool, anew: bool) -> None:
        tokens = self.symbols.keys()
        feeds = recut([feed.tokens for feed in self.feeds], tokens, self._sessions)
        if anew and len(feeds) > len(least := cut_feeds(tokens, self._sessions)):
            feeds = least
        if is_published and feeds == self.feeds:
            return
        text = msgspec.json.encode([feed.tokens for feed in feeds])
        if client.hsetnx(self._keys.feeds(), str(self._version + 1), text):
            self._version += 1
            self.added |= tokens - {token for feed in self.feeds for token in feed.tokens}
            self.feeds = feeds
            old: Any = client.hkeys(self._keys.feeds())
            if gone := [name for name in old if not _is_version(name) or int(name) < self._version]:
                client.hdel(self._keys.feeds(), *gone)
            log.info("feeds_cut", version=self._version, feeds=len(feeds), instruments=len(tokens))
        else:
            self._read(client)  # another was first, as a rule with the same list


def _is_version(name: bytes) -> bool:
    return name.isdigit() and len(name) <= VERSION_DIGITS_MAX


def _decode(found: bytes | None) -> list[list[int]]:
    """The tokens of each feed; [] for anything else."""
    try:
        cut = msgspec.json.decode(found or b"[]", type=list[list[int]])
    except msgspec.DecodeError:
        return []
    return cut if all(0 < token <= TOKEN_MAX for each in cut for token in each) else []
