"""Outages on a real Redis: reported once, known to the next reader, repaired by jobs that are never lost."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import pytest
import redis
import rq

from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.errors import SettingsError
from pkbrokers_redis.ingest import outages
from pkbrokers_redis.ingest.connections import FeedConnection, FeedLiveness, Outage
from pkbrokers_redis.ingest.feeds import Feed
from pkbrokers_redis.ingest.outages import ADDED_MS, ORPHAN_MS, PENDING_MAX, JobOutbox, Outages
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


class Worker:
    """The outages of one worker that reads feed 0, with both clocks set by the test."""

    def __init__(
        self, client: redis.Redis, settings: Settings, *tokens: int, has_history: bool = True
    ) -> None:
        self.client, self.keys = client, settings.keys
        self.now_ms = ms("10:00:00")
        self.machine_ms = 1_000_000.0
        self.oldest_ms: int | None = None  # of the worker's buffer
        self.lost_spans: deque[tuple[int, int]] = deque()
        self.queue_is_down = False
        self.settings = settings
        self.feed = Feed(0, 0, tuple(sorted(tokens or (INFY, TCS))))
        self.connections: list[FeedConnection] = []
        self.jobs = JobOutbox(lambda: client, self._open_queue, settings.keys, now_ms=lambda: self.machine_ms)
        part: Any = self
        self.outages = Outages(
            lambda: client,
            settings.keys,
            SESSIONS,
            part,
            part,
            self.jobs if has_history else None,
            now_ms=lambda: float(self.now_ms),
        )
        self.outages.feeds = [self.feed]

    def all(self) -> list[FeedConnection]:
        """As the worker's connections."""
        return self.connections

    def _open_queue(self) -> rq.Queue:
        if self.queue_is_down:
            raise redis.ConnectionError("down")
        return open_queue(self.settings)

    def read(self) -> FeedLiveness:
        life = self.outages.open_feed(self.client, self.feed)
        self.connections = [FeedConnection(self.feed, life)]
        return life

    def notices(self) -> list[tuple[list[int], int, int]]:
        found = []
        for shard in range(self.keys.shards):
            for _, fields in self.client.xrange(self.keys.repairs(shard)):  # type: ignore[union-attr]
                assert fields[b"kind"] == b"gap"
                found.append((json.loads(fields[b"tokens"]), int(fields[b"from"]), int(fields[b"to"])))
        return found

    def requested(self) -> list[tuple[str, dict[str, Any]]]:
        found: Any = self.client.hvals(self.keys.job_outbox())
        return [(job["name"], job["arguments"]) for job in map(json.loads, found)]

    def queued(self) -> list[tuple[str, dict[str, Any]]]:
        return [(job.func_name, job.kwargs) for job in open_queue(self.settings).get_jobs()]

    def progress(self) -> int | None:
        found: Any = self.client.hget(self.keys.feed_progress(), "0")
        return None if found is None else int(found)


MakeWorker = Callable[..., Worker]


@pytest.fixture
def make_worker(client: redis.Redis, settings: Settings) -> MakeWorker:
    return lambda *tokens, **options: Worker(client, settings, *tokens, **options)


def quote(worker: Worker, token: int, seen: str) -> None:
    worker.client.hset(worker.keys.quote(token), "received_at", f"2026-01-05T{seen}+05:30")


def test_an_outage_is_one_notice_per_shard_and_one_job(make_worker: MakeWorker) -> None:
    worker = make_worker()
    life = worker.read()
    life.note_tick(ms("10:00:00"))
    life.note_loss()
    life.note_tick(ms("10:00:20"))
    worker.outages.report()
    worker.outages.report()
    span = ms("10:00:00"), ms("10:00:20")
    assert sorted(worker.notices()) == [([INFY], *span), ([TCS], *span)]
    assert worker.requested()[1:] == [
        ("repair_gap", {"tokens": [INFY, TCS], "from_ms": span[0], "to_ms": span[1]})
    ]
    assert worker.progress() == span[1]


