"""Faults as words of a command line: `429`, `mute,seconds=20`, `slow,path=/quote,delay_seconds=3`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from pkbrokers_redis.errors import SettingsError
from pkbrokers_redis.simulator.faults import KINDS

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
