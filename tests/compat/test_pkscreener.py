"""The released PKScreener, unchanged, in a virtual environment of its own, reads our files.

Called are PKScreener's own functions, with its published addresses answered by `Published` and its clock set
by its own `simulation` variable:

    AssetsManager.loadStockData                  the cache file, its age, a newer one, the ticks;
      with download_fresh_pkl_from_github, _download_and_validate_pkl, loadDataFromLocalPickle,
      _apply_fresh_ticks_to_data, is_data_fresh, validate_data_freshness
    Utility.marketStatus                         ticks.json, the two indices by token
    PKDataProvider.get_stock_data                local pickle, published pickle, local ticks.json
    PKScalableDataFetcher.get_ticks_summary      ticks.json by urllib
    PKPickler.unpickle, SimplePickler.safe_load  the pickles by name

Not called: AssetsManager.downloadSavedDataFromServer takes no file below 20 MB (it unpickles as
loadDataFromLocalPickle does), and the screening itself needs TA-Lib's C library.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import redis

from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.files.pickles import Shape
from pkbrokers_redis.jobs.snapshots import open_run, snapshot
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.meta import ensure_meta
from tests.client.contract import INFY, NIFTY, OPEN_S, RELIANCE, SENSEX, push, row, write_master
from tests.compat.published import Published

INSTALL_SECONDS_MAX = 240
# All that the modules which read files import, at PKScreener's pins; its other forty are for screening.
LOADING = ["PKDevTools", "PKNSETools", "pandas>=2.2.3,<2.3", "numpy==1.26.4", "joblib", "rich"]
DAY_S = 86_400
DAYS = 130  # PKScreener takes no published file with fewer than 100 rows a stock
YESTERDAY_S, TODAY_S = OPEN_S, OPEN_S + DAY_S  # 2026-01-05, a Monday, and 2026-01-06, 09:15
PRICES = {INFY: 1500.25, RELIANCE: 1400.5, NIFTY: 25_000.5, SENSEX: 82_000.75}
SYMBOLS = ["INFY", "NIFTY 50", "RELIANCE", "SENSEX"]
BRANCH = "/pkjmesra/PKScreener/actions-data-download"
TICKS_OF_PKBROKERS = "pkbrokers/kite/examples/results/Data/ticks.json"
YESTERDAY, TODAY = "stock_data_05012026.pkl", "stock_data_06012026.pkl"

COMMON = """
import json, logging, os, sys
import pandas as pd
import pkscreener.classes.ConfigManager as ConfigManager
from pkscreener.classes import Utility
from pkscreener.classes.AssetsManager import PKAssetsManager as assets
from PKDevTools.classes.PKDataProvider import PKDataProvider
from PKDevTools.classes.PKPickler import PKPickler
from PKDevTools.classes.PKScalableDataFetcher import PKScalableDataFetcher
from PKDevTools.classes.SimplePickler import SimplePickler

config = ConfigManager.tools()
config.getConfig(ConfigManager.parser)
result = {}

def look(table):
    # What PKScreener's screening makes of a loaded stock, and what it then sees.
    if isinstance(table, dict):
        table = pd.DataFrame(table["data"], columns=table["columns"], index=pd.to_datetime(table["index"]))
    close = next(name for name in table.columns if name.lower() == "close")
    return {
        "columns": list(table.columns),
        "closes": table[close].tolist()[-2:],
        "rows": len(table),
        "last": table.index[-1].isoformat(),
        "tz": str(table.index.tz),
    }
"""

IN_MARKET_HOURS = """
result["status"] = Utility.marketStatus()
loaded = assets.loadStockData({}, config, stockCodes=["INFY", "RELIANCE", "NOBODY"], defaultAnswer="Y")
result["loaded"] = {symbol: look(table) for symbol, table in loaded.items()}
result["fresh"] = assets.validate_data_freshness(loaded)[:2]
summary = PKScalableDataFetcher().get_ticks_summary()
result["summary"] = {entry["trading_symbol"]: entry["ohlcv"]["close"] for entry in summary.values()}
print("RESULT" + json.dumps(result))
"""

AFTER_HOURS = """
provider = PKDataProvider()
result["published"] = look(provider.get_stock_data("INFY", count=500)) if "published" in sys.argv else None
for name in ("stock_data_06012026.pkl", "intraday_stock_data_06012026.pkl"):
    os.rename("later/" + name, "results/Data/" + name)
