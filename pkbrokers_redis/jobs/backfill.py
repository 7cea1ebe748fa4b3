"""Candles from Kite's history: the minutes of an outage, the morning before a late start, a checked day.

    outage 10:31:12–10:33:40         ─►  repair_gap   waits until 10:33 is complete, fetches 10:31 … 10:33
    a new instrument, a fresh Redis  ─►  warm_start   the session's minutes so far, a year of days
    pkb backfill --day 2026-11-20    ─►  repair_day   compares all minutes, replaces those that differ

Rows go to the shard's repair stream. The aggregator replaces its rows, recomputes the longer intervals and
announces the changes. Each job is repeatable, resumes after a kill, and works in slices.
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
from pkbrokers_redis.jobs.context import JobContext, open_job_context
from pkbrokers_redis.jobs.progress import (
    SLICE_SECONDS,
    Figures,
    Listener,
    Progress,
    current_job_id,
    reschedule,
    run_parts,
)
from pkbrokers_redis.kite.history_api import KITE_INTERVALS, HistoryRow, kite_interval
from pkbrokers_redis.store.queue import enqueue, job_id, queue_of
from pkbrokers_redis.store.repairs import send_rows, wait_applied
from pkbrokers_redis.store.rows import read_window

PRICE_EPSILON = 1e-7  # prices have at most seven decimals on the wire


class Comparison(NamedTuple):
    """Counts of rows: at Kite, equal, different, only at Kite, only in the store, equal but flagged."""

    rows: int
    matched: int
    changed: int
    missing: int
    extra: int
    marked: int

    @property
    def is_clean(self) -> bool:
        """Return whether nothing must be sent. Rows that Kite lacks stay in the store in any case."""
        return not (self.changed or self.missing or self.marked)


def compare(stored: Sequence[Candle], history: Sequence[HistoryRow]) -> Comparison:
    """Compare the rows of the store with Kite's, of the same instrument, interval and span."""
    unmatched = {candle.start: candle for candle in stored}
    matched = changed = missing = marked = 0
    for row in history:
        candle = unmatched.pop(row.start, None)
        if candle is None:
            missing += 1
        elif is_equal(candle, row):
            matched += 1
            marked += candle.flag in ("gap", "partial")
        else:
            changed += 1
    return Comparison(len(history), matched, changed, missing, len(unmatched), marked)


def is_equal(candle: Candle, row: HistoryRow) -> bool:
    """Compare prices and volume. Open interest changes without trades, and Kite samples it at other times."""
    return candle.volume == row.volume and all(
        abs(getattr(candle, name) - getattr(row, name)) < PRICE_EPSILON
        for name in ("open", "high", "low", "close")
    )


APPLIED_SECONDS_MAX = 20.0  # an aggregator needs milliseconds; without one the rows wait in the stream
SUBSCRIBED_SECONDS = 5.0  # from a warm start's request to the first packet of the feed
WAIT_SECONDS_MAX = 86_400.0  # until a candle is complete; a later end is a mistake

# Errors that another try or another session may end. Any other error concerns the one instrument.
TRANSIENT = (KiteUnavailable, KiteThrottled, SessionExpired, LoginRefused)

log = logs.get("backfill")


@dataclass
class Sender:
    """Sends rows to the aggregators and waits until they are applied."""

    context: JobContext
    why: str
    newest: dict[int, tuple[int, str]] = field(default_factory=dict)  # shard → (token, entry id)

    def send(self, token: int, interval: str, from_s: int, to_s: int, rows: Sequence[HistoryRow]) -> None:
        """Send one instrument's rows of [from_s, to_s), epoch seconds."""
        keys = self.context.keys
        entry = send_rows(self.context.client, keys, token, interval, from_s, to_s, rows, self.why)
        self.newest[keys.shard_of(token)] = token, entry

    def are_applied(self, seconds_max: float = APPLIED_SECONDS_MAX) -> bool:
        """Return whether the aggregators applied everything that was sent; wait for running ones."""
        client, keys = self.context.client, self.context.keys
        return all(
            wait_applied(client, keys, token, entry, seconds_max if client.exists(keys.lease(shard)) else 0.0)
            for shard, (token, entry) in self.newest.items()
        )