def test_the_next_reader_reports_the_outage_that_a_killed_one_left(make_worker: MakeWorker) -> None:
    dead = make_worker()
    life = dead.read()
    life.note_tick(ms("10:00:00"))
    life.note_heartbeat(ms("10:00:02"))
    dead.outages.report()
    assert dead.progress() == ms("10:00:02")
    successor = make_worker()
    life = successor.read()
    successor.outages.report()
    assert successor.progress() == ms("10:00:02") and successor.notices() == []  # no frame has arrived yet
    life.note_heartbeat(ms("10:05:00"))
    life.note_tick(ms("10:05:01"))
    successor.outages.report()
    assert [notice[1:] for notice in successor.notices()] == [(ms("10:00:02"), ms("10:05:01"))] * 2


def test_an_outage_that_a_killed_worker_did_not_report_is_reported_by_the_next(
    make_worker: MakeWorker, client: redis.Redis
) -> None:
    dead = make_worker()
    life = dead.read()
    life.note_tick(ms("10:00:00"))
    dead.outages.report()
    life.note_loss()
    life.note_tick(ms("10:00:30"))
    with unreachable(client):
        dead.outages.report()
    assert dead.notices() == [] and dead.progress() == ms("10:00:00")
    successor = make_worker()
    successor.read().note_tick(ms("10:00:40"))
    successor.outages.report()
    assert [notice[1:] for notice in successor.notices()] == [(ms("10:00:00"), ms("10:00:40"))] * 2


def test_frames_in_memory_only_do_not_count_as_received(make_worker: MakeWorker) -> None:
    worker = make_worker()
    life = worker.read()
    life.note_tick(ms("10:00:10"))
    worker.oldest_ms = ms("10:00:07")
    worker.outages.report()
    assert worker.progress() == ms("10:00:07")
    worker.oldest_ms = None
    worker.outages.close_feed(worker.client, worker.connections[0])
    assert worker.progress() == ms("10:00:10")


def test_a_night_and_a_second_make_no_notice(make_worker: MakeWorker) -> None:
    worker = make_worker()
    life = worker.read()
    life.note_tick(ms("15:29:59"))
    life.note_loss()
    life.note_tick(ms("23:00:00"))
    life.note_loss()
    worker.outages.report()
    assert worker.notices() == [] and worker.progress() == ms("23:00:00")
    worker.client.hset(worker.keys.feed_progress(), "0", ms("10:00:00"))
    worker.read().note_tick(ms("10:00:01"))
    worker.outages.report()
    assert worker.notices() == []


def test_an_instrument_never_seen_is_warm_started_and_its_feed_has_no_outage(make_worker: MakeWorker) -> None:
    worker = make_worker()
    worker.read().note_tick(ms("10:00:00"))
    worker.outages.report()
    assert worker.requested() == [("warm_start", {"tokens": [INFY, TCS], "why": "warm 2026-01-05"})]
    assert worker.notices() == []
    again = make_worker()  # killed at once: the same request is the same job
    again.read()
    assert len(again.requested()) == 1
    again.now_ms += 86_400_000  # and tomorrow, to a store that is empty again, it is another one
    again.read()
    assert len(again.requested()) == 2


def test_without_saved_progress_the_newest_quote_counts(make_worker: MakeWorker) -> None:
    worker = make_worker()
    quote(worker, INFY, "09:50:00.250")
    quote(worker, TCS, "09:40:00")  # illiquid: the feed was well
    worker.read().note_tick(ms("10:00:00"))
    worker.outages.report()
    assert {notice[1:] for notice in worker.notices()} == {(ms("09:50:00") + 250, ms("10:00:00"))}


def test_an_instrument_added_again_had_an_outage_of_its_own(make_worker: MakeWorker) -> None:
    worker = make_worker(INFY)
    worker.read().note_tick(ms("10:00:00"))
    quote(worker, TCS, "09:40:00")
    worker.outages.note_added(worker.client, [TCS, GOLD])
    worker.outages.note_subscribed(worker.client, [TCS, GOLD])
    worker.outages.report()
    assert worker.notices() == [([TCS], ms("09:40:00"), ms("10:00:00") + ADDED_MS)]
    assert ("warm_start", {"tokens": [GOLD], "why": "warm 2026-01-05"}) in worker.requested()


