"""Which instruments make which feed, and which worker reads which feed.

    tokens → feeds of up to 3,000, one connection each; feed n uses api key n // 3 (Kite allows 3 per key)

    P:feeds      hash             <version> → JSON, the tokens of each feed: [[256265, 408065], [738561]]
    P:feed:<n>   string with TTL  the worker that reads feed n; renewed while it lives

All workers follow the highest version of `P:feeds`. A worker whose list changes while it runs (`P:watch`, the
master) writes the next version with HSETNX: of two workers one succeeds and the other reads it. An instrument
stays in its feed: new ones go where most room is, so that no other is subscribed again.

A worker that merely starts with another list does not replace the published one while a living worker has
that: a shorter PKB_INSTRUMENTS by mistake must not stop other streams. `pkb doctor` names both lists.

Every living worker reads an even share of the feeds. A dead worker's leases run out and its feeds are taken.
While Redis is unavailable every worker reads on; only the reply "another worker has it" ends a feed. Two
readers of a feed for a moment are harmless (ticks are merged), a gap is not.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import redis
from pydantic import SecretStr
from redis.exceptions import ResponseError

from pkbrokers_redis import logs
from pkbrokers_redis.candles.model import TOKEN_MAX
from pkbrokers_redis.errors import PkbError, RedisUnavailable, SettingsError
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.kite.websocket import CONNECTIONS_PER_KEY_MAX, TOKENS_PER_CONNECTION_MAX
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store import leases
from pkbrokers_redis.store.errors import is_wrong_type

log = logs.get("ingest")

UPDATE_SECONDS = 1.0  # how often list and feeds are read
VERSION_DIGITS_MAX = 15
ROLE = "ingest"  # in the registry of workers
# Parts of PKB_LEASE_SECONDS. A dead worker's leases run out after at most `TTL`, and workers look every
# `LOOK`: its feeds move within TTL + LOOK < 1.
TTL, LOOK = 2 / 3, 1 / 6
TTL_MS_MIN = 1_000  # nothing is renewed while a connection closes, up to 0.5 s

Instruments = Sequence[tuple[int, str]]


@dataclass(frozen=True, slots=True)
class Feed:
    """What one connection reads: `tokens` ascending, `session` the number of the api key to use (from 0)."""

    number: int
    session: int
    tokens: tuple[int, ...]


# -- instruments → feeds: pure -----------------------------------------------------------------------------


def feeds_needed(tokens: int, sessions: int) -> int:
    """Return the least number of feeds. Raises SettingsError when `sessions` api keys are too few."""
    count = -(-tokens // TOKENS_PER_CONNECTION_MAX)
    keys = -(-count // CONNECTIONS_PER_KEY_MAX)
    if keys > sessions:
        most = TOKENS_PER_CONNECTION_MAX * CONNECTIONS_PER_KEY_MAX * sessions
        have = "one Kite api key" if sessions == 1 else f"{sessions} Kite api keys"
        raise SettingsError(
            f"{tokens:,} instruments are more than {have} may stream ({most:,})",
            f"name fewer in PKB_INSTRUMENTS, or {keys} api keys: PKB_KITE_API_KEY and PKB_KITE_ACCESS_TOKEN "
            "take comma lists of equal length",
        )
    return count


def partition(tokens: Collection[int], sessions: int) -> list[Feed]:
    """Return as few feeds as possible, of even size (±1). Raises SettingsError for too many instruments."""
    ordered = sorted(set(tokens))
    count = feeds_needed(len(ordered), sessions)
    ends = [n * len(ordered) // count for n in range(count + 1)] if count else [0]
    return _feeds([ordered[ends[n] : ends[n + 1]] for n in range(count)])


def repartition(current: Sequence[Collection[int]], tokens: Collection[int], sessions: int) -> list[Feed]:
    """Return the feeds for another list; every instrument that stays keeps its feed. Deterministic.

    New tokens go where most room is; a feed is opened only when all are full. Feeds that are being read are
    not merged: that would interrupt thousands of instruments. A malformed partition is replaced.
    """
    stream = set(tokens)
    needed = feeds_needed(len(stream), sessions)
    kept = [sorted(stream.intersection(members)) for members in current]
    has_repeats = sum(map(len, kept)) > len(set().union(*kept))
    is_too_big = any(len(members) > TOKENS_PER_CONNECTION_MAX for members in kept)
    if has_repeats or is_too_big or not any(kept) or len(kept) > sessions * CONNECTIONS_PER_KEY_MAX:
        return partition(stream, sessions)
    kept += [[] for _ in range(needed - len(kept))]
    for token in sorted(stream.difference(*kept)):
        roomiest = min(kept, key=len)
        if len(roomiest) >= TOKENS_PER_CONNECTION_MAX:
            kept.append(roomiest := [])
        roomiest.append(token)
    while not kept[-1]:
        kept.pop()
    return _feeds([sorted(members) for members in kept])


def _feeds(members: Sequence[Sequence[int]]) -> list[Feed]:
    return [Feed(n, n // CONNECTIONS_PER_KEY_MAX, tuple(tokens)) for n, tokens in enumerate(members)]


def list_id(tokens: Collection[int]) -> str:
    """Return a short name of an instrument list: workers with different ones must not share feeds."""
    text = ",".join(map(str, sorted(set(tokens))))
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


# -- the feeds that all workers agree on --------------------------------------------------------------------


class InstrumentSource(Protocol):
    """Where a worker's own list comes from: `version` is cheap, and differs whenever `read` may.

    `unknown` has the names that the last `read` did not find.
    """

    unknown: tuple[str, ...]

    def version(self, client: redis.Redis) -> str: ...
    def read(self, client: redis.Redis) -> Instruments: ...


class FeedAssignments:
    """The feeds as last published. `update` belongs to one thread; any may read.

    Attributes:
        feeds: all feeds, whichever workers read them.
        symbols: token → name, this worker's own list.
        own_id: that list's `list_id`.
        added: instruments added by versions that this worker wrote; the caller empties it.
    """

    def __init__(
        self,
        keys: Keys,
        instruments: Instruments,
        sessions: int,
        source: InstrumentSource | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with an own list. Raises SettingsError when `sessions` api keys are too few for it."""
        self._keys = keys
        self._sessions = sessions
        self._source = source
        self._clock = clock
        self._next_update = float("-inf")
        self._list_version: str | None = None  # of the own list
        self._version = 0  # of `feeds`; 0: not published yet
        self._once = logs.Once()
        self.symbols = dict(instruments)
        self.own_id = list_id(self.symbols)
        self.added: frozenset[int] = frozenset()
        self._set_feeds(partition(self.symbols, sessions))

    @property
    def unknown(self) -> tuple[str, ...]:
        """Names of the own list that the instrument master lacks."""
        return self._source.unknown if self._source is not None else ()

    def _set_feeds(self, feeds: list[Feed]) -> None:
        self.feeds = feeds
        self._feeds_id = list_id({token for feed in feeds for token in feed.tokens})

    def update(self, client: redis.Redis, other_workers: Collection[str] = ()) -> bool:
        """Read list and feeds, publish where the own list differs; return whether the feeds changed.

        It does so once a second at most. `other_workers` are the ids of the other living ingest workers.
        """
        if self._clock() < self._next_update:
            return False
        self._next_update = self._clock() + UPDATE_SECONDS
        before = self.feeds
        is_first = self._version == 0
        has_changed = self._read_own_list(client) and not is_first
        try:
            is_published = self._read(client)
            differs = self._feeds_id != self.own_id and not self._is_used(client, other_workers)
            if not is_published or has_changed or differs:
                self._publish(client, is_published, may_merge=is_first and not other_workers)
        except ResponseError as error:
            if not is_wrong_type(error):
                raise
            key = self._keys.feeds()
            if self._once.first("wrong type"):
                log.error("feeds_unreadable", key=key, hint=f"look at it, then `DEL {key}`")
        return self.feeds != before

    def _read_own_list(self, client: redis.Redis) -> bool:
        """Return whether the own list changed."""
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
                log.error("list_unreadable", reason=error.message, hint=error.hint, kept=len(self.symbols))
            return False
        before, self._list_version = self.own_id, version
        self.symbols, self.own_id = instruments, list_id(instruments)
        return self.own_id != before

    def _is_used(self, client: redis.Redis, other_workers: Collection[str]) -> bool:
        """Return whether another living worker has the published list, by its heartbeat."""
        ids: list[Any] = [client.hget(self._keys.worker(worker), "list") for worker in other_workers]
        if self._feeds_id.encode() not in ids:
            return False
        if self._once.first(("list differs", self._feeds_id, self.own_id)):
            streamed = sum(len(feed.tokens) for feed in self.feeds)
            log.error(
                "instrument_lists_differ", own=len(self.symbols), streamed=streamed,
                hint="give all ingest workers the same PKB_INSTRUMENTS; the published list is streamed",
            )  # fmt: skip
        return True

    def _read(self, client: redis.Redis) -> bool:
        """Follow the newest version; return False if there is none that can be used."""
        fields: Any = client.hkeys(self._keys.feeds())
        newest = max((int(name) for name in fields if _is_version(name)), default=0)
        if newest in (0, self._version):
            self._version = newest
            return newest > 0
        text: Any = client.hget(self._keys.feeds(), str(newest))
        if text is None:
            return True  # replaced just now: the next update sees it
        self._version = newest
        members = _decode(text)
        try:  # is it a partition, and may our api keys, maybe fewer than another worker's, stream it?
            feeds = repartition(members, [token for each in members for token in each], self._sessions)
        except SettingsError:
            feeds = []
        if not feeds or feeds != _feeds(members):
            if self._once.first(("malformed", newest)):
                log.warning("feeds_refused", version=newest, reason="no feeds that our api keys may stream")
            return False
        self._set_feeds(feeds)
        return True

    def _publish(self, client: redis.Redis, is_published: bool, may_merge: bool) -> None:
        tokens = self.symbols.keys()
        feeds = repartition([feed.tokens for feed in self.feeds], tokens, self._sessions)
        if may_merge and len(feeds) > len(fewest := partition(tokens, self._sessions)):
            feeds = fewest  # no worker reads yet
        if is_published and feeds == self.feeds:
            return
        text = msgspec.json.encode([feed.tokens for feed in feeds])
        if not client.hsetnx(self._keys.feeds(), str(self._version + 1), text):
            self._read(client)  # another worker was first, as a rule with the same list
            return
        self._version += 1
        self.added |= tokens - {token for feed in self.feeds for token in feed.tokens}
        self._set_feeds(feeds)
        names: Any = client.hkeys(self._keys.feeds())
        if old := [name for name in names if not _is_version(name) or int(name) < self._version]:
            client.hdel(self._keys.feeds(), *old)
        log.info("feeds_published", version=self._version, feeds=len(feeds), instruments=len(tokens))


