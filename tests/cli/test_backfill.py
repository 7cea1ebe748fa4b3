"""`pkb backfill`: what it compares, what it says, and what it leaves to the queue."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from pkbrokers_redis.jobs.context import JobContext
from pkbrokers_redis.jobs.progress import Progress
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.queue import job_id, open_queue
from pkbrokers_redis.store.rows import read_candles
from tests.cli.conftest import Pkb
from tests.jobs.conftest import ROWS, aggregator, clock, context, kite, kite_settings

__all__ = ["aggregator", "clock", "context", "kite", "kite_settings"]  # fixtures
pytestmark = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)

STOCK = next(row for row in ROWS if int(row["instrument_token"]) & 0xFF == 1)
SYMBOL, TOKEN = f"{STOCK['exchange']}:{STOCK['tradingsymbol']}", int(STOCK["instrument_token"])


def test_a_backfilled_day_agrees_afterwards(
    context: JobContext, aggregator: Callable[[], None], pkb: Pkb
) -> None:
    aggregator()
    ended = pkb("backfill", SYMBOL, "--day", "2026-08-05")
    assert ended.code == 0, ended.err
    assert ended.out == (
        "2026-08-05: 105 1m rows of 1 instruments at Kite: 105 were missing here\n105 replaced\n"
    )
    assert len(read_candles(context.client, context.keys, TOKEN, "1m", 1000)) == 105
    again = json.loads(pkb("backfill", SYMBOL, "--json").out)  # the last session is today's
    assert (again["day"], again["rows"], again["matched"]) == ("2026-08-05", 105, 105)


def test_a_dry_run_only_prints_what_would_change(context: JobContext, pkb: Pkb) -> None:
    ended = pkb("backfill", SYMBOL, "--day", "2026-08-05", "--dry-run")
    assert ended.out.endswith("105 would be replaced\n")
    assert context.client.exists(context.keys.repairs(context.keys.shard_of(TOKEN))) == 0


def test_without_symbols_all_streamed_instruments_are_backfilled(
    context: JobContext, pkb: Pkb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PKB_INSTRUMENTS", ",".join(str(row["instrument_token"]) for row in ROWS[:3]))
    found = json.loads(pkb("backfill", "--interval", "60m", "--dry-run", "--json").out)
    assert (found["instruments"], found["missing"]) == (3, 3)  # one of 60 minutes is over


def test_without_an_aggregator_the_rows_wait_and_a_note_says_so(context: JobContext, pkb: Pkb) -> None:
    ended = pkb("backfill", SYMBOL)
    assert ended.code == 0
    assert "the aggregators have not applied it yet" in ended.err


def test_an_interrupted_run_resumes_and_says_so(context: JobContext, pkb: Pkb) -> None:
    second = next(row for row in ROWS if row is not STOCK and int(row["instrument_token"]) & 0xFF == 1)
    tokens = [TOKEN, int(second["instrument_token"])]
    arguments = {"day": "2026-08-05", "tokens": tokens, "interval": "1m", "dry_run": True}
    progress = Progress(context.client, context.keys, job_id("repair_day", arguments))
    progress.begin(map(str, tokens))
    progress.note(str(TOKEN), {"rows": 7}, 1, 2)
    ended = pkb("backfill", *map(str, tokens), "--day", "2026-08-05", "--dry-run", "--json")
    assert "1 of 2 instruments are done" in ended.err
    assert json.loads(ended.out)["rows"] == 7 + 105


def test_a_backfill_can_be_enqueued(context: JobContext, pkb: Pkb) -> None:
    ended = pkb("backfill", SYMBOL, "--enqueue", "--json")
    job = json.loads(ended.out)["job"]
    queue = open_queue(context.settings)
    assert queue.get_job_ids() == [job]
    assert json.loads(pkb("backfill", SYMBOL, "--enqueue", "--json").out) == {"job": job, "new": False}
    queue.connection.close()


@pytest.mark.parametrize(
    "arguments",
    [("--day", "soon"), ("--interval", "2m"), ("--interval", "7m"), ("NSE:NONESUCH",)],
)
def test_a_mistake_is_one_line(context: JobContext, pkb: Pkb, arguments: tuple[str, ...]) -> None:
    ended = pkb("backfill", *arguments)
    assert ended.code == 2
    assert ended.err.startswith("pkb: ") and ended.err.count("\n") == 1


def test_a_kite_without_a_session_is_one_line(
    context: JobContext, pkb: Pkb, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("API_KEY", "API_SECRET", "USER_ID", "PASSWORD", "TOTP_SECRET"):
        monkeypatch.delenv(f"PKB_KITE_{name}")
    ended = pkb("backfill", SYMBOL)
    assert ended.code == 2
    assert "pkb login" in ended.err and ended.err.count("\n") == 1


def test_every_command_that_enqueues_prints_the_same(
    pkb: Pkb, store_env: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PKB_GITHUB_URL", "file:///nowhere")
    for words in (["snapshot", "ticks"], ["sync", "push"], ["sync", "pull"]):
        first, second = (json.loads(pkb(*words, "--enqueue", "--json").out) for _ in range(2))
        assert first["new"] and second == {"job": first["job"], "new": False}
