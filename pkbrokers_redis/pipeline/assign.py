"""Which ingest worker reads which feed (what a feed is: `cut.py`; how all agree on it: `roster.py`).

    P:feed:<n>      string with TTL, the worker that reads feed n; renewed while it lives

Every live worker takes its even share of the feeds. What a dead one held becomes free when its leases run
out; what one holds beyond its share it stops reading, then releases. Only Redis' answer "another has it"
takes a feed away: while Redis is away everybody reads on, as nobody can take anything either. Two readers of
a feed for a moment are harmless (a tick is a statement, candles are a merge), a gap is not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence

import redis
from pydantic import SecretStr
from redis.exceptions import ResponseError

from pkbrokers_redis import logs
from pkbrokers_redis.core.errors import PkbError, RedisUnavailable, SettingsError
from pkbrokers_redis.core.keys import Keys
from pkbrokers_redis.pipeline.cut import Feed
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store import lease
from pkbrokers_redis.store.commit import load_functions

log = logs.get("ingest")

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
