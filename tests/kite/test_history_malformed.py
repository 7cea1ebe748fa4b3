"""Malformed responses of Kite's history: never taken for "no trades", and requested again."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, cast

import pytest
import redis

from pkbrokers_redis.errors import KiteUnavailable
from pkbrokers_redis.kite.history import KiteTickerHistory
from pkbrokers_redis.settings import load_settings
from pkbrokers_redis.store.rate_limit import Limiter

INFY = 408065
NOW_MS = 1_795_400_000_000.0  # 2026-11-23
DAY = ("2026-11-16", "2026-11-16", "minute")
FROM_S, TO_S = 1_794_767_400, 1_794_853_800  # the same day in India
GOOD = ["2026-11-16T09:15:00+0530", 1.0, 2.0, 1.0, 2.0, 10]


def candles(*rows: list[Any]) -> bytes:
    return json.dumps({"status": "success", "data": {"candles": rows}}).encode()


WHOLE = candles(GOOD, ["2026-11-16T09:16:00+0530", *GOOD[1:]])
MALFORMED_ROW = candles(GOOD, ["2026-11-16T09:16:00+0530", None, *GOOD[2:]])
NO_ANSWERS = [
    b'{"status":"success","data":null}',
    b'{"status":"success","data":{}}',
    b'{"status":"success","data":[]}',
    b'{"status":"success","data":{"candles":null}}',
    b'{"status":"success"}',
    b'"x"',
    b"[" * 100_000,
]


class Unlimited:
    """No test waits for its turn."""

    def wait(self, stop: object = None) -> float:
        return 0.0

    def back_off(self, seconds: float) -> None: ...


class OddKite:
    """A Kite that answers with these bodies in turn, and the last for ever."""

    def __init__(self, data_dir: Path) -> None:
        self.bodies = [WHOLE]
        self.requests = 0
        self.data_dir = data_dir
        kite = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                kite.requests += 1
                body = kite.bodies.pop(0) if len(kite.bodies) > 1 else kite.bodies[0]
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def history(self, attempts: int = 1) -> KiteTickerHistory:
        settings = load_settings(
            kite_api_url=f"http://127.0.0.1:{self.server.server_port}", data_dir=self.data_dir
        )
        return KiteTickerHistory(
            "enctoken",
            settings=settings.model_copy(update={"kite_login_url": settings.kite_api_url}),
            client=cast(redis.Redis, object()),
            limiter=cast(Limiter, Unlimited()),
            now_ms=lambda: NOW_MS,
            stop=Impatient(),
            attempts=attempts,
        )


class Impatient(threading.Event):
    """A stop event on which nobody waits."""

    def wait(self, timeout: float | None = None) -> bool:
        return self.is_set()


@pytest.fixture
def kite(tmp_path: Path) -> Iterator[OddKite]:
    kite = OddKite(tmp_path)
    yield kite
    kite.server.shutdown()
    kite.server.server_close()


@pytest.mark.parametrize("body", NO_ANSWERS, ids=lambda body: body[:44].decode())
def test_a_response_without_candles_is_not_cached(kite: OddKite, body: bytes) -> None:
    kite.bodies = [body, WHOLE]
    with pytest.raises(KiteUnavailable) as error:
        kite.history().get_historical_data(INFY, *DAY, max_retries=1)
    assert "\n" not in str(error.value)
    assert len(kite.history().get_historical_data(INFY, *DAY)["data"]["candles"]) == 2
    assert kite.requests == 2


def test_a_response_without_candles_is_retried(kite: OddKite) -> None:
    kite.bodies = [NO_ANSWERS[0], NO_ANSWERS[1], WHOLE]
    assert len(kite.history(attempts=3).rows(INFY, "1m", FROM_S, TO_S)) == 2
    assert kite.requests == 3


def test_an_empty_list_means_no_trades(kite: OddKite) -> None:
    kite.bodies = [candles()]
    for _ in range(2):
        assert kite.history().get_historical_data(INFY, *DAY)["data"]["candles"] == []
    assert kite.requests == 1


@pytest.mark.parametrize("malformed", [MALFORMED_ROW, candles(GOOD, [*GOOD[:5], 1e300])])
def test_valid_rows_of_an_incomplete_response_are_returned_and_its_span_is_requested_again(
    kite: OddKite, malformed: bytes
) -> None:
    kite.bodies = [malformed, WHOLE]
    read = [kite.history().get_historical_data(INFY, *DAY)["data"]["candles"] for _ in range(3)]
    assert [len(rows) for rows in read] == [1, 2, 2]
    assert kite.requests == 2


def test_a_malformed_row_costs_that_row_only(kite: OddKite) -> None:
    kite.bodies = [MALFORMED_ROW]
    history = kite.history(attempts=3)
    assert len(history.rows(INFY, "1m", FROM_S, TO_S)) == 1
    assert history.rows_refused == 1
    assert kite.requests == 1, "another try would get the same"
