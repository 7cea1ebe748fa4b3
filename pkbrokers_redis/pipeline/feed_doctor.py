"""What ails a feed, and what to do about it. Pure: signs in, a verdict out.

| state          | seen                                               | action                      |
|----------------|----------------------------------------------------|-----------------------------|
| `ok`           | ticks come; some instruments may be illiquid       | none                        |
| `quiet`        | its markets are closed, or in the closing auction  | none                        |
| `mute`         | heartbeats but no ticks while its market is open   | reconnect, ever more seldom |
| `partly_mute`  | instruments that always tick do not, others do     | resubscribe, then reconnect |
| `expired`      | Kite answers 403                                   | renew the session           |
| `rate_limited` | Kite answers 429                                   | wait                        |
| `away`         | there is no connection                             | none, the socket tries on   |

A new subscription brings each instrument's last tick again, hours old perhaps: it mends nothing. All times
are market time; `speed` (of a rehearsal) keeps a limit from being shorter than the machine can hear.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

State = Literal["ok", "quiet", "mute", "partly_mute", "expired", "rate_limited", "away"]
Action = Literal["none", "reconnect", "resubscribe", "renew", "wait"]

MUTE_MS_MIN = 15_000.0  # a picture comes every second: fifteen are missing
UNKNOWN_MUTE_MS_MIN = 60_000.0  # of a feed without a lively instrument, or whose ways we do not know yet
MUTE_MS_MAX = 1_800_000.0  # between reconnects of a feed that stays mute: a holiday the calendar lacks
SILENT_MS_MIN = 15_000.0  # of a canary
ILLIQUID_MS = 600_000.0  # without a tick in an open market
MENDING_MS = 15_000.0  # what a resubscription or a new connection is given
RESENT_MS = 5_000.0  # ticks so soon after a connect may be the last ones again
MENDED_MS = 60_000.0  # a feed that ticks for so long after a remedy is well
MACHINE_MS_MIN = 2_000.0  # no limit is below this on the machine's clock
REMEDIES_MAX = 3  # a resubscription and two connections; then those instruments are halted, not mute
MOST = 0.5  # so large a part of the canaries is worth a reconnect, which all others pay for


class Signs(NamedTuple):
    """What is seen of one feed.

    `opened_ms`: since when a market of its trades continuously; None: none does.
    """

    socket: str  # the socket's state
    connected_ms: float
    ticked_ms: float
    mute_ms: float  # such a silence is not this feed's way (`FeedLife.mute_ms`)
    opened_ms: float | None
    instruments: int
    canaries: int = 0
    silent: tuple[int, ...] = ()  # of the canaries


class Verdict(NamedTuple):
    """What the feed has, what is to be done now, and why. `tokens`: the instruments meant."""

    state: State
    action: Action
    why: str
    tokens: tuple[int, ...] = ()


class FeedDoctor:
    """One feed's doctor: remembers what was tried. `look` is called again and again, twice a second or so."""

    def __init__(self, speed: float = 1.0) -> None:
        self._floor_ms = MACHINE_MS_MIN * speed
        self._reconnects = 0  # in a row, without a tick after them
        self._mute_from_ms: float | None = None  # the last tick when it fell mute
        self._remedies: dict[int, tuple[int, float]] = {}  # silent instrument → remedies tried, the last when

    @property
    def silent_ms_min(self) -> float:
        """So long a canary must be silent, at least."""
        return max(SILENT_MS_MIN, self._floor_ms)

    def look(self, signs: Signs, now_ms: float) -> Verdict:
        """The verdict. An action other than `none` is to be taken once for each time it is returned."""
        if signs.socket == "forbidden":
            return Verdict("expired", "renew", "Kite answers 403: the session is dead")
        if signs.socket == "throttled":
            return Verdict("rate_limited", "wait", "Kite answers 429: too many connections or requests")
        resent_ms = signs.connected_ms + max(RESENT_MS, self._floor_ms)
        if self._mute_from_ms is not None and signs.ticked_ms > max(self._mute_from_ms, resent_ms):
            self._mute_from_ms, self._reconnects = None, 0
        if signs.opened_ms is None or not signs.instruments:
            self._mute_from_ms, self._reconnects = None, 0
            return Verdict("quiet", "none", "its markets are closed, or in the closing auction")
        if signs.socket != "connected":
            if self._mute_from_ms is not None:
                return Verdict("mute", "none", "on its way to a new connection")
            return Verdict("away", "none", "no connection; the socket tries again")
        silent_ms = now_ms - max(signs.ticked_ms, signs.opened_ms, signs.connected_ms)
        if silent_ms > self._mute_limit_ms(signs):
            self._mute_from_ms = signs.ticked_ms
            self._reconnects += 1
            return Verdict("mute", "reconnect", f"heartbeats but no tick for {silent_ms / 1000:.0f} s")
        if self._mute_from_ms is not None:
            return Verdict("mute", "none", "connected anew, no tick yet")
        return self._look_at_canaries(signs, now_ms)

    def _mute_limit_ms(self, signs: Signs) -> float:
        usual = MUTE_MS_MIN if signs.canaries else UNKNOWN_MUTE_MS_MIN
        least = max(usual, self._floor_ms, signs.mute_ms)
        return min(least * 2.0 ** min(self._reconnects, 16), max(least, MUTE_MS_MAX))

    def _look_at_canaries(self, signs: Signs, now_ms: float) -> Verdict:
        self._forget_the_well(signs, now_ms)
        halted = {token for token, (n, _) in self._remedies.items() if n >= REMEDIES_MAX}
        silent = tuple(token for token in signs.silent if token not in halted)
        if not silent:
            why = f"{len(halted)} lively instruments are halted" if halted else "ticks come"
            return Verdict("ok", "none", why)
        seen = f"{len(silent)} of {signs.canaries} lively instruments are silent while others tick"
        fresh = tuple(token for token in silent if token not in self._remedies)
        if fresh:
            self._note(fresh, now_ms)
            return Verdict("partly_mute", "resubscribe", seen, fresh)
        if now_ms - max(self._remedies[token][1] for token in silent) <= max(MENDING_MS, self._floor_ms):
            return Verdict("partly_mute", "none", seen, silent)
        self._note(silent, now_ms)
        if len(silent) >= MOST * signs.canaries:
            return Verdict("partly_mute", "reconnect", f"{seen}, though subscribed anew", silent)
        return Verdict("partly_mute", "resubscribe", seen, silent)

    def _forget_the_well(self, signs: Signs, now_ms: float) -> None:
        for token, (_, tried_ms) in tuple(self._remedies.items()):
            if token not in signs.silent and now_ms - tried_ms > max(MENDED_MS, self._floor_ms):
                del self._remedies[token]

    def _note(self, tokens: tuple[int, ...], now_ms: float) -> None:
        for token in tokens:
            self._remedies[token] = (self._remedies.get(token, (0, 0.0))[0] + 1, now_ms)
