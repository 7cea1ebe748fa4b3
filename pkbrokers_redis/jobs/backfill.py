"""Our rows against Kite's, one by one. Pure.

Candles from Kite's history: the minutes of an outage, a late start's morning, a day that is checked.

    ingest was deaf 10:31:12–10:33:40  ─►  repair_gap   waits until 10:33 is over, asks for 10:31 … 10:33
    a new instrument, a fresh Redis    ─►  warm_start   the session's minutes so far, a year of days
    pkb backfill --day 2026-11-20      ─►  repair_day   compares all minutes, replaces what differs

Rows go to the shard's repair stream; the aggregator replaces its own, rebuilds the longer ones, announces.
Each job may be run twice, goes on after a kill with the instruments that are left, and works in slices.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any, NamedTuple

from rq import get_current_job

from pkbrokers_redis import logs
from pkbrokers_redis.candles.model import DAY, Candle, Interval, bucket_start_s, find_interval
from pkbrokers_redis.errors import (
    KiteError,
    KiteThrottled,
    KiteUnavailable,
    LoginRefused,
    PkbError,
    SessionExpired,
)
from pkbrokers_redis.jobs.context import Desk, open_desk
from pkbrokers_redis.jobs.progress import Figures, Listener, Progress
from pkbrokers_redis.jobs.time_slicing import SLICE_SECONDS, come_again, current_job_id, run_parts
from pkbrokers_redis.kite.history_api import KITE_INTERVALS, HistoryRow, kite_interval
from pkbrokers_redis.store.queue import enqueue, job_id, queue_of
from pkbrokers_redis.store.repairs import send_rows, wait_applied
from pkbrokers_redis.store.rows import read_window

PRICE_EPSILON = 1e-7  # prices have at most seven decimals on the wire


class Comparison(NamedTuple):
    """How many rows: Kite's in all, equal, different, only Kite's, only ours; and equal ones of ours that are
    marked as not whole."""

    rows: int
    matched: int
    changed: int
    missing: int
    extra: int
    marked: int

    @property
    def is_clean(self) -> bool:
        """Whether there is nothing to send. Rows of ours that Kite lacks stay, whatever is sent."""
        return not (self.changed or self.missing or self.marked)


def compare(ours: Sequence[Candle], theirs: Sequence[HistoryRow]) -> Comparison:
    """Both of the same instrument, interval and span."""
    mine = {candle.start: candle for candle in ours}
    matched = changed = missing = marked = 0
    for row in theirs:
        candle = mine.pop(row.start, None)
        if candle is None:
            missing += 1
        elif is_equal(candle, row):
            matched += 1
            marked += candle.flag in ("gap", "partial")
        else:
            changed += 1
    return Comparison(len(theirs), matched, changed, missing, len(mine), marked)


def is_equal(candle: Candle, row: HistoryRow) -> bool:
    """Prices and volume; open interest changes without trades, and Kite samples it elsewhere."""
    return candle.volume == row.volume and all(
        abs(getattr(candle, name) - getattr(row, name)) < PRICE_EPSILON
        for name in ("open", "high", "low", "close")
    )


APPLIED_SECONDS_MAX = (
    20.0  # an aggregator takes milliseconds; for one that is away the rows wait in the stream
)
SUBSCRIBED_SECONDS = 5.0  # from a warm start's request to the first packet of the feed
WAIT_SECONDS_MAX = 86_400.0  # for a candle to be over; a later end is a mistake

# What another try or another session may mend. All else that Kite says is about the one instrument.
MAY_HEAL = (KiteUnavailable, KiteThrottled, SessionExpired, LoginRefused)

log = logs.get("backfill")


@dataclass
class Sender:
    """Hands rows to the aggregators, and knows until when they were applied."""

    desk: Desk
    why: str
    newest: dict[int, tuple[int, str]] = field(default_factory=dict)  # shard → (token, entry id)

    def send(self, token: int, interval: str, from_s: int, to_s: int, rows: Sequence[HistoryRow]) -> None:
        """One instrument's rows of [from_s, to_s)."""
        keys = self.desk.keys
        entry = send_rows(self.desk.client, keys, token, interval, from_s, to_s, rows, self.why)
        self.newest[keys.shard_of(token)] = token, entry

    def are_applied(self, seconds_max: float = APPLIED_SECONDS_MAX) -> bool:
        """Whether the aggregators have applied all that was sent; waits for those that are there."""
        client, keys = self.desk.client, self.desk.keys
        return all(
            wait_applied(client, keys, token, entry, seconds_max if client.exists(keys.lease(shard)) else 0.0)
            for shard, (token, entry) in self.newest.items()
        )