def test_an_instrument_streamed_again_after_a_restart_had_an_outage_of_its_own(
    make_settings: Callable[..., Settings], client: redis.Redis
) -> None:
    """Two restarts: without TCS, then with it again. The rest of its feed was received until just now."""
    settings = make_settings(kite_ws_url="ws://127.0.0.1:1")

    def life(at: str, *tokens: int) -> None:
        ingest = Ingest(
            lambda: client,
            settings,
            [(token, f"NSE:S{token}") for token in tokens],
            now_ms=lambda: float(ms(at)),
        )
        assert ingest.update_feeds(client, ()) == 1
        ingest.outages.report()
        ingest.buffer.finish()

    life("09:15:00", INFY, TCS)
    client.hset(settings.keys.quote(TCS), "received_at", "2026-01-05T09:40:00+05:30")
    client.hset(settings.keys.quote(INFY), "received_at", "2026-01-05T09:40:00+05:30")
    life("09:40:05", INFY)
    life("09:59:00", INFY, TCS)
    [(_, fields)] = client.xrange(settings.keys.repairs(settings.keys.shard_of(TCS)))  # type: ignore[misc]
    assert json.loads(fields[b"tokens"]) == [TCS]
    assert int(fields[b"from"]) == ms("09:40:00") and int(fields[b"to"]) == ms("09:59:00") + ADDED_MS
    assert not client.exists(settings.keys.repairs(settings.keys.shard_of(INFY)))


def test_progress_of_a_feed_that_no_longer_exists_is_deleted(make_worker: MakeWorker) -> None:
    """The number is used again days later: its instruments were streamed by another feed meanwhile."""
    worker = make_worker()
    worker.client.hset(
        worker.keys.feed_progress(), mapping={"1": ms("09:20:00"), "12": ms("09:20:00"), "x": "mine"}
    )
    worker.read().note_tick(ms("10:00:00"))
    worker.outages.report()
    assert set(worker.client.hkeys(worker.keys.feed_progress())) == {b"0", b"x"}  # type: ignore[arg-type]
    worker.outages.feeds = [worker.feed, Feed(1, 0, (GOLD,))]
    quote(worker, GOLD, "10:00:00")
    assert worker.outages.open_feed(worker.client, Feed(1, 0, (GOLD,))).received_to_ms == ms("10:00:00")


def test_without_history_outages_are_only_marked(make_worker: MakeWorker) -> None:
    worker = make_worker(has_history=False)
    life = worker.read()
    life.note_tick(ms("10:00:00"))
    life.note_loss()
    life.note_tick(ms("10:00:20"))
    worker.outages.report()
    assert len(worker.notices()) == 2 and worker.requested() == []


def test_each_market_has_its_own_notice(make_worker: MakeWorker) -> None:
    worker = make_worker(INFY, GOLD)
    life = worker.read()
    life.note_tick(ms("15:20:00"))
    life.note_loss()
    life.note_tick(ms("16:00:00"))
    worker.outages.report()
    assert sorted(worker.notices()) == [
        ([INFY], ms("15:20:00"), ms("15:30:00")), ([GOLD], ms("15:20:00"), ms("16:00:00"))
    ]  # fmt: skip
    assert [name for name, _ in worker.requested()].count("repair_gap") == 2


@pytest.mark.parametrize("progress", ["", "x", "-5", "9" * 40, "0", "1e9"])
def test_malformed_progress_is_ignored(make_worker: MakeWorker, progress: str) -> None:
    worker = make_worker()
    worker.client.hset(worker.keys.feed_progress(), "0", progress)
    assert worker.read().received_to_ms == 0


