"""Kite's instrument master: fetched, checked row by row, and swapped into Redis.

    with connect(settings) as client:
        KiteInstruments(settings=settings, client=client).sync()

Kite publishes a CSV of about 97,000 rows:

    instrument_token,exchange_token,tradingsymbol,name,last_price,expiry,strike,tick_size,lot_size,…
    408065,1594,INFY,INFOSYS,0.0,,0.0,0.05,1,EQ,NSE,NSE

Columns are found by name, so that a new one does no harm. An invalid row is counted and left out.
(kiteconnect's own parser stops at the first invalid row.)

`KiteInstruments` has upstream's names and arguments. Redis replaces upstream's SQLite file, and holds the
whole master instead of NSE's shares: `get_equities` filters.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date, datetime
from typing import Any, NamedTuple

import redis
from pydantic import SecretStr

from pkbrokers_redis import logs
from pkbrokers_redis.candles.calendar import IST
from pkbrokers_redis.candles.model import SEGMENT_INDICES, TOKEN_MAX
from pkbrokers_redis.errors import KiteError, KiteUnavailable, PkbError, SettingsError
from pkbrokers_redis.kite.rest import open_kite
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store import instruments
from pkbrokers_redis.store.auth import Session, load_session
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.symbols import is_nse_equity, read_names

log = logs.get("instruments")

EXCHANGES = ("NSE", "BSE", "NFO", "BFO", "CDS", "BCD", "MCX", "NSEIX", "GLOBAL", "NCO")
ALL = "all"  # the scope of a sync of all exchanges
REFRESH_SECONDS = 23.5 * 3600  # upstream's: an older master is fetched again
REQUIRED = ("instrument_token", "tradingsymbol", "exchange")
NUMBERS = ("last_price", "strike", "tick_size", "lot_size")
ROWS_MAX = 1_000_000  # ten times what Kite has
COLUMNS = 12  # of Kite's CSV; it may get more
COLUMNS_MAX = 40
_EXCHANGE = re.compile(r"[A-Z][A-Z0-9_]{1,11}")
_COLUMN = re.compile(r"[a-z][a-z0-9_]{0,39}")
_SYMBOL_LENGTH_MAX = 64
_CELL_LENGTH_MAX = 200


@dataclass
class Instrument:
    """One instrument with upstream's fields. `expiry` is YYYY-MM-DD, `last_updated` ISO 8601."""

    instrument_token: int
    exchange_token: str
    tradingsymbol: str
    name: str | None
    last_price: float | None
    expiry: str | None
    strike: float | None
    tick_size: float
    lot_size: int
    instrument_type: str
    segment: str
    exchange: str
    last_updated: str
    nse_stock: bool = False


def instrument_of(row: Mapping[str, str], at: str) -> Instrument:
    """Return the instrument of a CSV row, read `at` (ISO 8601). A field `nse_stock` overrides the series."""
    token, exchange = int(row["instrument_token"]), row.get("exchange", "")
    symbol = row.get("tradingsymbol", "")
    override = row.get("nse_stock", "")
    return Instrument(
        instrument_token=token,
        exchange_token=row.get("exchange_token", ""),
        tradingsymbol=symbol,
        name=row.get("name") or None,
        last_price=_number(row.get("last_price")),
        expiry=row.get("expiry") or None,
        strike=_number(row.get("strike")),
        tick_size=_number(row.get("tick_size")) or 0.0,
        lot_size=int(_number(row.get("lot_size")) or 0),
        instrument_type=row.get("instrument_type", ""),
        segment=row.get("segment", ""),
        exchange=exchange,
        last_updated=at,
        nse_stock=override == "1" if override else is_nse_equity(f"{exchange}:{symbol}", token),
    )


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def csv_of(instruments: Iterable[Instrument]) -> bytes:
    """Return instruments as Kite's CSV."""
    text = io.StringIO()
    columns = [name for name in Instrument.__dataclass_fields__ if name not in ("last_updated", "nse_stock")]
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(asdict(instrument) for instrument in instruments)
    return text.getvalue().encode()


class Parsed(NamedTuple):
    """A parsed CSV.

    Attributes:
        rows: Column → text, with a valid and unique token and symbol.
        expired: The number of expired contracts, which are left out.
        refused: The number of invalid rows by reason.
        sha256: Of the download.
    """

    rows: list[dict[str, str]]
    expired: int
    refused: Counter[str]
    sha256: str


