"""The bot's alerts under load: does each fire once, how long from tick to message, what CPU does it take?

    python -m benchmarks.alerts [--alerts 200] [--instruments 2000] [--rate 20000] [--seconds 30]

Ticks go straight into the streams at a steady rate; each alert's instrument jumps over its level at a random
moment and stays there. The bot runs in its own process and writes to a local Bot API server.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from dataclasses import dataclass

import numpy as np
import redis

from benchmarks.harness import (
    cpu_seconds,
    machine,
    private_store,
    running,
    tick_stream,
    tokens,
    wait_for,
    worker_env,
)
from pkbrokers_redis.bot.alerts.rules import Alert
from pkbrokers_redis.bot.alerts.store import AlertStore
from pkbrokers_redis.candles.model import LAST_PRICE, TOKEN
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.cluster import Pipe
from pkbrokers_redis.store.tick_writer import queue_batches
from tests.bot.telegram import TOKEN as BOT_TOKEN
from tests.bot.telegram import Telegram

FRAME_TICKS = 200
CHATS = [1001, 1002, 1003, 1004]
JUMP = 1_000.0
ALERTED = re.compile(r"<b>(\d+)</b> rose to")


@dataclass
class Result:
    """Seconds from the tick's frame to the message at Telegram's door."""

    delays: list[float]
    missing: int
    repeated: int
    ticks: int
    seconds: float
    cpu_seconds: float


def set_alerts(client: redis.Redis, settings: Settings, count: int, instruments: int) -> np.ndarray:
    """Alerts above what the random walk reaches; the positions of their instruments."""
    chosen = np.random.default_rng(7).choice(instruments, count, replace=False)
    store = AlertStore(client, settings.keys)
    for n, place in enumerate(chosen.tolist()):
        token = int(tokens(instruments)[place])
        chat = CHATS[n % len(CHATS)]
        store.add(Alert(0, chat, chat, token, str(token), "above", 100.0 + place + JUMP / 2, False, 0.0), [])
    return chosen


def feed(
    client: redis.Redis, settings: Settings, chosen: np.ndarray, instruments: int, rate: float, seconds: float
) -> tuple[dict[int, float], int]:
    """Send for so long; when each alert's instrument jumped (epoch s, when its frame was written)."""
    ticks = tick_stream(int(rate * seconds), instruments, int(time.time() * 1000), rate)
    # In the middle of the run, at a tick of its own each.
    jump_at = np.random.default_rng(8).uniform(0.1, 0.9, len(chosen)) * len(ticks)
    jumped: dict[int, float] = {}
    first_row: dict[int, int] = {}
    for place, at in zip(chosen.tolist(), jump_at.tolist(), strict=True):
        rows = np.flatnonzero(ticks[:, TOKEN] == tokens(instruments)[place])
        rows = rows[rows >= at]
        ticks[rows, LAST_PRICE] += JUMP
        first_row[int(rows[0])] = int(tokens(instruments)[place])
    pipe = Pipe(client)
    began = time.time()
    for seq, first in enumerate(range(0, len(ticks), FRAME_TICKS), 1):
        wait = began + first / rate - time.time()
        if wait > 0:
            time.sleep(wait)
        now = time.time()
        queue_batches(
            pipe, settings.keys, "bench", [(seq, int(now * 1000), ticks[first : first + FRAME_TICKS])]
        )
        pipe.execute()
        for row in range(first, first + FRAME_TICKS):
            if row in first_row:
                jumped[first_row[row]] = now
    return jumped, len(ticks)


def run(alerts: int, instruments: int, rate: float, seconds: float) -> Result:
    """One run."""
    with private_store() as (settings, client), Telegram() as telegram:
        chosen = set_alerts(client, settings, alerts, instruments)
        env = worker_env(
            settings,
            PKB_TELEGRAM_TOKEN=BOT_TOKEN,
            PKB_TELEGRAM_API_URL=telegram.url,
            PKB_TELEGRAM_CHATS=",".join(map(str, CHATS)),
        )
        with running("bot", env) as process:
            wait_for("the bot", lambda: client.hexists(settings.keys.bot_position(), "0"))
            cpu, began = cpu_seconds(process), time.monotonic()
            jumped, ticks = feed(client, settings, chosen, instruments, rate, seconds)
            fed = time.monotonic() - began
            used = cpu_seconds(process) - cpu
            wait_for("the last alert", lambda: len(_notified(telegram)) >= alerts, seconds=20.0)
            notified = _notified(telegram)
        delays = [at - jumped[token] for token, at in notified if token in jumped]
        seen = {token for token, _ in notified}
        return Result(delays, alerts - len(seen), len(notified) - len(seen), ticks, fed, used)


def _notified(telegram: Telegram) -> list[tuple[int, float]]:
    return [(int(token), m.at) for m in telegram.messages() for token in ALERTED.findall(m.text)]


def main() -> None:
    """Print the figures."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    arguments.add_argument("--alerts", type=int, default=200)
    arguments.add_argument("--instruments", type=int, default=2_000)
    arguments.add_argument("--rate", type=float, default=20_000)
    arguments.add_argument("--seconds", type=float, default=30.0)
    given = arguments.parse_args()
    found = run(given.alerts, given.instruments, given.rate, given.seconds)
    cuts = statistics.quantiles(found.delays, n=100)
    print(machine())
    print(
        f"{given.alerts} alerts, {given.instruments} instruments, {found.ticks / found.seconds:,.0f} ticks/s"
    )
    print(f"each once: {found.missing} missing, {found.repeated} repeated")
    print(
        f"tick to message: median {cuts[49]:.3f} s, p99 {cuts[98]:.3f} s, longest {max(found.delays):.3f} s"
    )
    print(f"CPU of the bot's process: {found.cpu_seconds / found.seconds:.1%} of a core")


if __name__ == "__main__":
    main()
