"""A web server in a thread, on a port of its own, over a store with a few candles written by hand."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis

from pkbrokers_redis.runtime import health as status_module
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.meta import ensure_meta
from pkbrokers_redis.web.runner import serve
from tests.client.contract import INFY, OPEN_S, RELIANCE, push, row, write_master
from tests.support import wait_until


@dataclass
class Response:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Web:
    """An HTTP client. `get` reads the whole response, `open` leaves it open."""

    def __init__(self, url: str) -> None:
        self.url = url
        parts = urlsplit(url)
        self.host, self.port = str(parts.hostname), int(parts.port or 0)

    def get(self, path: str, method: str = "GET", **headers: str) -> Response:
        with self.open(path, method, headers) as response:
            found = {name.lower(): value for name, value in response.getheaders()}
            return Response(response.status, found, response.read())

    @contextlib.contextmanager
    def open(
        self, path: str, method: str = "GET", headers: dict[str, str] | None = None
    ) -> Iterator[HTTPResponse]:
        connection = HTTPConnection(self.host, self.port, timeout=20)
        try:
            connection.request(method, path, headers=headers or {})
            yield connection.getresponse()
        finally:
            connection.close()


def url_of(client: redis.Redis, settings: Settings) -> str:
    """Return the web server's URL from its heartbeat, or "" while there is none."""
    for key in client.keys(settings.keys.worker("web-*")):
        found: Any = client.hget(key, "url")
        if found:
            return str(found.decode())
    return ""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_module, "SECOND_LOOK_SECONDS", 0.01)


@pytest.fixture
def store(client: redis.Redis, settings: Settings) -> Settings:
    """INFY and RELIANCE with three candles of 5m and a current one of INFY."""
    keys = settings.keys
    ensure_meta(client, settings, "2026-01-01T00:00:00+00:00")
    write_master(client, keys)
    for token, price in ((INFY, 100.0), (RELIANCE, 200.5)):
        rows = [row(OPEN_S + 300 * i, price + i, 10 * i, "partial" if i == 0 else "") for i in range(3)]
        push(client, keys, token, "5m", rows)
        client.hset(keys.state(keys.shard_of(token)), str(token), "x")
    client.hset(keys.current(INFY), "5m", row(OPEN_S + 900, 109, 7))
    client.hset(keys.quote(INFY), mapping={"symbol": "NSE:INFY", "last_price": "109.5", "volume": "77"})
    return settings


Serving = Callable[..., "contextlib.AbstractContextManager[Web]"]


@pytest.fixture
def serving(client: redis.Redis, make_settings: Callable[..., Settings]) -> Serving:
    """`with serving(web_token="…") as web:`"""

    @contextlib.contextmanager
    def serve_it(**overrides: Any) -> Iterator[Web]:
        settings = make_settings(web_port=0, **overrides)
        stop = threading.Event()
        thread = threading.Thread(target=serve, args=(settings, stop), name="web")
        thread.start()
        try:
            yield Web(wait_until(lambda: url_of(client, settings), what="the web server"))
        finally:
            stop.set()
            thread.join(20)
            assert not thread.is_alive()

    return serve_it


@pytest.fixture
def web(store: Settings, serving: Serving) -> Iterator[Web]:
    with serving() as found:
        yield found
