"""Groups of instruments that PKB_INSTRUMENTS may name, as rules over `EXCHANGE:TRADINGSYMBOL` and token.

    all                           the whole master
    nse-equity  bse-equity        shares (NSE: without bonds, rights and funds)
    nse-indices bse-indices indices
    nfo bfo cds bcd mcx           an exchange's contracts
    nfo-futures, mcx-futures, …   its futures
    nfo-nifty, mcx-crudeoil, …    the contracts of one underlying

A new group is a row of `GROUPS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from pkbrokers_redis.core.model import SEGMENT_INDICES

Rule = Callable[[str, int], bool]  # (NSE:INFY, token) → whether it belongs

# NSE series that are shares: none, BE/BZ (trade for trade), SM/ST (SME). The others behind a hyphen
# (GS, SG, N1, RE, …) are bonds, rights and funds.
EQUITY_SERIES = {"BE", "BZ", "SM", "ST"}
NSE_SEGMENT, BSE_SEGMENT = 1, 4
CONTRACT_EXCHANGES = ("NFO", "BFO", "CDS", "BCD", "MCX")


def is_nse_equity(symbol: str, token: int) -> bool:
    """Whether it is a share on NSE."""
    exchange, _, name = symbol.partition(":")
    if exchange != "NSE" or token & 0xFF != NSE_SEGMENT:
        return False
    stem, hyphen, series = name.rpartition("-")
    return not (hyphen and stem and len(series) == 2) or series in EQUITY_SERIES


def _is_index(exchange: str = "") -> Rule:
    return lambda symbol, token: token & 0xFF == SEGMENT_INDICES and symbol.startswith(exchange)


def _starts(prefix: str) -> Rule:
    return lambda symbol, _: symbol.startswith(prefix)


GROUPS: dict[str, Rule] = {
    "all": lambda symbol, token: True,
    "nse-equity": is_nse_equity,
    "bse-equity": lambda symbol, token: symbol.startswith("BSE:") and token & 0xFF == BSE_SEGMENT,
    "indices": _is_index(),
    "nse-indices": _is_index("NSE:"),
    "bse-indices": _is_index("BSE:"),
    **{exchange.lower(): _starts(f"{exchange}:") for exchange in CONTRACT_EXCHANGES},
}


def group_of(text: str) -> Rule | None:
    """The rule of a group's name, in either case; None where it is no group."""
    name = text.lower()
    if name in GROUPS:
        return GROUPS[name]
    exchange, hyphen, underlying = text.upper().partition("-")
    if exchange not in CONTRACT_EXCHANGES or not hyphen or not underlying:
        return None
    if underlying == "FUTURES":
        return lambda symbol, _: symbol.startswith(f"{exchange}:") and symbol.endswith("FUT")
    # A contract's symbol is the underlying, then two digits of its year: NIFTY26DECFUT, NIFTY2612524500CE.
    of_underlying = re.compile(re.escape(f"{exchange}:{underlying}") + r"\d\d", re.IGNORECASE)
    return lambda symbol, _: of_underlying.match(symbol) is not None
