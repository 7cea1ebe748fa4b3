"""Faults on demand: what the simulator does wrong, how often and for how long.

A fault strikes while it is active: until its `count` is used up, or its `seconds` (machine time) are over.
Without either it stays active until `clear`.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from pkbrokers_redis.errors import SettingsError

Ints = npt.NDArray[np.int64]
Side = Literal["rest", "ws"]

# kind → (where it applies, what happens). docs/simulator.md has the same table.
KINDS: Final[dict[str, tuple[frozenset[Side], str]]] = {
    "403": (frozenset({"rest", "ws"}), "the session counts as over (websocket: at the next connect)"),
    "429": (frozenset({"rest", "ws"}), "too many requests (websocket: at the next connect)"),
    "500": (frozenset({"rest", "ws"}), "GeneralException"),
    "502": (frozenset({"rest", "ws"}), "DataException"),
    "503": (frozenset({"rest", "ws"}), "NetworkException"),
    "slow": (frozenset({"rest"}), "the response is delayed by `delay_seconds`"),
    "drop": (
        frozenset({"rest", "ws"}),
        "the connection is closed: no response; websocket: at the next frame",
    ),
    "html": (frozenset({"rest"}), "a maintenance page instead of JSON"),
    "garbage_json": (frozenset({"rest"}), "JSON that ends early"),
    "mute": (frozenset({"ws"}), "heartbeats, but no ticks"),
    "mute_some": (frozenset({"ws"}), "no ticks of `tokens`, or of a `share` of all"),
    "stall": (frozenset({"ws"}), "nothing at all, not even heartbeats"),
    "duplicate": (frozenset({"ws"}), "a `share` of frames is sent twice"),
    "reorder": (frozenset({"ws"}), "a `share` of frames is sent after the next one"),
    "garbage": (frozenset({"ws"}), "a `share` of frames is damaged: truncated, or random bytes"),
    # What the real market and the real Kite do; `tokens` are the instruments concerned.
    "corporate_action": (
        frozenset({"rest", "ws"}),
        "prices are divided by `factor`, volumes multiplied: of packets, their previous close included, and "
        "of all history",
    ),
    "rename": (frozenset({"rest"}), "the instruments CSV has another name for the same token: `name`"),
    "delist": (frozenset({"rest", "ws"}), "the instruments CSV lacks them, and no packet of them comes"),
    "annul_volume": (frozenset({"ws"}), "a packet has a volume far too high; the next ones are right"),
    "clock_offset": (
        frozenset({"rest", "ws"}),
        "the exchange's time is `offset_seconds` ahead of this machine's, in packets and history",
    ),
    "unlisted_session": (frozenset({"ws"}), "all trade although the calendar says closed"),
    "odd_history": (
        frozenset({"rest"}),
        "history has a row with open above high, a row twice, two rows in the wrong order, and one of 15:30",
    ),
    "csv_damage": (
        frozenset({"rest"}),
        "the instruments CSV has an unclosed quote, a new column and a comma at the end of its header; with "
        "`name` `short` it ends early instead",
    ),
    "zero_price_first": (
        frozenset({"ws"}),
        "packets with price 0 and volume 0 instead of trades, as before an instrument's first trade",
    ),
    "drop_token": (frozenset({"ws"}), "Kite silently sends no packets of them"),
}
_OF_TOKENS = ("corporate_action", "rename", "delist", "drop_token", "zero_price_first", "annul_volume")
_SILENT = ("mute_some", "drop_token", "delist")
_SPOIL_PACKETS = ("corporate_action", "annul_volume", "clock_offset", "zero_price_first")
_PRICES = ("last_price", "average_traded_price", "open", "high", "low", "close")
ANNULLED_VOLUME = 1_100_000
FAULTS_MAX = 100  # active at once
STATUS_KINDS = ("403", "429", "500", "502", "503")
DELAY_SECONDS_MAX = 3600.0


class Packets(NamedTuple):
    """The last packets of a market's rows: a market itself, or what is sent instead."""

    packets: Any  # full packets by row
    index_packets: Any
    is_index: npt.NDArray[np.bool_]
    row_of: Mapping[int, int]


