"""The frame around all commands: help, suggestions, errors in one line, exit codes, quick starts."""

from __future__ import annotations

import importlib
import os
import pwd
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pkbrokers_redis import __version__
from pkbrokers_redis.cli import demo, main
from pkbrokers_redis.cli.common import emit, fitting
from pkbrokers_redis.cli.main import COMMANDS
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.embedded import attach, discard_new_stores, store_folder
from tests.cli.conftest import Pkb
from tests.support import PKB, run_pkb

FOLDER = Path(main.__file__).parent


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_says_what_it_does(name: str) -> None:
    module, _, function = COMMANDS[name].partition(":")
    assert (FOLDER / f"{module}.py").exists()
    callback = getattr(importlib.import_module(f"pkbrokers_redis.cli.{module}"), function)
    first_line = (callback.__doc__ or "").strip().splitlines()[0]
    assert len(first_line) > 15
    command = main.load_command(name)
    for param in command.params:
        assert getattr(param, "help", None), f"{name}: {param.name} has no help"


def test_help_lists_every_command_with_its_help(pkb: Pkb) -> None:
    ended = pkb("--help")
    assert ended.code == 0
    lines = [line.split() for line in ended.out.splitlines()]
    for name in COMMANDS:
        assert any(words and words[0] == name and len(words) > 3 for words in lines), name


def test_no_arguments_is_help(pkb: Pkb) -> None:
    ended = pkb()
    assert "Commands:" in ended.out + ended.err


def test_the_version(pkb: Pkb) -> None:
    assert pkb("--version") == (0, f"pkb {__version__}\n", "")


