"""When each instrument of the simulated market trades, and how: by its segment's sessions.

    closed ─► pre-open (cash and indices, 15 to 7 minutes before the open) ─► closed ─► open ─► closed
                                        from 2026-08-03 stocks with derivatives: open ─► closed ─► auction

Trades of the pre-open and prints of the auction are few; the pre-open's only raise the day's volume.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pkbrokers_redis.candles.calendar import Day, Sessions

Ints = npt.NDArray[np.int64]

CLOSED, PREOPEN, OPEN, AUCTION = range(4)
# Trades an instrument makes, against those of continuous trading, by phase.
TEMPO: Final = np.array([0.0, 0.01, 1.0, 0.02])
PREOPEN_MS: Final = (15 * 60_000, 7 * 60_000)  # before the open: 09:00 to 09:08
AUCTION_QUIET_MS: Final = 15 * 60_000  # orders are collected, then matched
DERIVATIVE_KINDS: Final = ("FUT", "CE", "PE")
CASH_OF: Final = {"NFO": "NSE", "BFO": "BSE"}  # where the underlying stocks of an exchange's contracts trade


class Hours:
    """The sessions of a universe's rows. Rows are positions in the universe, times epoch ms.

    `around_the_clock`: the sessions are those of PKB_SESSIONS=always, one per day and no pre-open.
    """

    def __init__(
        self, universe: list[dict[str, Any]], sessions: Sessions, *, around_the_clock: bool = False
    ) -> None:
        self.sessions = sessions
        self._around_the_clock = around_the_clock
        contracts = {
            (CASH_OF[row["exchange"]], row["name"])
            for row in universe
            if row["instrument_type"] in DERIVATIVE_KINDS and row["exchange"] in CASH_OF
        }
        schedules = [
            sessions.schedule_of(
                row["instrument_token"], (row["exchange"], row["tradingsymbol"]) in contracts
            )
            for row in universe
        ]
        self.schedule: Ints = np.array(schedules, np.int64)
        self._used = [int(each) for each in np.unique(self.schedule)]
        self._count = len(universe)

    def has_preopen(self, schedule: int) -> bool:
        """Cash segments and their indices begin with a pre-open call."""
        cash = self.sessions.schedules[schedule].startswith(("NSE", "BSE", "INDICES"))
        return cash and not self._around_the_clock

    def phases(self, now_ms: int) -> tuple[npt.NDArray[np.int8], Ints]:
        """By row: the phase, and the second before which a trade of this phase cannot have been."""
        phase, since_s = np.zeros(self._count, np.int8), np.zeros(self._count, np.int64)
        for schedule in self._used:
            kind, begun_ms = self._phase(schedule, self.sessions.day(schedule, now_ms), now_ms)
            mine = self.schedule == schedule
            phase[mine], since_s[mine] = kind, begun_ms // 1000
        return phase, since_s

    def inside(self, rows: Ints, times_s: Ints, now_ms: int) -> npt.NDArray[np.bool_]:
        """Which of these trade times (of rows, about `now_ms`) lie in a window, so in a candle."""
        inside = np.zeros(rows.size, bool)
        for schedule in self._used:
            mine = self.schedule[rows] == schedule
            if not mine.any():
                continue
            for opened_ms, closed_ms in self.sessions.day(schedule, now_ms).windows:
                inside |= mine & (opened_ms <= times_s * 1000) & (times_s * 1000 < closed_ms)
        return inside

    def trading(self, schedule: int, day: Day) -> list[tuple[int, int, int]]:
        """When `day` has trades: (phase, from, to). An auction's window begins with a quiet quarter."""
        is_auctioned = self.sessions.schedules[schedule].endswith("DERIVATIVES")
        return [
            (AUCTION, opened_ms + AUCTION_QUIET_MS, closed_ms)
            if number and is_auctioned
            else (OPEN, opened_ms, closed_ms)
            for number, (opened_ms, closed_ms) in enumerate(day.windows)
        ]

    def _phase(self, schedule: int, day: Day, now_ms: int) -> tuple[int, int]:
        for phase, begun_ms, ended_ms in self.trading(schedule, day):
            if begun_ms <= now_ms < ended_ms:
                return phase, begun_ms
        if self.has_preopen(schedule) and day.windows:
            first_ms, last_ms = (day.anchor_ms - before for before in PREOPEN_MS)
            if first_ms >= day.day_start_ms and first_ms <= now_ms < last_ms:
                return PREOPEN, first_ms
        return CLOSED, 0
