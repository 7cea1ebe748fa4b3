"""A seeded run of the whole pipeline under faults, and the proof that nothing came of them.

    python -m tests.chaos.driver --seconds 600 --seed 7

A simulator feeds ingest workers, aggregators share the shards, a recorder keeps every entry the streams
acknowledged. Meanwhile a seeded driver kills -9 and stops workers, kills and stalls Redis, drops sockets and
refuses new ones, repeats and swaps frames. At the end the rows of every interval must equal (1) those of an
aggregator that gets the recorded entries without any fault, and (2) an independent oracle; every candle must
have been announced as final exactly once; and the flag `gap` must stand exactly where the feed was down,
which `outages.py` knows from the market. A seed gives the same faults at the same moments again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import redis

from pkbrokers_redis.aggregate.worker import Aggregator
from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.client.replay import lag_entries
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.simulator.faults import Faults
from pkbrokers_redis.simulator.market import Market
from pkbrokers_redis.simulator.universe import universe
from pkbrokers_redis.simulator.websocket_server import SimulatorServer
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.meta import ensure_meta
from tests.chaos import oracle, outages
from tests.chaos.report import Report, difference
from tests.chaos.stage import ClusterServers, Recorder, RedisServer, SentinelServers, Worker
from tests.support import settings_env, wait_until

INSTRUMENTS = 300
LEASE_SECONDS = 2.0
PAUSE_SECONDS = (0.3, 2.5)  # between faults
REFUSALS = 2  # then ingest has waited 3.5 s on average
WORDS_MAX = 10  # examples of what is wrong, in the report
# Seconds of frames: an outage goes through the spool, and the longer ones through its quota.
SCARCE = {"buffer_max_bytes": 1_000_000, "spool_max_bytes": 300_000}


TOPOLOGIES = {"single": RedisServer, "sentinel": SentinelServers, "cluster": ClusterServers}


class Chaos:
    """The stage, the faults and the verdict."""

    def __init__(
        self,
        seed: int,
        seconds: float,
        folder: Path,
        *,
        ingests: int = 1,
        aggregators: int = 2,
        topology: str = "single",
    ) -> None:
        self.rng = random.Random(seed)
        self.seconds = seconds
        self.folder = folder
        self.report = Report(seed, seconds)
        self._frame_rng = random.Random(seed + 1)
        self._held: bytes | None = None
        (folder / "redis").mkdir()
        self.redis = TOPOLOGIES[topology](folder / "redis")
        rows = universe(INSTRUMENTS)
        market = Market(rows, int(time.time() * 1000), seed=seed)
        self.memory = outages.MarketMemory(market)
        self._line = Faults(seed=seed)
        self.kite = SimulatorServer(
            market, outgoing=self._damage, recorder=self.memory.note, faults=self._line
        )
        self._untimely: list[outages.Span] = []  # faults of Redis and ingest, and a while after them
        self.kite.start()
        tokens = folder / "tokens"
        tokens.write_text("\n".join(str(row["instrument_token"]) for row in rows))
        self.settings = load_settings(
            redis_url=self.redis.url, data_dir=folder / "data", sessions="always",
            lease_seconds=LEASE_SECONDS,
            instruments=str(tokens), kite_ws_url=self.kite.url, close_grace_seconds=1, log_level="info",
            **({} if self.redis.can_go_back else SCARCE),
        )  # fmt: skip
        self.workers = [
            Worker(role, n, settings_env(self.settings), folder)
            for role, count in (("aggregate", aggregators), ("ingest", ingests))
            for n in range(count)
        ]
        self.recorder = Recorder(self.settings)

    # -- faults ------------------------------------------------------------------------------------

    def _damage(self, frame: bytes) -> Iterator[bytes]:
        """Now and then a frame twice, or behind the next one."""
        roll = self._frame_rng.random()
        if self._held is not None:
            yield frame
            yield self._held
            self._held = None
        elif roll < 0.02:
            self.report.faults["frame_repeated"] += 1
            yield frame
            yield frame
        elif roll < 0.04:
            self.report.faults["frame_swapped"] += 1
            self._held = frame
        else:
            yield frame

    def faults(self) -> dict[str, Callable[[], None]]:
        """Name → what it does. Each leaves the stage whole, if late."""
        faults = {
            "aggregator_killed": lambda: self._one("aggregate").signal(signal.SIGKILL),
            "aggregator_stopped": lambda: self._hang(
                self._one("aggregate"), self.rng.uniform(0.5, 2 * LEASE_SECONDS)
            ),
            "ingest_killed": lambda: self._one("ingest").signal(signal.SIGKILL),
            "ingest_stopped": lambda: self._hang(self._one("ingest"), self.rng.uniform(0.2, 2.0)),
            "sockets_dropped": self.kite.disconnect_all,
            "feed_refused": self._cut_off,
            **self.redis.faults(self.rng),
        }
        if self.redis.can_go_back:
            # What a failover takes back only its source can send again: it must not die just then.
            del faults["ingest_killed"]
        return faults

    def _one(self, role: str) -> Worker:
        return self.rng.choice([each for each in self.workers if each.role == role])

    def _hang(self, worker: Worker, seconds: float) -> None:
        worker.signal(signal.SIGSTOP)
        time.sleep(seconds)
        worker.signal(signal.SIGCONT)

    def _cut_off(self) -> None:
        """Cut, and refused the next times: away for some seconds, while other faults go on."""
        self._line.add("503", count=REFUSALS, on="ws")
        self.kite.disconnect_all()

    # -- the run -----------------------------------------------------------------------------------

    def run(self) -> Report:
        """Set the stage, let the faults come, wait for calm, judge."""
        self.redis.start()
        client = connect(self.settings)
        ensure_meta(client, self.settings, "2026-01-01T00:00:00+00:00")
        self.recorder.start()
        try:
            self._play(client)
            self._judge(client)
        finally:
            for worker in self.workers:
                worker.stop()
            self.kite.stop()
            self.redis.kill()
        client.close()
        return self.report

    def _play(self, client: redis.Redis) -> None:
        for worker in self.workers:
            worker.start()
        wait_until(lambda: self._applied(client) > 0, timeout_seconds=120, what="the first commit")
        self._disturb()
        self._calm(client)
        for worker in reversed(self.workers):  # ingest first
            worker.stop()
        wait_until(lambda: lag_entries(client, self.settings.keys) == 0, timeout_seconds=60, what="no lag")
        self.recorder.caught_up.clear()
        self.recorder.caught_up.wait(30)
        self.recorder.stop_event.set()
        self.recorder.join(10)

    def _applied(self, client: redis.Redis) -> int:
        with contextlib.suppress(redis.RedisError):
            keys = self.settings.keys
            return sum(int(client.hget(keys.cursor(s), "read") or 0) for s in range(keys.shards))
        return 0

    def _disturb(self) -> None:
        names = sorted(self.faults())
        ends = time.monotonic() + self.seconds
        while time.monotonic() < ends:
            time.sleep(self.rng.uniform(*PAUSE_SECONDS))
            for worker in self.workers:
                worker.ensure()
            name = self.rng.choice(names)
            print(f"{self.seconds - (ends - time.monotonic()):6.1f} s  {name}", file=sys.stderr)
            self.report.faults[name] += 1
            began_ms = time.time() * 1000
            self.faults()[name]()
            if not name.startswith(("aggregator", "sockets", "feed")):
                self._untimely.append(outages.Span(began_ms, time.time() * 1000 + outages.BACK_MS))

    def _calm(self, client: redis.Redis) -> None:
        """No more faults: everything runs again and applies what there is, for a few seconds."""
        self._line.clear()
        for worker in self.workers:
            worker.signal(signal.SIGCONT)
            worker.ensure()
        before = self._applied(client)
        wait_until(
            lambda: self._applied(client) > before + 200, timeout_seconds=120, what="the pipeline to go on"
        )
        self.kite.stop()  # the market closes: what is under way arrives, nothing new comes
        looks = Counter[int]()

        def quiet() -> bool:
            looks[self._applied(client)] += 1
            lag = lag_entries(client, self.settings.keys)
            return lag == 0 and looks[self._applied(client)] > 30 and self._are_repairs_applied(client)

        wait_until(quiet, timeout_seconds=120, poll_seconds=0.1, what="the streams to run dry")

    def _are_repairs_applied(self, client: redis.Redis) -> bool:
        keys = self.settings.keys
        newest = {shard: client.xrevrange(keys.repairs(shard), count=1) for shard in range(keys.shards)}
        return all(
            client.hget(keys.cursor(shard), "repair") == entries[0][0]  # type: ignore[index]
            for shard, entries in newest.items()
            if entries
        )

    # -- the verdict -------------------------------------------------------------------------------

    def _judge(self, client: redis.Redis) -> None:
        settings = self.settings
        rows_read = all_rows(client, settings)
        expected: oracle.Rows = {}
        sessions = load_sessions("always", settings.timezone)
        arrived: list[tuple[int, oracle.Row]] = []
        for entries in self.recorder.entries.values():
            ticks, repeats = oracle.acknowledged(entries)
            self.report.entries += len(entries)
            self.report.repeated_entries += repeats
            arrived += ticks
            expected |= oracle.candles(ticks, settings.intervals, sessions)
        self.report.ticks = len(arrived)
        self._judge_outages(client, rows_read, arrived)
        calm = self._undisturbed(client)
        self.report.rows = sum(map(len, rows_read.values()))
        for key in sorted(rows_read.keys() | expected.keys() | calm.keys()):
            for start in sorted(
                rows_read.get(key, {}).keys() | expected.get(key, {}).keys() | calm.get(key, {}).keys()
            ):
                rows = [each.get(key, {}).get(start) for each in (rows_read, expected, calm)]
                if rows[0] is not None and rows[0][-1] == "gap":
                    # The oracle knows what arrived; when the feed was down has been judged.
                    rows[0] = rows[0][:-1]
                    self.report.rows_in_outages += 1
                if not rows[0] == rows[1] == rows[2]:
                    self.report.rows_different += 1
                    self.report.columns_different[difference(rows)] += 1
                    if len(self.report.examples) < WORDS_MAX:
                        self.report.examples.append(
                            f"{key} {start}: pipeline {rows[0]} oracle {rows[1]} calm {rows[2]}"
                        )
        self._judge_announcements(client, rows_read)

    def _judge_outages(
        self, client: redis.Redis, rows_read: oracle.Rows, arrived: list[tuple[int, oracle.Row]]
    ) -> None:
        """Check that losses are reported, reports are true, and candles carry the flags of the reports."""
        settings, report = self.settings, self.report
        notices = [each for entries in self.recorder.repairs.values() for each in outages.notices_of(entries)]
        lost = outages.losses(self.memory.steps, arrived)
        report.losses, report.notices = len(lost), len({each[1:] for each in notices})
        report.repairs_unseen = self.recorder.unseen(client)
        if report.repairs_unseen:
            return
        sessions = load_sessions("always", settings.timezone)
        report.outages_wrong = [
            *outages.unreported(lost, notices, {token for token, _ in rows_read}),
            *outages.unfounded(notices, (at_ms for at_ms, _ in arrived), self._untimely),
            *outages.wrong_flags(rows_read, notices, settings.intervals, sessions),
        ][:WORDS_MAX]

    def _undisturbed(self, client: redis.Redis) -> oracle.Rows:
        """The recorded entries through one aggregator of another prefix, without a fault."""
        settings = load_settings(
            redis_url=self.redis.url, data_dir=self.folder / "data", prefix="calm", sessions="always",
            close_grace_seconds=1,
        )  # fmt: skip
        for shard, entries in self.recorder.entries.items():
            for first in range(0, len(entries), 500):
                pipeline = client.pipeline(transaction=False)
                for entry in entries[first : first + 500]:
                    pipeline.xadd(settings.keys.ticks(shard), entry)  # type: ignore[arg-type]
                pipeline.execute()
        aggregator = Aggregator(lambda: connect(settings), settings, now_ms=lambda: time.time() * 1000)
        aggregator.start()
        while aggregator.step(block_ms_max=1) or lag_entries(client, settings.keys):
            pass
        return all_rows(client, settings)

    def _judge_announcements(self, client: redis.Redis, rows_read: oracle.Rows) -> None:
        """Every final candle announced once; the last announcement of each says what the list says."""
        for shard in range(self.settings.shards):
            first: Counter[tuple[int, str, int]] = Counter()
            last: dict[tuple[int, str, int], Any] = {}
            for _, fields in client.xrange(self.settings.keys.closed(shard)):  # type: ignore[union-attr]
                row = json.loads(fields[b"row"])
                name = int(fields[b"token"]), fields[b"interval"].decode(), row[0]
                first[name] += fields[b"rev"] == b"0"
                last[name] = row
            self.report.announced += len(last)
            self.report.announced_twice += sum(count != 1 for count in first.values())
            self.report.announced_differently += sum(
                rows_read[token, interval].get(start) != row for (token, interval, start), row in last.items()
            )


def all_rows(client: redis.Redis, settings: Settings) -> oracle.Rows:
    """Every completed and forming row of a store."""
    rows: oracle.Rows = {}
    for key in client.scan_iter(match=f"{settings.prefix}:*", count=5_000):
        kind, *rest = key.decode().split(":")[2:] or [""]
        if kind == "candles":
            token, interval = rest
            found = [json.loads(text) for text in client.lrange(key, 0, -1)]  # type: ignore[union-attr]
            rows.setdefault((int(token), interval), {}).update({row[0]: row for row in found})
        elif kind == "current":
            for interval, text in client.hgetall(key).items():  # type: ignore[union-attr]
                row = json.loads(text)
                rows.setdefault((int(rest[0]), interval.decode()), {})[row[0]] = row
    return rows


def main() -> int:
    """Run once and print the report; 0 when nothing came of the faults."""
    parser = argparse.ArgumentParser(description="the pipeline under faults")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--aggregators", type=int, default=2)
    parser.add_argument("--ingests", type=int, default=1)
    parser.add_argument("--topology", choices=TOPOLOGIES, default="single", help="what Redis runs as")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="pkb-chaos-"))
    report = Chaos(
        options.seed,
        options.seconds,
        folder,
        ingests=options.ingests,
        aggregators=options.aggregators,
        topology=options.topology,
    ).run()
    print(json.dumps({**asdict(report), "faults": dict(report.faults), "ok": report.ok}, indent=1))
    if not report.ok:
        print(f"logs of the workers: {folder}; again: --seconds {options.seconds:g} --seed {options.seed}")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
