"""Text frames of Kite's websocket → typed events. Pure; nothing a server sends makes it raise.

    {"type": "order", "data": {…the postback…}}
    {"type": "error", "data": "…"}
    {"type": "message", "data": "…"}
    {"type": "instruments_meta", "data": {"count": 86481, "etag": "W/…"}}
    {"type": "app_code", "timestamp": "2025-08-04T13:50:28+05:30"}      no data key

The first three are documented (https://kite.trade/docs/connect/v3/websocket/), the others arrive on
every connect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec

EVIDENCE_CHARS_MAX = 200  # of a frame we do not understand, for the log


@dataclass(frozen=True, slots=True)
class OrderUpdate:
    """An order postback; `data` is Kite's object as it came."""

    kind: ClassVar[str] = "order"
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ServerError:
    """The server refuses something we asked for."""

    kind: ClassVar[str] = "error"
    text: str


@dataclass(frozen=True, slots=True)
class Notice:
    """A message or alert of the broker."""

    kind: ClassVar[str] = "message"
    text: str


@dataclass(frozen=True, slots=True)
class InstrumentsMeta:
    """Size and version of the instrument master as the server has it."""

    kind: ClassVar[str] = "instruments_meta"
    count: int | None
    etag: str | None


@dataclass(frozen=True, slots=True)
class AppCode:
    """Version stamp of Kite's web application."""

    kind: ClassVar[str] = "app_code"
    timestamp: str | None


@dataclass(frozen=True, slots=True)
class Unknown:
    """Well-formed, of a type that nobody has told us about."""

    kind: ClassVar[str] = "unknown"
    type: str
    evidence: str


@dataclass(frozen=True, slots=True)
class Invalid:
    """Not UTF-8, not JSON, or not of the shape its type has; `evidence` is its beginning."""

    kind: ClassVar[str] = "invalid"
    reason: str
    evidence: str


TextEvent = OrderUpdate | ServerError | Notice | InstrumentsMeta | AppCode | Unknown | Invalid
TEXT_KINDS = ("order", "error", "message", "instruments_meta", "app_code", "unknown", "invalid")

_json = msgspec.json.Decoder()


def parse_text(frame: bytes | str) -> TextEvent:
    """One text frame → its event; what it is not becomes `Invalid` with a reason."""
    try:
        content = _json.decode(frame)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        return Invalid(f"no JSON ({type(error).__name__})", _evidence(frame))
    if not isinstance(content, dict) or not isinstance(content.get("type"), str):
        return Invalid("no object with a type", _evidence(frame))
    return _event(content["type"], content, frame)


def _event(kind: str, content: dict[str, Any], frame: bytes | str) -> TextEvent:
    data = content.get("data")
    match kind:
        case "order":
            return OrderUpdate(data) if isinstance(data, dict) else _wrong(kind, frame)
        case "error":
            return ServerError(data) if isinstance(data, str) else _wrong(kind, frame)
        case "message":
            return Notice(data) if isinstance(data, str) else _wrong(kind, frame)
        case "instruments_meta":
            if not isinstance(data, dict):
                return _wrong(kind, frame)
            count, etag = data.get("count"), data.get("etag")
            return InstrumentsMeta(
                count if isinstance(count, int) and not isinstance(count, bool) else None,
                etag if isinstance(etag, str) else None,
            )
        case "app_code":
            stamp = content.get("timestamp")
            return AppCode(stamp if isinstance(stamp, str) else None)
    return Unknown(kind[:EVIDENCE_CHARS_MAX], _evidence(frame))


def _wrong(kind: str, frame: bytes | str) -> Invalid:
    return Invalid(f"{kind}: its data is of another type", _evidence(frame))


def _evidence(frame: bytes | str) -> str:
    if isinstance(frame, bytes):
        return frame[:EVIDENCE_CHARS_MAX].decode("utf-8", "backslashreplace")[:EVIDENCE_CHARS_MAX]
    return frame[:EVIDENCE_CHARS_MAX]