loaded = assets.loadStockData({}, config, stockCodes=["INFY", "RELIANCE"], defaultAnswer="Y")
result["loaded"] = {symbol: look(table) for symbol, table in loaded.items()}
result["provider"] = look(provider.get_stock_data("RELIANCE", count=500))
result["pickler"] = sorted(PKPickler().unpickle("stock_data_06012026.pkl"))
result["safe"] = sorted(SimplePickler().safe_load("results/Data/stock_data_06012026.pkl")[0])
minutes, done = assets.loadDataFromLocalPickle(
    {}, config, False, "Y", ".NS", "intraday_stock_data_06012026.pkl", False
)
result["minutes"] = {symbol: look(table) for symbol, table in minutes.items()}
os.rename("later/ticks.json", "results/Data/ticks.json")
result["ticks"] = provider.get_stock_data("NIFTY 50", count=500)["close"].tolist()
print("RESULT" + json.dumps(result))
"""


@pytest.fixture(scope="module")
def screener_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has PKScreener and what its loading modules import; nothing of this package."""
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        pytest.skip("needs uv to make a virtual environment")
    folder = tmp_path_factory.mktemp("pkscreener") / "venv"
    python = folder / "bin" / "python"
    target = ["--python", str(python), "-q"]
    commands = [
        [uv, "venv", "-q", "--python", sys.executable, str(folder)],
        [uv, "pip", "install", *target, "--no-deps", "pkscreener"],
        [uv, "pip", "install", *target, *LOADING],
    ]
    for command in commands:
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=INSTALL_SECONDS_MAX, check=False
            )
        except subprocess.TimeoutExpired:
            pytest.skip("no package index answers in time")
        if done.returncode:
            pytest.skip(f"PKScreener cannot be installed here: {done.stderr.strip().splitlines()[-1][:150]}")
    return python


class Market:
    """A store that is at a moment: its candles and quotes up to then, and snapshots made then."""

    def __init__(self, client: redis.Redis, make_settings: Callable[..., Settings]) -> None:
        self._client, self._make_settings = client, make_settings
        self._keys = make_settings().keys
        write_master(client, self._keys)
        ensure_meta(client, make_settings(), "2026-01-05T09:00:00+05:30")
        weekdays = [YESTERDAY_S - DAY_S * n for n in range(DAYS * 2) if -n % 7 < 5][:DAYS]
        for token, price in PRICES.items():
            days = [row(start, price - i, 1000) for i, start in enumerate(weekdays)]
            push(client, self._keys, token, "day", reversed(days))

    def today(self) -> None:
        """Today's first hour: minutes, the day so far, quotes."""
        client, keys = self._client, self._keys
        for token, price in PRICES.items():
            minutes = [row(TODAY_S + 60 * i, price + i / 4, 10) for i in range(60)]
            push(client, keys, token, "1m", minutes)
            client.hset(keys.current(token), "day", row(TODAY_S, price + 20, 5000, ticks=77))
            quote: dict[Any, Any] = {
                "last_price": price + 20, "open": price, "high": price + 20, "low": price, "close": price,
                "volume": 5000, "last_trade_time": "2026-01-06T10:14:59+05:30",
                "received_at": "2026-01-06T10:15:00+05:30",
            }  # fmt: skip
            client.hset(keys.quote(token), mapping=quote)

    def snapshot(self, kind: str, shape: Shape, at_s: int, folder: Path) -> None:
        """One kind of snapshot, made at that moment of the market's time."""
        shift = f"{at_s},{dt.datetime.now(dt.UTC).timestamp()},1"
        settings = self._make_settings(time_shift=shift)
        with CandleStore(settings, self._client) as store, open_run(settings, store, folder) as run:
            snapshot(kind, shape, run=run)


@pytest.fixture
def market(client: redis.Redis, make_settings: Callable[..., Settings]) -> Market:
    return Market(client, make_settings)


def screen(python: Path, script: str, at: Path, site: Published, now: str, *arguments: str) -> dict[str, Any]:
    """Return what the script prints, run in `at` at PKScreener's `now`, India's time."""
    trading = {"currentDateTime": now, "isTrading": now < "2026-01-06 15:30"}
    env = {**os.environ, **site.env, "HOME": str(at), "TZ": "Asia/Kolkata", "simulation": json.dumps(trading)}
    (at / "results" / "Data").mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [str(python), "-c", COMMON + script, *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=at,
    )
    line = next((each for each in done.stdout.splitlines() if "RESULT" in each), None)
    assert line is not None, done.stdout[-2000:] + done.stderr[-2000:] + "\n".join(site.requests)
    result: dict[str, Any] = json.loads(line.partition("RESULT")[2])
    return result


