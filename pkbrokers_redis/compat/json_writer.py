"""`JSONWriter`: a ticks.json kept current from ticks that a program passes in, with upstream's methods.

Upstream's own (`JSONFileWriter`) runs a process behind a queue. Here a tick is merged into one entry an
instrument at once, and a thread writes the entries every ten seconds. Memory is bounded by the number of
instruments, and no tick is dropped.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from pkbrokers_redis import logs
from pkbrokers_redis.candles.calendar import KOLKATA
from pkbrokers_redis.candles.model import TOKEN_MAX
from pkbrokers_redis.files.atomic import replacing
from pkbrokers_redis.files.ticks_json import NAME, TicksFile, market_depth
from pkbrokers_redis.settings import load_settings

SAVE_SECONDS = 10.0
INSTRUMENTS_MAX = 200_000  # more than Kite lists: ticks of further tokens are refused
NUMBER_MAX = 1e15
KNOWN_NAMES = {256265: "NIFTY 50", 265: "SENSEX"}
PRICES = ("open", "high", "low", "close", "volume")

log = logs.get("ticks.json")


class JSONWriter:
    """Merge ticks (upstream's dicts or KiteTicker's) and write ticks.json.

    `add_tick` may be called by any thread. `start` writes from a thread of its own, `save` at once.

    Args:
        json_file_path: Default: `ticks.json` in PKB_FILES_DIR.
        max_queue_size, log_level, writer_id: Upstream's, without effect.
        save_seconds: How often the thread writes.
        now: Epoch seconds; the time of ticks that have none.

    Example:
        >>> writer = JSONWriter(path)
        >>> writer.add_tick({"instrument_token": 408065, "last_price": 1512.5})
        True
        >>> writer.save()
    """

    def __init__(
        self,
        json_file_path: str | Path | None = None,
        max_queue_size: int = 0,
        log_level: int = 0,
        writer_id: str | None = None,
        save_seconds: float = SAVE_SECONDS,
        now: Callable[[], float] = time.time,
    ) -> None:
        path = Path(json_file_path) if json_file_path else load_settings().files_folder / NAME
        self.json_file_path = str(path)
        self.ticks_refused = 0
        self.kite_instruments: Mapping[int, Any] = {}
        self._path = path
        self._save_seconds = save_seconds
        self._now = now
        self._entries: dict[int, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._load()

    def start(self, kite_instruments: Mapping[int, Any] | None = None) -> None:
        """Write every few seconds until `stop`. `kite_instruments`: token → object with `tradingsymbol`."""
        if kite_instruments is not None:
            self.kite_instruments = kite_instruments
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name="ticks.json", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread and write once more."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.save()

    def add_tick(self, tick_data: Mapping[str, Any]) -> bool:
        """Merge a tick; return False (counted in `ticks_refused`) without a token or a price."""
        with self._lock:
            try:
                self._merge(tick_data)
            except (ValueError, TypeError, AttributeError, OverflowError):
                self.ticks_refused += 1
                return False
        return True

    def add_batch(self, tick_data_list: Iterable[Mapping[str, Any]]) -> bool:
        """Merge many ticks; return False if one of them was refused."""
        accepted = [self.add_tick(tick) for tick in tick_data_list]
        return all(accepted)

    def save(self) -> None:
        """Write the file now, completely or not at all.

        Raises:
            OSError: The file cannot be written.
        """
        with self._lock:
            entries = [
                (token, {**entry, "ohlcv": dict(entry["ohlcv"])}) for token, entry in self._entries.items()
            ]
        with replacing(self._path) as file:
            ticks = TicksFile(file)
            for token, entry in entries:
                ticks.add(token, entry)
            ticks.finish()

    def _run(self) -> None:
        while not self._stop.wait(self._save_seconds):
            try:
                self.save()
            except OSError as error:  # a full disk must not end the thread
                log.warning(
                    "ticks_json_not_written", path=self.json_file_path, reason=error.strerror or str(error)
                )

    def _load(self) -> None:
        """Continue with the entries of an existing file; ignore a damaged one."""
        try:
            tree = msgspec.json.decode(self._path.read_bytes())
            self._entries = {int(token): entry for token, entry in tree.items() if _is_entry(entry)}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            log.warning("ticks_json_unreadable", path=self.json_file_path, reason=str(error)[:80])

    def _merge(self, tick: Mapping[str, Any]) -> None:
        token = int(tick["instrument_token"]) if "instrument_token" in tick else 0
        price = _number(tick.get("last_price"))
        if not 0 < token <= TOKEN_MAX or price is None or price <= 0:
            raise ValueError("no token or price")
        ohlc = tick.get("ohlc")
        day: Mapping[str, Any] = ohlc if isinstance(ohlc, Mapping) else {}
        day_open, day_high, day_low = (
            _number(_first(tick.get(f"{name}_price"), day.get(name))) or price
            for name in ("open", "high", "low")
        )
        stamp = self._stamp(
            _first(tick.get("timestamp"), tick.get("exchange_timestamp"), tick.get("last_trade_time"))
        )
        entry = self._entries.get(token) or self._new_entry(token, tick)
        ohlcv = entry["ohlcv"]
        if ohlcv["timestamp"][:10] != stamp[:10]:  # the first tick of a day
            ohlcv.update(open=day_open, high=day_high, low=day_low)
        ohlcv["high"] = max(ohlcv["high"], day_high, price)
        ohlcv["low"] = min(ohlcv["low"], day_low, price)
        ohlcv["close"] = price
        ohlcv["volume"] = _count(tick.get("day_volume"), tick.get("volume_traded"))
        ohlcv["timestamp"] = entry["last_updated"] = stamp
        previous = _number(_first(tick.get("prev_day_close"), day.get("close")))
        entry["prev_day_close"] = previous or entry["prev_day_close"]
        entry["buy_quantity"] = _count(tick.get("buy_quantity"), tick.get("total_buy_quantity"))
        entry["sell_quantity"] = _count(tick.get("sell_quantity"), tick.get("total_sell_quantity"))
        entry["oi"] = _count(tick.get("oi"))
        depth = tick.get("depth")
        if isinstance(depth, Mapping) and depth:
            entry["market_depth"] = _depth(depth)
        entry["tick_count"] += 1

    def _new_entry(self, token: int, tick: Mapping[str, Any]) -> dict[str, Any]:
        if len(self._entries) >= INSTRUMENTS_MAX:
            raise ValueError("too many instruments")
        known = getattr(self.kite_instruments.get(token), "tradingsymbol", None)
        symbol = known or tick.get("trading_symbol") or tick.get("tradingsymbol")
        entry: dict[str, Any] = {
            "instrument_token": token,
            "trading_symbol": str(symbol or KNOWN_NAMES.get(token, "NA")),
            "ohlcv": {**dict.fromkeys(PRICES, 0.0), "timestamp": ""},
            "prev_day_close": 0.0,
            "buy_quantity": 0,
            "sell_quantity": 0,
            "oi": 0,
            "market_depth": {"bid": [], "ask": []},
            "last_updated": "",
            "tick_count": 0,
        }
        self._entries[token] = entry
        return entry

    def _stamp(self, moment: Any) -> str:
        """Return ISO text with +05:30.

        A naive datetime is in this host's zone, as KiteTicker makes it; text without a zone is in
        Asia/Kolkata; a number is epoch seconds.
        """
        if isinstance(moment, str):
            moment = datetime.fromisoformat(moment)
            moment = moment.replace(tzinfo=KOLKATA) if moment.tzinfo is None else moment
        seconds = _number(moment)
        if seconds is not None and seconds > 0:
            moment = datetime.fromtimestamp(seconds, UTC)
        if not isinstance(moment, datetime):
            moment = datetime.fromtimestamp(self._now(), UTC)
        return str(moment.astimezone(KOLKATA).isoformat())


JSONFileWriter = JSONWriter


def _is_entry(entry: Any) -> bool:
    """Return whether an entry of an existing file has the fields that `_merge` reads."""
    ohlcv = entry.get("ohlcv") if isinstance(entry, dict) else None
    if not isinstance(ohlcv, dict) or not all(_number(ohlcv.get(name)) is not None for name in PRICES):
        return False
    return isinstance(ohlcv.get("timestamp"), str) and {"tick_count", "prev_day_close"} <= set(entry)


def _depth(depth: Mapping[str, Any]) -> dict[str, list[Any]]:
    if "bid" in depth or "ask" in depth:
        return {side: [dict(level) for level in depth.get(side) or []] for side in ("bid", "ask")}
    return market_depth(msgspec.json.encode(dict(depth)))


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _count(*values: Any) -> int:
    return int(_number(_first(*values)) or 0)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and abs(value) < NUMBER_MAX else None
