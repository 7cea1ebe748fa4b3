"""Redis is killed for a while under a steady feed: is anything lost, and how fast is it caught up?

python -m benchmarks.redis_away [SECONDS_AWAY] [TICKS_PER_SECOND]     default 60 and 10,000
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import redis

from benchmarks.harness import INSTRUMENTS, committed, machine, running, tokens, wait_for, worker_env
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.embedded import find_binary

FRAME_PACKETS = 40  # 250 frames a second at 10,000 ticks a second
BEFORE_SECONDS, AFTER_SECONDS = 5, 15
CAUGHT_UP_MS = 500  # behind the feed, from the frame's arrival to its commit


@dataclass(frozen=True)
class Outage:
    """What a run found."""

    ticks: int
    counted: int
    seconds_away: float
    seconds_to_catch_up: float
    ticks_per_second: float
    spool_bytes_max: int
    ingest_bytes_max: int
    figures: dict[str, str]

    @property
    def catch_up_rate(self) -> float:
        """Ticks a second from Redis's return until nothing was left behind."""
        backlog = (self.seconds_away + self.seconds_to_catch_up) * self.ticks_per_second
        return backlog / self.seconds_to_catch_up


@contextlib.contextmanager
def _server(folder: Path, port: int) -> Iterator[None]:
    """A Redis with an append-only file, killed (-9) at the end of the block."""
    argv = [str(find_binary("valkey")), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    options = ["--save", "", "--appendonly", "yes", "--logfile", str(folder / "log")]
    process = subprocess.Popen([*argv, *options])
    try:
        with redis.Redis(port=port) as client:
            wait_for("Redis", lambda: _answers(client))
        yield
    finally:
        process.kill()
        process.wait()


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


def _behind_ms(client: redis.Redis, settings: Settings) -> float:
    """How old the newest frame of the slowest shard is; endless while one is not applied."""
    if committed(client, settings)[1] > settings.shards:
        return float("inf")
    newest: list[Any] = [client.xrevrange(settings.keys.ticks(s), count=1) for s in range(settings.shards)]
    return time.time() * 1000 - min(float(each[0][1][b"at"]) for each in newest)


def _ticks_counted(client: redis.Redis, settings: Settings) -> int:
    """The ticks in all minute rows."""
    pipeline = client.pipeline(transaction=False)
    for token in tokens().tolist():
        pipeline.lrange(settings.keys.candles(token, "1m"), 0, -1)
        pipeline.hget(settings.keys.current(token), "1m")
    replies = pipeline.execute()
    rows = [row for reply in replies for row in (reply if isinstance(reply, list) else [reply]) if row]
    return sum(json.loads(row)[7] for row in rows)


def _figures(client: redis.Redis, settings: Settings) -> dict[str, str]:
    for key in client.scan_iter(match=f"{settings.prefix}:worker:*"):
        fields: Any = client.hgetall(key)
        if fields.get(b"role") == b"ingest":
            return {name.decode(): value.decode() for name, value in fields.items()}
    return {}


def outage(seconds_away: float = 60.0, ticks_per_second: int = 10_000, **overrides: Any) -> Outage:
    """One run: 5 s of feed, Redis away, and the feed goes on until everything is caught up."""
    rounds = -(-int((BEFORE_SECONDS + seconds_away + AFTER_SECONDS) * ticks_per_second) // INSTRUMENTS)
    ticks = rounds * INSTRUMENTS
    with TemporaryDirectory(prefix="pkb-bench-") as name, socket.socket() as probe:
        folder = Path(name)
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
        probe.close()
        settings = load_settings(
            redis_url=f"redis://127.0.0.1:{port}/0", data_dir=folder / "data", sessions="always", **overrides
        )
        argv = [
            sys.executable,
            "-m",
            "benchmarks.feeder",
            str(ticks),
            str(FRAME_PACKETS),
            str(ticks_per_second),
        ]
        feeder = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert feeder.stdout and feeder.stdin
        env = worker_env(
            settings, PKB_REDIS_URL=f"redis://127.0.0.1:{port}/0", PKB_LOG_LEVEL="error",
            PKB_KITE_WS_URL=f"ws://127.0.0.1:{int(feeder.stdout.readline())}",
            PKB_INSTRUMENTS=",".join(map(str, tokens().tolist())),
            PKB_BUFFER_MAX_BYTES=str(settings.buffer_max_bytes),
        )  # fmt: skip
        client = redis.Redis(port=port)
        spool = folder / "data" / "spool"
        spool_bytes = ingest_bytes = 0
        with contextlib.ExitStack() as stack:
            with _server(folder, port):
                stack.enter_context(running("aggregate", env))
                wait_for("the aggregator", lambda: client.exists(settings.keys.cursor(0)))
                ingest = stack.enter_context(running("ingest", env))
                wait_for("the first ticks", lambda: committed(client, settings)[0] > 0, every=0.005)
                time.sleep(BEFORE_SECONDS)
            gone_at = time.monotonic()
            while time.monotonic() < gone_at + seconds_away:
                spool_bytes = max(
                    spool_bytes, sum(each.stat().st_size for each in spool.rglob("frames.sqlite*"))
                )
                ingest_bytes = max(ingest_bytes, _memory(ingest))
                time.sleep(0.2)
            stack.enter_context(_server(folder, port))
            back_at = time.monotonic()
            caught_at = wait_for(
                "catching up", lambda: _behind_ms(client, settings) < CAUGHT_UP_MS, seconds_away + 120
            )
            ingest_bytes = max(ingest_bytes, _memory(ingest))
            feeder.stdout.readline()
            wait_for("the end", lambda: _behind_ms(client, settings) > 3 * CAUGHT_UP_MS)
            wait_for("the last tick", lambda: committed(client, settings)[1] == 0)
            wait_for("the last heartbeat", lambda: _figures(client, settings).get("spool_bytes") == "0")
            result = Outage(
                ticks - INSTRUMENTS,  # the first of each is its baseline
                _ticks_counted(client, settings),
                back_at - gone_at, caught_at - back_at, ticks_per_second,
                spool_bytes, ingest_bytes, _figures(client, settings),
            )  # fmt: skip
        feeder.stdin.close()
        feeder.wait(10)
        return result


def _memory(process: psutil.Process) -> int:
    return int(process.memory_info().rss)


def main() -> None:
    """Run and print."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    rate = int(sys.argv[2]) if len(sys.argv) > 2 else 10_000
    print(machine())
    found = outage(seconds, rate)
    print(
        f"Redis away for {found.seconds_away:.1f} s at {rate:,} ticks/s",
        f"ticks sent {found.ticks:,}, counted {found.counted:,}: {found.ticks - found.counted:,} lost",
        f"caught up in {found.seconds_to_catch_up:.1f} s, at {found.catch_up_rate:,.0f} ticks/s",
        f"at most {found.spool_bytes_max / 2**20:.0f} MiB on disk,"
        f" {found.ingest_bytes_max / 2**20:.0f} MiB of memory in ingest",
        f"frames spooled {found.figures.get('frames_spooled')}, lost {found.figures.get('frames_lost')}",
        sep="\n  ",
    )


if __name__ == "__main__":
    main()
