"""The websocket client against the simulator, and against servers that misbehave."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from pydantic import SecretStr

from pkbrokers_redis.errors import PkbError, SettingsError
from pkbrokers_redis.kite import websocket as socket_module
from pkbrokers_redis.kite.protocol import MODE_OF_LENGTH, TextEvent, encode_frame, encode_packet, parse_frame
from pkbrokers_redis.kite.rest import address_of, url_for
from pkbrokers_redis.kite.websocket import (
    BACKOFF_CAP_SECONDS,
    TOKENS_PER_CONNECTION_MAX,
    ZerodhaWebSocketClient,
    backoff_seconds,
)
from pkbrokers_redis.settings import load_settings
from pkbrokers_redis.simulator.market import Market
from pkbrokers_redis.simulator.universe import universe
from pkbrokers_redis.simulator.websocket_server import SimulatorServer
from pkbrokers_redis.store.auth import Session
from tests.support import wait_until

SECRET = "s3cr3t-session"
FRAME = encode_frame([encode_packet("full", 408065, last_price=1500.0)])


class Received:
    """A running client and everything it was given."""

    def __init__(self, url: Any, tokens: list[int] = [], **options: Any) -> None:  # noqa: B006
        self.frames: list[bytes] = []
        self.events: list[TextEvent] = []
        self.failure: BaseException | None = None
        self.stop = _Stop()
        options = {"rng": _NoWait(), **options}
        self.client = ZerodhaWebSocketClient(
            url, tokens, on_frame=self._take, on_text=self.events.append, **options
        )
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _take(self, frame: bytes, at_ms: int) -> None:
        assert abs(at_ms - time.time() * 1000) < 60_000
        self.frames.append(frame)

    def _run(self) -> None:
        try:
            self.client.run(self.stop)
        except BaseException as error:
            self.failure = error

    def modes(self) -> dict[int, set[str]]:
        """token → the modes its packets came in."""
        seen: dict[int, set[str]] = {}
        for frame in tuple(self.frames):
            parsed = parse_frame(frame, 0)
            for token, length in zip(parsed.ticks[:, 0].astype(int).tolist(), parsed.lengths, strict=True):
                seen.setdefault(token, set()).add(MODE_OF_LENGTH[length])
        return seen


class _Stop(threading.Event):
    """A stop event that notes how long it was asked to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout)
        return super().wait(timeout)


class _NoWait(random.Random):
    """Jitter at its least: reconnects come at once."""

    def random(self) -> float:
        return 0.0


@contextlib.contextmanager
def receiving(*args: Any, **options: Any) -> Iterator[Received]:
    received = Received(*args, **options)
    received.thread.start()
    try:
        yield received
    finally:
        received.stop.set()
        received.thread.join(timeout=10)
        assert not received.thread.is_alive()


@contextlib.contextmanager
def serving(market: Market | None = None, **options: Any) -> Iterator[SimulatorServer]:
    server = SimulatorServer(market, **options)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def quick_market(count: int) -> Market:
    return Market(universe(count), int(time.time() * 1000), rate=count * 20)


@contextlib.contextmanager
def raw_server(handle: Callable[[socket.socket], None]) -> Iterator[str]:
    """Start a TCP server with a scripted behaviour for each connection; yield its ws:// URL."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                link, _ = listener.accept()
                threading.Thread(target=guarded, args=(link,), daemon=True).start()

    def guarded(link: socket.socket) -> None:
        with contextlib.suppress(OSError), link:
            handle(link)

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"ws://127.0.0.1:{listener.getsockname()[1]}/?access_token={SECRET}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def shake_hands(link: socket.socket, headers: bytes = b"") -> None:
    """The server's side of a websocket handshake."""
    from websockets.utils import accept_key

    request = b""
    while b"\r\n\r\n" not in request:
        request += link.recv(4096)
    key = next(
        line[19:] for line in request.decode().split("\r\n") if line.lower().startswith("sec-websocket-key")
    )
    link.sendall(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        + headers
        + b"Sec-WebSocket-Accept: "
        + accept_key(key.strip()).encode()
        + b"\r\n\r\n"
    )


# --- the usual way -------------------------------------------------------------------------------