# --- the jobs


def repair_gap(
    tokens: Sequence[int], from_ms: float, to_ms: float, why: str = "gap", *, desk: Desk | None = None
) -> Any:
    """Replace the base candles that an outage [from_ms, to_ms) touched by Kite's; epoch ms, market time.

    Comes again when the last of them is over. Returns counts: `instruments rows refused too_old`, and whether
    they were `applied`.
    """
    with _at(desk) as desk:
        if desk.seconds_until_known(int(to_ms // 1000)) > WAIT_SECONDS_MAX:
            raise PkbError(
                f"a repair until {int(to_ms)} ends in the future", "give epoch milliseconds of market time"
            )
        last_s = max((desk.span_s(int(token), from_ms, to_ms)[1] for token in tokens), default=0)
        if (seconds := desk.seconds_until_known(last_s)) > 0:
            return come_again(seconds)
        sender = Sender(desk, why)

        def hint(part: str) -> Figures:
            token = int(part)
            from_s, to_s = desk.span_s(token, from_ms, to_ms)
            begins_s = max(from_s, desk.kept_since_s(token))
            if from_s >= to_s:
                return {}
            if begins_s >= to_s:
                return {"too_old": 1}
            rows = ask(desk, token, desk.base.name, begins_s, to_s)
            if rows is None:
                return {"refused": 1}
            sender.send(token, desk.base.name, begins_s, to_s, rows)
            return {"rows": len(rows)}

        arguments = {"tokens": list(tokens), "from_ms": from_ms, "to_ms": to_ms, "why": why}
        progress = Progress(desk.client, desk.keys, current_job_id(job_id("repair_gap", arguments)))
        return _finish(sender, progress, run_parts(progress, _parts(desk, tokens), hint), len(tokens))


def warm_start(tokens: Sequence[int], why: str = "warm", *, desk: Desk | None = None) -> Any:
    """Give instruments that nobody has watched the session's base candles so far, and their daily ones.

    The most active first. The candle in which the watching began is repaired once it is over. Returns
    counts: `instruments rows days refused`, and whether they were `applied`.
    """
    with _at(desk) as desk:
        sender = Sender(desk, why)
        # The candle of then is ours in part only.
        began_s = _requested_s(desk) + int(SUBSCRIBED_SECONDS * desk.clock.speed)

        def warm(part: str) -> Figures:
            token = int(part)
            figures = _warm_minutes(desk, sender, token, began_s) | _warm_days(desk, sender, token)
            return {name: count for name, count in figures.items() if count}

        progress = Progress(
            desk.client, desk.keys, current_job_id(job_id("warm_start", {"tokens": list(tokens)}))
        )
        figures = run_parts(progress, _parts(desk, tokens), warm)
        early = sorted(int(part) for part, each in progress.figures().items() if each.get("early"))
        if early and (job := get_current_job()) is not None:
            # To the end of the candle that began in part; from the open once more, as that is no further
            # request: then history has answered for each longer candle that began before we watched.
            opened_s = min(desk.session_s(token, desk.last_session(token))[0] for token in early)
            to_s = max(desk.span_s(token, began_s * 1000, began_s * 1000 + 1)[1] for token in early)
            span = {"from_ms": opened_s * 1000, "to_ms": to_s * 1000}
            enqueue(queue_of(job.connection), "repair_gap", {"tokens": early, **span, "why": why})
        return _finish(sender, progress, figures, len(tokens))


def repair_day(
    day: str,
    tokens: Sequence[int],
    interval: str = "1m",
    dry_run: bool = False,
    *,
    desk: Desk | None = None,
    listener: Listener | None = None,
    seconds_max: float | None = SLICE_SECONDS,
) -> Any:
    """Compare a day's candles with Kite's, and replace those that differ; `dry_run` only compares.

    Returns counts: `instruments rows matched changed missing extra marked sent refused too_old`, and whether
    what was sent is `applied`. `missing` rows are Kite's alone, `extra` ours alone (they stay), `marked` are
    equal ones of ours that said "gap" or "partial". Raises UnknownInterval where Kite or the store has none.
    """
    with _at(desk) as desk:
        chosen = kept_interval(desk, interval)
        local = date.fromisoformat(day)
        sender = Sender(desk, "day")

        def check(part: str) -> Figures:
            return _check_day(desk, sender, int(part), chosen, local, dry_run)

        arguments = {"day": day, "tokens": list(tokens), "interval": chosen.name, "dry_run": dry_run}
        job = current_job_id(job_id("repair_day", arguments))
        progress = Progress(desk.client, desk.keys, job, listener)
        figures = run_parts(progress, _parts(desk, tokens), check, seconds_max=seconds_max)
        return _finish(sender, progress, figures, len(tokens))


# --- one instrument


def kept_interval(desk: Desk, name: str) -> Interval:
    """An interval that the store keeps and Kite has. Raises UnknownInterval."""
    chosen = find_interval(desk.settings.intervals, name)
    kite_interval(chosen.name)
    return chosen


def ask(desk: Desk, token: int, interval: str, from_s: int, to_s: int) -> list[HistoryRow] | None:
    """Kite's candles of [from_s, to_s); None where Kite has nothing to say on this instrument.

    Those of a length that Kite lacks are made of its minutes. Raises what may heal: Kite away, too many
    requests, no session.
    """
    try:
        if interval in KITE_INTERVALS:
            return desk.history.rows(token, interval, from_s, to_s)
        seconds = find_interval(desk.settings.intervals, interval).seconds
        return _joined(desk, token, seconds, desk.history.rows(token, "1m", from_s, to_s))
    except MAY_HEAL:
        raise
    except KiteError as error:
        log.warning("history_refused", token=token, interval=interval, why=error.message)
        return None


def _joined(desk: Desk, token: int, seconds: int, minutes: Sequence[HistoryRow]) -> list[HistoryRow]:
    """An instrument's minutes as longer candles."""
    schedule = desk.schedule_of(token)
    parts: dict[int, list[HistoryRow]] = {}
    for row in minutes:
        day = desk.sessions.day(schedule, row.start * 1000)
        parts.setdefault(bucket_start_s(day, seconds, row.start * 1000), []).append(row)
    return [
        HistoryRow(
            start, rows[0].open, max(row.high for row in rows), min(row.low for row in rows),
            rows[-1].close, sum(row.volume for row in rows), rows[-1].oi,
        )
        for start, rows in parts.items()
    ]  # fmt: skip


def _warm_minutes(desk: Desk, sender: Sender, token: int, began_s: int) -> Figures:
    local = desk.last_session(token)
    opened_s, closed_s = desk.session_s(token, local)
    until_s = min(closed_s, desk.known_until_s(token))
    # The candle in which we began to watch is still forming: somebody has to come back for it.
    early = int(opened_s <= began_s < closed_s and until_s <= began_s)
    if opened_s >= until_s:
        return {"early": early}
    rows = ask(desk, token, desk.base.name, opened_s, until_s)
    if rows is None:
        return {"refused": 1}
    sender.send(token, desk.base.name, opened_s, until_s, rows)
    return {"rows": len(rows), "early": early}


def _warm_days(desk: Desk, sender: Sender, token: int) -> Figures:
    """The `day` candles up to yesterday: today's comes with the packets."""
    interval = next((each for each in desk.settings.intervals if each.name == DAY), None)
    if interval is None:
        return {}
    today = desk.sessions.date_of(int(desk.clock()))
    midnight_s = desk.sessions.on_date(desk.schedule_of(token), today).day_start_ms // 1000
    since = today - timedelta(days=interval.keep * 3 // 2 + 10)  # weekends and holidays are no rows
    since_s = desk.sessions.on_date(desk.schedule_of(token), since).day_start_ms // 1000
    rows = ask(desk, token, DAY, since_s, midnight_s)
    if not rows:
        return {}
    rows = rows[-interval.keep :]
    sender.send(token, DAY, rows[0].start, midnight_s, rows)
    return {"days": len(rows)}


def _check_day(
    desk: Desk, sender: Sender, token: int, interval: Interval, local: date, dry_run: bool
) -> Figures:
    opened_s, closed_s = desk.session_s(token, local)
    ours, since_s = _our_rows(desk, token, interval, opened_s, closed_s)
    until_s = _over_until_s(desk, token, interval, opened_s, closed_s)
    begins_s = max(opened_s, since_s)
    if begins_s >= until_s:
        return {"too_old": 1} if opened_s < until_s else {}
    asked_s = desk.sessions.on_date(desk.schedule_of(token), local).day_start_ms // 1000
    theirs = ask(desk, token, interval.name, begins_s if interval.seconds else asked_s, until_s)
    if theirs is None:
        return {"refused": 1}
    if not interval.seconds:  # Kite stamps a day with its midnight, we with its open
        theirs = [row._replace(start=opened_s) for row in theirs]
    theirs = [row for row in theirs if begins_s <= row.start < until_s]
    found = compare([candle for candle in ours if begins_s <= candle.start < until_s], theirs)
    figures = {name: count for name, count in found._asdict().items() if count}
    if dry_run or found.is_clean:
        return figures
    sender.send(token, interval.name, begins_s, until_s, theirs)
    return {**figures, "sent": 1}


def _our_rows(
    desk: Desk, token: int, interval: Interval, opened_s: int, closed_s: int
) -> tuple[list[Candle], int]:
    """Our candles of a session, and since when the list has them: a full one has forgotten the older."""
    done, current = read_window(desk.client, desk.keys, token, interval.name, interval.keep)
    since_s = done[0].start if len(done) >= interval.keep else 0
    rows = [*done, current] if current is not None else done
    return [candle for candle in rows if opened_s <= candle.start < closed_s], since_s


def _over_until_s(desk: Desk, token: int, interval: Interval, opened_s: int, closed_s: int) -> int:
    """The end of the session's last candle that is over and known to Kite."""
    known_s = desk.known_until_s(token)
    if known_s >= closed_s:
        return closed_s
    if not interval.seconds or known_s <= opened_s:
        return opened_s
    return opened_s + (known_s - opened_s) // interval.seconds * interval.seconds


# --- around


@contextmanager
def _at(desk: Desk | None) -> Iterator[Desk]:
    if desk is not None:
        yield desk
        return
    with open_desk() as opened:
        yield opened


def _parts(desk: Desk, tokens: Sequence[int]) -> list[str]:
    return [str(token) for token in desk.by_activity([int(token) for token in tokens])]


def _requested_s(desk: Desk) -> int:
    """When the job was made; epoch s, market time."""
    job = get_current_job()
    age_seconds = 0.0
    if job is not None and job.created_at is not None:
        age_seconds = max(0.0, time.time() - job.created_at.timestamp())
    return int(desk.clock() / 1000 - age_seconds * desk.clock.speed)


def _finish(sender: Sender, progress: Progress, figures: Figures | None, instruments: int) -> Any:
    """Another slice, or the result."""
    if figures is None:
        return come_again()
    result = {"instruments": instruments, **figures, "applied": sender.are_applied()}
    progress.forget()
    log.info("backfilled", why=sender.why, **result)
    return result