def _is_version(name: bytes) -> bool:
    return name.isdigit() and len(name) <= VERSION_DIGITS_MAX


def _decode(text: bytes) -> list[list[int]]:
    """Return the tokens of each feed; [] for anything else."""
    try:
        members = msgspec.json.decode(text or b"[]", type=list[list[int]])
    except msgspec.DecodeError:
        return []
    return members if all(0 < token <= TOKEN_MAX for each in members for token in each) else []


# -- which worker reads which feed --------------------------------------------------------------------------


def sessions_of(settings: Settings) -> list[Settings]:
    """Return one Settings per api key, from the comma lists PKB_KITE_API_KEY and PKB_KITE_ACCESS_TOKEN."""
    secret = settings.kite_access_token
    keys: list[str | None] = [*_split(settings.kite_api_key)] or [None]
    tokens = _split(secret.get_secret_value() if secret else None)
    if tokens and len(tokens) != len(keys):
        raise SettingsError(
            f"PKB_KITE_API_KEY names {len(keys)} keys, PKB_KITE_ACCESS_TOKEN {len(tokens)}",
            "give each api key its access token, in the same order",
        )
    secrets: list[SecretStr | None] = [*map(SecretStr, tokens)] or [None] * len(keys)
    return [
        settings.model_copy(update={"kite_api_key": key, "kite_access_token": token})
        for key, token in zip(keys, secrets, strict=True)
    ]