# --- the jobs


def repair_gap(
    tokens: Sequence[int],
    from_ms: float,
    to_ms: float,
    why: str = "gap",
    *,
    context: JobContext | None = None,
) -> Any:
    """Replace the base candles that an outage touched by Kite's.

    Args:
        tokens: the instruments of the outage.
        from_ms: begin of the outage, epoch ms of market time.
        to_ms: its end, exclusive.
        why: the reason, as the repair stream and `pkb explain` show it.
        context: tools of the caller; None opens new ones.

    Returns:
        Counts `instruments rows refused too_old` and whether they were `applied`; or a reschedule until the
        last of the candles is complete.
    """
    with _at(context) as context:
        if context.seconds_until_known(int(to_ms // 1000)) > WAIT_SECONDS_MAX:
            raise PkbError(
                f"a repair until {int(to_ms)} ends in the future", "give epoch milliseconds of market time"
            )
        last_s = max((context.span_s(int(token), from_ms, to_ms)[1] for token in tokens), default=0)
        if (seconds := context.seconds_until_known(last_s)) > 0:
            return reschedule(seconds)
        sender = Sender(context, why)

        def repair(part: str) -> Figures:
            token = int(part)
            from_s, to_s = context.span_s(token, from_ms, to_ms)
            begins_s = max(from_s, context.kept_since_s(token))
            if from_s >= to_s:
                return {}
            if begins_s >= to_s:
                return {"too_old": 1}
            rows = fetch_history(context, token, context.base.name, begins_s, to_s)
            if rows is None:
                return {"refused": 1}
            sender.send(token, context.base.name, begins_s, to_s, rows)
            return {"rows": len(rows)}

        arguments = {"tokens": list(tokens), "from_ms": from_ms, "to_ms": to_ms, "why": why}
        progress = Progress(context.client, context.keys, current_job_id(job_id("repair_gap", arguments)))
        return _finish(sender, progress, run_parts(progress, _parts(context, tokens), repair), len(tokens))


def warm_start(tokens: Sequence[int], why: str = "warm", *, context: JobContext | None = None) -> Any:
    """Fetch the session's base candles so far, and a year of days, for newly watched instruments.

    The most active instruments come first. The candle in which watching began is repaired at its end.

    Returns:
        Counts `instruments rows days refused` and whether they were `applied`.
    """
    with _at(context) as context:
        sender = Sender(context, why)
        # The candle of that moment was watched in part only.
        began_s = _requested_s(context) + int(SUBSCRIBED_SECONDS * context.clock.speed)

        def warm(part: str) -> Figures:
            token = int(part)
            figures = _warm_minutes(context, sender, token, began_s) | _warm_days(context, sender, token)
            return {name: count for name, count in figures.items() if count}

        progress = Progress(
            context.client, context.keys, current_job_id(job_id("warm_start", {"tokens": list(tokens)}))
        )
        figures = run_parts(progress, _parts(context, tokens), warm)
        early = sorted(int(part) for part, each in progress.figures().items() if each.get("early"))
        if early and (job := get_current_job()) is not None:
            # Until the end of the candle that was watched in part, from the open, at no further request:
            # then history also covers each longer candle that began before the watching.
            opened_s = min(context.session_s(token, context.last_session(token))[0] for token in early)
            to_s = max(context.span_s(token, began_s * 1000, began_s * 1000 + 1)[1] for token in early)
            span = {"from_ms": opened_s * 1000, "to_ms": to_s * 1000}
            enqueue(queue_of(job.connection), "repair_gap", {"tokens": early, **span, "why": why})
        return _finish(sender, progress, figures, len(tokens))


def repair_day(
    day: str,
    tokens: Sequence[int],
    interval: str = "1m",
    dry_run: bool = False,
    *,
    context: JobContext | None = None,
    listener: Listener | None = None,
    seconds_max: float | None = SLICE_SECONDS,
) -> Any:
    """Compare a day's candles with Kite's and replace those that differ.

    Args:
        day: ISO date.
        tokens: the instruments.
        interval: an interval of the store that Kite has.
        dry_run: only compare.

    Returns:
        Counts `instruments rows matched changed missing extra marked sent refused too_old` and whether sent
        rows are `applied`. `missing` rows exist only at Kite, `extra` rows only in the store (they
        stay), `marked` rows are equal but carry "gap" or "partial".

    Raises:
        UnknownInterval: Kite or the store has no such interval.
    """
    with _at(context) as context:
        chosen = kept_interval(context, interval)
        local = date.fromisoformat(day)
        sender = Sender(context, "day")

        def check(part: str) -> Figures:
            return _check_day(context, sender, int(part), chosen, local, dry_run)

        arguments = {"day": day, "tokens": list(tokens), "interval": chosen.name, "dry_run": dry_run}
        job = current_job_id(job_id("repair_day", arguments))
        progress = Progress(context.client, context.keys, job, listener)
        figures = run_parts(progress, _parts(context, tokens), check, seconds_max=seconds_max)
        return _finish(sender, progress, figures, len(tokens))


# --- one instrument


def kept_interval(context: JobContext, name: str) -> Interval:
    """Return an interval that the store keeps and Kite has. Raise UnknownInterval otherwise."""
    chosen = find_interval(context.settings.intervals, name)
    kite_interval(chosen.name)
    return chosen


def fetch_history(
    context: JobContext, token: int, interval: str, from_s: int, to_s: int
) -> list[HistoryRow] | None:
    """Return Kite's candles of [from_s, to_s), None if Kite refuses this instrument.

    Candles of a length that Kite lacks are made of its minutes. Raise transient errors: Kite unavailable, too
    many requests, no session.
    """
    try:
        if interval in KITE_INTERVALS:
            return context.history.rows(token, interval, from_s, to_s)
        seconds = find_interval(context.settings.intervals, interval).seconds
        return _joined(context, token, seconds, context.history.rows(token, "1m", from_s, to_s))
    except TRANSIENT:
        raise
    except KiteError as error:
        log.warning("history_refused", token=token, interval=interval, reason=error.message)
        return None


def _joined(context: JobContext, token: int, seconds: int, minutes: Sequence[HistoryRow]) -> list[HistoryRow]:
    """Combine an instrument's minutes into longer candles."""
    schedule = context.schedule_of(token)
    parts: dict[int, list[HistoryRow]] = {}
    for row in minutes:
        day = context.sessions.day(schedule, row.start * 1000)
        parts.setdefault(bucket_start_s(day, seconds, row.start * 1000), []).append(row)
    return [
        HistoryRow(
            start, rows[0].open, max(row.high for row in rows), min(row.low for row in rows),
            rows[-1].close, sum(row.volume for row in rows), rows[-1].oi,
        )
        for start, rows in parts.items()
    ]  # fmt: skip


def _warm_minutes(context: JobContext, sender: Sender, token: int, began_s: int) -> Figures:
    local = context.last_session(token)
    opened_s, closed_s = context.session_s(token, local)
    until_s = min(closed_s, context.known_until_s(token))
    # The candle in which watching began is still forming: it needs a later repair.
    early = int(opened_s <= began_s < closed_s and until_s <= began_s)
    if opened_s >= until_s:
        return {"early": early}
    rows = fetch_history(context, token, context.base.name, opened_s, until_s)
    if rows is None:
        return {"refused": 1}
    sender.send(token, context.base.name, opened_s, until_s, rows)
    return {"rows": len(rows), "early": early}


def _warm_days(context: JobContext, sender: Sender, token: int) -> Figures:
    """Fetch the `day` candles up to yesterday; packets carry today's."""
    interval = next((each for each in context.settings.intervals if each.name == DAY), None)
    if interval is None:
        return {}
    today = context.sessions.date_of(int(context.clock()))
    midnight_s = context.sessions.on_date(context.schedule_of(token), today).day_start_ms // 1000
    since = today - timedelta(days=interval.keep * 3 // 2 + 10)  # weekends and holidays are no rows
    since_s = context.sessions.on_date(context.schedule_of(token), since).day_start_ms // 1000
    rows = fetch_history(context, token, DAY, since_s, midnight_s)
    if not rows:
        return {}
    rows = rows[-interval.keep :]
    sender.send(token, DAY, rows[0].start, midnight_s, rows)
    return {"days": len(rows)}


def _check_day(
    context: JobContext, sender: Sender, token: int, interval: Interval, local: date, dry_run: bool
) -> Figures:
    opened_s, closed_s = context.session_s(token, local)
    stored, since_s = _stored_rows(context, token, interval, opened_s, closed_s)
    until_s = _complete_until_s(context, token, interval, opened_s, closed_s)
    begins_s = max(opened_s, since_s)
    if begins_s >= until_s:
        return {"too_old": 1} if opened_s < until_s else {}
    midnight_s = context.sessions.on_date(context.schedule_of(token), local).day_start_ms // 1000
    history = fetch_history(
        context, token, interval.name, begins_s if interval.seconds else midnight_s, until_s
    )
    if history is None:
        return {"refused": 1}
    if not interval.seconds:  # Kite stamps a day with midnight, the store with its open
        history = [row._replace(start=opened_s) for row in history]
    history = [row for row in history if begins_s <= row.start < until_s]
    found = compare([candle for candle in stored if begins_s <= candle.start < until_s], history)
    figures = {name: count for name, count in found._asdict().items() if count}
    if dry_run or found.is_clean:
        return figures
    sender.send(token, interval.name, begins_s, until_s, history)
    return {**figures, "sent": 1}


def _stored_rows(
    context: JobContext, token: int, interval: Interval, opened_s: int, closed_s: int
) -> tuple[list[Candle], int]:
    """Return the stored candles of a session, and the start since which the list holds all of them."""
    done, current = read_window(context.client, context.keys, token, interval.name, interval.keep)
    since_s = done[0].start if len(done) >= interval.keep else 0
    rows = [*done, current] if current is not None else done
    return [candle for candle in rows if opened_s <= candle.start < closed_s], since_s


def _complete_until_s(
    context: JobContext, token: int, interval: Interval, opened_s: int, closed_s: int
) -> int:
    """Return the end of the session's last candle that is complete and known to Kite."""
    known_s = context.known_until_s(token)
    if known_s >= closed_s:
        return closed_s
    if not interval.seconds or known_s <= opened_s:
        return opened_s
    return opened_s + (known_s - opened_s) // interval.seconds * interval.seconds


# --- helpers


@contextmanager
def _at(context: JobContext | None) -> Iterator[JobContext]:
    if context is not None:
        yield context
        return
    with open_job_context() as opened:
        yield opened


def _parts(context: JobContext, tokens: Sequence[int]) -> list[str]:
    return [str(token) for token in context.by_activity([int(token) for token in tokens])]


def _requested_s(context: JobContext) -> int:
    """Return when the job was created, epoch seconds of market time."""
    job = get_current_job()
    age_seconds = 0.0
    if job is not None and job.created_at is not None:
        age_seconds = max(0.0, time.time() - job.created_at.timestamp())
    return int(context.clock() / 1000 - age_seconds * context.clock.speed)


def _finish(sender: Sender, progress: Progress, figures: Figures | None, instruments: int) -> Any:
    """Return a reschedule for another slice, or the result."""
    if figures is None:
        return reschedule()
    result = {"instruments": instruments, **figures, "applied": sender.are_applied()}
    progress.forget()
    log.info("backfill_ended", reason=sender.why, **result)
    return result