def test_it_subscribes_in_batches_and_every_instrument_ticks_in_its_mode() -> None:
    market = quick_market(25)
    tokens = market.tokens.tolist()
    with serving(market) as server, receiving(server.url, tokens, mode="full", batch_size=10) as received:
        wait_until(lambda: all("full" in received.modes().get(token, ()) for token in tokens))
        kinds = {event.kind for event in received.events}
        assert kinds == {"instruments_meta", "app_code"}
        assert received.client.tokens == frozenset(tokens)
        assert received.client.state == "connected"
        assert server.subscriptions == 25
    assert received.client.state == "stopped"
    assert received.client.stats.frames >= len(received.frames)
    assert received.client.stats.bytes >= sum(map(len, received.frames))


def test_instruments_are_added_and_dropped_while_connected() -> None:
    market = quick_market(4)
    first, second, third, fourth = market.tokens.tolist()
    with serving(market) as server, receiving(server.url, [first], mode="ltp") as received:
        wait_until(lambda: "ltp" in received.modes().get(first, ()))
        received.client.subscribe([second, third], "full")
        received.client.subscribe([fourth])
        wait_until(lambda: {"full"} <= received.modes().get(third, set()) and fourth in received.modes())
        received.client.unsubscribe([first, 999])
        wait_until(lambda: server.subscriptions == 3)
        assert received.client.tokens == {second, third, fourth}
        server.disconnect_all()
        wait_until(lambda: received.client.stats.connects == 2 and server.subscriptions == 3)


def test_frames_arrive_byte_for_byte_whatever_their_size() -> None:
    large = encode_frame([FRAME[4:]] * 4000)  # 744 KB
    with serving(None) as server, receiving(server.url) as received:
        wait_until(lambda: server.clients)
        sent = [FRAME, large, b"\x00\x00", FRAME[:-7], large]
        for frame in sent:
            server.publish(frame)
        wait_until(lambda: len(received.frames) == len(sent))
        assert received.frames == sent


def test_heartbeats_are_counted_and_are_no_frames() -> None:
    beats: list[int] = []
    with (
        serving(None, heartbeat_seconds=0.02) as server,
        receiving(server.url, on_heartbeat=beats.append) as received,
    ):
        wait_until(lambda: received.client.stats.heartbeats >= 3 and len(beats) >= 3)
        assert received.frames == []


def test_frames_and_heartbeats_are_stamped_with_market_time() -> None:
    stamps: list[int] = []
    with serving(None, heartbeat_seconds=0.02) as server:
        client = ZerodhaWebSocketClient(
            server.url,
            on_frame=lambda frame, at_ms: stamps.append(at_ms),
            on_heartbeat=stamps.append,
            now_ms=lambda: 1_767_584_700_000.7,
        )
        stop = threading.Event()
        thread = threading.Thread(target=client.run, args=(stop,), daemon=True)
        thread.start()
        wait_until(lambda: stamps and client.state == "connected")
        server.publish(FRAME)
        wait_until(lambda: client.stats.frames > client.stats.heartbeats)
        stop.set()
        thread.join(10)
    assert set(stamps) == {1_767_584_700_000}


def test_instruments_that_fell_silent_are_subscribed_anew_in_their_modes() -> None:
    asked: list[Any] = []
    with serving(quick_market(3)) as server, receiving(server.url) as received:
        answer = server._handle_request
        server._handle_request = lambda client, message: (
            asked.append(msgspec.json.decode(message)),
            answer(client, message),
        )[1]  # type: ignore[method-assign]
        first, second, third = server.market.tokens.tolist()  # type: ignore[union-attr]
        received.client.subscribe([first, second], "full")
        received.client.subscribe([third], "ltp")
        wait_until(lambda: server.subscriptions == 3)
        asked.clear()
        received.client.resubscribe([first, third, 999])
        wait_until(lambda: len(asked) == 5)
        assert asked == [
            {"a": "unsubscribe", "v": [first, third]},
            {"a": "subscribe", "v": [third]},
            {"a": "mode", "v": ["ltp", [third]]},
            {"a": "subscribe", "v": [first]},
            {"a": "mode", "v": ["full", [first]]},
        ]
        assert server.subscriptions == 3


def test_it_reconnects_when_told_to_and_tells_each_state() -> None:
    states: list[str] = []
    with serving(None) as server, receiving(server.url, on_state=states.append) as received:
        received.client.reconnect("nothing is connected yet, maybe")
        wait_until(lambda: received.client.state == "connected")
        received.client.reconnect("some instruments are silent")
        wait_until(lambda: received.client.stats.connects >= 2)
    assert states[:5] == ["connecting", "connected", "waiting", "connecting", "connected"]
    assert states[-1] == "stopped"


