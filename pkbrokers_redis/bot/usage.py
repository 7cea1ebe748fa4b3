"""What a person typed and we could not make out."""

from __future__ import annotations

from pkbrokers_redis.errors import PkbError


class UsageError(PkbError):
    """Raised when a command was given arguments that it does not understand."""
