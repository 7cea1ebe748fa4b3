"""Redis's refusals that mean "not now": the same command is worth sending again."""

from __future__ import annotations

from redis.exceptions import (
    BusyLoadingError,
    ClusterDownError,
    ExecAbortError,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    TryAgainError,
)

# redis-py takes the code off the text of those it has a class for; the others keep theirs.
_CLASSES = (
    BusyLoadingError,
    ClusterDownError,
    ExecAbortError,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    TryAgainError,
)
_CODES = ("MISCONF ", "BUSY ", "NOREPLICAS ", "UNBLOCKED ")


def is_not_now(error: BaseException) -> bool:
    """Whether a reply says that Redis cannot do it at the moment: out of memory, read-only, loading, …"""
    return isinstance(error, _CLASSES) or str(error).startswith(_CODES)