def test_hostile_text_is_counted_and_the_frames_behind_it_arrive() -> None:
    with serving(None) as server, receiving(server.url) as received:
        wait_until(lambda: server.clients)
        for text in ("{", "[]", '{"type": 7}', '{"type":"order","data":3}', ""):
            server.publish(text)
        server.publish(FRAME)
        wait_until(lambda: received.frames)
        assert received.client.stats.text_invalid == 5
        assert received.client.stats.connects == 1


# --- losses and refusals -------------------------------------------------------------------------


def test_after_a_loss_it_connects_again_and_subscribes_everything() -> None:
    market = quick_market(3)
    with serving(market) as server, receiving(server.url, market.tokens.tolist()) as received:
        for connects in (1, 2, 3):
            wait_until(lambda: server.subscriptions == 3, what="subscriptions")
            received.frames.clear()
            wait_until(lambda: len(received.modes()) == 3)
            assert received.client.stats.connects == connects
            server.disconnect_all()
            wait_until(lambda n=connects: received.client.stats.connects > n)
        assert received.client.stats.reconnects == 3


def test_a_server_that_comes_up_later_is_found() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with receiving(f"ws://127.0.0.1:{port}") as received:
        wait_until(lambda: received.client.stats.errors >= 2)
        with serving(None, port=port):
            wait_until(lambda: received.client.state == "connected")


def test_silence_without_a_heartbeat_ends_the_connection() -> None:
    with (
        serving(None, heartbeat_seconds=1000) as server,
        receiving(server.url, stale_seconds=0.3) as received,
    ):
        wait_until(lambda: received.client.stats.stale >= 1 and received.client.stats.connects >= 2)


def test_heartbeats_without_ticks_are_silence_only_while_the_market_trades() -> None:
    trading = threading.Event()
    with (
        serving(None, heartbeat_seconds=0.05) as server,
        receiving(
            server.url, [408065], tickless_seconds=0.2, expects_ticks=lambda at_ms: trading.is_set()
        ) as received,
    ):
        wait_until(lambda: received.client.stats.heartbeats >= 12)
        assert received.client.stats.stale == 0
        trading.set()
        wait_until(lambda: received.client.stats.stale >= 1)


def test_after_403_the_session_is_renewed_once_and_used() -> None:
    sessions = ["old"]
    calls: list[str] = []

    def renew(stop: threading.Event) -> None:
        calls.append(sessions[-1])
        sessions.append("new")

    with (
        serving(None, access_token="new") as server,
        receiving(lambda: f"{server.url}/?access_token={sessions[-1]}", on_forbidden=renew) as received,
    ):
        wait_until(lambda: received.client.state == "connected")
        assert calls == ["old"]
        assert received.client.stats.forbidden == 1


def test_a_session_that_stays_dead_is_not_hammered() -> None:
    with (
        serving(None, access_token="other") as server,
        receiving(f"{server.url}/?access_token={SECRET}", forbidden_seconds=30) as received,
    ):
        wait_until(lambda: socket_module.SESSION_CHECK_SECONDS in received.stop.waits)
        assert received.client.state == "forbidden"
        assert server.stats.refused == 1


def test_while_it_waits_after_403_a_session_made_by_others_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_module, "SESSION_CHECK_SECONDS", 0.02)
    sessions = ["dead"]
    with (
        serving(None, access_token="new") as server,
        receiving(lambda: f"{server.url}/?access_token={sessions[-1]}", forbidden_seconds=300) as received,
    ):
        wait_until(lambda: received.stop.waits.count(0.02) >= 3)
        assert server.stats.refused == 1
        sessions.append("new")
        wait_until(lambda: received.client.state == "connected")


def test_what_on_forbidden_raises_ends_the_run() -> None:
    class Dead(PkbError): ...

    def give_up(stop: threading.Event) -> None:
        raise Dead("no session")

    with (
        serving(None, access_token="other") as server,
        receiving(f"{server.url}/?access_token=x", on_forbidden=give_up) as received,
    ):
        wait_until(lambda: isinstance(received.failure, Dead))


