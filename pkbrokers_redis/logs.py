"""Structured logs: one line per event to stderr, key=value or JSON (`PKB_LOG_FORMAT`).

    log = logs.get("ingest")
    log.info("subscribed", tokens=3000, mode="full")
    → timestamp=2026-08-03T03:45:00.123456Z level=info logger=ingest event=subscribed tokens=3000 mode=full

structlog's global configuration is left to the program that imports us; until `configure` is called only
warnings and errors are shown. Libraries that log through `logging` come out in the same form. Everything
that looks like a credential is masked before it is written.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Hashable, MutableMapping
from dataclasses import dataclass
from typing import Any

import structlog
from structlog.typing import FilteringBoundLogger, Processor

from pkbrokers_redis.settings import Settings

MASK = "***"

_SECRETS = re.compile(
    r"""
      (?<=://)[^/\s@]*(?=@)       # redis://user:password@host
    | (?<=/bot)\d+:[\w-]+         # api.telegram.org/bot123:token/getMe
    | (?<=token\ )\w+:\w+         # Authorization: token api_key:access_token
    | (?<=[?&\s"'])               # ?access_token=… and the like
      (?P<name>(?:access_token|request_token|enctoken|password|api_secret|checksum|totp)=)
      [^&\s"']+
    """,
    re.VERBOSE | re.IGNORECASE,
)


def mask(text: str) -> str:
    """Return the text with *** for credentials: URL users, bot tokens, Kite's tokens."""
    return _SECRETS.sub(lambda found: (found["name"] or "") + MASK, text)


class Once:
    """Log evidence once for each key. Beyond `keys_max` distinct keys every new one counts as seen."""

    def __init__(self, keys_max: int = 1000) -> None:
        self.keys_max = keys_max
        self.repeats = 0
        self._seen: set[Hashable] = set()

    def first(self, key: Hashable) -> bool:
        """Return True for the first call with this key only."""
        if key in self._seen or len(self._seen) >= self.keys_max:
            self.repeats += 1
            return False
        self._seen.add(key)
        return True


def configure(settings: Settings) -> None:
    """Show what `PKB_LOG_LEVEL` asks for, in the form of `PKB_LOG_FORMAT`. May be called again."""
    _output.level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    _output.renderer = _JSON if settings.log_format == "json" else _TEXT
    root = logging.getLogger()
    for handler in [each for each in root.handlers if isinstance(each, _ThroughUs)]:
        root.removeHandler(handler)
    root.addHandler(_ThroughUs())
    root.setLevel(max(_output.level, logging.WARNING))  # a library's INFO is not an operator's


def get(name: str) -> FilteringBoundLogger:
    """A logger whose lines carry `logger=<name>`. Cheap, and may be got before `configure`."""
    logger: FilteringBoundLogger = structlog.wrap_logger(
        _Stderr(),
        processors=_PROCESSORS,
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
    ).bind(logger=name)
    return logger


_TEXT = structlog.processors.LogfmtRenderer(
    key_order=["timestamp", "level", "logger", "event"], drop_missing=True, bool_as_flag=False
)
_JSON = structlog.processors.JSONRenderer(default=str, ensure_ascii=False)


@dataclass
class _Output:
    """What `configure` sets. Loggers look here at each event, so those got earlier follow."""

    level: int = logging.WARNING
    renderer: Processor = _TEXT


_output = _Output()


def _drop_below_level(_logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if logging.getLevelNamesMapping().get(method.upper(), logging.ERROR) < _output.level:
        raise structlog.DropEvent
    return event


def _clean(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """No credential leaves, and no value breaks out of its line: text from the wire may hold anything."""
    for key, value in event.items():
        if not isinstance(value, (int, float, bool, type(None))):
            text = mask(value if isinstance(value, str) else str(value))
            event[key] = text if text.isprintable() else _escape(text)
    return event


def _escape(text: str) -> str:
    """Control characters as \\x1b; newlines stay, the renderers escape those of a traceback themselves."""
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in text
    )


def _render(logger: Any, method: str, event: MutableMapping[str, Any]) -> Any:
    return _output.renderer(logger, method, event)


_PROCESSORS: list[Processor] = [
    _drop_below_level,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.format_exc_info,
    _clean,
    _render,
]


class _Stderr:
    """Write whole lines to the current sys.stderr; a closed one loses the line, not the worker."""

    def msg(self, line: str) -> None:
        try:
            sys.stderr.write(line + "\n")  # one call, so that lines of several threads stay whole
            sys.stderr.flush()
        except (OSError, ValueError):
            pass

    log = debug = info = warning = warn = error = critical = exception = fatal = failure = err = msg


class _ThroughUs(logging.Handler):
    """Write a record of `logging` as an event of this module."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            extra = {"exc_info": record.exc_info} if record.exc_info else {}
            method = record.levelname.lower() if record.levelname in _LEVELS else "error"
            getattr(get(record.name), method)(record.getMessage(), **extra)
        except Exception:
            self.handleError(record)


_LEVELS = {"DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"}
