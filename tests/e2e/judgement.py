"""How a rehearsal ended: our rows against the simulator's own history, and what `pkb doctor` says."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from pkbrokers_redis.candles.calendar import IST
from pkbrokers_redis.candles.model import Interval, bucket_end_s, bucket_start_s
from pkbrokers_redis.kite.history_api import KITE_INTERVALS
from pkbrokers_redis.store.rows import read_candles
from tests.support import run_pkb

if TYPE_CHECKING:
    from tests.e2e.rehearsal import Stage

Row = tuple[int, float, float, float, float, float]  # start, open, high, low, close, volume


@dataclass
class Verdict:
    """What the comparison found."""

    rows: int = 0
    backfilled: int = 0
    auction: int = 0  # minutes of the closing auction
    differences: list[str] = field(default_factory=list)


def judge(
    stage: Stage, rows: list[dict[str, Any]], begin_s: float, end_s: float, calm_s: float = math.inf
) -> Verdict:
    """Every completed row that began since the day's open and was over by `end_s`, against the simulator's.

    From `calm_s` on nothing went wrong, so that no row of that time may have been mended.
    """
    verdict = Verdict()
    for instrument in rows:
        for interval in stage.settings.intervals:
            if interval.seconds:
                _compare(stage, verdict, instrument, interval, begin_s, end_s, calm_s)
    return verdict


def _compare(
    stage: Stage,
    verdict: Verdict,
    instrument: dict[str, Any],
    interval: Interval,
    begin_s: float,
    end_s: float,
    calm_s: float,
) -> None:
    token, name = int(instrument["instrument_token"]), f"{instrument['tradingsymbol']} {interval.name}"
    generator = stage.kite.history.generator
    day = generator.day(stage.kite.market.row_of[token], int(begin_s) * 1000)
    found = read_candles(stage.client, stage.settings.keys, token, interval.name, interval.keep)
    since_s = found[0].start if len(found) >= interval.keep else day.anchor_ms // 1000
    pipeline_rows = {
        candle.start: candle
        for candle in found
        if candle.start >= max(since_s, day.anchor_ms // 1000)
        and bucket_end_s(day, interval.seconds, candle.start) <= end_s
    }
    kite_rows = {
        row[0]: row
        for row in kites(stage, token, interval, max(since_s, day.anchor_ms // 1000), int(end_s))
        if bucket_end_s(day, interval.seconds, row[0]) <= end_s
    }
    for start in sorted(pipeline_rows.keys() | kite_rows.keys()):
        candle, row = pipeline_rows.get(start), kite_rows.get(start)
        verdict.rows += 1
        verdict.auction += (
            interval.seconds == 60 and len(day.windows) > 1 and start * 1000 >= day.windows[1][0]
        )
        when = f"{name} {datetime.fromtimestamp(start, IST):%H:%M}"
        if candle is None or row is None:
            verdict.differences.append(f"{when}: pipeline {candle}, Kite's {row}")
        elif tuple(candle[:6]) != row:
            verdict.differences.append(f"{when}: pipeline {tuple(candle[:6])} {candle.flag!r}, Kite's {row}")
        elif candle.flag not in ("", "backfilled"):
            verdict.differences.append(f"{when}: still marked {candle.flag!r}")
        elif candle.flag and start >= calm_s:
            verdict.differences.append(f"{when}: {candle.flag}, though nothing was missed")
        else:
            verdict.backfilled += candle.flag == "backfilled"


def kites(stage: Stage, token: int, interval: Interval, from_s: int, to_s: int) -> list[Row]:
    """The simulator's own candles; of an interval that Kite has not, merged from its minutes."""
    history, now_ms = stage.kite.history, stage.kite.now_ms()
    if interval.name in KITE_INTERVALS:
        name = KITE_INTERVALS[interval.name].name
        return [row[:6] for row in history.rows(token, name, from_s, to_s - 1, now_ms)]
    day = history.generator.day(stage.kite.market.row_of[token], from_s * 1000)
    merged: dict[int, Row] = {}
    for start, opened, high, low, close, volume, *_ in history.rows(
        token, "minute", from_s, to_s - 1, now_ms
    ):
        bucket = bucket_start_s(day, interval.seconds, start * 1000)
        if bucket in merged:
            _, first, top, bottom, _, sum_ = merged[bucket]
            merged[bucket] = (bucket, first, max(top, high), min(bottom, low), close, sum_ + volume)
        else:
            merged[bucket] = (bucket, opened, high, low, close, volume)
    return list(merged.values())


def doctor(stage: Stage) -> tuple[int, list[str]]:
    """`pkb doctor`: its exit code, and what it does not like."""
    found = run_pkb("doctor", "--json", env=stage.env)
    try:
        findings = json.loads(found.stdout)["findings"]
    except (ValueError, KeyError):
        return found.returncode, [found.stdout + found.stderr]
    return found.returncode, [
        f"{each['check']}: {each['message']}" for each in findings if each["level"] != "ok"
    ]
