"""Upstream's import paths: they find this package, and an installed PKBrokers keeps its other modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPAT = [sys.executable, "-m", "pkbrokers_redis.compat"]


def run(code: str, *path: Path | str) -> str:
    """What that program prints, with these folders in PYTHONPATH."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def shim() -> str:
    return subprocess.run(COMPAT, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with a package `pkbrokers` as upstream has it, each module marked as upstream."""
    kite = tmp_path / "site" / "pkbrokers" / "kite"
    kite.mkdir(parents=True)
    for file in (kite.parent / "__init__.py", kite / "__init__.py"):
        file.write_text("MARK = True\n")
    (kite / "inMemoryCandleStore.py").write_text("get_candle_store = 'upstream'\n")
    (kite / "trader.py").write_text(
        "from pkbrokers.kite.inMemoryCandleStore import get_candle_store\nname = 'upstream'\n"
    )
    return tmp_path / "site"


def test_modules_have_upstream_s_names_and_import_nothing_before_first_use() -> None:
    run(
        "import importlib, sys, pkbrokers_redis.compat\n"
        "from pkbrokers_redis.compat.import_finder import MODULES\n"
        "modules = {name: importlib.import_module(name) for name in MODULES}\n"
        "assert not {'numba', 'pandas', 'redis', 'kiteconnect'} & set(sys.modules), 'imported too early'\n"
        "for name, module in modules.items():\n"
        "    assert module.__all__ == sorted(MODULES[name]) and set(module.__all__) <= set(dir(module))\n"
        "    for each in module.__all__: getattr(module, each)\n"
    )


def test_the_constants_that_programs_import_have_upstream_s_values() -> None:
    run(
        "import pkbrokers_redis.compat\n"
        "from pkbrokers.kite import instruments, kiteTokenWatcher as watcher\n"
        "from pkbrokers.kite import zerodhaWebSocketClient as socket\n"
        "from pkbrokers.kite.inMemoryCandleStore import MARKET_OPEN_HOUR, MARKET_CLOSE_MINUTE\n"
        "assert (instruments.NIFTY_50, instruments.BSE_SENSEX) == (256265, 265)\n"
        "assert (socket.NIFTY_50, watcher.BSE_SENSEX) == ([256265], [265])\n"
        "assert (watcher.OPTIMAL_TOKEN_BATCH_SIZE, MARKET_OPEN_HOUR, MARKET_CLOSE_MINUTE) == (500, 9, 30)\n"
    )


def test_from_import_star_and_unknown_names_work_as_in_any_module() -> None:
    print_it = (
        "import pkbrokers_redis.compat\n"
        "from pkbrokers.kite.inMemoryCandleStore import *\n"
        "import pkbrokers.kite.inMemoryCandleStore as module\n"
        "print(InMemoryCandleStore.__module__, MAX_CANDLES['1h'], hasattr(module, 'nothing'))\n"
        "from pkbrokers_redis import InMemoryCandleStore as own; print(own is InMemoryCandleStore)\n"
    )
    out = run(print_it).split()
    assert out == ["pkbrokers_redis.compat.candle_store", "7", "False", "True"]


def test_one_environment_variable_is_enough() -> None:
    code = "from pkbrokers.kite.tickProcessor import HighPerformanceDataProvider as P; print(P.__module__)"
    assert run(code, shim()).strip() == "pkbrokers_redis.compat.data_provider"


def test_existing_python_path_entries_stay() -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(["/one", "/two"])}
    out = subprocess.run(COMPAT, env=env, capture_output=True, text=True, timeout=60, check=True).stdout
    assert out.strip().split(os.pathsep)[1:] == ["/one", "/two"]


def test_child_processes_inherit_the_import_paths() -> None:
    code = (
        "import subprocess, sys\n"
        "code = 'import pkbrokers.kite.inMemoryCandleStore as m; print(m.get_candle_store.__module__)'\n"
        "print(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout)\n"
    )
    assert run(code, shim()).strip() == "pkbrokers_redis.compat.candle_store"


@pytest.mark.parametrize("by_variable", [True, False])
def test_an_installed_pkbrokers_keeps_only_its_other_modules(installed: Path, by_variable: bool) -> None:
    code = (
        "import pkbrokers.kite.trader as trader, pkbrokers.kite.inMemoryCandleStore as store\n"
        "own = store.get_candle_store\n"
        "print(trader.name, trader.get_candle_store is own, own.__module__)"
    )
    if by_variable:
        out = run(code, shim(), installed)
    else:
        out = run("import pkbrokers_redis.compat\n" + code, installed)
    assert out.split() == ["upstream", "True", "pkbrokers_redis.compat.candle_store"]


def test_an_unknown_module_is_the_usual_error() -> None:
    code = (
        "import pkbrokers_redis.compat\n"
        "try:\n import pkbrokers.kite.trader\n"
        "except ModuleNotFoundError as error:\n print(error.name)"
    )
    assert run(code).strip() == "pkbrokers.kite.trader"


def test_modules_imported_earlier_give_a_warning_and_are_replaced_for_later_imports(installed: Path) -> None:
    code = (
        "from pkbrokers.kite.inMemoryCandleStore import get_candle_store as early\n"
        "import pkbrokers_redis.compat\n"
        "from pkbrokers.kite.inMemoryCandleStore import get_candle_store as late\n"
        "print(early, late.__module__)"
    )
    out = run(code, installed)
    assert "upstream pkbrokers_redis.compat.candle_store" in out
    assert "pkbrokers.kite.inMemoryCandleStore had been imported before pkbrokers_redis.compat" in out
