"""Feeds: the instrument list cut into connections. Pure.

    tokens → feeds of up to 3,000, one connection each; feed n uses api key n // 3 (Kite allows 3 per key)

Where a list changes while it is streamed, an instrument stays in its feed: `recut` takes out what left, and
puts what came into the feed with the most room. No other instrument is subscribed anew, so none has a gap.

The instruments and their feeds as all ingest workers have them: `P:feeds`, followed while we run.

    P:feeds   hash   <version> → JSON, the tokens of each feed: [[256265, 408065], [738561]]

The highest version counts. Whoever has a new list writes the next version with HSETNX, so that of two only
one does, and the other reads it: one command on one key, the same on every deployment. All workers thus read
the same cut, and an instrument added moves no other (`cut.recut`).

A worker writes when its own list changes while it runs (`P:watch`, the master). Where it merely finds another
list, as after a start, it writes only if no living worker has that one: somebody who starts a worker with a
shorter PKB_INSTRUMENTS by mistake must not stop the others' streams. `pkb doctor` names both.

Which ingest worker reads which feed (what a feed is: `cut.py`; how all agree on it: `roster.py`).

    P:feed:<n>      string with TTL, the worker that reads feed n; renewed while it lives

Every live worker takes its even share of the feeds. What a dead one held becomes free when its leases run
out; what one holds beyond its share it stops reading, then releases. Only Redis' answer "another has it"
takes a feed away: while Redis is away everybody reads on, as nobody can take anything either. Two readers of
a feed for a moment are harmless (a tick is a statement, candles are a merge), a gap is not.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Collection, Sequence
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
from pkbrokers_redis.store import lease
from pkbrokers_redis.store.commit import load_functions


@dataclass(frozen=True, slots=True)
class Feed:
    """What one connection reads: `tokens` ascending, `session` the api key to use (0 is the first)."""

    number: int
    session: int
    tokens: tuple[int, ...]


def feeds_needed(tokens: int, sessions: int) -> int:
    """The least number of feeds. Raises SettingsError when it is more than `sessions` api keys may have."""
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


def cut_feeds(tokens: Collection[int], sessions: int) -> list[Feed]:
    """A first cut: as few feeds as possible, of even size (±1). The same instruments give the same feeds.

    Raises SettingsError when there are more than `sessions` api keys may stream.
    """
    ordered = sorted(set(tokens))
    count = feeds_needed(len(ordered), sessions)
    cuts = [n * len(ordered) // count for n in range(count)] + [len(ordered)] if count else []
    return feeds_of([ordered[cuts[n] : cuts[n + 1]] for n in range(count)])


def recut(cut: Sequence[Collection[int]], tokens: Collection[int], sessions: int) -> list[Feed]:
    """The next cut: whoever has a feed keeps it. Deterministic; a cut that cannot be kept is made anew.

    `cut` are the tokens of each feed so far, a foreign hand's maybe. New tokens go where most room is; a new
    feed is opened only when all are full. Feeds are not merged while they are read: that would interrupt
    thousands to save a connection. Raises SettingsError as `cut_feeds` does.
    """
    wanted = set(tokens)
    needed = feeds_needed(len(wanted), sessions)
    kept = [sorted(wanted.intersection(each)) for each in cut]
    has_repeats = sum(map(len, kept)) > len(set().union(*kept))
    is_too_big = any(len(each) > TOKENS_PER_CONNECTION_MAX for each in kept)
    if has_repeats or is_too_big or not any(kept) or len(kept) > sessions * CONNECTIONS_PER_KEY_MAX:
        return cut_feeds(wanted, sessions)
    kept += [[] for _ in range(needed - len(kept))]
    for token in sorted(wanted.difference(*kept)):
        roomiest = min(kept, key=len)
        if len(roomiest) >= TOKENS_PER_CONNECTION_MAX:
            kept.append(roomiest := [])
        roomiest.append(token)
    while not kept[-1]:
        kept.pop()
    return feeds_of([sorted(each) for each in kept])


def feeds_of(cut: Sequence[Sequence[int]]) -> list[Feed]:
    """Feeds from the tokens of each."""
    return [Feed(n, n // CONNECTIONS_PER_KEY_MAX, tuple(tokens)) for n, tokens in enumerate(cut)]


def list_id(tokens: Collection[int]) -> str:
    """A short name for an instrument list: workers with different ones must not share feeds."""
    text = ",".join(map(str, sorted(set(tokens))))
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


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
                log.error("feeds_unreadable", key=key, hint=f"look at it, then `DEL {key}`")
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
                log.error("list_unreadable", why=error.message, hint=error.hint, kept=len(self.symbols))
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
                hint="give all ingest workers the same PKB_INSTRUMENTS; other workers' list is streamed",
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


ROLE = "ingest"  # in the registry of workers

# Parts of PKB_LEASE_SECONDS. A dead worker's leases run out after at most `TTL`, and the others look every
# `LOOK`: its feeds move within TTL + LOOK < 1.
TTL, LOOK = 2 / 3, 1 / 6
TTL_MS_MIN = 1_000  # while we wait for a connection to close (up to 0.5 s) nothing is renewed


def sessions_of(settings: Settings) -> list[Settings]:
    """One Settings an api key, from the comma lists in PKB_KITE_API_KEY and PKB_KITE_ACCESS_TOKEN.

    Raises SettingsError when the lists differ in length.
    """
    api_keys = _split(settings.kite_api_key)
    secret = settings.kite_access_token
    access_tokens = _split(secret.get_secret_value() if secret else None)
    if access_tokens and len(access_tokens) != max(len(api_keys), 1):
        raise SettingsError(
            f"PKB_KITE_API_KEY names {len(api_keys)} keys, PKB_KITE_ACCESS_TOKEN {len(access_tokens)}",
            "give each api key its access token, in the same order",
        )
    count = max(len(api_keys), 1)
    return [
        settings.model_copy(
            update={
                "kite_api_key": api_keys[n] if api_keys else None,
                "kite_access_token": SecretStr(access_tokens[n]) if access_tokens else None,
            }
        )
        for n in range(count)
    ]


def _split(text: str | None) -> list[str]:
    return [part for part in (piece.strip() for piece in (text or "").split(",")) if part]


def share_of(worker_id: str, members: Collection[str], feeds: int) -> int:
    """How many of the feeds a worker reads: even (±1), and the shares of all members add up to `feeds`."""
    everybody = sorted({*members, worker_id})
    each, left = divmod(feeds, len(everybody))
    return each + (everybody.index(worker_id) < left)


class FeedLeases:
    """This worker's feeds: `look` renews, gives up and takes; `run` does so until told to stop.

    `on_take(client, n)` and `on_drop(client, [n, …])` start and stop reading, with a client of the store, or
    None where the feed is another's already. A feed beyond the share is dropped before its lease is released:
    Kite counts connections. `count(client, others)` is asked at each look how many feeds there are; `others`
    are the other living workers.
    """

    def __init__(
        self,
        connect: Callable[[], redis.Redis],
        keys: Keys,
        worker_id: str,
        lease_seconds: float,
        *,
        count: Callable[[redis.Redis, Collection[str]], int],
        now_ms: Callable[[], float],
        on_take: Callable[[redis.Redis, int], None],
        on_drop: Callable[[redis.Redis | None, Collection[int]], None],
    ) -> None:
        self._connect = connect
        self._client: redis.Redis | None = None
        self._keys = keys
        self._worker_id = worker_id
        self._count = count
        self._ttl_ms = max(int(lease_seconds * 1000 * TTL), TTL_MS_MIN)
        self.look_seconds = lease_seconds * LOOK
        self._now_ms = now_ms
        self._on_take, self._on_drop = on_take, on_drop
        # Not at the first look: workers that start together must see each other, and not take what they
        # would have to give back.
        self._pause(self.look_seconds * 1000)
        self._away = False
        self.held: set[int] = set()
        self.lost = 0  # feeds that another had when Redis or we came back

    def run(self, stop: threading.Event) -> None:
        """`look` again and again; at the end drop and release everything."""
        try:
            while not stop.is_set():
                self.look()
                stop.wait(self.look_seconds)
        finally:
            self.end()

    def look(self) -> None:
        """One round with Redis. Without Redis everything stays as it is."""
        try:
            if self._client is None:
                self._client = self._connect()
            self._look(self._client)
        except (redis.RedisError, RedisUnavailable) as error:
            self._client = None
            if not self._away:
                log.warning("leases_wait", why=str(error).partition("\n")[0][:200], feeds=_names(self.held))
            self._away = True
            return
        if self._away:
            self._away = False
            # The others must first renew what they read all the time, and be seen as alive.
            self._pause(self._ttl_ms)
            log.info("leases_again", feeds=_names(self.held))

    def _look(self, client: redis.Redis) -> None:
        try:
            lease.announce(client, self._keys, ROLE, self._worker_id)
        except ResponseError as error:
            if "unction not found" not in str(error):
                raise
            load_functions(client)  # we are the first here, or Redis lost its data
            lease.announce(client, self._keys, ROLE, self._worker_id)
        gone = [feed for feed in sorted(self.held) if not self._try(client, feed)]
        self.lost += len(gone)
        self._drop(None, gone, "another worker reads it")
        members = lease.members(client, self._keys, ROLE, self._ttl_ms)
        feeds = self._count(client, [each for each in members if each != self._worker_id])
        share = share_of(self._worker_id, members, feeds)
        held = sorted(self.held)
        vanished = [feed for feed in held if feed >= feeds]
        beyond = [feed for feed in held if feed < feeds][share:]
        for some, why in ((vanished, "there are fewer feeds now"), (beyond, "shared with a new worker")):
            self._drop(client, some, why)
            self._release(client, some)
        if self._away or self._paused_ms <= self._now_ms() < self._take_from_ms:
            return
        for feed in range(feeds):
            if len(self.held) >= share:
                break
            if feed not in self.held and self._try(client, feed):
                log.info("feed_taken", feed=feed, of=feeds)
                self._on_take(client, feed)
                self.held.add(feed)

    def _pause(self, pause_ms: float) -> None:
        self._paused_ms = self._now_ms()
        self._take_from_ms = self._paused_ms + pause_ms

    def _try(self, client: redis.Redis, feed: int) -> bool:
        return lease.try_lease(client, self._keys.feed(feed), self._worker_id, self._ttl_ms)

    def _drop(self, client: redis.Redis | None, feeds: Collection[int], why: str) -> None:
        if feeds:
            log.info("feeds_dropped", feeds=_names(feeds), why=why)
            self.held.difference_update(feeds)
            self._on_drop(client, feeds)

    def _release(self, client: redis.Redis, feeds: Collection[int]) -> None:
        for feed in feeds:
            lease.release_lease(client, self._keys.feed(feed), self._worker_id)

    def end(self) -> None:
        """Stop reading, then let the others have it at once. Silent where Redis is away: leases run out."""
        held = sorted(self.held)
        client: redis.Redis | None = None
        try:
            client = self._client or self._connect()
        except (redis.RedisError, PkbError):
            pass
        self._drop(client, held, "stopping")
        if client is None:
            return
        try:
            self._release(client, held)
            lease.leave(client, self._keys, ROLE, self._worker_id)
            client.close()
        except redis.RedisError:
            pass


def _names(feeds: Collection[int]) -> str:
    return ",".join(map(str, sorted(feeds)))


def feed_figures(feeds: Sequence[Feed], held: Collection[int]) -> dict[str, object]:
    """What a heartbeat tells of the assignment; `pkb status` and `pkb doctor` read it."""
    return {
        "feeds": _names(held),
        "feeds_total": len(feeds),
        "instruments": sum(len(feeds[n].tokens) for n in held if n < len(feeds)),
        "instruments_total": sum(len(feed.tokens) for feed in feeds),
    }