def test_429_waits_and_then_tries_again() -> None:
    with (
        serving(None, connections_max=1) as server,
        receiving(server.url) as first,
    ):
        wait_until(lambda: first.client.state == "connected")
        with receiving(server.url, throttled_seconds=0.05) as second:
            wait_until(lambda: second.client.stats.throttled >= 2)
            first.stop.set()
            wait_until(lambda: second.client.state == "connected")


def test_a_frame_beyond_the_bound_is_never_read_and_costs_the_connection_only() -> None:
    with serving(None) as server, receiving(server.url, frame_bytes_max=100_000) as received:
        wait_until(lambda: server.clients)
        server.publish(b"x" * 100_001)
        wait_until(lambda: received.client.stats.oversized == 1 and received.client.stats.connects == 2)
        wait_until(lambda: server.clients)
        server.publish(FRAME)
        wait_until(lambda: received.frames == [FRAME])


def test_fragments_are_joined_and_bounded_like_a_frame() -> None:
    def fragments(link: socket.socket) -> None:
        shake_hands(link)
        link.sendall(b"\x02\x02ab" + b"\x80\x01c")
        link.sendall(b"\x02\x7d" + b"x" * 125)
        for _ in range(20):
            link.sendall(b"\x00\x7d" + b"x" * 125)
        link.recv(1)

    with raw_server(fragments) as url, receiving(url, frame_bytes_max=1000) as received:
        wait_until(lambda: received.client.stats.oversized)
        assert received.frames[0] == b"abc"


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"hello\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 500 x\r\nContent-Length: zz\r\n\r\n",
        b"\xff" * 99,
    ],
)
def test_a_server_that_speaks_no_websocket_is_an_error_and_not_a_crash(garbage: bytes) -> None:
    def answer(link: socket.socket) -> None:
        link.recv(4096)
        link.sendall(garbage)

    with raw_server(answer) as url, receiving(url) as received:
        wait_until(lambda: received.client.stats.errors >= 2)
        assert received.failure is None


@pytest.mark.parametrize(
    "bytes_sent", [b"\xf2\x00", b"\x83\x00", b"\x80\x01x", b"\x88\x01x", b"\x89\x7e\x00\x80" + b"x" * 128]
)
def test_a_breach_of_the_protocol_costs_the_connection_only(bytes_sent: bytes) -> None:
    def breach(link: socket.socket) -> None:
        shake_hands(link)
        link.sendall(bytes_sent)
        link.recv(1)

    with raw_server(breach) as url, receiving(url) as received:
        wait_until(lambda: received.client.stats.connects >= 2)
        assert received.failure is None


# --- stopping ------------------------------------------------------------------------------------


def _hang(link: socket.socket) -> None:
    while link.recv(4096):
        pass


def _hang_connected(link: socket.socket) -> None:
    shake_hands(link)
    _hang(link)


def _drip(link: socket.socket) -> None:
    shake_hands(link)
    link.sendall(b"\x82\x7e\xff\xff")
    while True:
        link.sendall(b"x")
        time.sleep(0.05)


def _drip_headers(link: socket.socket) -> None:
    link.sendall(b"HTTP/1.1 101 x\r\n")
    while True:
        link.sendall(b"X: y\r\n")
        time.sleep(0.05)


def _refuse(link: socket.socket) -> None:
    link.recv(4096)
    link.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")


@pytest.mark.parametrize("server", [_hang, _hang_connected, _drip, _drip_headers, _refuse])
def test_it_stops_from_any_state(server: Callable[[socket.socket], None]) -> None:
    accepted = threading.Event()

    def handle(link: socket.socket) -> None:
        accepted.set()
        server(link)

    with raw_server(handle) as url, receiving(url, connect_seconds=60) as received:
        wait_until(accepted.is_set)
        wait_until(lambda: received.client.state != "stopped")
        received.stop.set()
        received.thread.join(timeout=5)  # far below every time-out involved
        assert not received.thread.is_alive()


def test_a_connect_that_hangs_is_given_up() -> None:
    with raw_server(_drip_headers) as url, receiving(url, connect_seconds=0.2) as received:
        wait_until(lambda: received.client.stats.errors >= 2)


# --- secrets, limits, settings -------------------------------------------------------------------


