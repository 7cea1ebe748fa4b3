"""What the ingest workers' heartbeats say of the market: names, hours, clocks and prices that do not fit.

They are status checks like those of `runtime/health.py`; figures that no worker reports give no line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pkbrokers_redis.runtime.cluster_state import ClusterState, Finding

NAMES_MAX = 5  # in one line


def shown(names: Sequence[object]) -> str:
    """Return the first names with commas, and how many more there are."""
    first = ", ".join(map(str, names[:NAMES_MAX]))
    return first + (f" and {len(names) - NAMES_MAX} more" if len(names) > NAMES_MAX else "")


def names_known(cluster: ClusterState) -> Iterator[Finding]:
    """Check that the instrument master has every name of the list."""
    if unknown := cluster.names("unknown_instruments"):
        message = f"not in the instrument master, so not streamed: {shown(unknown)}"
        hint = "renamed, delisted or misspelt: `pkb instruments search` finds names; correct PKB_INSTRUMENTS"
        yield Finding("names", "warn", message, hint)


def volumes_taken_back(cluster: ClusterState) -> Iterator[Finding]:
    """Show how often the exchange took volume back; the candles were corrected."""
    if count := sum(worker.number("volumes_taken_back") for worker in cluster.workers):
        message = f"{count:,.0f} times a lower volume replaced a wrong one; sums still add up"
        yield Finding("corrections", "ok", message)


MARKET_CHECKS: tuple[Callable[[ClusterState], Iterator[Finding]], ...] = (names_known, volumes_taken_back)
