"""`JSONWriter`: a ticks.json kept current from ticks that a program hands in, with upstream's methods.

Upstream's own is called `JSONFileWriter` and runs a process behind a queue; here a tick is merged into a
table at once, one entry per instrument, and a thread writes the table every ten seconds. So what waits is
bounded by the number of instruments, and no tick is dropped.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import msgspec

from pkbrokers_redis import logs
from pkbrokers_redis.candles.calendar import MARKET_TIMEZONE
from pkbrokers_redis.candles.model import TOKEN_MAX
from pkbrokers_redis.files.atomic import replacing
from pkbrokers_redis.files.ticks_json import NAME, TicksFile, market_depth
from pkbrokers_redis.settings import load_settings

SAVE_SECONDS = 10.0
INSTRUMENTS_MAX = 200_000  # more tokens than Kite lists: ticks of further ones are refused
KNOWN_NAMES = {256265: "NIFTY 50", 265: "SENSEX"}

log = logs.get("ticks.json")

_KOLKATA = ZoneInfo(MARKET_TIMEZONE)


class JSONWriter:
    """`add_tick(tick)` takes upstream's dicts and KiteTicker's; `start()` saves from a thread, `save()` now.

    `max_queue_size`, `log_level` and `writer_id` are upstream's and mean nothing here. `now` is the time of
    ticks that have none, epoch seconds.
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
        """Save every few seconds until `stop`. `kite_instruments`: token → object with `tradingsymbol`."""
        if kite_instruments is not None:
            self.kite_instruments = kite_instruments
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._save_often, name="ticks.json", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Save once more and end the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.save()

    def add_tick(self, tick_data: Mapping[str, Any]) -> bool:
        """Merge a tick. False when it is none (no token, no price); it is counted in `ticks_refused`."""
        with self._lock:
            try:
                self._merge(tick_data)
            except (ValueError, TypeError, AttributeError, OverflowError):
                self.ticks_refused += 1
                return False
        return True

    def add_batch(self, tick_data_list: Iterable[Mapping[str, Any]]) -> bool:
        """Merge many; False when one of them was none."""
        taken = [self.add_tick(tick) for tick in tick_data_list]
        return all(taken)

    def save(self) -> None:
        """Write the file now, whole or not at all. Raises OSError."""
        with self._lock:
            entries = [
                (token, {**entry, "ohlcv": dict(entry["ohlcv"])}) for token, entry in self._entries.items()
            ]
        with replacing(self._path) as file:
            ticks = TicksFile(file)
            for token, entry in entries:
                ticks.add(token, entry)
            ticks.finish()

    def _save_often(self) -> None:
        while not self._stop.wait(self._save_seconds):
            try:
                self.save()
            except OSError as error:  # a full disk must not end the writer
                log.warning("cannot write", path=self.json_file_path, reason=error.strerror or str(error))

    def _load(self) -> None:
        """Go on with the file that is there; a damaged one is begun anew."""
        try:
            tree = msgspec.json.decode(self._path.read_bytes())
            entries = {int(token): entry for token, entry in tree.items()}
            self._entries = {token: entry for token, entry in entries.items() if _is_entry(entry)}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            log.warning(
                "the old file cannot be read: begun anew", path=self.json_file_path, reason=str(error)[:80]
            )

    def _merge(self, tick: Mapping[str, Any]) -> None:
        token = int(tick["instrument_token"]) if "instrument_token" in tick else 0
        price = _number(tick.get("last_price"))
        if not 0 < token <= TOKEN_MAX or price is None or price <= 0:
            raise ValueError("no tick")
        told = tick.get("ohlc")
        day: Mapping[str, Any] = told if isinstance(told, Mapping) else {}
        prices = [
            _number(_first(tick.get(f"{name}_price"), day.get(name))) or price
            for name in ("open", "high", "low")
        ]
        stamp = self._stamp(
            _first(tick.get("timestamp"), tick.get("exchange_timestamp"), tick.get("last_trade_time"))
        )
        entry = self._entries.get(token)
        if entry is None:
            if len(self._entries) >= INSTRUMENTS_MAX:
                raise ValueError("too many instruments")
            entry = self._entries[token] = self._new_entry(token, tick, prices)
        ohlcv = entry["ohlcv"]
        if ohlcv["timestamp"][:10] != stamp[:10]:  # a new day begins anew
            ohlcv.update(open=prices[0], high=prices[1], low=prices[2])
        ohlcv["high"] = max(ohlcv["high"], prices[1], price)
        ohlcv["low"] = min(ohlcv["low"], prices[2], price)
        ohlcv["close"] = price
        ohlcv["volume"] = int(_number(_first(tick.get("day_volume"), tick.get("volume_traded"))) or 0)
        ohlcv["timestamp"] = stamp
        previous = _first(tick.get("prev_day_close"), day.get("close"))
        entry["prev_day_close"] = _number(previous) or entry["prev_day_close"]
        for name, kites in (
            ("buy_quantity", "total_buy_quantity"),
            ("sell_quantity", "total_sell_quantity"),
            ("oi", "oi"),
        ):
            entry[name] = int(_number(_first(tick.get(name), tick.get(kites))) or 0)
        depth = tick.get("depth")
        if isinstance(depth, Mapping) and depth:
            entry["market_depth"] = _depth(depth)
        entry["last_updated"] = stamp
        entry["tick_count"] += 1

    def _new_entry(self, token: int, tick: Mapping[str, Any], prices: list[float]) -> dict[str, Any]:
        known = getattr(self.kite_instruments.get(token), "tradingsymbol", None)
        symbol = (
            known or tick.get("trading_symbol") or tick.get("tradingsymbol") or KNOWN_NAMES.get(token, "NA")
        )
        return {
            "instrument_token": token,
            "trading_symbol": str(symbol),
            "ohlcv": {
                "open": prices[0],
                "high": prices[1],
                "low": prices[2],
                "close": 0.0,
                "volume": 0,
                "timestamp": "",
            },
            "prev_day_close": 0.0,
            "buy_quantity": 0,
            "sell_quantity": 0,
            "oi": 0,
            "market_depth": {"bid": [], "ask": []},
            "last_updated": "",
            "tick_count": 0,
        }

    def _stamp(self, moment: Any) -> str:
        """ISO with +05:30. Naive datetimes are this host's, as KiteTicker makes them; numbers are epoch s."""
        if isinstance(moment, str):
            moment = datetime.fromisoformat(moment)
            moment = moment.replace(tzinfo=_KOLKATA) if moment.tzinfo is None else moment
        if (
            isinstance(moment, int | float)
            and not isinstance(moment, bool)
            and math.isfinite(moment)
            and moment > 0
        ):
            moment = datetime.fromtimestamp(moment, UTC)
        if not isinstance(moment, datetime):
            moment = datetime.fromtimestamp(self._now(), UTC)
        return str(moment.astimezone(_KOLKATA).isoformat())


JSONFileWriter = JSONWriter


def _is_entry(entry: Any) -> bool:
    ohlcv = entry.get("ohlcv") if isinstance(entry, dict) else None
    names = ("open", "high", "low", "close", "volume")
    if not isinstance(ohlcv, dict) or not all(_number(ohlcv.get(name)) is not None for name in names):
        return False
    return isinstance(ohlcv.get("timestamp"), str) and {"tick_count", "prev_day_close"} <= set(entry)


def _depth(depth: Mapping[str, Any]) -> dict[str, list[Any]]:
    if "bid" in depth or "ask" in depth:
        return {side: [dict(level) for level in depth.get(side) or []] for side in ("bid", "ask")}
    return market_depth(msgspec.json.encode(dict(depth)))


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and abs(value) < 1e15 else None