def parse_instruments(content: bytes, today: date) -> Parsed:
    """Parse Kite's CSV.

    Args:
        content: The download.
        today: The date in India. A contract is expired from the day after its expiry.

    Raises:
        KiteUnavailable: The content is no instruments CSV.
    """
    refused: Counter[str] = Counter()
    lines = _lines(content.decode("utf-8", errors="replace"), refused)
    header = [name.strip().lstrip("\ufeff") for name in next(lines, [])]
    known = [name for name in dict.fromkeys(header) if _COLUMN.fullmatch(name)]
    if not set(REQUIRED) <= set(known) or len(header) > COLUMNS_MAX:
        raise KiteUnavailable("Kite's instruments are not the documented CSV", "try again later")
    positions = [header.index(name) for name in known]  # columns of other names are ignored
    rows: list[dict[str, str]] = []
    expired = 0
    tokens: set[str] = set()
    symbols: set[str] = set()
    for cells in lines:
        if len(cells) != len(header):
            refused["columns"] += 1
            continue
        row = {name: cells[n].strip() for name, n in zip(known, positions, strict=True)}
        reason = _invalid_reason(row)
        symbol = f"{row['exchange']}:{row['tradingsymbol']}"
        if not reason and (row["instrument_token"] in tokens or symbol in symbols):
            reason = "repeated"
        if reason:
            refused[reason] += 1
        elif row.get("expiry") and date.fromisoformat(row["expiry"]) < today:
            expired += 1
        else:
            tokens.add(row["instrument_token"])
            symbols.add(symbol)
            rows.append(row)
            if len(rows) >= ROWS_MAX:
                refused["too_many"] += 1
                break
    return Parsed(rows, expired, refused, hashlib.sha256(content).hexdigest())


def _lines(text: str, refused: Counter[str]) -> Iterator[list[str]]:
    """Yield the cells of each line that is not empty. An unclosed quote costs its own line only."""
    for line in text.split("\n"):
        if not line.strip("\r"):
            continue
        try:
            cells = line.rstrip("\r").split(",") if '"' not in line else next(csv.reader([line], strict=True))
        except csv.Error:
            refused["unreadable"] += 1
            continue
        while cells and not cells[-1].strip() and len(cells) > COLUMNS:  # a comma at the end of the line
            cells.pop()
        yield cells


def _invalid_reason(row: dict[str, str]) -> str:
    """Return why a row is no instrument, or "". Remove leading zeros of the token."""
    token, symbol = row["instrument_token"], row["tradingsymbol"]
    if not (token.isascii() and token.isdecimal() and len(token) <= 12 and 0 < int(token) <= TOKEN_MAX):
        return "token"
    row["instrument_token"] = str(int(token))
    if not symbol or len(symbol) > _SYMBOL_LENGTH_MAX or not symbol.isprintable() or "\ufffd" in symbol:
        return "symbol"
    if not _EXCHANGE.fullmatch(row["exchange"]):
        return "exchange"
    for name in NUMBERS:
        if not _is_number(row.get(name, "")):
            return name
    if not _is_date(row.get("expiry", "")):
        return "expiry"
    if any(len(cell) > _CELL_LENGTH_MAX or not cell.isprintable() for cell in row.values()):
        return "text"
    return ""


def _is_number(text: str) -> bool:
    if not text:
        return True
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _is_date(text: str) -> bool:
    if not text:
        return True
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return len(text) == 10


class Synced(NamedTuple):
    """The result of a sync. `changed` is False if the store already had the same master."""

    rows: int
    added: int
    removed: int
    expired: int
    refused: int
    changed: bool


