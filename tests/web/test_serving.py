"""The server as a process: tokens, followers, slow clients, an unavailable Redis, SIGTERM."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest
import redis

from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.web import closed, http
from pkbrokers_redis.web.runner import ROUTES, serve
from tests.client.contract import INFY, OPEN_S, RELIANCE, announce, row
from tests.support import running_python, running_server, settings_env, wait_until
from tests.topologies import free_ports
from tests.web.conftest import Serving, Web, url_of

pytestmark = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)

TOKEN = "a-long-token-of-the-tests"


def publish(client: redis.Redis, settings: Settings, i: int, token: int = INFY, interval: str = "1m") -> None:
    text = row(OPEN_S + 60 * i, 100 + i)
    announce(client, settings.keys, token, interval, text, symbol="NSE:INFY")


def events(response: HTTPResponse) -> Iterator[tuple[str, str, Any]]:
    """Yield (id, event, data)."""
    fields: dict[str, str] = {}
    for line in response:
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if name:
            fields[name] = value
        elif fields:
            if "data" in fields:
                yield fields.get("id", ""), fields["event"], json.loads(fields["data"])
            fields = {}


# --- tokens


def test_without_the_token_only_healthz_answers(store: Settings, serving: Serving) -> None:
    with serving(web_token=TOKEN) as web:
        for route in ROUTES:
            answer = web.get(route.example)
            assert answer.status == (503 if route.is_open else 401), route.path
            assert TOKEN.encode() not in answer.body
        assert web.get("/no/such/path").status == 401
        assert web.get("/api/status", Authorization=f"Bearer {TOKEN}").status == 200
        assert web.get("/api/status", Authorization=f"bearer  {TOKEN} ").status == 200
        assert web.get(f"/api/status?token={TOKEN}").status == 200
        for wrong in ("", TOKEN[:-1], TOKEN + "x", "%FF%00", "ä" * 9):
            assert (
                web.get("/api/status", Authorization=f"Bearer {wrong}".encode().decode("latin-1")).status
                == 401
            )
            assert web.get("/api/status?token=" + wrong.encode().hex()).status == 401
        assert web.get("/api/status", Authorization=f"Basic {TOKEN}").status == 401


# --- followers


def test_a_follower_resumes_at_its_position_without_loss_or_repeat(
    web: Web, client: redis.Redis, store: Settings
) -> None:
    with web.open("/api/closed") as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        stream = events(response)
        where, kind, data = next(stream)
        assert kind == "ready" and data == {"position": where}
        for i in range(3):
            publish(client, store, i)
        where, kind, data = next(stream)
        assert kind == "closed"
        assert data == {
            "token": INFY, "symbol": "NSE:INFY", "interval": "1m",
            "row": [OPEN_S, 100, 100, 100, 100, 10, None, 1], "rev": 0,
        }  # fmt: skip
    publish(client, store, 3)
    for resumed in ({"Last-Event-ID": where}, None):
        path = "/api/closed" if resumed else f"/api/closed?position={where}"
        with web.open(path, headers=resumed) as response:
            stream = events(response)
            assert next(stream)[1] == "ready"
            assert [next(stream)[2]["row"][4] for _ in range(3)] == [101, 102, 103]


def test_filters_apply_and_the_keepalive_advances_the_position(
    web: Web, client: redis.Redis, store: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closed, "KEEPALIVE_SECONDS", 0.05)
    with web.open("/api/closed?symbols=INFY&intervals=1m") as response:
        first, _, _ = next(events(response))
        publish(client, store, 1, INFY, "5m")
        publish(client, store, 2, RELIANCE)
        moved = next(line for line in response if line.startswith(b"id: ") and line[4:-1].decode() != first)
        publish(client, store, 3)
        assert moved and next(events(response))[2]["row"][4] == 103


def test_a_follower_behind_the_trimmed_stream_gets_the_count_of_missed_candles(
    web: Web, client: redis.Redis, store: Settings
) -> None:
    key = store.keys.closed(store.keys.shard_of(INFY))
    publish(client, store, 0)
    with web.open("/api/closed") as response:
        where = next(events(response))[0]
    for i in range(1, 6):
        publish(client, store, i)
    client.xtrim(key, maxlen=2, approximate=False)
    with web.open("/api/closed", headers={"Last-Event-ID": where}) as response:
        kinds = [(kind, data) for _, (_, kind, data) in zip(range(4), events(response), strict=False)]
    assert [kind for kind, _ in kinds] == ["ready", "missed", "closed", "closed"]
    assert kinds[1][1] == {"missed": 3}


def test_a_client_that_does_not_read_is_disconnected_and_others_continue(
    web: Web, client: redis.Redis, store: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "WRITE_SECONDS_MAX", 2.0)
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect((web.host, web.port))
    with slow, web.open("/api/closed") as response:
        slow.sendall(b"GET /api/closed HTTP/1.1\r\nHost: x\r\n\r\n")
        stream = events(response)
        assert next(stream)[1] == "ready"
        wait_until(lambda: b"pkb_web_streams 2.0" in web.get("/metrics").body)
        pipe, key = client.pipeline(transaction=False), store.keys.closed(store.keys.shard_of(INFY))
        for i in range(2_000):  # 2 MB: more than all the buffers between
            fields: dict[Any, Any] = {
                "token": INFY,
                "symbol": "X" * 1000,
                "interval": "1m",
                "row": row(OPEN_S + 60 * i),
                "rev": 0,
            }
            pipe.xadd(key, fields)
        pipe.execute()
        assert sum(1 for _ in zip(range(2_000), stream, strict=False)) == 2_000
        wait_until(lambda: b"pkb_web_streams_dropped_total 1.0" in web.get("/metrics").body)
        assert b"pkb_web_streams 1.0" in web.get("/metrics").body


def test_followers_are_limited_and_a_closed_one_frees_its_place(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closed, "STREAMS_MAX", 1)
    with web.open("/api/closed") as response:
        next(events(response))
        answer = web.get("/api/closed")
        assert answer.status == 503 and "too many" in answer.json["error"]
    wait_until(lambda: b"pkb_web_streams 0.0" in web.get("/metrics").body)
    with web.open("/api/closed") as response:
        assert response.status == 200


# --- failures


def test_every_route_reports_an_unavailable_redis_in_one_line_and_recovers(
    tmp_path: Path, server_kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closed, "RETRY_SECONDS", 0.02)
    stop = threading.Event()
    [port] = free_ports(1)
    settings = load_settings(
        redis_url=f"redis://:geheim@127.0.0.1:{port}/0", data_dir=tmp_path / "data", web_port=0
    )
    with running_server(tmp_path / "first", "--port", str(port), "--requirepass", "geheim"):
        thread = threading.Thread(target=serve, args=(settings, stop))
        thread.start()
        own = redis.Redis(port=port, password="geheim")
        web = Web(wait_until(lambda: url_of(own, settings)))
        follower = web.open("/api/closed")
        stream = events(follower.__enter__())
        assert next(stream)[1] == "ready"
        own.close()
    try:
        _, kind, data = next(stream)
        assert kind == "trouble" and "cannot be reached" in data["error"]
        with ThreadPoolExecutor(len(ROUTES)) as pool:
            found = list(pool.map(lambda route: web.get(route.example), ROUTES))
        for route, answer in zip(ROUTES, found, strict=True):
            expected = 200 if route.path in ("/", "/metrics") else 503
            assert answer.status == expected, route.path
            assert b"geheim" not in answer.body and b"Traceback" not in answer.body
        assert b"pkb_redis_up 0.0" in web.get("/metrics").body
        with running_server(tmp_path / "second", "--port", str(port), "--requirepass", "geheim"):
            wait_until(lambda: web.get("/api/status").status == 200, what="redis to be found again")
            own = redis.Redis(port=port, password="geheim")
            publish(own, settings, 4)
            assert next(event for event in stream if event[1] == "closed")[2]["row"][4] == 104
            own.close()
    finally:
        stop.set()
        thread.join(20)
        follower.__exit__(None, None, None)
    assert not thread.is_alive()


def test_a_key_of_another_type_is_reported_and_other_instruments_still_work(
    web: Web, client: redis.Redis, store: Settings
) -> None:
    client.set(store.keys.quote(RELIANCE), "nonsense")
    answer = web.get("/api/quote/RELIANCE")
    assert answer.status == 500 and "holds a string, not a hash" in answer.json["error"]
    assert web.get("/api/quote/INFY").status == 200


def test_an_internal_error_is_one_line_outside_and_a_traceback_in_the_log(
    web: Web, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a secret detail")

    monkeypatch.setattr("pkbrokers_redis.web.market.read_quote", broken)
    answer = web.get("/api/quote/INFY")
    assert answer.status == 500
    assert "secret detail" not in answer.body.decode() and "see the log" in answer.json["error"]


def test_garbage_on_the_socket_is_refused_and_the_server_stays(web: Web) -> None:
    for garbage in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 9_000 + b" HTTP/1.1\r\n\r\n",
    ):
        with socket.create_connection((web.host, web.port), timeout=10) as connection:
            connection.sendall(garbage + b"\r\n\r\n")
            assert not connection.recv(20).startswith(b"HTTP/1.1 200")
    assert web.get("/").status == 200


def test_a_port_in_use_is_one_line(store: Settings, make_settings: Callable[..., Settings]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PkbError, match=rf"cannot listen on 127.0.0.1:{port} \(.*in use.*PKB_WEB_PORT"):
            serve(make_settings(web_port=port), threading.Event())


def test_sigterm_ends_followers_deletes_the_heartbeat_and_no_token_is_logged(
    store: Settings, client: redis.Redis, make_settings: Callable[..., Settings]
) -> None:
    settings = make_settings(web_port=0, web_token=TOKEN, log_level="debug")
    with running_python("-m", "workers.web", env=settings_env(settings)) as process:
        web = Web(wait_until(lambda: url_of(client, settings)))
        assert web.get(f"/api/candles/INFY/5m?token={TOKEN}").status == 200
        assert web.get(f"/api/candles/NONE%0Aevent=forged/5m?token={TOKEN}").status == 404
        with web.open(f"/api/closed?token={TOKEN}") as response:
            stream = events(response)
            assert next(stream)[1] == "ready"
            process.send_signal(signal.SIGTERM)
            assert list(stream) == []  # the stream ends without an error
            out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert url_of(client, settings) == ""
    assert "/api/candles/INFY/5m" in out and TOKEN not in out and "token=" not in out
    assert "\nevent=forged" not in out