@pytest.mark.parametrize(
    "handle",
    [
        lambda link: link.close(),
        lambda link: (
            link.recv(4096),
            link.sendall(f"HTTP/1.1 403 {SECRET}\r\nX: {SECRET}\r\n\r\n".encode()),
        ),
        lambda link: (
            link.recv(4096),
            link.sendall(f"HTTP/1.1 302 x\r\nLocation: bad://{SECRET}\r\n\r\n".encode()),
        ),
        lambda link: (link.recv(4096), link.sendall(SECRET.encode() + b"\r\n\r\n")),
    ],
)
def test_no_log_line_and_no_error_holds_the_session(
    handle: Callable[[socket.socket], None],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(0)
    with raw_server(handle) as url, receiving(url, forbidden_seconds=0.01) as received:
        wait_until(lambda: received.client.stats.errors >= 2)
    printed = "".join(capsys.readouterr())
    assert "logger=kite" in printed
    assert SECRET not in printed + caplog.text + repr(vars(received.client)["stats"])


@pytest.mark.parametrize(
    "url", ["", "http://x/?t=" + SECRET, "nonsense:" + SECRET, "ws://h:99999/?" + SECRET]
)
def test_a_url_that_is_none_is_an_error_that_holds_no_session(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with receiving(url) as received:
        wait_until(lambda: received.client.stats.errors >= 1)
    printed = "".join(capsys.readouterr())
    assert "logger=kite" in printed
    assert SECRET not in printed
    assert received.failure is None


def test_a_redirect_is_not_followed_with_the_session() -> None:
    with serving(None) as elsewhere:

        def redirect(link: socket.socket) -> None:
            link.recv(4096)
            link.sendall(f"HTTP/1.1 302 x\r\nLocation: {elsewhere.url}\r\n\r\n".encode())

        with raw_server(redirect) as url, receiving(url) as received:
            wait_until(lambda: received.client.stats.errors >= 2 or received.client.stats.connects)
            assert received.client.stats.connects == elsewhere.stats.connections == 0


def test_more_than_3000_instruments_are_refused_in_one_line() -> None:
    many = [number << 8 | 1 for number in range(1, TOKENS_PER_CONNECTION_MAX + 1)]
    client = ZerodhaWebSocketClient("ws://x", many, on_frame=lambda frame, at_ms: None)
    client.subscribe(many)  # again is not more
    with pytest.raises(SettingsError, match="3001 instruments"):
        client.subscribe([1])
    assert len(client.tokens) == TOKENS_PER_CONNECTION_MAX
    with pytest.raises(SettingsError, match="no Kite mode"):
        client.subscribe([], "depth")


def test_the_backoff_grows_to_its_cap_and_is_spread() -> None:
    rng = random.Random(1)
    waits = [[backoff_seconds(attempt, rng) for _ in range(200)] for attempt in range(12)]
    assert all(0 < wait <= BACKOFF_CAP_SECONDS for row in waits for wait in row)
    assert max(waits[0]) <= 0.5 < max(waits[2])
    assert max(waits[11]) > BACKOFF_CAP_SECONDS * 0.9
    assert min(waits[11]) < BACKOFF_CAP_SECONDS * 0.1


def test_url_for_builds_kites_two_forms_and_a_local_one() -> None:
    key = {"kite_api_key": "key", "kite_access_token": "a/b+c"}
    assert url_for(load_settings(**key)) == "wss://ws.kite.trade?api_key=key&access_token=a%2Fb%2Bc"
    web = load_settings(kite_enctoken="x+/==", kite_user_id="AB1234")
    assert url_for(web) == "wss://ws.zerodha.com/?api_key=kitefront&user_id=AB1234&enctoken=x%2B%2F%3D%3D"
    mine = Session("other", access_token=SecretStr("mine"))
    assert url_for(load_settings(**key), mine) == "wss://ws.kite.trade?api_key=other&access_token=mine"
    assert "enctoken=mine" in url_for(load_settings(**key), Session("", "U", enctoken=SecretStr("mine")))
    local = "ws://127.0.0.1:8765"
    assert url_for(load_settings(kite_ws_url=local)) == local
    assert url_for(load_settings(kite_ws_url=local, **key)).startswith(local + "?api_key=key&")
    with pytest.raises(SettingsError, match="pkb login"):
        url_for(load_settings())


def test_the_address_of_a_url_holds_nothing_but_the_server() -> None:
    url = f"wss://user:{SECRET}@ws.kite.trade:99/{SECRET}?t={SECRET}#{SECRET}"
    assert address_of(url) == "wss://ws.kite.trade:99"
