"""`pkb sim` and `pkb record` as a user runs them, and `record` captures what `sim` sends."""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from pkbrokers_redis.cli.sim import record, sim
from pkbrokers_redis.errors import PkbError, SessionExpired
from pkbrokers_redis.kite.capture import KIND_BINARY, read_capture
from pkbrokers_redis.kite.protocol import parse_frame
from pkbrokers_redis.simulator.websocket_server import SimulatorServer
from tests.support import running_python, wait_until

SIM = "import typer; from pkbrokers_redis.cli.sim import sim; typer.run(sim)"
RECORD = "import typer; from pkbrokers_redis.cli.sim import record; typer.run(record)"


def test_sim_prints_its_addresses_and_record_captures_its_frames(tmp_path: Path) -> None:
    with running_python("-c", SIM, "--port", "0", "--instruments", "20", "--rate", "400") as simulator:
        assert simulator.stdout is not None
        output_lines = list(itertools.takewhile(lambda line: not line.startswith("Ctrl-C"), simulator.stdout))
        assert "20 instruments, 400 ticks a second" in output_lines[0]
        env = dict(re.findall(r"export (PKB_\w+)=(\S+)", "".join(output_lines)))
        for name in ("PKB_KITE_WS_URL", "PKB_KITE_API_URL", "PKB_KITE_LOGIN_URL"):
            assert env[name] in output_lines[1]
        expected = {int(text) for text in env["PKB_INSTRUMENTS"].split(",")}
        with running_python("-c", RECORD, "frames.cap", env=env) as recorder:
            wait_until(
                lambda: recorded_tokens() == expected or recorder.poll() is not None, timeout_seconds=60
            )
            recorder.send_signal(signal.SIGTERM)
            output, _ = recorder.communicate(timeout=60)
        assert recorder.returncode == 0, output
        assert re.search(r"[1-9]\d* frames, .* 0 reconnects", output)
        simulator.send_signal(signal.SIGTERM)
        rest, _ = simulator.communicate(timeout=60)
        assert simulator.returncode == 0
        assert "1 connections" in rest
    assert recorded_tokens() == expected


def recorded_tokens() -> set[int]:
    """The instruments in frames.cap so far."""
    tokens: set[int] = set()
    if not Path("frames.cap").exists() or not Path("frames.cap").stat().st_size:
        return tokens
    for _, kind, frame in read_capture("frames.cap"):
        assert kind == KIND_BINARY
        tokens |= set(parse_frame(frame, 0).ticks[:, 0].astype(int).tolist())
    return tokens


def test_sim_and_record_stop_after_the_given_seconds() -> None:
    with running_python("-c", SIM, "--port", "0", "--seconds", "0.1") as simulator:
        simulator.communicate(timeout=60)
    env = {"PKB_INSTRUMENTS": "408065", "PKB_KITE_WS_URL": "ws://127.0.0.1:1"}
    with running_python("-c", RECORD, "frames.cap", "--seconds", "0.1", env=env) as recorder:
        output, _ = recorder.communicate(timeout=60)
    assert (simulator.returncode, recorder.returncode) == (0, 0)
    assert "0 frames" in output


def test_sim_control_adds_faults_and_expires_sessions_of_a_running_simulator(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with running_python("-c", SIM, "--port", "0", "--instruments", "3", "--fault", "mute") as simulator:
        assert simulator.stdout is not None
        output_lines = "".join(
            itertools.takewhile(lambda line: not line.startswith("Ctrl-C"), simulator.stdout)
        )
        env = dict(re.findall(r"export (PKB_\w+)=(\S+)", output_lines))
        address = env["PKB_KITE_API_URL"]
        headers = {"Authorization": f"token {env['PKB_KITE_API_KEY']}:{env['PKB_KITE_ACCESS_TOKEN']}"}

        def status() -> int:
            return requests.get(address + "/user/profile", headers=headers, timeout=10).status_code

        assert status() == 200
        sim(control=address, clear=True, fault=["503,count=2,path=/user"])
        assert capsys.readouterr().out == "503 struck 0 count 2 path /user\n"
        assert [status(), status(), status()] == [503, 503, 200]
        sim(control=address, expire=True)
        assert status() == 403


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"control": "http://127.0.0.1:1", "fault": ["mute"]}, "REST address"),
        ({"fault": ["flood"]}, "choose one of"),
        ({"fault": ["mute,count=x"]}, "give a number"),
        ({"start": "tomorrow"}, "2026-08-03T10:05"),
    ],
)
def test_an_invalid_sim_option_is_a_one_line_error(options: dict[str, Any], word: str) -> None:
    with pytest.raises(PkbError, match=word):
        sim(port=0, **options)


@pytest.mark.usefixtures("_signals")
def test_sim_starts_at_the_given_time_and_speed(capsys: pytest.CaptureFixture[str]) -> None:
    sim(port=0, instruments=5, sessions=True, start="2026-09-10T08:55", speed=60, seconds=0.1)
    output_lines = capsys.readouterr().out
    shift = re.search(r"PKB_TIME_SHIFT=([\d.]+),([\d.]+),([\d.]+)", output_lines)
    assert shift is not None
    assert (float(shift[1]), float(shift[3])) == (1_789_010_700.0, 60.0)
    assert "PKB_SESSIONS" not in output_lines


@pytest.fixture
def _signals() -> Iterator[None]:
    """A command installs signal handlers; the fixture restores those of this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals")
def test_record_with_an_expired_session_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    server = SimulatorServer(None, access_token="right")
    server.start()
    monkeypatch.setenv("PKB_KITE_WS_URL", server.url)
    monkeypatch.setenv("PKB_KITE_ACCESS_TOKEN", "wr0ng-session")
    monkeypatch.setenv("PKB_INSTRUMENTS", "408065")
    try:
        with pytest.raises(SessionExpired) as caught:
            record(Path("frames.cap"))
    finally:
        server.stop()
    assert "wr0ng-session" not in str(caught.value)


@pytest.mark.parametrize(
    ("env", "word"),
    [
        ({}, "PKB_INSTRUMENTS"),
        ({"PKB_INSTRUMENTS": "408065"}, "pkb login"),
        (
            {"PKB_INSTRUMENTS": "1", "PKB_KITE_WS_URL": "ws://127.0.0.1:1", "FILE": "no/such/folder"},
            "No such file",
        ),
    ],
)
def test_record_checks_its_settings_before_it_starts(
    env: dict[str, str], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PkbError, match=word):
        record(Path(env.get("FILE", "frames.cap")))


def test_the_wire_protocol_imports_neither_redis_nor_asyncio() -> None:
    code = (
        "import json, sys; import pkbrokers_redis.kite.protocol;"
        "print(json.dumps(sorted({'redis', 'asyncio', 'websockets', 'pandas'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