def _rescale(packets: Any, rows: Ints, factor: float) -> None:
    for name in _PRICES:
        packets[name][rows] = np.rint(packets[name][rows] / factor)
    for name in ("volume_traded", "last_traded_quantity"):
        packets[name][rows] = np.rint(packets[name][rows] * factor)
    packets["depth"]["price"][rows] = np.rint(packets["depth"]["price"][rows] / factor)


class FaultOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One fault as it is ordered: the body of `POST /_sim/faults`, the arguments of `Faults.add`.

    Attributes:
        kind: A key of `KINDS`.
        count: How often the fault strikes; None is without limit.
        seconds: How long it stays active, machine time; None is without limit.
        on: Restricts a kind that applies to both sides to one of them.
        path: Restricts the fault to REST paths with this prefix.
        tokens: The instruments of `mute_some`.
        share: The part of frames or instruments that is affected, (0, 1].
        delay_seconds: The delay of `slow`.
        factor: Of `corporate_action`: 5 is a split of 1 into 5.
        name: Of `rename`: the new symbol, by default the old one with `NEW` behind it.
        offset_seconds: Of `clock_offset`; a multiple of 60, so that history's minutes move as a whole.
    """

    kind: str
    count: int | None = None
    seconds: float | None = None
    on: Side | None = None
    path: str = ""
    tokens: list[int] = []
    share: float = 0.2
    delay_seconds: float = 2.0
    factor: float = 5.0
    name: str = ""
    offset_seconds: int = 180


def parse_fault(text: str) -> dict[str, Any]:
    """Parse a fault of the command line: `429`, `mute,seconds=20`, `mute_some,tokens=1+2`.

    Returns the arguments of `Faults.add`. Raise SettingsError for an unknown kind or option.
    """
    kind, *parts = text.split(",")
    if kind not in KINDS:
        raise SettingsError(f"unknown fault {kind!r}", "choose one of " + ", ".join(KINDS))
    given: dict[str, Any] = dict(part.partition("=")[::2] for part in parts)
    if "tokens" in given:
        given["tokens"] = given["tokens"].split("+")
    try:
        options = msgspec.convert({**given, "kind": kind}, FaultOptions, strict=False)
    except msgspec.ValidationError as error:
        names = ", ".join(FaultOptions.__struct_fields__[1:])
        raise SettingsError(
            f"the fault {text!r} cannot be read ({error})",
            f"use {names}, and give a number where one belongs",
        ) from None
    return {"kind": kind} | {name: getattr(options, name) for name in given}


@dataclass(slots=True)
class _ActiveFault:
    options: FaultOptions
    sides: frozenset[Side]
    until_s: float | None  # monotonic
    struck: int = 0

    def is_over(self, now_s: float) -> bool:
        used_up = self.options.count is not None and self.struck >= self.options.count
        return used_up or (self.until_s is not None and now_s >= self.until_s)


class Faults:
    """The active faults. Thread-safe; random decisions follow `seed`.

    Attributes:
        struck: How often each kind struck since the start.

    Example:
        >>> faults = Faults()
        >>> _ = faults.add("429", count=1)
        >>> faults.strike("rest", "429") is not None, faults.strike("rest", "429") is not None
        (True, False)
    """

    def __init__(self, *, seed: int = 1, now_s: Callable[[], float] = time.monotonic) -> None:
        self.struck: dict[str, int] = {}
        self._now_s = now_s
        self._lock = threading.Lock()
        self._active: list[_ActiveFault] = []
        self._seed, self._random = seed, random.Random(seed)

    def add(self, kind: str, **options: Any) -> FaultOptions:
        """Activate a fault; `options` are fields of `FaultOptions`. Raise SettingsError for invalid ones."""
        fault = FaultOptions(kind, **options)
        if kind not in KINDS:
            raise SettingsError(f"unknown fault {kind!r}", "choose one of " + ", ".join(KINDS))
        sides = KINDS[kind][0]
        if fault.on is not None:
            if fault.on not in sides:
                raise SettingsError(f"the fault {kind} does not apply to {fault.on}", "omit `on`")
            sides = frozenset({fault.on})
        if kind in _OF_TOKENS and not fault.tokens:
            raise SettingsError(f"the fault {kind} needs tokens", f"{kind},tokens=408065+738561")
        if not fault.factor > 0 or fault.offset_seconds % 60:
            raise SettingsError("factor is above 0, offset_seconds a multiple of 60", "correct it")
        if not 0 < fault.share <= 1 or not 0 <= fault.delay_seconds <= DELAY_SECONDS_MAX:
            raise SettingsError(f"{kind}: share is (0, 1], delay 0 to 3600 seconds", "correct it")
        until_s = None if fault.seconds is None else self._now_s() + fault.seconds
        with self._lock:
            self._remove_ended()
            if len(self._active) >= FAULTS_MAX:
                raise SettingsError(f"{FAULTS_MAX} faults are active", "clear some")
            self._active.append(_ActiveFault(fault, sides, until_s))
        return fault

    def clear(self, kind: str | None = None) -> None:
        """End all faults, or those of one kind."""
        with self._lock:
            self._active = [
                fault for fault in self._active if kind is not None and fault.options.kind != kind
            ]

    def active(self) -> list[dict[str, Any]]:
        """Return the active faults as JSON: kind, on, count and seconds left, path, tokens, struck."""
        with self._lock:
            self._remove_ended()
            now_s = self._now_s()
            return [
                {
                    "kind": fault.options.kind,
                    "on": sorted(fault.sides),
                    "count": None if fault.options.count is None else fault.options.count - fault.struck,
                    "seconds": None if fault.until_s is None else round(fault.until_s - now_s, 3),
                    "path": fault.options.path,
                    "tokens": sorted(fault.options.tokens),
                    "struck": fault.struck,
                }
                for fault in self._active
            ]

    def strike(self, side: Side, *kinds: str, path: str = "") -> FaultOptions | None:
        """Count a strike of the first active fault of these kinds, and return the fault."""
        if not self._active:  # the usual case, at no cost
            return None
        with self._lock:
            self._remove_ended()
            for fault in self._active:
                options = fault.options
                if options.kind in kinds and side in fault.sides and path.startswith(options.path):
                    return self._count(fault)
        return None

    def damage(self, frame: bytes, delayed: list[bytes]) -> list[bytes]:
        """Return the frames to send instead of `frame`; `delayed` is what `reorder` kept of its client."""
        before, delayed[:] = list(delayed), []
        if not self._active:
            return [frame, *before]
        frames = [frame]
        with self._lock:
            self._remove_ended()
            for fault in tuple(self._active):
                kind = fault.options.kind
                if kind not in ("duplicate", "reorder", "garbage"):
                    continue
                if self._random.random() >= fault.options.share:
                    continue
                self._count(fault)
                if kind == "duplicate":
                    frames = frames * 2
                elif kind == "reorder":
                    delayed[:], frames = [*delayed, *frames], []
                else:
                    frames = [self._garbage(one) for one in frames]
        return frames + before

    def unmuted(self, rows: Ints, tokens: Ints) -> Ints:
        """Return the rows whose packets are sent. `tokens` has the token of each market row."""
        if not self._active:
            return rows
        with self._lock:
            self._remove_ended()
            for fault in self._active:
                if fault.options.kind in ("mute", "stall"):
                    self._count(fault)
                    return rows[:0]
                if fault.options.kind in _SILENT:
                    self._count(fault)
                    rows = rows[~self._is_muted(fault.options, tokens[rows])]
        return rows

    def find(self, *kinds: str) -> list[FaultOptions]:
        """Return the active faults of these kinds, without counting a strike."""
        if not self._active:
            return []
        with self._lock:
            self._remove_ended()
            return [each.options for each in self._active if each.options.kind in kinds]

    def rows_of(self, kind: str, row_of: Mapping[int, int]) -> Ints:
        """Return the market rows of the instruments of a kind's faults."""
        tokens = {token for each in self.find(kind) for token in each.tokens}
        return np.array(sorted(row_of[token] for token in tokens if token in row_of), np.int64)

    def spoil_packets(self, market: Packets, rows: Ints) -> Packets:
        """Return the packets to send of a market, of which `rows` are due."""
        if not self.find(*_SPOIL_PACKETS):
            return market
        shown = Packets(market.packets.copy(), market.index_packets.copy(), market.is_index, market.row_of)
        with self._lock:
            for fault in tuple(self._active):
                options = fault.options
                chosen = np.array([market.row_of[t] for t in options.tokens if t in market.row_of], np.int64)
                if options.kind == "corporate_action":
                    _rescale(shown.packets, chosen, options.factor)
                elif options.kind == "clock_offset":
                    for packets, name in (
                        (shown.packets, "exchange_timestamp"),
                        (shown.index_packets, "exchange_timestamp"),
                        (shown.packets, "last_trade_time"),
                    ):
                        packets[name] = packets[name].astype(np.int64) + options.offset_seconds
                elif options.kind == "zero_price_first":
                    tokens = shown.packets["instrument_token"][chosen]
                    shown.packets[chosen] = np.zeros(1, shown.packets.dtype)
                    shown.packets["instrument_token"][chosen] = tokens
                elif options.kind == "annul_volume" and (struck := np.intersect1d(chosen, rows)).size:
                    shown.packets["volume_traded"][struck] += ANNULLED_VOLUME
                    self._count(fault)
        return shown

    def spoil_history(self, token: int, candles: list[list[Any]], interval: str) -> list[list[Any]]:
        """Return Kite's JSON rows of an instrument as the active faults show them."""
        for options in self.find("corporate_action"):
            if token in options.tokens:
                factor = options.factor
                candles = [
                    [
                        row[0],
                        *(round(price / factor, 2) for price in row[1:5]),
                        int(row[5] * factor),
                        *row[6:],
                    ]
                    for row in candles
                ]
        if len(candles) > 4 and self.strike("rest", "odd_history") is not None:
            odd = [list(row) for row in candles]
            odd[1][1] = odd[1][2] + 1.0  # the pre-open's price, as Kite gives it
            odd[2], odd[3] = odd[3], odd[2]
            odd.insert(4, list(odd[4]))
            if interval != "day":
                odd.append([odd[-1][0][:11] + "15:30:00+0530", *odd[-1][1:]])
            candles = odd
        return candles

    @property
    def offset_s(self) -> int:
        """How far the exchange's time is ahead."""
        return sum(each.offset_seconds for each in self.find("clock_offset"))

    def listed(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]] | None:
        """Return the CSV's rows with renamed and without delisted instruments; None if unchanged."""
        faults = self.find("rename", "delist")
        if not faults:
            return None
        shown: list[dict[str, Any]] = []
        for row in rows:
            of_row = [each for each in faults if int(row["instrument_token"]) in each.tokens]
            if any(each.kind == "delist" for each in of_row):
                continue
            for each in of_row:
                row = row | {"tradingsymbol": each.name or f"{row['tradingsymbol']}NEW"}
            shown.append(row)
        return shown

    def spoil_csv(self, text: str) -> str:
        """Return the instruments CSV as the fault `csv_damage` leaves it."""
        fault = self.strike("rest", "csv_damage")
        if fault is None:
            return text
        if fault.name == "short":
            return text[: len(text) // 2]
        header, *lines = text.splitlines()
        lines = [f"{line},x" for line in lines]
        if lines:
            middle = len(lines) // 2
            lines[middle] = lines[middle].replace(",", ',"', 3)
        return "\n".join([f"{header},freeze qty,", *lines]) + "\n"

    def stalled(self) -> bool:
        """Return whether not even heartbeats are sent."""
        if not self._active:
            return False
        with self._lock:
            self._remove_ended()
            return any(fault.options.kind == "stall" for fault in self._active)

    def _is_muted(self, options: FaultOptions, tokens: Ints) -> npt.NDArray[np.bool_]:
        if options.tokens:
            return np.isin(tokens, options.tokens)
        # A hash of the token, so that the same instruments stay muted while the fault lasts.
        return (tokens * 2_654_435_761 + self._seed) % 1_000_003 < options.share * 1_000_003

    def _count(self, fault: _ActiveFault) -> FaultOptions:
        fault.struck += 1
        self.struck[fault.options.kind] = self.struck.get(fault.options.kind, 0) + 1
        return fault.options

    def _remove_ended(self) -> None:
        now_s = self._now_s()
        self._active = [fault for fault in self._active if not fault.is_over(now_s)]

    def _garbage(self, frame: bytes) -> bytes:
        if self._random.random() < 0.5:
            return frame[: self._random.randrange(1, len(frame))]
        return self._random.randbytes(min(len(frame), 200))