def _split(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def share_of(worker_id: str, members: Collection[str], feeds: int) -> int:
    """Return how many feeds a worker reads: even (±1), and all members' shares add up to `feeds`."""
    everybody = sorted({*members, worker_id})
    share, rest = divmod(feeds, len(everybody))
    return share + (everybody.index(worker_id) < rest)


class FeedReader(Protocol):
    """What `FeedLeases` directs (`worker.Ingest`), from its thread; it may raise what redis-py raises."""

    def update_feeds(self, client: redis.Redis, other_workers: Collection[str]) -> int: ...
    def open_feed(self, client: redis.Redis, number: int) -> None: ...
    def close_feeds(self, client: redis.Redis | None, numbers: Collection[int]) -> None: ...


class FeedLeases:
    """This worker's feeds. `run` has a thread of its own; `held` may be read by any.

    A feed beyond the share is closed before its lease is released: Kite counts connections.
    """

    def __init__(
        self,
        connect: Callable[[], redis.Redis],
        keys: Keys,
        worker_id: str,
        lease_seconds: float,
        reader: FeedReader,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; `connect` returns a client that gives up soon."""
        self._connect = connect
        self._client: redis.Redis | None = None
        self._keys = keys
        self._worker_id = worker_id
        self._reader = reader
        self._ttl_ms = max(int(lease_seconds * 1000 * TTL), TTL_MS_MIN)
        self.look_seconds = lease_seconds * LOOK
        self._clock = clock
        # Take nothing at the first look: workers that start together must see each other first.
        self._take_from = clock() + self.look_seconds
        self._is_disconnected = False
        self.held: set[int] = set()
        self.lost = 0  # feeds that another worker had taken when Redis or this worker resumed

    def run(self, stop: threading.Event) -> None:
        """Renew, give up and take feeds until `stop` is set; then release all."""
        try:
            while not stop.is_set():
                self.look()
                stop.wait(self.look_seconds)
        finally:
            self.end()

    def look(self) -> None:
        """Do one round with Redis. Without Redis everything stays as it is."""
        try:
            client = self._client = self._client or self._connect()
            leases.announce(client, self._keys, ROLE, self._worker_id)
            lost = [feed for feed in sorted(self.held) if not self._lease(client, feed).acquire()]
            self.lost += len(lost)
            self._close(None, lost, "another worker reads it")
            members = leases.members(client, self._keys, ROLE, self._ttl_ms)
            total = self._reader.update_feeds(client, [each for each in members if each != self._worker_id])
            share = share_of(self._worker_id, members, total)
            self._give_up(client, total, share)
            if not (self._is_disconnected or self._clock() < self._take_from):
                self._take(client, total, share)
        except (redis.RedisError, RedisUnavailable) as error:
            self._client = None
            if not self._is_disconnected:
                reason = str(error).partition("\n")[0][:200]
                log.warning("leases_not_renewed", reason=reason, feeds=_names(self.held))
            self._is_disconnected = True
            return
        if self._is_disconnected:
            self._is_disconnected = False
            # The other workers must first renew what they read all the time, and be seen as alive.
            self._take_from = self._clock() + self._ttl_ms / 1000
            log.info("leases_renewed", feeds=_names(self.held))

    def _give_up(self, client: redis.Redis, total: int, share: int) -> None:
        held = sorted(self.held)
        removed = [feed for feed in held if feed >= total]
        surplus = [feed for feed in held if feed < total][share:]
        for feeds, reason in ((removed, "there are fewer feeds now"), (surplus, "shared with a new worker")):
            self._close(client, feeds, reason)
            self._release(client, feeds)

    def _take(self, client: redis.Redis, total: int, share: int) -> None:
        for feed in range(total):
            if len(self.held) >= share:
                return
            if feed not in self.held and self._lease(client, feed).acquire():
                log.info("feed_taken", feed=feed, of=total)
                self._reader.open_feed(client, feed)
                self.held.add(feed)

    def _lease(self, client: redis.Redis, feed: int) -> leases.LeaderLease:
        return leases.LeaderLease(client, self._keys.feed(feed), self._worker_id, self._ttl_ms / 1000)

    def _close(self, client: redis.Redis | None, feeds: Collection[int], reason: str) -> None:
        if feeds:
            log.info("feeds_closed", feeds=_names(feeds), reason=reason)
            self.held.difference_update(feeds)
            self._reader.close_feeds(client, feeds)

    def _release(self, client: redis.Redis, feeds: Collection[int]) -> None:
        for feed in feeds:
            self._lease(client, feed).release()

    def end(self) -> None:
        """Close all feeds and release them at once. Without Redis their leases run out."""
        held = sorted(self.held)
        try:
            client = self._client or self._connect()
        except (redis.RedisError, PkbError):
            self._close(None, held, "stopping")
            return
        self._close(client, held, "stopping")
        with suppress(redis.RedisError):
            self._release(client, held)
            leases.leave(client, self._keys, ROLE, self._worker_id)
            client.close()


def _names(feeds: Collection[int]) -> str:
    return ",".join(map(str, sorted(feeds)))


def feed_figures(feeds: Sequence[Feed], held: Collection[int]) -> dict[str, object]:
    """Return what a heartbeat shows of the assignment; `pkb status` and `pkb doctor` read it."""
    return {
        "feeds": _names(held),
        "feeds_total": len(feeds),
        "instruments": sum(len(feeds[n].tokens) for n in held if n < len(feeds)),
        "instruments_total": sum(len(feed.tokens) for feed in feeds),
    }