class KiteInstruments:
    """The instrument master in Redis.

    A session is sent if there is one: `api_key` and `access_token`, else P:auth, else the settings'. Kite
    publishes the list without a session too.

    Args:
        api_key: Upstream's.
        access_token: Upstream's.
        db_path: Upstream's; without effect, as `local` and `recreate_schema`.
        settings: Default: the environment's.
        client: Default: a connection to the configured store.
        now: Market time, epoch seconds, which decides what has expired.

    Example:
        >>> KiteInstruments().sync(["NSE"]).rows                                # doctest: +SKIP
        9217
    """

    def __init__(
        self,
        api_key: str | None = None,
        access_token: str | None = None,
        db_path: str | None = None,
        local: bool = True,
        recreate_schema: bool = False,
        *,
        settings: Settings | None = None,
        client: redis.Redis | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.settings = settings or load_settings()
        self._client = client
        self._session = _session_of(api_key, access_token)
        self._now = now

    @property
    def client(self) -> redis.Redis:
        """The store; connected at the first use."""
        if self._client is None:
            self._client = connect(self.settings)
        return self._client

    def fetch(self, exchanges: Sequence[str] = ()) -> Parsed:
        """Download and parse the master.

        Args:
            exchanges: Default: all.

        Raises:
            KiteError: Kite does not respond, or not with a CSV.
            SettingsError: An exchange is unknown.
        """
        named = [exchange.strip().upper() for exchange in exchanges]
        for exchange in named:
            if exchange not in EXCHANGES:
                raise SettingsError(f"Kite has no exchange {exchange[:20]!r}", "use " + ", ".join(EXCHANGES))
        files: list[str | None] = [*named] or [None]
        session = self._session or load_session(self.client, self.settings.keys)
        kite = open_kite(self.settings, session)
        try:
            content = [kite.instruments_csv(exchange) for exchange in files]
        except KiteError as error:
            if error.status not in (401, 403):
                raise
            kite = open_kite(self.settings, anonymous=True)  # the list is public: the session may be dead
            content = [kite.instruments_csv(exchange) for exchange in files]
        first, *further = content
        # Each exchange's file has its own header line.
        joined = first + b"".join(b"\n" + other.partition(b"\n")[2] for other in further)
        return parse_instruments(joined, datetime.fromtimestamp(self._now(), IST).date())

    def sync(self, exchanges: Sequence[str] = (), *, force: bool = False) -> Synced:
        """Fetch the master and store it. An unchanged list costs a download and one small write.

        Args:
            exchanges: Default: all.
            force: Whether to store an unchanged list again, and one that lost half of its rows.

        Raises:
            KiteError: Kite does not respond, or not with a CSV.
            MasterShrunk: The list lost half of its rows.
            SettingsError: An exchange is unknown.
        """
        return self.store(self.fetch(exchanges), exchanges, force=force)

    def store(self, parsed: Parsed, exchanges: Sequence[str] = (), *, force: bool = False) -> Synced:
        """Store a parsed master of `exchanges`, or of all exchanges in it. See `sync`."""
        client, keys = self.client, self.settings.keys
        if not parsed.rows:
            raise PkbError("Kite's instrument list is empty", "try again later: the stored list is unchanged")
        named = sorted({exchange.strip().upper() for exchange in exchanges})
        scope = ",".join(named) or ALL
        refused = parsed.refused.total()
        if refused:
            reasons = ",".join(f"{reason}={count}" for reason, count in parsed.refused.items())
            log.warning("instruments_refused", rows=refused, reason=reasons)
        at = datetime.fromtimestamp(self._now(), IST).isoformat(timespec="seconds")
        # The stored rows depend on the day too, because of expired contracts.
        digest = parsed.sha256 if not parsed.expired else f"{parsed.sha256}-{parsed.expired}"
        before = instruments.read_manifest(client, keys)
        changed = force or not instruments.is_current(client, keys, digest, scope)
        swapped = instruments.SwapResult(len(parsed.rows), 0, 0)
        if changed:
            rows = [row for row in parsed.rows if not named or row["exchange"] in named]
            in_scope = named or sorted({row["exchange"] for row in rows})
            swapped = instruments.swap_master(client, keys, rows, in_scope, force=force)
        changed_at = at if changed or before is None else before.changed_at
        manifest = instruments.Manifest(at, changed_at, swapped.names, refused, digest, scope)
        instruments.write_manifest(client, keys, manifest)
        log.info(
            "instruments_synced", scope=scope, rows=swapped.names, added=swapped.added,
            removed=swapped.removed, reassigned=swapped.reassigned, expired=parsed.expired, refused=refused,
            changed=changed,
        )  # fmt: skip
        return Synced(swapped.names, swapped.added, swapped.removed, parsed.expired, refused, changed)

    # --- upstream's methods --------------------------------------------------------------------------

    def fetch_instruments(self, reTrial: bool = False) -> list[Instrument]:  # noqa: N803  upstream's name
        """Fetch NSE's instruments. Nothing is stored."""
        at = self._iso_now()
        return [instrument_of(row, at) for row in self.fetch(["NSE"]).rows]

    def sync_instruments(self, instruments: Sequence[Instrument] = (), force_fetch: bool = True) -> bool:
        """Sync if the stored master is older than 23.5 hours.

        Args:
            instruments: What to store if `force_fetch` is False.
            force_fetch: Whether to fetch Kite's list.

        Returns:
            False if the sync failed; the log has the reason.
        """
        try:
            if not self._needs_refresh():
                return True
            if force_fetch:
                self.sync()
            else:
                content = csv_of(instruments)
                self.store(parse_instruments(content, datetime.fromtimestamp(self._now(), IST).date()))
        except (PkbError, redis.RedisError) as error:
            log.error("instruments_sync_failed", reason=str(error))
            return False
        return True

    def get_instrument_count(self) -> int:
        """Return the number of names in the master."""
        count: Any = self.client.hlen(self.settings.keys.symbols())
        return int(count)

    def get_nse_stock_count(self) -> int:
        """Return the number of shares on NSE."""
        return sum(is_nse_equity(name, token) for name, token in self._names().items())

    def get_equities(
        self,
        column_names: str = "instrument_token,tradingsymbol,name",
        segment: str = "NSE",
        only_nse_stocks: bool = False,
    ) -> list[dict[str, Any]]:
        """Return the shares of NSE with some columns.

        Args:
            column_names: A comma list of `Instrument`'s fields.
            segment: `NSE`, or another segment (`BSE`, `NFO-FUT`, `INDICES`), whose rows are returned.
            only_nse_stocks: Whether to leave out NSE's indices.

        Raises:
            ValueError: A column is unknown.
        """
        columns = [name.strip() for name in column_names.split(",")]
        known = set(Instrument.__dataclass_fields__)
        if unknown := sorted(set(columns) - known):
            raise ValueError(f"no such columns: {', '.join(unknown)}")
        rows = []
        for instrument in self._read(self._tokens_of(segment, only_nse_stocks)):
            if segment != "NSE" and instrument.segment != segment:
                continue
            row = asdict(instrument)
            rows.append({name: row[name] for name in columns})
        return rows

    def get_or_fetch_instrument_tokens(
        self, all_columns: bool = True, only_nse_stocks: bool = False
    ) -> list[int]:
        """Return the tokens of `get_equities`. An empty master is fetched first."""
        if not self.get_instrument_count():
            self.sync_instruments(force_fetch=True)
        return self.get_instrument_tokens(self.get_equities("instrument_token", "NSE", only_nse_stocks))

    def get_instrument_tokens(self, equities: Iterable[dict[str, Any]]) -> list[int]:
        """Return the `instrument_token` of each row that has one."""
        tokens = []
        for row in equities:
            try:
                tokens.append(int(row["instrument_token"]))
            except (KeyError, ValueError, TypeError):
                continue
        return tokens

    def get_instrument(self, instrument_token: int) -> dict[str, Any] | None:
        """Return an instrument with all columns, or None."""
        found = self._read([int(instrument_token)])
        return asdict(found[0]) if found else None

    def get_nse_stocks(self) -> list[dict[str, Any]]:
        """Return the shares of NSE."""
        columns = "instrument_token,tradingsymbol,name,last_price,nse_stock"
        return self.get_equities(columns, only_nse_stocks=True)

    def update_nse_stock_status(self, tradingsymbol: str, is_nse_stock: bool) -> bool:
        """Set whether an NSE instrument counts as a share. Return False if it is unknown."""
        keys = self.settings.keys
        token: Any = self.client.hget(keys.symbols(), f"NSE:{tradingsymbol}")
        if token is None:
            return False
        self.client.hset(keys.instrument(int(token)), "nse_stock", int(is_nse_stock))
        return True

    def migrate_to_nse_stock_column(self) -> bool:
        """Return True: shares are known by their series, so there is nothing to migrate."""
        return True

    # --- helpers -------------------------------------------------------------------------------------

    def _needs_refresh(self) -> bool:
        manifest = instruments.read_manifest(self.client, self.settings.keys)
        age = None if manifest is None else manifest.age_seconds(self._now())
        return age is None or not 0 <= age <= REFRESH_SECONDS

    def _names(self) -> dict[str, int]:
        return read_names(self.client, self.settings.keys)

    def _tokens_of(self, segment: str, only_nse_stocks: bool) -> list[int]:
        names = self._names().items()
        if segment != "NSE":
            prefix = "" if segment == "INDICES" else segment.partition("-")[0] + ":"
            return [token for name, token in names if name.startswith(prefix)]
        return [
            token
            for name, token in names
            if is_nse_equity(name, token)
            or (not only_nse_stocks and name.startswith("NSE:") and token & 0xFF == SEGMENT_INDICES)
        ]

    def _read(self, tokens: Sequence[int]) -> list[Instrument]:
        at = self._iso_now()
        manifest = instruments.read_manifest(self.client, self.settings.keys)
        at = manifest.synced_at if manifest is not None else at
        rows = instruments.read_rows(self.client, self.settings.keys, tokens)
        return [instrument_of(row, at) for row in rows]

    def _iso_now(self) -> str:
        return datetime.fromtimestamp(self._now(), IST).isoformat(timespec="seconds")


def _session_of(api_key: str | None, access_token: str | None) -> Session | None:
    if not (api_key and access_token):
        return None
    return Session(api_key, access_token=SecretStr(access_token))
