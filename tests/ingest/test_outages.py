"""Outages on a real Redis: told once, remembered by the next reader, mended by jobs that are never lost."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import pytest
import redis
import rq

from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.errors import SettingsError
from pkbrokers_redis.ingest import job_outbox as wanted_jobs_module
from pkbrokers_redis.ingest.connections import Reading
from pkbrokers_redis.ingest.feeds import Feed
from pkbrokers_redis.ingest.job_outbox import ORPHAN_MS, WantedJobs
from pkbrokers_redis.ingest.liveness import FeedLife, Outage
from pkbrokers_redis.ingest.outages import JOINED_MS, Outages
from pkbrokers_redis.ingest.worker import Ingest
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.queue import open_queue
from tests.support import wait_until

SESSIONS = load_sessions("market")
INFY, TCS, GOLD = 408065, 2953217, 58839 << 8 | 7


@pytest.fixture
def server_kind() -> str:
    return "valkey"


def ms(text: str) -> int:
    return int(datetime.fromisoformat(f"2026-01-05 {text}+05:30").timestamp() * 1000)


class Office:
    """The outages of one worker that reads feed 0, with the machine's and the market's time in our hand."""

    def __init__(self, client: redis.Redis, settings: Settings, *tokens: int, asks_jobs: bool = True) -> None:
        self.client, self.keys = client, settings.keys
        self.now_ms = ms("10:00:00")
        self.machine_ms = 1_000_000.0
        self.unsent_ms: int | None = None
        self.feeds = 1
        self.queue_is_away = False
        self.settings = settings
        self.feed = Feed(0, 0, tuple(sorted(tokens or (INFY, TCS))))
        self.readings: list[Reading] = []
        self.jobs = WantedJobs(
            lambda: client, self._open_queue, settings.keys, now_ms=lambda: self.machine_ms
        )
        self.outages = Outages(
            lambda: client,
            settings.keys,
            SESSIONS,
            SESSIONS.schedule_of,
            now_ms=lambda: float(self.now_ms),
            readings=lambda: self.readings,
            feeds=lambda: self.feeds,
            unsent_ms=lambda: self.unsent_ms,
            jobs=self.jobs if asks_jobs else None,
        )

    def _open_queue(self) -> rq.Queue:
        if self.queue_is_away:
            raise redis.ConnectionError("away")
        return open_queue(self.settings)

    def read(self) -> FeedLife:
        life = self.outages.open_feed(self.client, self.feed)
        self.readings = [Reading(self.feed, life)]
        return life

    def notices(self) -> list[tuple[list[int], int, int]]:
        found = []
        for shard in range(self.keys.shards):
            for _, fields in self.client.xrange(self.keys.repairs(shard)):  # type: ignore[union-attr]
                assert fields[b"kind"] == b"gap"
                found.append((json.loads(fields[b"tokens"]), int(fields[b"from"]), int(fields[b"to"])))
        return found

    def wanted(self) -> list[tuple[str, dict[str, Any]]]:
        found: Any = self.client.hvals(self.keys.job_outbox())
        return [(job["name"], job["arguments"]) for job in map(json.loads, found)]

    def queued(self) -> list[tuple[str, dict[str, Any]]]:
        return [(job.func_name, job.kwargs) for job in open_queue(self.settings).get_jobs()]

    def feed_progress(self) -> int | None:
        found: Any = self.client.hget(self.keys.feed_progress(), "0")
        return None if found is None else int(found)


MakeOffice = Callable[..., Office]


@pytest.fixture
def make_office(client: redis.Redis, settings: Settings) -> MakeOffice:
    return lambda *tokens, **options: Office(client, settings, *tokens, **options)


def quote(office: Office, token: int, seen: str) -> None:
    office.client.hset(office.keys.quote(token), "received_at", f"2026-01-05T{seen}+05:30")


def test_an_outage_is_a_notice_a_shard_and_one_job(make_office: MakeOffice) -> None:
    office = make_office()
    life = office.read()
    life.tick(ms("10:00:00"))
    life.lost()
    life.tick(ms("10:00:20"))
    office.outages.look()
    office.outages.look()
    span = ms("10:00:00"), ms("10:00:20")
    assert sorted(office.notices()) == [([INFY], *span), ([TCS], *span)]
    assert office.wanted()[1:] == [
        ("repair_gap", {"tokens": [INFY, TCS], "from_ms": span[0], "to_ms": span[1]})
    ]
    assert office.feed_progress() == span[1]


def test_the_next_reader_tells_the_outage_that_a_killed_one_left(make_office: MakeOffice) -> None:
    dead = make_office()
    life = dead.read()
    life.tick(ms("10:00:00"))
    life.heartbeat(ms("10:00:02"))
    dead.outages.look()
    assert dead.feed_progress() == ms("10:00:02")
    successor = make_office()
    life = successor.read()
    successor.outages.look()
    assert (
        successor.feed_progress() == ms("10:00:02") and successor.notices() == []
    )  # nobody has heard it yet
    life.heartbeat(ms("10:05:00"))
    life.tick(ms("10:05:01"))
    successor.outages.look()
    assert [notice[1:] for notice in successor.notices()] == [(ms("10:00:02"), ms("10:05:01"))] * 2


def test_who_dies_before_the_notice_is_out_leaves_it_to_the_next(
    make_office: MakeOffice, client: redis.Redis
) -> None:
    dead = make_office()
    life = dead.read()
    life.tick(ms("10:00:00"))
    dead.outages.look()
    life.lost()
    life.tick(ms("10:00:30"))
    with unreachable(client):
        dead.outages.look()
    assert dead.notices() == [] and dead.feed_progress() == ms("10:00:00")
    successor = make_office()
    successor.read().tick(ms("10:00:40"))
    successor.outages.look()
    assert [notice[1:] for notice in successor.notices()] == [(ms("10:00:00"), ms("10:00:40"))] * 2


def test_what_is_in_memory_only_does_not_count_as_heard(make_office: MakeOffice) -> None:
    office = make_office()
    life = office.read()
    life.tick(ms("10:00:10"))
    office.unsent_ms = ms("10:00:07")
    office.outages.look()
    assert office.feed_progress() == ms("10:00:07")
    office.unsent_ms = None
    office.outages.close_feed(office.client, office.readings[0])
    assert office.feed_progress() == ms("10:00:10")


def test_a_night_and_a_blink_make_no_notice(make_office: MakeOffice) -> None:
    office = make_office()
    life = office.read()
    life.tick(ms("15:29:59"))
    life.lost()
    life.tick(ms("23:00:00"))
    life.lost()
    office.outages.look()
    assert office.notices() == [] and office.feed_progress() == ms("23:00:00")
    office.client.hset(office.keys.feed_progress(), "0", ms("10:00:00"))
    office.read().tick(ms("10:00:01"))
    office.outages.look()
    assert office.notices() == []


def test_an_instrument_never_seen_is_warmed_and_its_feed_has_no_outage(make_office: MakeOffice) -> None:
    office = make_office()
    office.read().tick(ms("10:00:00"))
    office.outages.look()
    assert office.wanted() == [("warm_start", {"tokens": [INFY, TCS], "why": "warm 2026-01-05"})]
    assert office.notices() == []
    again = make_office()  # killed at once: the same request is the same job
    again.read()
    assert len(again.wanted()) == 1
    again.now_ms += 86_400_000  # and tomorrow, to a store that is empty again, it is another one
    again.read()
    assert len(again.wanted()) == 2


def test_a_store_without_memory_of_its_feeds_goes_by_the_quotes(make_office: MakeOffice) -> None:
    office = make_office()
    quote(office, INFY, "09:50:00.250")
    quote(office, TCS, "09:40:00")  # illiquid: the feed was well
    office.read().tick(ms("10:00:00"))
    office.outages.look()
    assert {notice[1:] for notice in office.notices()} == {(ms("09:50:00") + 250, ms("10:00:00"))}


def test_who_is_added_again_had_an_outage_of_its_own(make_office: MakeOffice) -> None:
    office = make_office(INFY)
    office.read().tick(ms("10:00:00"))
    quote(office, TCS, "09:40:00")
    office.outages.join(office.client, [TCS, GOLD])
    office.outages.welcome(office.client, [TCS, GOLD])
    office.outages.look()
    assert office.notices() == [([TCS], ms("09:40:00"), ms("10:00:00") + JOINED_MS)]
    assert ("warm_start", {"tokens": [GOLD], "why": "warm 2026-01-05"}) in office.wanted()


def test_who_is_streamed_again_after_a_restart_had_an_outage_of_its_own(
    make_settings: Callable[..., Settings], client: redis.Redis
) -> None:
    """Two restarts: TCS left out, then back. All its feed was heard until just now."""
    settings = make_settings(kite_ws_url="ws://127.0.0.1:1")

    def life(at: str, *tokens: int) -> None:
        ingest = Ingest(
            lambda: client,
            settings,
            [(token, f"NSE:S{token}") for token in tokens],
            now_ms=lambda: float(ms(at)),
        )
        assert ingest._count_feeds(client, ()) == 1
        ingest.outages.look()
        ingest.inbox.finish()

    life("09:15:00", INFY, TCS)
    client.hset(settings.keys.quote(TCS), "received_at", "2026-01-05T09:40:00+05:30")
    client.hset(settings.keys.quote(INFY), "received_at", "2026-01-05T09:40:00+05:30")
    life("09:40:05", INFY)
    life("09:59:00", INFY, TCS)
    [(_, fields)] = client.xrange(settings.keys.repairs(settings.keys.shard_of(TCS)))  # type: ignore[misc]
    assert json.loads(fields[b"tokens"]) == [TCS]
    assert int(fields[b"from"]) == ms("09:40:00") and int(fields[b"to"]) == ms("09:59:00") + JOINED_MS
    assert not client.exists(settings.keys.repairs(settings.keys.shard_of(INFY)))


def test_a_feed_that_is_no_more_is_not_remembered(make_office: MakeOffice) -> None:
    """The number is used again days later: its instruments were streamed by another feed meanwhile."""
    office = make_office()
    office.client.hset(
        office.keys.feed_progress(), mapping={"1": ms("09:20:00"), "12": ms("09:20:00"), "x": "mine"}
    )
    office.read().tick(ms("10:00:00"))
    office.outages.look()
    assert set(office.client.hkeys(office.keys.feed_progress())) == {b"0", b"x"}  # type: ignore[arg-type]
    office.feeds = 2
    quote(office, GOLD, "10:00:00")
    assert office.outages.open_feed(office.client, Feed(1, 0, (GOLD,))).heard_ms == ms("10:00:00")


def test_without_history_outages_are_marked_only(make_office: MakeOffice) -> None:
    office = make_office(asks_jobs=False)
    life = office.read()
    life.tick(ms("10:00:00"))
    life.lost()
    life.tick(ms("10:00:20"))
    office.outages.look()
    assert len(office.notices()) == 2 and office.wanted() == []


def test_each_market_has_its_own_notice(make_office: MakeOffice) -> None:
    office = make_office(INFY, GOLD)
    life = office.read()
    life.tick(ms("15:20:00"))
    life.lost()
    life.tick(ms("16:00:00"))
    office.outages.look()
    assert sorted(office.notices()) == [
        ([INFY], ms("15:20:00"), ms("15:30:00")), ([GOLD], ms("15:20:00"), ms("16:00:00"))
    ]  # fmt: skip
    assert [name for name, _ in office.wanted()].count("repair_gap") == 2


@pytest.mark.parametrize("heard", ["", "x", "-5", "9" * 40, "0", "1e9"])
def test_a_time_of_a_foreign_hand_is_no_time(make_office: MakeOffice, heard: str) -> None:
    office = make_office()
    office.client.hset(office.keys.feed_progress(), "0", heard)
    assert office.read().heard_ms == 0


def test_keys_of_another_type_hold_up_no_feed(
    make_office: MakeOffice, capsys: pytest.CaptureFixture[str]
) -> None:
    office = make_office()
    for key in (office.keys.feed_progress(), office.keys.job_outbox(), office.keys.quote(INFY)):
        office.client.set(key, "mine")
    life = office.read()
    life.tick(ms("10:00:00"))
    for _ in range(3):
        office.outages.look()
    assert capsys.readouterr().err.count("outages_wait") == 1
    office.client.delete(office.keys.feed_progress())
    office.outages.look()
    assert office.feed_progress() == ms("10:00:00")


@contextlib.contextmanager
def unreachable(client: redis.Redis) -> Iterator[None]:
    """Every command of this client fails, as while Redis is away."""
    pool = client.connection_pool
    client.connection_pool = redis.ConnectionPool(host="127.0.0.1", port=1)
    try:
        yield
    finally:
        client.connection_pool = pool


# --- jobs


def test_wanted_jobs_are_carried_to_rq_once(make_office: MakeOffice) -> None:
    office = make_office()
    arguments = {"tokens": [INFY], "from_ms": 1, "to_ms": 2}
    for _ in range(2):
        office.jobs.want(office.client, "repair_gap", arguments)
        office.jobs.carry()
        office.jobs.carry()
    assert office.queued() == [("pkbrokers_redis.jobs.backfill.repair_gap", arguments)]
    assert office.wanted() == []


def test_while_rq_is_away_requests_wait_and_none_is_lost_with_the_process(make_office: MakeOffice) -> None:
    office = make_office()
    office.queue_is_away = True
    office.jobs.want(office.client, "warm_start", {"tokens": [INFY]})
    with pytest.raises(redis.ConnectionError):
        office.jobs.carry()
    assert len(office.wanted()) == 1
    successor = make_office()
    successor.jobs.carry()
    assert successor.queued() == []  # its owner may well live
    successor.machine_ms += ORPHAN_MS
    successor.jobs.carry()
    assert len(successor.queued()) == 1 and successor.wanted() == []


def test_requests_are_bounded_and_the_rest_is_counted(
    make_office: MakeOffice, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wanted_jobs_module, "JOBS_MAX", 3)
    office = make_office()
    for token in range(1, 6):
        office.jobs.want(office.client, "warm_start", {"tokens": [token]})
    assert len(office.wanted()) == 3
    assert office.jobs.counts["jobs_refused"] == 2 and "job_refused" in capsys.readouterr().err


@pytest.mark.parametrize("odd", [b"", b"{", b'{"name":"rm","arguments":{},"at":0}', b'{"name":"repair_gap"}'])
def test_a_request_of_a_foreign_hand_is_no_job(make_office: MakeOffice, odd: bytes) -> None:
    office = make_office()
    office.client.hset(office.keys.job_outbox(), "x", odd)  # type: ignore[arg-type]
    office.jobs.carry()
    assert office.queued() == [] and office.wanted() == []


def test_a_queue_that_can_never_be_reached_is_one_line(
    make_office: MakeOffice, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wanted_jobs_module, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr(wanted_jobs_module, "PAUSE_SECONDS_MAX", 0.002)
    tries: list[float] = []

    def refuse() -> rq.Queue:
        tries.append(time.monotonic())
        raise SettingsError("RQ jobs do not run on a Redis Cluster", "point PKB_RQ_REDIS_URL elsewhere")

    office = make_office()
    office.jobs._open_queue = refuse
    office.jobs.want(office.client, "warm_start", {"tokens": [INFY]})
    stop = threading.Event()
    thread = threading.Thread(target=office.jobs.run, args=(stop,))
    thread.start()
    wait_until(lambda: len(tries) >= 5)
    stop.set()
    thread.join()
    assert capsys.readouterr().err.count("jobs_wait") == 1


def test_outages_of_single_instruments_wait_for_redis(make_office: MakeOffice, client: redis.Redis) -> None:
    office = make_office()
    office.outages.add("silent", (INFY,), Outage(ms("10:00:00"), ms("10:01:00")))
    with unreachable(client):
        office.outages.look()
    office.outages.look()
    office.outages.look()
    assert office.notices() == [([INFY], ms("10:00:00"), ms("10:01:00"))]
