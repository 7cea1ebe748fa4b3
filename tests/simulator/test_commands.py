"""`pkb sim` and `pkb record` as a user runs them, the one recording the other."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pkbrokers_redis.cli.record import SessionRefused, record
from pkbrokers_redis.core.errors import PkbError
from pkbrokers_redis.kite.capture import KIND_BINARY, read_capture
from pkbrokers_redis.kite.wire import parse_frame
from pkbrokers_redis.simulator.server import SimulatorServer
from tests.support import running_python, wait_until

SIM = "import typer; from pkbrokers_redis.cli.sim import sim; typer.run(sim)"
RECORD = "import typer; from pkbrokers_redis.cli.record import record; typer.run(record)"


def test_a_simulator_says_where_it_is_and_what_it_sends_can_be_recorded(tmp_path: Path) -> None:
    with running_python("-c", SIM, "--port", "0", "--instruments", "20", "--rate", "400") as simulator:
        assert simulator.stdout is not None
        said = [simulator.stdout.readline() for _ in range(3)]
        assert "20 instruments, 400 ticks a second" in said[0]
        env = dict(re.findall(r"(PKB_\w+)=(\S+)", said[1]))
        assert env["PKB_KITE_WS_URL"] in said[0]
        wanted = {int(text) for text in env["PKB_INSTRUMENTS"].split(",")}
        with running_python("-c", RECORD, "frames.cap", env=env) as recorder:
            wait_until(lambda: recorded_tokens() == wanted or recorder.poll() is not None, timeout_seconds=60)
            recorder.send_signal(signal.SIGTERM)
            output, _ = recorder.communicate(timeout=60)
        assert recorder.returncode == 0, output
        assert re.search(r"[1-9]\d* frames, .* 0 reconnects", output)
        simulator.send_signal(signal.SIGTERM)
        rest, _ = simulator.communicate(timeout=60)
        assert simulator.returncode == 0
        assert "1 connections" in rest
    assert recorded_tokens() == wanted


def recorded_tokens() -> set[int]:
    """The instruments in frames.cap so far."""
    tokens: set[int] = set()
    if not Path("frames.cap").exists() or not Path("frames.cap").stat().st_size:
        return tokens
    for _, kind, frame in read_capture("frames.cap"):
        assert kind == KIND_BINARY
        tokens |= set(parse_frame(frame, 0).ticks[:, 0].astype(int).tolist())
    return tokens


def test_both_stop_by_themselves_when_told() -> None:
    with running_python("-c", SIM, "--port", "0", "--seconds", "0.1") as simulator:
        simulator.communicate(timeout=60)
    env = {"PKB_INSTRUMENTS": "408065", "PKB_KITE_WS_URL": "ws://127.0.0.1:1"}
    with running_python("-c", RECORD, "frames.cap", "--seconds", "0.1", env=env) as recorder:
        output, _ = recorder.communicate(timeout=60)
    assert (simulator.returncode, recorder.returncode) == (0, 0)
    assert "0 frames" in output


def test_recording_with_a_dead_session_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    server = SimulatorServer(None, access_token="right")
    server.start()
    monkeypatch.setenv("PKB_KITE_WS_URL", server.url)
    monkeypatch.setenv("PKB_KITE_ACCESS_TOKEN", "wr0ng-session")
    monkeypatch.setenv("PKB_INSTRUMENTS", "408065")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SessionRefused) as caught:
            record(Path("frames.cap"))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
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
def test_what_cannot_be_recorded_is_told_before_anything_starts(
    env: dict[str, str], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PkbError, match=word):
        record(Path(env.get("FILE", "frames.cap")))


def test_the_kite_packages_need_no_redis_and_no_asyncio_to_be_imported() -> None:
    code = (
        "import json, sys; import pkbrokers_redis.kite.wire, pkbrokers_redis.kite.parser;"
        "print(json.dumps(sorted({'redis', 'asyncio', 'websockets', 'pandas'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