def test_keys_of_another_type_stop_no_feed(
    make_worker: MakeWorker, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = make_worker()
    for key in (worker.keys.feed_progress(), worker.keys.job_outbox(), worker.keys.quote(INFY)):
        worker.client.set(key, "mine")
    life = worker.read()
    life.note_tick(ms("10:00:00"))
    for _ in range(3):
        worker.outages.report()
    assert capsys.readouterr().err.count("outages_not_reported") == 1
    worker.client.delete(worker.keys.feed_progress())
    worker.outages.report()
    assert worker.progress() == ms("10:00:00")


@contextlib.contextmanager
def unreachable(client: redis.Redis) -> Iterator[None]:
    """Every command of this client fails, as while Redis is unavailable."""
    pool = client.connection_pool
    client.connection_pool = redis.ConnectionPool(host="127.0.0.1", port=1)
    try:
        yield
    finally:
        client.connection_pool = pool


# --- jobs


def test_requested_jobs_are_queued_once(make_worker: MakeWorker) -> None:
    worker = make_worker()
    arguments = {"tokens": [INFY], "from_ms": 1, "to_ms": 2}
    for _ in range(2):
        worker.jobs.add(worker.client, "repair_gap", arguments)
        worker.jobs.send()
        worker.jobs.send()
    assert worker.queued() == [("pkbrokers_redis.jobs.backfill.repair_gap", arguments)]
    assert worker.requested() == []


def test_while_rq_is_unavailable_requests_wait_in_the_outbox(
    make_worker: MakeWorker,
) -> None:
    worker = make_worker()
    worker.queue_is_down = True
    worker.jobs.add(worker.client, "warm_start", {"tokens": [INFY]})
    with pytest.raises(redis.ConnectionError):
        worker.jobs.send()
    assert len(worker.requested()) == 1
    successor = make_worker()
    successor.jobs.send()
    assert successor.queued() == []  # its owner may be alive
    successor.machine_ms += ORPHAN_MS
    successor.jobs.send()
    assert len(successor.queued()) == 1 and successor.requested() == []


def test_requests_are_bounded_and_the_rest_is_counted(
    make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outages, "JOBS_MAX", 3)
    worker = make_worker()
    for token in range(1, 6):
        worker.jobs.add(worker.client, "warm_start", {"tokens": [token]})
    assert len(worker.requested()) == 3
    assert worker.jobs.counts["jobs_refused"] == 2 and "job_refused" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", [b"", b"{", b'{"name":"rm","arguments":{},"at":0}', b'{"name":"repair_gap"}']
)
def test_a_malformed_request_is_dropped(make_worker: MakeWorker, text: bytes) -> None:
    worker = make_worker()
    worker.client.hset(worker.keys.job_outbox(), "x", text)  # type: ignore[arg-type]
    worker.jobs.send()
    assert worker.queued() == [] and worker.requested() == []


def test_a_queue_that_can_never_be_reached_is_one_log_line(
    make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outages, "SEND_SECONDS", 0.001)
    monkeypatch.setattr(outages, "RETRY_SECONDS_MAX", 0.002)
    tries: list[float] = []

    def refuse() -> rq.Queue:
        tries.append(time.monotonic())
        raise SettingsError("RQ jobs do not run on a Redis Cluster", "point PKB_RQ_REDIS_URL elsewhere")

    worker = make_worker()
    worker.jobs._open_queue = refuse
    worker.jobs.add(worker.client, "warm_start", {"tokens": [INFY]})
    stop = threading.Event()
    thread = threading.Thread(target=worker.jobs.run, args=(stop,))
    thread.start()
    wait_until(lambda: len(tries) >= 5)
    stop.set()
    thread.join()
    assert capsys.readouterr().err.count("job_queue_unavailable") == 1


def test_outages_of_single_instruments_wait_for_redis(make_worker: MakeWorker, client: redis.Redis) -> None:
    worker = make_worker()
    worker.outages.add("silent", (INFY,), Outage(ms("10:00:00"), ms("10:01:00")))
    with unreachable(client):
        worker.outages.report()
    worker.outages.report()
    worker.outages.report()
    assert worker.notices() == [([INFY], ms("10:00:00"), ms("10:01:00"))]


def test_beyond_the_bound_the_oldest_pending_outage_is_dropped_and_counted(
    make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker()
    sent: list[int] = []

    def send(client: redis.Redis, keys: Any, tokens: Any, *, from_ms: int, to_ms: int, why: str) -> int:
        if not sent:  # while the first one is being sent, one more arrives
            worker.outages.add("silent", (INFY,), Outage(ms("12:00:00"), ms("12:01:00")))
        sent.append(to_ms - from_ms)
        return 1

    monkeypatch.setattr(outages, "send_gap", send)
    for n in range(PENDING_MAX + 2):
        worker.outages.add("silent", (INFY,), Outage(ms("10:00:00"), ms("10:01:00") + n))
    worker.outages.report()
    assert sent == [60_000 + n for n in range(2, PENDING_MAX + 2)] + [60_000]
    assert worker.outages.counts["outages_dropped"] == 2
