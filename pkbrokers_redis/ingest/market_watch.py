"""Compare what Kite sends with what the pipeline believes: its hours, its clock, its previous closes.

    hours    instruments trade while the calendar says closed: an unannounced session, longer hours
    clock    this host's clock against the exchange's timestamps
    closes   the packets' previous close against our last day row: a split, a bonus, a merger

Every LOOK_SECONDS it reads the newest packet of each instrument, which waits for its quote hash anyway: the
way of a tick does not know of it. What it finds is in the worker's heartbeat, from where `pkb status`,
`pkb doctor` and the operators' chat have it (`runtime/market_checks.py`), and once in the log.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import redis

from pkbrokers_redis import logs
from pkbrokers_redis.candles.calendar import Sessions
from pkbrokers_redis.candles.model import DAY
from pkbrokers_redis.candles.rows import CLOSE, START, number, parse_row
from pkbrokers_redis.clock import ExchangeClock
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.ingest.connections import Outage
from pkbrokers_redis.ingest.outages import Outages
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.kite.protocol import DTYPES, PRICE_DIVISORS, SECONDS_MIN
from pkbrokers_redis.runtime.roles import follow_calendar
from pkbrokers_redis.store.cluster import Pipe
from pkbrokers_redis.store.tick_writer import Packet

log = logs.get("market")

LOOK_SECONDS = 5.0
NAMES_MAX = 5  # in the log and the heartbeat
MINUTE_MS = 60_000
# Around a session day's windows orders are matched without continuous trading: NSE's pre-open ends at 09:08,
# its closing session lies between 15:40 and 16:00. Neither is in the calendar, and neither is a surprise.
PRE_OPEN_MS = 15 * MINUTE_MS
LAST_TRADES_MS = MINUTE_MS
POST_CLOSE_MS = (10 * MINUTE_MS, 35 * MINUTE_MS)
RISES_MIN = 2  # looks in which an instrument's volume rose: one may be a late packet
FOLLOWED_LOOKS = 3  # after a new calendar: by then every aggregator has it, and takes the missed part
CLOCK_PACKETS_MIN = 5  # of the newest looks
CLOCK_LOOKS = 12
CLOSE_PART_MAX = 0.05  # the exchange's close is an average of the last half hour, ours the last trade
EQUITY_SEGMENTS = (1, 4)  # of a token: NSE, BSE; elsewhere the close is a settlement price
ROWS_AT_ONCE = 500  # last day rows read a look
ROW_SECONDS, ROW_AGAIN_SECONDS = 3600.0, 60.0  # before a day row is read again; where it differs

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Seen(NamedTuple):
    """The newest packets, a row each, by token, ascending. What a packet lacks is NaN (`exchange_ms`: 0)."""

    tokens: Ints
    at_ms: Floats
    volume: Floats
    close: Floats  # of the previous day
    exchange_ms: Floats


def read_packets(packets: Iterable[Packet]) -> Seen:
    """Return what the watch needs of the packets."""
    by_length: dict[int, list[Packet]] = {}
    for packet in packets:
        by_length.setdefault(packet[2], []).append(packet)
    parts: list[Floats] = [np.empty((0, 5))]
    for length, group in by_length.items():
        joined = b"".join(frame[offset : offset + length] for frame, offset, _, _ in group)
        records = np.frombuffer(joined, DTYPES[length])
        names = records.dtype.names or ()
        rows = np.full((len(group), 5), np.nan)
        rows[:, 0] = records["instrument_token"]
        rows[:, 1] = [at_ms for *_, at_ms in group]
        rows[:, 4] = 0.0
        if "volume_traded" in names:
            rows[:, 2] = records["volume_traded"]
        if "close" in names:
            rows[:, 3] = records["close"] / PRICE_DIVISORS[records["instrument_token"] & 0xFF]
        if "exchange_timestamp" in names:
            seconds = records["exchange_timestamp"].astype(np.float64)
            rows[:, 4] = np.where(seconds >= SECONDS_MIN, seconds * 1000, 0.0)
        parts.append(rows)
    rows = np.concatenate(parts)
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    return Seen(rows[:, 0].astype(np.int64), rows[:, 1], rows[:, 2], rows[:, 3], rows[:, 4])


EMPTY = read_packets(())


@dataclass
class _OffHours:
    """An instrument that trades while the calendar says closed."""

    since_ms: float  # its first trade, or a look before it
    rises: int = 0


class MarketWatch:
    """`run` has a thread of its own. Figures may be read by any."""

    def __init__(
        self,
        calendar: Sessions,
        newest_packets: Callable[[], Mapping[int, Packet]],
        outages: Outages,
        clock: ExchangeClock,
        connect: Callable[[], redis.Redis],
        keys: Keys,
        *,
        on_calendar: Callable[[], None],
    ) -> None:
        """Prepare; `on_calendar` is called after PKB_CALENDAR was loaded again."""
        self._calendar = calendar
        self._newest_packets = newest_packets
        self._outages = outages
        self._clock = clock
        self._connect = connect
        self._client: redis.Redis | None = None
        self._keys = keys
        self._on_calendar = on_calendar
        self._before = EMPTY
        self._before_ms = 0.0
        self._of_unknown_hours: list[int] = []
        self._follows = 0  # looks until the part that a new calendar added is requested
        self._off_hours: dict[int, _OffHours] = {}
        self._offsets: deque[Floats] = deque(maxlen=CLOCK_LOOKS)
        self._closes: dict[int, tuple[date | None, float]] = {}  # token → our last day row's date and close
        self._closes_read_at: dict[int, float] = {}
        self._differing: dict[int, tuple[float, float]] = {}  # token → our close, the packet's
        self._once = logs.Once()
        self.symbols: Mapping[int, str] = {}

    def run(self, stop: threading.Event) -> None:
        """Look until `stop` is set."""
        while not stop.wait(LOOK_SECONDS):
            self.look()

    def look(self) -> None:
        """Look once."""
        now_ms = self._clock()
        seen = read_packets(self._newest_packets().values())
        if follow_calendar(self._calendar):
            self._on_calendar()
            self._follows = FOLLOWED_LOOKS
        _, rows, rows_before = np.intersect1d(
            seen.tokens, self._before.tokens, assume_unique=True, return_indices=True
        )
        self._look_at_hours(seen, rows, rows_before, now_ms)
        self._look_at_clock(seen, rows, rows_before)
        self._look_at_closes(seen, now_ms)
        unknown, tokens = self._calendar.unknown_schedule, seen.tokens.tolist()
        self._of_unknown_hours = [each for each in tokens if self._calendar.schedule_of(each) == unknown]
        self._before, self._before_ms = seen, now_ms

    def figures(self) -> dict[str, object]:
        """Return the fields of the heartbeat."""
        trading = sorted(token for token, each in self._off_hours.items() if each.rises >= RISES_MIN)
        offset_ms = self.clock_offset_ms
        differing = dict(self._differing)
        return {
            "closed_trading": len(trading),
            "closed_trading_names": self._names(trading),
            "unknown_hours": len(self._of_unknown_hours),
            "unknown_hours_names": self._names(self._of_unknown_hours),
            "clock_offset_ms": "" if offset_ms is None else round(offset_ms / self._clock.speed),
            "closes_differ": len(differing),
            "closes_differ_names": ",".join(
                f"{self._name(token)} {ours:g} → {theirs:g}"
                for token, (ours, theirs) in sorted(differing.items())[:NAMES_MAX]
            ),
        }

    def _name(self, token: int) -> str:
        return str(self.symbols.get(token, token))

    def _names(self, tokens: list[int]) -> str:
        return ",".join(map(self._name, tokens[:NAMES_MAX]))

    # -- hours

    def _look_at_hours(self, seen: Seen, rows: Ints, rows_before: Ints, now_ms: float) -> None:
        today = self._calendar.date_of(int(now_ms))
        for token, each in tuple(self._off_hours.items()):
            is_old = self._calendar.date_of(int(each.since_ms)) != today
            is_known = self._calendar.is_open(self._calendar.schedule_of(token), int(each.since_ms))
            if is_old or (is_known and self._follows <= 1):
                del self._off_hours[token]
                if is_known and not is_old:
                    self._request(token, each.since_ms, now_ms)
        self._follows = max(0, self._follows - 1)
        risen = rows[seen.volume[rows] > self._before.volume[rows_before]]
        schedules = {token: self._calendar.schedule_of(token) for token in seen.tokens[risen].tolist()}
        closed = {each for each in set(schedules.values()) if self._is_surprising(each, now_ms)}
        for token, schedule in schedules.items():
            if schedule in closed:
                self._off_hours.setdefault(token, _OffHours(self._before_ms or now_ms)).rises += 1
        trading = sorted(token for token, each in self._off_hours.items() if each.rises >= RISES_MIN)
        if trading and self._once.first(("off hours", today)):
            log.warning(
                "trading_while_closed", instruments=len(trading), symbols=self._names(trading),
                reason="their volume rises while the calendar says closed: no candle is made",
                hint="add the session to PKB_CALENDAR (docs/calendar.md), which workers follow at once",
            )  # fmt: skip

    def _is_surprising(self, schedule: int, now_ms: float) -> bool:
        """Return whether nobody should trade now: neither in a window, nor shortly around the day's."""
        windows = self._calendar.day(schedule, int(now_ms)).windows
        if not windows:
            return True
        after_ms = now_ms - windows[-1][1]
        if after_ms < 0:
            return now_ms < windows[0][0] - PRE_OPEN_MS
        return after_ms >= LAST_TRADES_MS and not POST_CLOSE_MS[0] <= after_ms < POST_CLOSE_MS[1]

    def _request(self, token: int, since_ms: float, now_ms: float) -> None:
        """Report the part of a session that was missed before the calendar had it; history fills it."""
        for opened, closed in self._calendar.day(self._calendar.schedule_of(token), int(since_ms)).windows:
            if opened <= since_ms < closed:
                self._outages.add("unlisted session", (token,), Outage(opened, int(min(now_ms, closed))))

    # -- clock

    @property
    def clock_offset_ms(self) -> float | None:
        """Host clock minus exchange's timestamps, a median of many packets; None while there are too few."""
        offsets = tuple(self._offsets)
        found = np.concatenate(offsets) if offsets else np.empty(0)
        return float(np.median(found)) if len(found) >= CLOCK_PACKETS_MIN else None

    def _look_at_clock(self, seen: Seen, rows: Ints, rows_before: Ints) -> None:
        fresh = rows[seen.exchange_ms[rows] > self._before.exchange_ms[rows_before]]
        # A timestamp is a whole second: on average it is half a second older than what it stamps.
        offsets = seen.at_ms[fresh] + self._clock.offset_ms - seen.exchange_ms[fresh] - 500.0
        self._offsets.append(offsets)
        measured = self.clock_offset_ms
        if measured is not None and self._clock.follow(measured):
            self._offsets.clear()
            log.warning(
                "clock_differs", offset_seconds=round(measured / 1000, 1),
                corrected=self._clock.offset_ms != 0,
                reason="this is the host's clock minus the exchange's timestamps",
                hint="synchronise the clock (chrony, systemd-timesyncd)",
            )  # fmt: skip

    # -- previous closes

    def _look_at_closes(self, seen: Seen, now_ms: float) -> None:
        """Compare the packets' previous close with our last day row, of equities that trade now."""
        today = self._calendar.date_of(int(now_ms))
        before = {
            schedule: self._calendar.session_near(schedule, today, -1)
            for schedule in range(len(self._calendar.schedules))
            if self._calendar.is_open(schedule, int(now_ms))
        }
        rows = np.flatnonzero((seen.close > 0) & np.isin(seen.tokens & 0xFF, EQUITY_SEGMENTS))
        pairs = zip(seen.tokens[rows].tolist(), seen.close[rows].tolist(), strict=True)
        closes = {token: close for token, close in pairs if self._calendar.schedule_of(token) in before}
        self._read_day_rows(closes, today)
        differing: dict[int, tuple[float, float]] = {}
        for token, close in closes.items():
            day, ours = self._closes.get(token, (None, 0.0))
            is_previous = day is not None and day == before[self._calendar.schedule_of(token)]
            if is_previous and ours > 0 and abs(close / ours - 1) > CLOSE_PART_MAX:
                differing[token] = (ours, close)
        self._differing = differing
        for token, (ours, theirs) in differing.items():
            if self._once.first(("close", token, theirs)):
                log.warning(
                    "previous_close_differs", symbol=self._name(token), ours=ours, kite=theirs,
                    reason="a split, bonus or merger, or our last day is not final",
                    hint="`pkb backfill --day` fetches a day again; older rows stay on the old scale",
                )  # fmt: skip

    def _read_day_rows(self, closes: Mapping[int, float], today: date) -> None:
        """Read the last day row of instruments before today: once an hour, where it differs each minute."""
        now, never = time.monotonic(), float("-inf")
        due = [
            token
            for token in closes
            if now - self._closes_read_at.get(token, never)
            >= (ROW_AGAIN_SECONDS if token in self._differing else ROW_SECONDS)
        ][:ROWS_AT_ONCE]
        if not due:
            return
        try:
            client = self._client = self._client or self._connect()
            pipe = Pipe(client)
            for token in due:
                pipe.add("LRANGE", self._keys.candles(token, DAY), -2, -1)
            replies = pipe.execute()
        except (redis.RedisError, PkbError):
            self._client = None  # ingest reports the outage; the next look reads again
            return
        for token, reply in zip(due, replies, strict=True):
            self._closes_read_at[token] = now
            found: tuple[date | None, float] = (None, 0.0)
            for text in [] if isinstance(reply, Exception) else reply:
                row = parse_row(text)
                day = self._calendar.date_of(int(number(row[START])) * 1000) if row else today
                if row and day != today:
                    found = (day, number(row[CLOSE]))
            self._closes[token] = found
