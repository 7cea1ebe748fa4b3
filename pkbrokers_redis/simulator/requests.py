"""What clients ask of the simulator's websocket. Pure; nothing a client sends makes it raise.

{"a": "subscribe", "v": [408065]}
{"a": "unsubscribe", "v": [408065]}
{"a": "mode", "v": ["full", [408065]]}
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from pkbrokers_redis.simulator.frames import MODES


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Ticks of these tokens, in quote mode until told otherwise."""

    tokens: list[int]


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    """No more ticks of these tokens."""

    tokens: list[int]


@dataclass(frozen=True, slots=True)
class SetMode:
    """Another mode (one of `frames.MODES`' values) for tokens that are subscribed."""

    mode: int
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class BadRequest:
    """Something else; `reason` is for the error text frame."""

    reason: str


def parse_request(message: bytes | str) -> Subscribe | Unsubscribe | SetMode | BadRequest:
    """One message of a client. Tokens that are no numbers give no ticks (as on Kite): dropped."""
    try:
        content = msgspec.json.decode(message)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return BadRequest("the message is not JSON")
    if not isinstance(content, dict):
        return BadRequest("the message is no object")
    action, value = content.get("a"), content.get("v")
    if action == "mode":
        if not (isinstance(value, list) and len(value) == 2 and isinstance(value[1], list)):
            return BadRequest("mode needs [mode, [tokens]]")
        mode = MODES.get(value[0]) if isinstance(value[0], str) else None
        return BadRequest("the mode is unknown") if mode is None else SetMode(mode, _tokens(value[1]))
    if action not in ("subscribe", "unsubscribe"):
        return BadRequest("the action is unknown")
    if not isinstance(value, list):
        return BadRequest(f"{action} needs a list of tokens")
    return Subscribe(_tokens(value)) if action == "subscribe" else Unsubscribe(_tokens(value))


def _tokens(values: list[object]) -> list[int]:
    numbers = [value for value in values if isinstance(value, int) and not isinstance(value, bool)]
    return list(dict.fromkeys(numbers))
