"""The errors of the whole package. One line says what is wrong, `hint` says what to do about it.

The command line prints `pkb: <message>: <hint>` and exits with 2; programs get the exception
with its evidence and its cause chained.
"""

from __future__ import annotations


class PkbError(Exception):
    """Base of all errors that are not bugs: a user's mistake, an unavailable server, invalid data.

    Args:
        message: What happened, in one line, without a secret.
        hint: What to do about it: a short sentence in the imperative, without a secret.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}: {self.hint}" if self.hint else self.message


class SettingsError(PkbError):
    """Raised when a PKB_… setting cannot be understood."""


class RedisUnavailable(PkbError):
    """Raised when no Redis answers at the configured URL, or it refuses access (password, ACL)."""


class RedisUnsuitable(PkbError):
    """Raised when Redis lacks a feature that is needed (Functions: Redis 7 or Valkey)."""


class MetaMismatch(PkbError):
    """Raised when `P:meta` was written by workers with other settings; `.field` names which."""

    def __init__(self, field: str, stored: str, wanted: str, hint: str) -> None:
        super().__init__(f"the store was made with {field}={stored}, this worker has {field}={wanted}", hint)
        self.field = field
        self.stored = stored
        self.wanted = wanted


class UnknownSymbol(PkbError):
    """Raised when a symbol is in no instrument list; `.nearest` holds close spellings."""

    def __init__(self, symbol: str, nearest: list[str], hint: str = "") -> None:
        if nearest and not hint:
            hint = f"did you mean {' or '.join(nearest)}? `pkb instruments search` finds more"
        hint = hint or "`pkb instruments search` finds names; or give the instrument token"
        super().__init__(f"unknown symbol {symbol!r}", hint)
        self.symbol = symbol
        self.nearest = nearest


class UnknownInterval(PkbError):
    """Raised when an interval is not one of the configured ones."""


class FrameError(PkbError):
    """Raised when bytes are no packet of Kite's, by their length. `.frame` holds the first of them."""

    def __init__(self, message: str, frame: bytes) -> None:
        super().__init__(message)
        self.frame = frame[:64]


class CommitRefused(PkbError):
    """Raised when Redis refuses a commit: the lease epoch or the cursor changed since the last one."""


class WrongKeyType(PkbError):
    """Raised when a key of the store holds another Redis type; `.key` names it."""

    def __init__(self, key: str, found: str, wanted: str) -> None:
        super().__init__(f"{key} holds a {found}, not a {wanted}", f"look at it, then `DEL {key}`")
        self.key = key


class InputFileError(PkbError):
    """Raised when a file (replay, instruments, pickle) cannot be read as what it should be."""


class RefusedPickle(InputFileError):
    """Raised when a pickle needs more than tables of numbers; `.name` is the object it refers to."""

    def __init__(self, message: str, name: str = "") -> None:
        super().__init__(message, "nothing of it was run; use a file from a source you trust")
        self.name = name


class CandleFileError(PkbError):
    """Raised when the SQLite file of candles cannot be opened, read or written: damaged, locked, full."""


class KiteError(PkbError):
    """Raised when Kite refuses a request. `.status` is the HTTP status (None: there was no answer), `.kind`
    Kite's own `error_type`."""

    def __init__(self, message: str, hint: str = "", *, status: int | None = None, kind: str = "") -> None:
        super().__init__(message, hint)
        self.status = status
        self.kind = kind


class KiteUnavailable(KiteError):
    """Raised when Kite does not answer, or not as it should (5xx, a page for data): try again later."""


class KiteThrottled(KiteError):
    """Raised on 429: too many requests."""


class SessionExpired(KiteError):
    """Raised on Kite's TokenException (403): the session is invalid. Renew it."""


class LoginRefused(KiteError):
    """Raised when Kite refuses the credentials. Never retried automatically: Kite locks accounts."""


class LoginNeeded(SettingsError):
    """Raised when there is no Kite session, and only a person can create one."""
