"""The whole simulated Kite: its clock, its environment, a day in minutes, stop and start."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import websocket

from pkbrokers_redis.candles import model
from pkbrokers_redis.candles.calendar import IST, load_sessions
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.kite.capture import KIND_BINARY, CaptureWriter, read_capture
from pkbrokers_redis.kite.protocol import parse_frame
from pkbrokers_redis.settings import load_settings
from pkbrokers_redis.simulator.kite import SimulatedKite
from pkbrokers_redis.simulator.universe import universe
from pkbrokers_redis.simulator.websocket_server import STEPS_MAX, SimulatorFailed, steps_between
from tests.simulator.conftest import INFY
from tests.support import running_python, wait_until


def at_ms(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=IST).timestamp() * 1000


def subscribe(kite: SimulatedKite, tokens: list[int]) -> websocket.WebSocket:
    query = f"?api_key={kite.accounts.first.api_key}&access_token={kite.accounts.open_session()}"
    link = websocket.create_connection(kite.ws_url + query, timeout=20)
    link.send(json.dumps({"a": "subscribe", "v": tokens}))
    link.send(json.dumps({"a": "mode", "v": ["full", tokens]}))
    return link


def test_a_fast_market_sends_each_instrument_once_a_market_second(tmp_path: Path) -> None:
    rows = universe(100)
    tokens = [row["instrument_token"] for row in rows]
    start_ms = at_ms("2026-09-10 10:00")
    with CaptureWriter(tmp_path / "sent.cap") as capture:
        kite = SimulatedKite(
            rows, sessions=load_sessions("market"), start_ms=start_ms, speed=60, capture=capture
        )
        kite.start()
        link = subscribe(kite, tokens)
        wait_until(lambda: link.recv_data() and kite.now_ms() > start_ms + 120_000, poll_seconds=0)
        kite.stop()
    seconds: dict[int, list[int]] = {token: [] for token in tokens}
    for _, kind, frame in read_capture(tmp_path / "sent.cap"):
        if kind == KIND_BINARY and len(frame) > 1:
            parsed = parse_frame(frame, 0)
            for tick in parsed.ticks:
                if tick[model.TOKEN].astype(int) & 0xFF == model.SEGMENT_INDICES:
                    seconds[int(tick[model.TOKEN])].append(int(tick[model.TIME_MS]) // 1000)
    indices = [times for token, times in seconds.items() if token & 0xFF == model.SEGMENT_INDICES]
    assert len(indices) == 6
    for times in indices:
        later = np.array(sorted(set(times[2:])))
        assert later.size > 60
        assert (np.diff(later) <= 2).all()  # each index has its own phase of the second


def test_the_official_kiteticker_works_with_an_account_session() -> None:
    script = Path(__file__).with_name("kite_ticker.py")
    with SimulatedKite(universe(10)) as kite:
        env = kite.environment() | {"PKB_KITE_ACCESS_TOKEN": kite.accounts.open_session()}
        with running_python(str(script), kite.ws_url, "full", str(INFY), env=env) as process:
            output, _ = process.communicate(timeout=60)
    result = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    assert result["ticks"].keys() == {str(INFY)}


def test_a_process_with_the_environment_has_the_same_market_time() -> None:
    start_ms = at_ms("2026-09-10 09:00")
    kite = SimulatedKite(universe(3), sessions=load_sessions("market"), start_ms=start_ms, speed=60)
    kite.start()
    environment = kite.environment()
    assert "PKB_SESSIONS" not in environment
    process_clock = market_clock(load_settings(time_shift=environment["PKB_TIME_SHIFT"]))
    before, shared_ms, after = kite.now_ms(), process_clock(), kite.now_ms()
    assert before <= shared_ms <= after
    code = (
        "from pkbrokers_redis.clock import market_clock; from pkbrokers_redis.settings import load_settings;"
        "print(market_clock(load_settings())())"
    )
    with running_python("-c", code, env=environment) as process:
        output, _ = process.communicate(timeout=60)
    assert before <= float(output.splitlines()[-1]) <= kite.now_ms()
    kite.stop()


def test_the_default_market_time_is_now_and_trading_never_closes() -> None:
    with SimulatedKite(universe(3)) as kite:
        environment = kite.environment()
        assert environment["PKB_SESSIONS"] == "always"
        assert "PKB_TIME_SHIFT" not in environment
        assert abs(kite.now_ms() - time.time() * 1000) < 60_000
        settings = load_settings(kite_ws_url=environment["PKB_KITE_WS_URL"])
        assert settings.kite_ws_url == kite.ws_url


def test_each_segment_trades_in_its_hours_only() -> None:
    """Ten minutes around each of the day's edges at 600×: which segments trade."""
    rows = universe(60)
    sessions = load_sessions("market")

    def traded_segments(start: str, minutes: int) -> set[int]:
        with SimulatedKite(rows, sessions=sessions, start_ms=at_ms(start), speed=600) as kite:
            before = kite.market.volume.copy()
            end_ms = at_ms(start) + minutes * 60_000
            wait_until(lambda: kite.server._stepped_ms is not None and kite.server._stepped_ms >= end_ms)
            moved = kite.market.tokens[kite.market.volume != before]
        return {int(token) & 0xFF for token in moved}

    everything = {1, 2, 3, 4, 5, 6, 7}
    assert traded_segments("2026-09-10 08:50", 9) == set()
    assert traded_segments("2026-09-10 09:01", 5) >= {3, 6, 7}
    assert traded_segments("2026-09-10 09:16", 3) == everything
    assert traded_segments("2026-09-10 15:36", 3) == {2, 3, 5, 6, 7}
    assert traded_segments("2026-09-10 15:42", 3) == {3, 6, 7}
    assert traded_segments("2026-09-10 17:01", 3) == {7}
    assert traded_segments("2026-09-10 23:31", 3) == set()
    assert traded_segments("2026-09-12 11:00", 3) == set()  # a Saturday


def test_a_restart_keeps_ports_and_market() -> None:
    kite = SimulatedKite(universe(10), rate=200)
    kite.start()
    addresses = (kite.ws_url, kite.api_url, kite.login_url)
    wait_until(lambda: kite.stats.packets > 20)
    kite.stop()
    volume = kite.market.volume.copy()
    kite.start()
    assert (kite.ws_url, kite.api_url, kite.login_url) == addresses
    packets = kite.stats.packets
    subscribe(kite, [INFY]).recv_data()
    wait_until(lambda: kite.stats.packets > packets)
    kite.stop()
    assert (kite.market.volume >= volume).all()


def test_a_port_in_use_is_a_one_line_error_and_leaves_nothing_open() -> None:
    with SimulatedKite(universe(3)) as kite:
        port = int(kite.api_url.rpartition(":")[2])
        other = SimulatedKite(universe(3), login_port=port)
        with pytest.raises(SimulatorFailed, match="another port"):
            other.start()
        other.stop()


def test_steps_of_a_fast_market_skip_no_interval_and_are_bounded() -> None:
    assert list(steps_between(1000, 1300, 0)) == [1300]
    assert list(steps_between(1000, 4200, 1000)) == [2000, 3000, 4000, 4200]
    assert list(steps_between(1000, 1400, 1000)) == [1400]
    far = list(steps_between(0, 10**9, 1000))
    assert (len(far), far[-1]) == (STEPS_MAX, STEPS_MAX * 1000)