@pytest.mark.xdist_group("pkscreener")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
@pytest.mark.parametrize("shape", get_args(Shape))
def test_in_market_hours_the_released_pkscreener_takes_yesterdays_pickle_and_todays_ticks(
    screener_python: Path, market: Market, shape: Shape, tmp_path: Path
) -> None:
    files, at = tmp_path / "files", tmp_path / "screener"
    market.snapshot("pickle", shape, YESTERDAY_S + 7 * 3600, files)
    market.today()
    market.snapshot("ticks", shape, TODAY_S + 3600, files)
    (at / "results" / "Data").mkdir(parents=True)
    shutil.copy(files / YESTERDAY, at / "results" / "Data")  # not of today: it asks for a newer one
    site = Published(
        tmp_path,
        {
            f"{BRANCH}/actions-data-download/{YESTERDAY}": files / YESTERDAY,
            f"{BRANCH}/results/Data/ticks.json": files / "ticks.json",
            f"/pkjmesra/PKBrokers/main/{TICKS_OF_PKBROKERS}": files / "ticks.json",
            f"/pkjmesra/PKBrokers/refs/heads/main/{TICKS_OF_PKBROKERS}": files / "ticks.json",
        },
    )
    with site:
        result = screen(screener_python, IN_MARKET_HOURS, at, site, "2026-01-06 10:15:00")
    assert f"200 {BRANCH}/actions-data-download/{YESTERDAY}" in site.requests
    assert "NIFTY 50" in result["status"] and "25020.5" in result["status"] and "82020.75" in result["status"]
    assert sorted(result["loaded"]) == ["INFY", "RELIANCE"] and result["fresh"] == [2, 0]
    for symbol, token in (("INFY", INFY), ("RELIANCE", RELIANCE)):
        found = result["loaded"][symbol]
        assert found["closes"] == [PRICES[token], PRICES[token] + 20] and found["rows"] == DAYS + 1
        assert found["columns"] == ["open", "high", "low", "close", "volume"]
        assert found["last"] == "2026-01-06T10:14:59+05:30"
    assert result["summary"] == {
        name: PRICES[token] + 20 for name, token in zip(SYMBOLS, (INFY, NIFTY, RELIANCE, SENSEX), strict=True)
    }


@pytest.mark.xdist_group("pkscreener")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
@pytest.mark.parametrize("shape", get_args(Shape))
def test_after_hours_the_released_pkscreener_reads_todays_pickles(
    screener_python: Path, market: Market, shape: Shape, tmp_path: Path
) -> None:
    at = tmp_path / "screener"
    later = at / "later"
    market.today()
    market.snapshot("pickle", shape, TODAY_S + 7 * 3600, later)
    market.snapshot("ticks", shape, TODAY_S + 7 * 3600, later)
    copy = Path(shutil.copy(later / TODAY, tmp_path))
    with Published(tmp_path, {f"{BRANCH}/actions-data-download/{TODAY}": copy}) as site:
        result = screen(screener_python, AFTER_HOURS, at, site, "2026-01-06 16:15:00", shape)
    names = ["open", "high", "low", "close", "volume"]
    own = [name.capitalize() for name in names] if shape == "published" else names
    for symbol, token in (("INFY", INFY), ("RELIANCE", RELIANCE)):
        found = result["loaded"][symbol]
        assert found["closes"] == [PRICES[token], PRICES[token] + 20] and found["rows"] == DAYS + 1
        assert found["columns"] == names and found["last"].startswith("2026-01-06T00:00:00")
    assert result["provider"]["columns"] == own and result["provider"]["closes"] == [1400.5, 1420.5]
    if shape == "published":  # PKDataProvider takes no other shape from the branch
        assert (
            result["published"]["closes"] == [1500.25, 1520.25]
            and result["published"]["tz"] == "Asia/Kolkata"
        )
    assert result["pickler"] == result["safe"] == SYMBOLS
    assert sorted(result["minutes"]) == SYMBOLS and result["minutes"]["INFY"]["rows"] == 60
    assert result["minutes"]["INFY"]["last"] == "2026-01-06T10:14:00+05:30"
    assert result["ticks"] == [25_020.5]