def test_a_misspelt_command_is_named_with_the_one_meant(pkb: Pkb) -> None:
    ended = pkb("qoute")
    assert ended.code == 2 and "Did you mean 'quote'?" in ended.err and "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (["quote", "INFY"], {"PKB_REDIS_URL": "redis://:geheim@127.0.0.1:1"}, "cannot be reached"),
        (
            ["candles", "INFY", "5m"],
            {"PKB_REDIS_URL": "http://x"},
            "begins with an unknown scheme",
        ),
        (["closed"], {"PKB_SHARDS": "many"}, "PKB_SHARDS"),
        (["config"], {"PKB_INTERVALS": "7x"}, "7x"),
    ],
)
def test_a_users_mistake_or_a_dead_server_is_one_line(
    pkb: Pkb, monkeypatch: pytest.MonkeyPatch, arguments: list[str], environment: dict[str, str], says: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ended = pkb(*arguments)
    assert ended.code == 2 and ended.out == ""
    assert ended.err.startswith("pkb: ") and ended.err.count("\n") == 1
    assert says in ended.err and "geheim" not in ended.err


@pytest.mark.parametrize("arguments", [["redis-cli", "PING"], ["jobs", "--list"], ["jobs", "--failed"]])
def test_reading_creates_no_store_that_would_hide_the_demos(pkb: Pkb, arguments: list[str]) -> None:
    ended = pkb(*arguments)
    assert ended.code == 2 and "there is no store" in ended.err and ended.err.count("\n") == 1
    assert not store_folder(load_settings().data_dir).exists()


@pytest.mark.parametrize(
    "command", ["instruments add NOPE", "replay no.csv", "up", "ingest", "snapshot restore"]
)
def test_a_command_that_fails_leaves_nothing_behind(command: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    ended = run_pkb(*command.split(), env={"PKB_DATA_DIR": str(folder)})
    assert ended.returncode == 2 and ended.stderr.startswith("pkb: ")
    assert not folder.exists()


def test_a_store_with_contents_or_another_user_is_left_alone(tmp_path: Path) -> None:
    for number, (name, is_shared) in enumerate((("symbols", False), ("meta", True))):
        settings = load_settings(data_dir=tmp_path / str(number))
        with connect(settings) as client:
            client.hset(f"pkb:{name}", "a", "1")
            other = attach(settings) if is_shared else None
        ended = run_pkb("instruments", "add", "NOPE", env={"PKB_DATA_DIR": str(settings.data_dir)})
        assert ended.returncode == 2
        discard_new_stores("pkb")
        assert store_folder(settings.data_dir).exists()
        if other is not None:
            other.close()


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("calendar 2026-01-05 >&-", 0, ""),
        ("calendar 2026-01-05 2>&-", 0, "NSE_CASH"),
        ("calendar 2026-01-05 >&- 2>&-", 0, ""),
        ("calendar 2026-13-05 2>&-", 2, ""),
        ("candles INFY 1m -n 99999999999999999999 2>&1", 2, "less than or equal to 1000000"),
        ("-V", 0, "pkb "),
        ("--show-completion bash", 0, "_completion()"),
    ],
)
def test_closed_streams_and_absurd_numbers_are_no_traceback(
    line: str, code: int, says: str, tmp_path: Path
) -> None:
    env = {**os.environ, "PKB_DATA_DIR": str(tmp_path), "PYTHONIOENCODING": "ascii"}
    env["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"  # there may be no shell above the tests
    command = f"exec {shlex.join(PKB)} {line}"
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert "Traceback" not in done.stdout + done.stderr
    assert says in done.stdout


def test_quiet_prints_no_notes_and_verbose_logs(
    pkb: Pkb, store_env: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_PKB_QUIET", "")
    monkeypatch.delenv("_PKB_QUIET")
    monkeypatch.setenv("PKB_LOG_LEVEL", "info")
    assert "no 1m candles" in pkb("candles", "INFY", "1m").err
    assert pkb("--quiet", "candles", "INFY", "1m").err == ""
    pkb("--verbose", "candles", "INFY", "1m")
    assert load_settings().log_level == "debug"


def test_a_user_without_a_home_has_a_data_folder_in_the_temp_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "XDG_DATA_HOME", "PKB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert load_settings().data_dir.name == f"pkbrokers-redis-{os.getuid()}"


def test_a_narrow_terminal_lacks_columns_and_wraps_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    widths = {"time": 16, "open": 9, "high": 9, "low": 9, "close": 9, "volume": 12, "oi": 8, "flag": 7}
    assert fitting(widths, 200) == list(widths)
    narrow = fitting(widths, 60)
    assert narrow == ["time", "close", "volume", "flag"] or sum(widths[each] + 2 for each in narrow) - 2 <= 60
    assert {"time", "close", "volume"} <= set(narrow)
    assert fitting(widths, 5) == ["time"]
    row = {name: "x" * width for name, width in widths.items()}
    emit([row], list(widths), "table")
    out, err = capsys.readouterr()
    assert max(map(len, out.splitlines())) <= 80
    assert "not shown for want of width: open, oi" in err


def test_a_demo_waits_for_the_server_of_the_one_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lingering = iter([True, True, None])
    monkeypatch.setattr(demo, "running", lambda folder: next(lingering))
    assert demo._own_settings().data_dir.name == "demo"
    assert next(lingering, "asked to the end") == "asked to the end"


def test_a_bug_keeps_its_traceback() -> None:
    assert main.one_line(KeyError("x")) is None
    assert main.one_line(FileNotFoundError(2, "No such file", "a.csv")) == "No such file: a.csv"


def test_help_and_the_reading_commands_start_without_the_compiler_and_pandas() -> None:
    code = (
        "import sys; from pkbrokers_redis.cli.main import COMMANDS, load_command, summary\n"
        "for name in COMMANDS: assert summary(name), name\n"
        "for name in 'quote candles closed ticks key config redis-cli status top'.split():"
        " load_command(name)\n"
        "print([name for name in ('numba', 'pandas', 'kiteconnect') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_pipe_that_closes_early_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*PKB, "config"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=60
        )
    finally:
        os.close(writer)
    assert done.stderr == ""
    assert done.returncode in (0, 1)
