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


def nothing_halted(cluster: ClusterState) -> Iterator[Finding]:
    """Check that no active instrument stays silent while its feed ticks."""
    if count := sum(worker.number("halted") for worker in cluster.alive("ingest")):
        names = shown(cluster.names("halted_names"))
        message = f"{count:,.0f} active instruments get no ticks, though subscribed again: {names}"
        hint = "the exchange halted them, or Kite dropped them; they are subscribed again every five minutes"
        yield Finding("halted", "warn", message, hint)


def volumes_taken_back(cluster: ClusterState) -> Iterator[Finding]:
    """Show how often the exchange took volume back; the candles were corrected."""
    if count := sum(worker.number("volumes_taken_back") for worker in cluster.workers):
        message = f"{count:,.0f} times a lower volume replaced a wrong one; sums still add up"
        yield Finding("corrections", "ok", message)


def hours_known(cluster: ClusterState) -> Iterator[Finding]:
    """Name instruments for whose exchange the calendar has no hours."""
    if count := sum(worker.number("unknown_hours") for worker in cluster.alive("ingest")):
        names = shown(cluster.names("unknown_hours_names"))
        message = f"{count:,.0f} instruments count as open all day, as the calendar lacks their kind: "
        hint = "give their exchange or segment a schedule in PKB_CALENDAR (docs/calendar.md)"
        yield Finding("hours", "ok", message + names, hint)


CLOCK_MS_MAX = 5_000  # between a host's clock and the exchange's timestamps


def calendar_agrees(cluster: ClusterState) -> Iterator[Finding]:
    """Check that nobody trades while the calendar says closed."""
    if count := sum(worker.number("closed_trading") for worker in cluster.alive("ingest")):
        names = shown(cluster.names("closed_trading_names"))
        message = f"{count:,.0f} instruments trade while the calendar says closed: {names}"
        hint = "add the session to PKB_CALENDAR (docs/calendar.md); then the missed part is backfilled"
        yield Finding("calendar", "warn", message, hint)


def clock_agrees_with_exchange(cluster: ClusterState) -> Iterator[Finding]:
    """Check the ingest hosts' clocks against the exchange's timestamps."""
    measured = [(each, each.number("clock_offset_ms")) for each in cluster.alive("ingest")]
    measured = [pair for pair in measured if pair[0].fields.get("clock_offset_ms")]
    for worker, offset_ms in measured:
        if abs(offset_ms) > CLOCK_MS_MAX:
            direction = "ahead of" if offset_ms > 0 else "behind"
            message = f"{worker.id}'s clock is {abs(offset_ms) / 1000:.1f} s {direction} the exchange"
            hint = "synchronise it (chrony, systemd-timesyncd); until then the exchange's time is used"
            yield Finding("exchange_clock", "warn", message, hint)
    if measured and all(abs(offset_ms) <= CLOCK_MS_MAX for _, offset_ms in measured):
        worst = max((abs(offset_ms) for _, offset_ms in measured), default=0.0)
        yield Finding("exchange_clock", "ok", f"at most {worst / 1000:.1f} s off the exchange's timestamps")


def closes_agree(cluster: ClusterState) -> Iterator[Finding]:
    """Check Kite's previous closes against our last day rows: splits, bonus shares, mergers."""
    if count := sum(worker.number("closes_differ") for worker in cluster.alive("ingest")):
        names = shown(cluster.names("closes_differ_names"))
        message = f"Kite's previous close of {count:,.0f} instruments is not our last day's: {names}"
        hint = "a split, bonus or merger: older rows are on another scale; or a day that is not final"
        yield Finding("previous_close", "warn", message, hint)


MARKET_CHECKS: tuple[Callable[[ClusterState], Iterator[Finding]], ...] = (
    names_known,
    hours_known,
    calendar_agrees,
    clock_agrees_with_exchange,
    closes_agree,
    nothing_halted,
    volumes_taken_back,
)
