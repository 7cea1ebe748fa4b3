"""A virtual trading day: a simulated Kite at many times real time, our workers as processes, and mishaps.

    python -m tests.e2e.rehearsal                        # 08:55 to 15:45 at 60×: about eight minutes
    python -m tests.e2e.rehearsal --begin 14:50 --speed 30

At the end every 1m … 60m row of every instrument must equal what the simulator's own history answers, no row
of the day may be marked as not whole, none of a calm time as mended, and `pkb doctor` must be content.
Intervals that Kite does not have are merged from its minutes here.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import redis

from pkbrokers_redis.candles.calendar import IST, load_sessions
from pkbrokers_redis.candles.model import Interval
from pkbrokers_redis.clock import Clock
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.simulator.kite import SimulatedKite
from pkbrokers_redis.simulator.universe import universe
from pkbrokers_redis.store.embedded import attach
from pkbrokers_redis.store.queue import open_queue
from pkbrokers_redis.store.rows import read_candles
from tests.e2e.judgement import doctor, judge, kites
from tests.support import run_pkb, settings_env, wait_until

DAY = "2026-08-05"  # a Wednesday of the closing auction's era, MCX to 23:30
LEAD_SECONDS = 6.0  # machine time the workers have to start before the begin
SETTLE_SECONDS_MAX = 120.0  # machine time for the last repairs
CALM_SECONDS = 1_200  # market time after the begin, or a mishap: from then on nothing needs mending


def at(text: str) -> float:
    """`10:05` or `10:05:30` of the day → epoch seconds."""
    return datetime.fromisoformat(f"{DAY}T{text}").replace(tzinfo=IST).timestamp()


def cast(per_segment: int, segments: Sequence[int] = range(1, 10)) -> list[dict[str, Any]]:
    """So many instruments of each segment: 1 NSE, 2 NFO, 3 CDS, 4 BSE, 5 BFO, 6 BCD, 7 MCX, 9 indices."""
    chosen: dict[int, list[dict[str, Any]]] = {}
    for row in universe(60):
        group = chosen.setdefault(int(row["instrument_token"]) & 0xFF, [])
        if len(group) < per_segment:
            group.append(row)
    return [row for segment, group in chosen.items() if segment in segments for row in group]


def with_futures(rows: list[dict[str, Any]], stocks: int) -> list[dict[str, Any]]:
    """… and the futures of the first so many NSE stocks: those take part in the closing auction."""
    names = [row["tradingsymbol"] for row in rows if row["segment"] == "NSE"][:stocks]
    futures = [row for row in universe(60) if row["exchange"] == "NFO" and row["name"] in names]
    assert len(futures) == stocks
    return [*rows, *(row for row in futures if row not in rows)]


@dataclass(frozen=True)
class Act:
    """Something that happens at a time of the virtual day."""

    at_s: float
    name: str
    do: Callable[[Stage], None]


@dataclass
class Stage:
    """The simulator here, the workers as children that write to files in `folder`."""

    settings: Settings
    client: redis.Redis
    kite: SimulatedKite
    folder: Path
    env: dict[str, str]
    workers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, role: str) -> None:
        """One worker of a role. Its output goes on in the role's file."""
        with (self.folder / f"{role}.log").open("ab") as log:
            self.workers[role] = subprocess.Popen(
                [sys.executable, "-m", f"workers.{role}"],
                env={**os.environ, **self.env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self, role: str) -> None:
        """kill -9, children included."""
        worker = self.workers.pop(role)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()

    def stop(self) -> None:
        """SIGTERM for all."""
        for worker in self.workers.values():
            worker.terminate()
        for role, worker in self.workers.items():
            try:
                worker.wait(20)
            except subprocess.TimeoutExpired:
                raise AssertionError(f"{role} did not stop:\n{self.log(role)[-3000:]}") from None

    def log(self, role: str) -> str:
        """What the workers of a role have said."""
        return (self.folder / f"{role}.log").read_text(errors="replace")

    def seconds(self, market_minutes: float) -> float:
        """So many minutes of market time in seconds of the machine."""
        return market_minutes * 60 / self.kite.clock.speed

    def wait_until_streaming(self) -> None:
        """Until every shard's stream has a tick that was written after this call, and it is committed."""
        keys, shards = self.settings.keys, sorted({int(t) >> 8 for t in self.kite.market.tokens})
        shards = sorted({shard % self.settings.shards for shard in shards})
        seconds, micros = self.client.time()
        since_ms = int(seconds) * 1000 + int(micros) // 1000

        def is_streaming() -> bool:
            moved = [self.client.hget(keys.cursor(shard), "id") or b"0-0" for shard in shards]
            return all(int(bytes(each).partition(b"-")[0]) > since_ms for each in moved)

        wait_until(is_streaming, timeout_seconds=60, what="ticks of every shard to be committed")

    def wait_for(self, time_s: float) -> None:
        """Until the market's clock says so."""
        left = self.kite.clock.real_seconds(time_s * 1000 - self.kite.now_ms())
        wait_until(
            lambda: self.kite.now_ms() >= time_s * 1000, timeout_seconds=left + 30, what="the market's time"
        )


# --- what goes wrong


def cut(minutes: float) -> Callable[[Stage], None]:
    """The connection is lost, and Kite lets nobody in for so long."""

    def do(stage: Stage) -> None:
        stage.kite.faults.add("503", on="ws", seconds=stage.seconds(minutes))
        stage.kite.disconnect_all()

    return do


def mute(minutes: float) -> Callable[[Stage], None]:
    """Connected, with heartbeats, but without ticks."""
    return lambda stage: void(stage.kite.faults.add("mute", seconds=stage.seconds(minutes)))


def expire(stage: Stage) -> None:
    """The session ends: 403 until somebody logs in."""
    stage.kite.expire_sessions()


def restart(*roles: str) -> Callable[[Stage], None]:
    """kill -9, and start again."""

    def do(stage: Stage) -> None:
        for role in roles:
            stage.kill(role)
        for role in reversed(roles):
            stage.start(role)

    return do


def volumes_are_their_own(stage: Stage) -> None:
    """Once the restart is mended, no candle of the last minutes holds more than was traded in it."""
    minutes = Interval("1m", 60, 390)

    def surplus() -> list[str]:
        found: list[str] = []
        for token in stage.kite.market.tokens.tolist():
            rows = read_candles(stage.client, stage.settings.keys, token, "1m", 30)
            traded = {
                row[0]: row[5] for row in kites(stage, token, minutes, rows[0].start, rows[-1].start + 60)
            }
            found += [f"{token}: {each}" for each in rows if each.volume > traded[each.start]]
        return found

    wait_until(lambda: not surplus(), timeout_seconds=60, what="the minutes of the restart to be mended")


def void(_: object) -> None:
    """For lambdas that return something."""


# --- the play


@contextlib.contextmanager
def staged(
    settings: Settings,
    client: redis.Redis,
    folder: Path,
    rows: list[dict[str, Any]],
    *,
    begin: str,
    speed: float,
    lead_seconds: float = LEAD_SECONDS,
) -> Iterator[Stage]:
    """Kite and all workers, ready when the market's clock says `begin`."""
    clock = Clock(at(begin), time.time() + lead_seconds, speed)
    with SimulatedKite(rows, clock=clock, sessions=load_sessions("market")) as kite:
        env = {
            **settings_env(settings),
            **kite.environment(),
            "PKB_INSTRUMENTS": ",".join(str(row["instrument_token"]) for row in rows),
            "PKB_LEASE_SECONDS": "1",
            "PKB_DATA_DIR": str(folder / "data"),
        }
        stage = Stage(settings, client, kite, folder, env)
        try:
            synced = run_pkb("instruments", "sync", env=env)
            assert synced.returncode == 0, synced.stderr
            # The first login uses the TOTP of this half minute; the next login may then have to wait.
            env["PKB_KITE_ACCESS_TOKEN"] = kite.accounts.open_session()
            for role in ("aggregate", "jobs", "ingest"):
                stage.start(role)
            yield stage
        finally:
            for role in list(stage.workers):
                stage.kill(role)


def play(stage: Stage, acts: Sequence[Act], end: str, say: Callable[[str], None] = void) -> float:
    """All acts, and then wait until what they broke is repaired.

    Each waits for its time and until the workers receive ticks: on a slow machine acts and end come later.

    Returns:
        When the day ended: `end`, or the first full minute after the last act's recovery; epoch seconds.
    """
    for act in sorted(acts, key=lambda act: act.at_s):
        stage.wait_for(act.at_s)
        stage.wait_until_streaming()
        say(f"{datetime.fromtimestamp(stage.kite.now_ms() / 1000, IST):%H:%M:%S}  {act.name}")
        act.do(stage)
    stage.wait_until_streaming()
    end_s = max(at(end), stage.kite.now_ms() // 60_000 * 60 + 120)
    stage.wait_for(end_s)
    say(f"{datetime.fromtimestamp(end_s, IST):%H:%M}  the end; waiting for the last repairs")
    wait_until_applied(stage)
    return end_s


def wait_until_applied(stage: Stage) -> None:
    """Until no job is requested, queued, running or scheduled."""
    queue = open_queue(stage.settings)
    keys = (
        stage.settings.keys.job_outbox(),
        queue.key,
        queue.intermediate_queue_key,  # between a worker's dequeue and its child's start
        queue.started_job_registry.key,
        queue.scheduled_job_registry.key,
    )

    def is_quiet() -> bool:
        # In one command: read one after the other, a job that moves meanwhile is in none of them.
        return not stage.client.exists(*keys)

    try:
        wait_until(is_quiet, timeout_seconds=SETTLE_SECONDS_MAX, what="the jobs", poll_seconds=0.1)
        failed = queue.failed_job_registry.get_job_ids()
        assert failed == [], stage.log("jobs")[-3000:]
    finally:
        queue.connection.close()


# --- the long one

LONG_ACTS = (
    Act(at("10:05"), "the network is gone for three minutes", cut(3)),
    Act(at("11:00"), "the session expires", expire),
    Act(at("12:00:20"), "kill -9 of ingest and aggregator, and a restart", restart("ingest", "aggregate")),
    Act(at("12:05"), "every minute has its own volume only", volumes_are_their_own),
    Act(at("12:40"), "kill -9 of the jobs worker, and a restart", restart("jobs")),
    Act(at("13:10"), "heartbeats but no ticks for five minutes", mute(5)),
)


def main() -> int:
    """The long rehearsal; 0 when nothing differs."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--begin", default="08:55")
    options.add_argument("--end", default="15:45")
    options.add_argument("--speed", type=float, default=60)
    options.add_argument("--per-segment", type=int, default=4)
    options.add_argument("--keep", type=Path, help="a folder for the logs")
    chosen = options.parse_args()
    rows = with_futures(cast(chosen.per_segment), stocks=chosen.per_segment - 1)
    acts = [act for act in LONG_ACTS if at(chosen.begin) < act.at_s < at(chosen.end)]
    with contextlib.ExitStack() as stack:
        folder = chosen.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        server = stack.enter_context(attach(load_settings(data_dir=folder / "server", redis_url=None)))
        client = stack.enter_context(redis.Redis.from_url(server.url))
        settings = load_settings(redis_url=server.url, data_dir=folder / "data")
        stage = stack.enter_context(
            staged(settings, client, folder, rows, begin=chosen.begin, speed=chosen.speed)
        )
        print(f"{len(rows)} instruments, {chosen.begin} to {chosen.end} at {chosen.speed:g}×")
        end_s = play(stage, acts, chosen.end, print)
        calm_s = max([at(chosen.begin), *(act.at_s for act in acts)]) + CALM_SECONDS
        verdict = judge(stage, rows, at(chosen.begin), end_s, calm_s)
        code, complaints = doctor(stage)
        stage.stop()
    for line in [*verdict.differences[:20], *complaints]:
        print(line)
    print(
        f"{verdict.rows:,} rows compared, {len(verdict.differences):,} differ, "
        f"{verdict.backfilled:,} were backfilled, {verdict.auction:,} are minutes of the closing auction; "
        f"pkb doctor: {code}"
    )
    return int(bool(verdict.differences) or code != 0 or not verdict.rows)


if __name__ == "__main__":
    sys.exit(main())
