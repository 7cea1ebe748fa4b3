"""Faults on demand: what the simulator does wrong, how often and for how long. Thread-safe, seeded.

A fault strikes while it is active: until its count is used up, or its seconds (machine time) are over.
Without either it stays until `clear`.

Faults as words of a command line: `429`, `mute,seconds=20`, `slow,path=/quote,delay_seconds=3`.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from pkbrokers_redis.errors import SettingsError

Ints = npt.NDArray[np.int64]
Side = Literal["rest", "ws"]

# kind → (where it makes sense, what happens). docs/simulator.md has the same table.
KINDS: Final[dict[str, tuple[frozenset[Side], str]]] = {
    "403": (frozenset({"rest", "ws"}), "the session counts as over (websocket: at the next connect)"),
    "429": (frozenset({"rest", "ws"}), "too many requests (websocket: at the next connect)"),
    "500": (frozenset({"rest", "ws"}), "GeneralException"),
    "502": (frozenset({"rest", "ws"}), "DataException"),
    "503": (frozenset({"rest", "ws"}), "NetworkException"),
    "slow": (frozenset({"rest"}), "the answer comes `delay_seconds` late"),
    "drop": (frozenset({"rest", "ws"}), "the connection is cut: no answer; websocket: at the next frame"),
    "html": (frozenset({"rest"}), "a maintenance page instead of JSON"),
    "garbage_json": (frozenset({"rest"}), "JSON that ends early"),
    "mute": (frozenset({"ws"}), "heartbeats, but no ticks"),
    "mute_some": (frozenset({"ws"}), "no ticks of `tokens`, or of a `share` of all"),
    "stall": (frozenset({"ws"}), "nothing at all, not even heartbeats"),
    "duplicate": (frozenset({"ws"}), "a `share` of frames comes twice"),
    "reorder": (frozenset({"ws"}), "a `share` of frames comes after the next one"),
    "garbage": (frozenset({"ws"}), "a `share` of frames is damaged: cut off, or random bytes"),
}
FAULTS_MAX = 100  # active at once
STATUS_KINDS = ("403", "429", "500", "502", "503")


@dataclass(slots=True)
class Fault:
    """One active fault. `path`: only REST paths that begin so. `struck`: how often it did."""

    kind: str
    sides: frozenset[Side]
    count: int | None = None
    until_s: float | None = None  # monotonic
    path: str = ""
    tokens: frozenset[int] = frozenset()
    share: float = 0.2
    delay_seconds: float = 2.0
    struck: int = field(default=0)


class Faults:
    """The active faults. `add("429", count=3)`, `clear()`."""

    def __init__(self, *, seed: int = 1, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._lock = threading.Lock()
        self._active: list[Fault] = []
        self._seed, self._random = seed, random.Random(seed)
        self.struck: dict[str, int] = {}  # by kind, since the start

    def add(
        self,
        kind: str,
        *,
        count: int | None = None,
        seconds: float | None = None,
        on: Side | None = None,
        path: str = "",
        tokens: Collection[int] = (),
        share: float = 0.2,
        delay_seconds: float = 2.0,
    ) -> Fault:
        """Begin a fault; `on` limits one that knows both sides. Raises SettingsError for nonsense."""
        if kind not in KINDS:
            raise SettingsError(f"unknown fault {kind!r}", "choose one of " + ", ".join(KINDS))
        sides = KINDS[kind][0]
        if on is not None:
            if on not in sides:
                raise SettingsError(f"the fault {kind} is not one of {on}", "leave `on` away")
            sides = frozenset({on})
        if not 0 < share <= 1 or not 0 <= delay_seconds <= 3600:
            raise SettingsError(f"{kind}: share is (0, 1], delay 0 to 3600 seconds", "correct it")
        until_s = None if seconds is None else self._now_s() + seconds
        fault = Fault(kind, sides, count, until_s, path, frozenset(tokens), share, delay_seconds)
        with self._lock:
            self._prune()
            if len(self._active) >= FAULTS_MAX:
                raise SettingsError(f"{FAULTS_MAX} faults are active", "clear some")
            self._active.append(fault)
        return fault

    def clear(self, kind: str | None = None) -> None:
        """End all faults, or those of one kind."""
        with self._lock:
            self._active = [fault for fault in self._active if kind is not None and fault.kind != kind]

    def active(self) -> list[dict[str, Any]]:
        """What is active now, for people: kind, count left, seconds left, path, tokens, struck."""
        with self._lock:
            self._prune()
            now = self._now_s()
            return [
                {
                    "kind": fault.kind,
                    "on": sorted(fault.sides),
                    "count": None if fault.count is None else fault.count - fault.struck,
                    "seconds": None if fault.until_s is None else round(fault.until_s - now, 3),
                    "path": fault.path,
                    "tokens": sorted(fault.tokens),
                    "struck": fault.struck,
                }
                for fault in self._active
            ]

    def strike(self, side: Side, *kinds: str, path: str = "") -> Fault | None:
        """The first active fault of these kinds, which has now struck once more; None if there is none."""
        if not self._active:  # the usual case, at no cost
            return None
        with self._lock:
            self._prune()
            for fault in self._active:
                if fault.kind in kinds and side in fault.sides and path.startswith(fault.path):
                    return self._struck(fault)
        return None

    def damage(self, frame: bytes, held: list[bytes]) -> list[bytes]:
        """One client's frame → the frames to send now; `held` is what waits for its next one."""
        before, held[:] = list(held), []
        if not self._active:
            return [frame, *before]
        frames = [frame]
        with self._lock:
            self._prune()
            for fault in tuple(self._active):
                if fault.kind not in ("duplicate", "reorder", "garbage"):
                    continue
                if self._random.random() >= fault.share:
                    continue
                self._struck(fault)
                if fault.kind == "duplicate":
                    frames = frames * 2
                elif fault.kind == "reorder":
                    held[:], frames = [*held, *frames], []
                else:
                    frames = [self._garbage(each) for each in frames]
        return frames + before

    def audible(self, rows: Ints, tokens: Ints) -> Ints:
        """The market rows whose packets are sent, of those that are new. `tokens` is by row."""
        if not self._active:
            return rows
        with self._lock:
            self._prune()
            for fault in self._active:
                if fault.kind in ("mute", "stall"):
                    self._struck(fault)
                    return rows[:0]
                if fault.kind == "mute_some":
                    self._struck(fault)
                    rows = rows[~self._silent(fault, tokens[rows])]
        return rows

    def stalled(self) -> bool:
        """Whether not even heartbeats are sent."""
        if not self._active:
            return False
        with self._lock:
            self._prune()
            return any(fault.kind == "stall" for fault in self._active)

    def _silent(self, fault: Fault, tokens: Ints) -> npt.NDArray[np.bool_]:
        if fault.tokens:
            return np.isin(tokens, list(fault.tokens))
        # The same share of the instruments for as long as the fault lasts.
        return (tokens * 2_654_435_761 + self._seed) % 1_000_003 < fault.share * 1_000_003

    def _struck(self, fault: Fault) -> Fault:
        fault.struck += 1
        self.struck[fault.kind] = self.struck.get(fault.kind, 0) + 1
        return fault

    def _prune(self) -> None:
        now = self._now_s()
        self._active = [
            fault
            for fault in self._active
            if (fault.count is None or fault.struck < fault.count)
            and (fault.until_s is None or now < fault.until_s)
        ]

    def _garbage(self, frame: bytes) -> bytes:
        if self._random.random() < 0.5:
            return frame[: self._random.randrange(1, len(frame))]
        return self._random.randbytes(min(len(frame), 200))


_READERS: Final[dict[str, Callable[[str], Any]]] = {
    "count": int,
    "seconds": float,
    "on": str,
    "path": str,
    "share": float,
    "delay_seconds": float,
    "tokens": lambda text: [int(part) for part in text.split("+")],
}


def parse_fault(text: str) -> dict[str, Any]:
    """The arguments of `Faults.add`, `kind` among them; tokens are joined by +. Raises SettingsError."""
    kind, *parts = text.split(",")
    if kind not in KINDS:
        raise SettingsError(f"unknown fault {kind!r}", "choose one of " + ", ".join(KINDS))
    found: dict[str, Any] = {"kind": kind}
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals or name not in _READERS:
            raise SettingsError(
                f"{part!r} of the fault {kind} is not understood", f"use {', '.join(_READERS)}"
            )
        try:
            found[name] = _READERS[name](value)
        except ValueError:
            raise SettingsError(f"{part!r} of the fault {kind} is not understood", "give a number") from None
    return found
