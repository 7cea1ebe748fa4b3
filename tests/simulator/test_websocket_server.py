"""The websocket server as its clients see it: the official KiteTicker, a plain websocket, a hostile one."""

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
from hypothesis import given
from hypothesis import strategies as st

from pkbrokers_redis.candles import model
from pkbrokers_redis.kite.capture import KIND_BINARY, CaptureWriter, read_capture
from pkbrokers_redis.kite.protocol import decode, parse_frame
from pkbrokers_redis.simulator.market import Market
from pkbrokers_redis.simulator.subscriptions import (
    MODE_FULL,
    InvalidRequest,
    Request,
    parse_request,
)
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


def send_request(link: websocket.WebSocket, action: str, value: Any) -> None:
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


def test_a_client_gets_text_frames_and_heartbeats_without_a_subscription() -> None:
    server = SimulatorServer(None, heartbeat_seconds=0.05)
    server.start()
    link = connect(server)
    assert next_text(link)["type"] == "instruments_meta"
    code = next_text(link)
    assert code["type"] == "app_code" and "data" not in code
    assert [link.recv_data() for _ in range(2)] == [(websocket.ABNF.OPCODE_BINARY, b"\x00")] * 2
    server.stop()


def test_a_subscribe_sends_the_last_packet_in_quote_mode(still: SimulatorServer) -> None:
    link = connect(still)
    send_request(link, "subscribe", [INFY, NIFTY])
    parsed = parse_frame(next_frame(link), 0)
    assert dict(zip(parsed.ticks[:, model.TOKEN].tolist(), parsed.lengths, strict=True)) == {
        INFY: 44,
        NIFTY: 28,
    }


def test_a_mode_applies_to_one_subscribed_instrument(server: SimulatorServer) -> None:
    link = connect(server)
    send_request(link, "mode", ["full", [USDINR]])
    send_request(link, "subscribe", [INFY, NIFTY])
    send_request(link, "mode", ["full", [INFY]])
    send_request(link, "mode", ["ltp", [NIFTY]])
    latest: dict[float, int] = {}

    def has_both_modes() -> bool:
        parsed = parse_frame(next_frame(link), 0)
        latest.update(zip(parsed.ticks[:, model.TOKEN].tolist(), parsed.lengths, strict=True))
        return latest == {INFY: 184, NIFTY: 8}

    wait_until(has_both_modes)
    send_request(link, "unsubscribe", [INFY])
    latest.clear()

    def unsubscribed() -> bool:
        latest.clear()
        for _ in range(5):
            parsed = parse_frame(next_frame(link), 0)
            latest.update(zip(parsed.ticks[:, model.TOKEN].tolist(), parsed.lengths, strict=True))
        return latest == {NIFTY: 8}

    wait_until(unsubscribed)


def test_tokens_that_are_no_numbers_are_ignored(still: SimulatorServer) -> None:
    link = connect(still)
    send_request(link, "subscribe", [str(INFY), True, None])
    send_request(link, "subscribe", [NIFTY])
    parsed = parse_frame(next_frame(link), 0)
    assert parsed.ticks[:, model.TOKEN].tolist() == [NIFTY]
    assert still.subscriptions == 1


@pytest.mark.parametrize("message", ["{", "[]", '{"a":"fly","v":[]}', '{"a":"mode","v":["deep",[1]]}'])
def test_an_invalid_message_gets_an_error_and_keeps_the_connection(
    still: SimulatorServer, message: str
) -> None:
    link = connect(still)
    next_text(link), next_text(link)
    link.send(message)
    answer = next_text(link)
    assert answer["type"] == "error" and answer["data"]
    send_request(link, "subscribe", [INFY])
    assert next_frame(link)


def test_bytes_that_are_no_websocket_do_not_affect_other_clients(still: SimulatorServer) -> None:
    link = connect(still)
    for garbage in (b"\x00" * 64, b"GET / HTTP/1.1\r\n\r\n", b"\xff\xff\xff\xff"):
        with socket.create_connection((still.host, still.port)) as raw:
            raw.sendall(garbage)
    breach = connect(still)
    breach.sock.sendall(b"\x83\x00")
    send_request(link, "subscribe", [INFY])
    assert next_frame(link)


def test_tokens_beyond_3000_are_refused_with_an_error() -> None:
    server = SimulatorServer(Market(universe(3100), int(time.time() * 1000)))
    server.start()
    assert server.market is not None
    link = connect(server)
    next_text(link), next_text(link)
    send_request(link, "subscribe", server.market.tokens.tolist())
    assert "3000" in next_text(link)["data"]
    wait_until(lambda: server.subscriptions == 3000)
    server.stop()


def test_a_wrong_session_gets_403_and_a_surplus_connection_429(market: Market) -> None:
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


def test_only_the_slow_client_is_disconnected() -> None:
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


def test_outgoing_replaces_market_frames(still_market: Market) -> None:
    server = SimulatorServer(still_market, outgoing=lambda frame: [frame, frame[:-1]])
    server.start()
    link = connect(server)
    send_request(link, "subscribe", [INFY])
    whole, damaged = next_frame(link), next_frame(link)
    assert damaged == whole[:-1]
    server.stop()


def test_the_capture_equals_the_frames_sent(tmp_path: Path, market: Market) -> None:
    with CaptureWriter(tmp_path / "sent.cap") as capture:
        server = SimulatorServer(market, capture=capture)
        server.start()
        link = connect(server)
        send_request(link, "subscribe", [INFY, NIFTY])
        received = [next_frame(link) for _ in range(5)]
        server.stop()
    sent = [
        frame
        for _, kind, frame in read_capture(tmp_path / "sent.cap")
        if kind == KIND_BINARY and len(frame) > 1
    ]
    assert sent[:5] == received


def test_a_port_in_use_is_a_one_line_error(server: SimulatorServer) -> None:
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


@pytest.mark.parametrize(
    ("message", "request_"),
    [
        ('{"a":"subscribe","v":[408065,884737]}', Request("subscribe", [408065, 884737])),
        ('{"a":"unsubscribe","v":[408065]}', Request("unsubscribe", [408065])),
        (b'{"a":"mode","v":["full",[408065,408065]]}', Request("mode", [408065], MODE_FULL)),
        ('{"a":"subscribe","v":["408065",true,null,1.5,7]}', Request("subscribe", [7])),
    ],
)
def test_kites_requests_are_parsed(message: str | bytes, request_: object) -> None:
    assert parse_request(message) == request_


@pytest.mark.parametrize(
    "message",
    [
        "",
        "{",
        "[]",
        "7",
        "{}",
        '{"a":"dance","v":[1]}',
        '{"a":"subscribe"}',
        '{"a":"subscribe","v":7}',
        '{"a":"mode","v":["full"]}',
        '{"a":"mode","v":[{},[1]]}',
        '{"a":"mode","v":["depth",[1]]}',
        '{"a":["subscribe"],"v":[1]}',
        b"\xff",
        "[" * 50_000,
    ],
)
def test_any_other_message_is_an_invalid_request_with_a_reason(message: str | bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"[a-z]"):
        parse_request(message)


@given(st.one_of(st.binary(max_size=100), st.text(max_size=100)))
def test_no_message_makes_the_parser_raise_anything_else(message: str | bytes) -> None:
    try:
        action = parse_request(message).action
    except InvalidRequest as error:
        action = str(error) and "invalid"
    assert action in ("subscribe", "unsubscribe", "mode", "invalid")
