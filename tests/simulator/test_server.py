"""The simulator as its clients see it: the official KiteTicker, a plain websocket, a hostile one."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import websocket

from pkbrokers_redis.candles import model
from pkbrokers_redis.kite.capture import KIND_BINARY, CaptureWriter, read_capture
from pkbrokers_redis.kite.protocol import decode, parse_frame
from pkbrokers_redis.simulator.market import Market
from pkbrokers_redis.simulator.universe import universe
from pkbrokers_redis.simulator.websocket_server import SimulatorFailed, SimulatorServer
from tests.support import running_python, wait_until

INFY, NIFTY, USDINR = 408065, 256265, 1201 << 8 | 3


@pytest.fixture
def market() -> Market:
    return Market(universe(60), int(time.time() * 1000), rate=1200)


@pytest.fixture
def still_market() -> Market:
    """One that has its first packets and makes no more while a test lasts."""
    market = Market(universe(60), int(time.time() * 1000))
    market.interval_ms = 10**9
    market._turn[:] = np.inf
    return market


@pytest.fixture
def server(market: Market) -> Iterator[SimulatorServer]:
    server = SimulatorServer(market)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def still(still_market: Market) -> Iterator[SimulatorServer]:
    server = SimulatorServer(still_market)
    server.start()
    yield server
    server.stop()


def connect(server: SimulatorServer, query: str = "", **options: Any) -> websocket.WebSocket:
    return websocket.create_connection(server.url + query, timeout=10, **options)


def ask(link: websocket.WebSocket, action: str, value: Any) -> None:
    link.send(json.dumps({"a": action, "v": value}))


def next_text(link: websocket.WebSocket) -> dict[str, Any]:
    while True:
        opcode, data = link.recv_data()
        if opcode == websocket.ABNF.OPCODE_TEXT:
            content: dict[str, Any] = json.loads(data)
            return content


def next_frame(link: websocket.WebSocket) -> bytes:
    """The next binary frame that is no heartbeat."""
    while True:
        opcode, data = link.recv_data()
        if opcode == websocket.ABNF.OPCODE_BINARY and len(data) > 1:
            return bytes(data)


@pytest.mark.parametrize("mode", ["ltp", "quote", "full"])
def test_the_official_kiteticker_works_unchanged(market: Market, mode: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("kite_ticker.py")
    tokens = [INFY, NIFTY, USDINR]
    with CaptureWriter(tmp_path / "sent.cap") as capture:
        server = SimulatorServer(market, capture=capture)
        server.start()
        with running_python(str(script), server.url, mode, *map(str, tokens)) as process:
            output, _ = process.communicate(timeout=60)
        server.stop()
    result = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    assert [json.loads(text)["type"] for text in result["messages"]] == ["instruments_meta", "app_code"]
    assert result["ticks"].keys() == {str(token) for token in tokens}
    sent = list(packets_in(tmp_path / "sent.cap"))
    for tick in result["ticks"].values():
        assert tick["mode"] == mode
        assert without_times(tick) in sent


def packets_in(path: Path) -> Iterator[dict[str, Any]]:
    """Every packet of a capture, decoded."""
    for _, _, frame in read_capture(path):
        parsed = parse_frame(frame, 0)
        for offset, length in zip(parsed.offsets, parsed.lengths, strict=True):
            yield without_times(decode(frame[offset : offset + length]))


def without_times(tick: dict[str, Any]) -> dict[str, Any]:
    """The SDK's times are naive, of the host's zone."""
    return {name: tick[name] for name in tick if name not in ("last_trade_time", "exchange_timestamp")}


def test_a_client_is_greeted_and_gets_heartbeats_without_a_subscription() -> None:
    server = SimulatorServer(None, heartbeat_seconds=0.05)
    server.start()
    link = connect(server)
    assert next_text(link)["type"] == "instruments_meta"
    code = next_text(link)
    assert code["type"] == "app_code" and "data" not in code
    assert [link.recv_data() for _ in range(2)] == [(websocket.ABNF.OPCODE_BINARY, b"\x00")] * 2
    server.stop()


def test_the_cached_last_tick_comes_on_subscribe_in_quote_mode(still: SimulatorServer) -> None:
    link = connect(still)
    ask(link, "subscribe", [INFY, NIFTY])
    parsed = parse_frame(next_frame(link), 0)
    assert dict(zip(parsed.ticks[:, model.TOKEN].tolist(), parsed.lengths, strict=True)) == {
        INFY: 44,
        NIFTY: 28,
    }


def test_modes_are_each_instruments_own_and_only_of_what_is_subscribed(server: SimulatorServer) -> None:
    link = connect(server)
    ask(link, "mode", ["full", [USDINR]])
    ask(link, "subscribe", [INFY, NIFTY])
    ask(link, "mode", ["full", [INFY]])
    ask(link, "mode", ["ltp", [NIFTY]])
    latest: dict[float, int] = {}

    def settled() -> bool:
        parsed = parse_frame(next_frame(link), 0)
        latest.update(zip(parsed.ticks[:, model.TOKEN].tolist(), parsed.lengths, strict=True))
        return latest == {INFY: 184, NIFTY: 8}

    wait_until(settled)
    ask(link, "unsubscribe", [INFY])
    latest.clear()

    def gone() -> bool:
        latest.clear()
        for _ in range(5):
            parsed = parse_frame(next_frame(link), 0)
            latest.update(zip(parsed.ticks[:, model.TOKEN].tolist(), parsed.lengths, strict=True))
        return latest == {NIFTY: 8}

    wait_until(gone)


def test_tokens_that_are_no_numbers_give_no_ticks(still: SimulatorServer) -> None:
    link = connect(still)
    ask(link, "subscribe", [str(INFY), True, None])
    ask(link, "subscribe", [NIFTY])
    parsed = parse_frame(next_frame(link), 0)
    assert parsed.ticks[:, model.TOKEN].tolist() == [NIFTY]
    assert still.subscriptions == 1


@pytest.mark.parametrize("message", ["{", "[]", '{"a":"fly","v":[]}', '{"a":"mode","v":["deep",[1]]}'])
def test_a_hostile_message_gets_an_error_and_the_connection_lives(
    still: SimulatorServer, message: str
) -> None:
    link = connect(still)
    next_text(link), next_text(link)
    link.send(message)
    answer = next_text(link)
    assert answer["type"] == "error" and answer["data"]
    ask(link, "subscribe", [INFY])
    assert next_frame(link)


def test_bytes_that_are_no_websocket_harm_nobody_else(still: SimulatorServer) -> None:
    link = connect(still)
    for garbage in (b"\x00" * 64, b"GET / HTTP/1.1\r\n\r\n", b"\xff\xff\xff\xff"):
        with socket.create_connection((still.host, still.port)) as raw:
            raw.sendall(garbage)
    breach = connect(still)
    breach.sock.sendall(b"\x83\x00")
    ask(link, "subscribe", [INFY])
    assert next_frame(link)


def test_beyond_3000_tokens_the_rest_is_refused_with_an_error() -> None:
    server = SimulatorServer(Market(universe(3100), int(time.time() * 1000)))
    server.start()
    assert server.market is not None
    link = connect(server)
    next_text(link), next_text(link)
    ask(link, "subscribe", server.market.tokens.tolist())
    assert "3000" in next_text(link)["data"]
    wait_until(lambda: server.subscriptions == 3000)
    server.stop()


def test_a_wrong_session_is_refused_with_403_and_one_connection_too_many_with_429(market: Market) -> None:
    server = SimulatorServer(market, access_token="right", connections_max=2)
    server.start()
    for query in ("", "?access_token=wrong", "?api_key=k&enctoken=wrong"):
        with pytest.raises(websocket.WebSocketBadStatusException) as refused:
            connect(server, query)
        assert refused.value.status_code == 403
    links = [connect(server, "?api_key=k&access_token=right"), connect(server, "?enctoken=right")]
    wait_until(lambda: server.clients == 2)
    with pytest.raises(websocket.WebSocketBadStatusException) as refused:
        connect(server, "?access_token=right")
    assert refused.value.status_code == 429
    links.pop().close()
    wait_until(lambda: server.clients == 1)
    connect(server, "?access_token=right").close()
    server.stop()


def test_who_reads_too_slowly_is_disconnected_and_nobody_else() -> None:
    server = SimulatorServer(None)
    server.start()
    slow, quick = connect(server), connect(server)
    wait_until(lambda: server.clients == 2)
    frame = b"x" * 200_000

    def dropped() -> bool:
        for _ in range(20):
            server.publish(frame)
            next_frame(quick)
        return server.stats.slow_disconnects == 1

    wait_until(dropped)
    assert server.clients == 1
    slow.shutdown()
    server.stop()


def test_faults_come_in_where_frames_go_out(still_market: Market) -> None:
    server = SimulatorServer(still_market, outgoing=lambda frame: [frame, frame[:-1]])
    server.start()
    link = connect(server)
    ask(link, "subscribe", [INFY])
    whole, damaged = next_frame(link), next_frame(link)
    assert damaged == whole[:-1]
    server.stop()


def test_the_capture_holds_what_was_sent(tmp_path: Path, market: Market) -> None:
    with CaptureWriter(tmp_path / "sent.cap") as capture:
        server = SimulatorServer(market, capture=capture)
        server.start()
        link = connect(server)
        ask(link, "subscribe", [INFY, NIFTY])
        received = [next_frame(link) for _ in range(5)]
        server.stop()
    sent = [
        frame
        for _, kind, frame in read_capture(tmp_path / "sent.cap")
        if kind == KIND_BINARY and len(frame) > 1
    ]
    assert sent[:5] == received


def test_a_taken_port_is_told_in_one_line(server: SimulatorServer) -> None:
    with pytest.raises(SimulatorFailed, match=f"{server.port}.*another port"):
        SimulatorServer(None, port=server.port).start()


def test_stop_ends_the_thread_and_a_second_stop_does_nothing(market: Market) -> None:
    server = SimulatorServer(market)
    server.start()
    link = connect(server)
    server.stop()
    server.stop()
    assert server._thread is not None and not server._thread.is_alive()
    link.shutdown()
