"""`/alert feed`: no tick of any instrument for so long, while the market is open; and that they came back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pkbrokers_redis.bot.alerts.commit import Told
from pkbrokers_redis.bot.alerts.model import Alert
from pkbrokers_redis.bot.text import clock_time, duration
from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.settings import Settings

EQUITY_TOKEN = 1  # segment NSE: whose hours decide whether silence means anything
LOOK_EVERY_SECONDS = 0.5


class FeedWatch:
    """Tells silence from a closed market. `silent_seconds` runs from the last tick, or from our start."""

    def __init__(self, settings: Settings, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._market = market_clock(settings)
        self._sessions = load_sessions(settings.sessions, settings.timezone, settings.calendar)
        self._schedule = self._sessions.schedule_of(EQUITY_TOKEN)
        self._heard_at: float | None = None
        self._began_at = monotonic()
        self._looked_at = self._began_at

    @property
    def silent_seconds(self) -> float:
        """Since the last tick, or since we began to listen."""
        heard_at = self._began_at if self._heard_at is None else self._heard_at
        return self._monotonic() - heard_at

    def heard(self) -> None:
        """Ticks came."""
        self._heard_at = self._monotonic()

    def open_seconds(self) -> float:
        """For how long the market has been open, in machine time; 0 while it is closed."""
        now_ms = int(self._market())
        for opened, closed in self._sessions.day(self._schedule, now_ms).windows:
            if opened <= now_ms < closed:
                return self._market.real_seconds(now_ms - opened)
        return 0.0

    def look(self, alerts: Sequence[Alert], down: dict[int, bool]) -> list[Told]:
        """What fired; `down` (alert id → told that it is down) is changed with it."""
        now = self._monotonic()
        if not alerts or now - self._looked_at < LOOK_EVERY_SECONDS:
            return []
        self._looked_at = now
        silent = self.silent_seconds
        is_open_for = self.open_seconds()
        told: list[Told] = []
        for alert in alerts:
            when = clock_time(self._market() / 1000)
            if down.get(alert.id):
                if self._heard_at is not None and silent < alert.value:
                    down[alert.id] = False
                    told.append(Told(alert.chat_id, f"✅ Ticks come again ({when}, alert {alert.id})", 0))
            elif silent >= alert.value and is_open_for >= alert.value:
                down[alert.id] = True
                told.append(
                    Told(
                        alert.chat_id,
                        f"🔔 No tick for {duration(silent)} in an open market ({when}, alert {alert.id})",
                        0,
                    )
                )
        return told
