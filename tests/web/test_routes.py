"""Every route over real HTTP: its answers and its refusals."""

from __future__ import annotations

import io
import re
import socket
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import redis

from pkbrokers_redis.runtime.cluster_state import Heartbeat
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.functions import load_functions
from pkbrokers_redis.store.leases import announce
from pkbrokers_redis.web import market
from pkbrokers_redis.web.runner import ROUTES
from tests.client.contract import INFY, OPEN_S, RELIANCE
from tests.web.conftest import Serving, Web

pytestmark = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)

ROW_1, ROW_2 = (
    [OPEN_S + 300, 101, 101, 101, 101, 10, None, 1],
    [OPEN_S + 600, 102, 102, 102, 102, 20, None, 1],
)
PARTIAL = [OPEN_S, 100, 100, 100, 100, 0, None, 1, "partial"]
CURRENT = [OPEN_S + 900, 109, 109, 109, 109, 7, None, 1]


def test_every_route_is_in_the_docs(server_kind: str) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "web.md").read_text(encoding="utf-8")
    for route in ROUTES:
        assert f"`{route.path.replace(':.+', '')}" in text, route.path


def test_candles_are_redis_rows(web: Web) -> None:
    found = web.get("/api/candles/infy/5m").json
    assert (found["token"], found["symbol"], found["interval"]) == (INFY, "NSE:INFY", "5m")
    assert found["candles"] == [PARTIAL, ROW_1, ROW_2]
    assert web.get("/api/candles/INFY/5m?count=2&current=1").json["candles"] == [ROW_2, CURRENT]
    assert web.get(f"/api/candles/{INFY}/5min?count=1&fill=1").json["candles"] != []


def test_a_quote_is_an_object_and_several_are_an_array(web: Web) -> None:
    found = web.get("/api/quote/INFY").json
    assert found == {"token": INFY, "symbol": "NSE:INFY", "last_price": 109.5, "volume": 77}
    both = web.get("/api/quote/NSE:INFY/RELIANCE").json
    assert [quote["symbol"] for quote in both] == ["NSE:INFY", "NSE:RELIANCE"]
    assert web.get("/api/quote/INFY,RELIANCE").json == both
    assert web.get("/api/quote/NIFTY%2050").json["symbol"] == "NSE:NIFTY 50"


def test_bulk_returns_all_instruments_with_candles_or_the_named_ones(web: Web) -> None:
    found = web.get("/api/bulk?interval=5m&count=2").json
    assert found["candles"].keys() == {"NSE:INFY", "NSE:RELIANCE"}
    assert found["candles"]["NSE:INFY"] == [ROW_1, ROW_2]
    named = web.get("/api/bulk?symbols=INFY,SENSEX&count=9&current=1").json["candles"]
    assert named == {"NSE:INFY": [PARTIAL, ROW_1, ROW_2, CURRENT], "BSE:SENSEX": []}


def test_bulk_as_arrow_is_one_table(web: Web) -> None:
    answer = web.get("/api/bulk?format=arrow")
    assert answer.headers["content-type"] == "application/vnd.apache.arrow.stream"
    table = pa.ipc.open_stream(io.BytesIO(answer.body)).read_all()
    rows = [cells for cells in table.to_pylist() if cells["symbol"] == "NSE:INFY"]
    assert [row["close"] for row in rows] == [100, 101, 102]
    assert [row["flag"] for row in rows] == ["partial", "", ""]
    assert rows[0]["start"] == OPEN_S and rows[0]["oi"] is None


def test_bulk_beyond_the_row_limit_is_refused_with_a_count_that_fits(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(market, "ROWS_MAX", 5)
    answer = web.get("/api/bulk?interval=5m&count=3")
    assert answer.status == 400
    assert "count=2" in answer.json["error"]
    assert web.get("/api/bulk?interval=5m&count=2").status == 200


def test_search_finds_by_symbol_and_without_text_returns_streamed_instruments(web: Web) -> None:
    assert [match["symbol"] for match in web.get("/api/search?q=reli").json] == ["NSE:RELIANCE"]
    assert {match["token"] for match in web.get("/api/search").json} == {INFY, RELIANCE}


def test_an_unknown_symbol_is_404_with_the_nearest_names(web: Web) -> None:
    for path in (
        "/api/candles/INFI/5m",
        "/api/quote/INFI",
        "/api/bulk?symbols=INFI",
        "/api/closed?symbols=INFI",
    ):
        answer = web.get(path)
        assert answer.status == 404, path
        assert answer.json["symbol"] == "INFI" and "NSE:INFY" in answer.json["nearest"]


OTHER_SHARDS = ";..0" * 7  # of a store with eight shards
INVALID_POSITIONS = [
    "-1.0.0" + OTHER_SHARDS,
    "0.-1.0" + OTHER_SHARDS,
    "0.0.-1" + OTHER_SHARDS,
    "z" * 30 + ".0.0" + OTHER_SHARDS,
]
INVALID_REQUESTS = [
    "/api/candles/INFY/7m",
    "/api/candles/INFY/5m?count=0",
    "/api/candles/INFY/5m?count=-1",
    "/api/candles/INFY/5m?count=99999999999999999999",
    "/api/candles/INFY/5m?count=%D9%A3",  # an Arabic digit
    "/api/candles/INFY/5m?current=yes",
    "/api/candles/" + "A" * 61 + "/5m",
    "/api/bulk?format=xml",
    "/api/bulk?interval=%3Cscript%3E",
    "/api/bulk?symbols=" + ",".join(f"S{i}" for i in range(501)),
    "/api/search?limit=51",
    "/api/closed?intervals=7m",
    "/api/closed?position=nonsense",
    "/api/closed?position=1.2.3",
    *(f"/api/closed?position={position}" for position in INVALID_POSITIONS),
]


def test_invalid_parameters_are_400_in_one_line(web: Web) -> None:
    for path in INVALID_REQUESTS:
        answer = web.get(path)
        assert answer.status == 400, path
        assert answer.headers["content-type"].startswith("application/json")
        assert answer.json["error"] and "\n" not in answer.json["error"]


def test_an_invalid_position_is_refused_before_the_event_stream_starts(web: Web) -> None:
    for position in ("zzz", *INVALID_POSITIONS):
        answer = web.get("/api/closed", **{"Last-Event-ID": position})
        assert answer.status == 400, position
        assert "is no position" in answer.json["error"] and "\n" not in answer.json["error"]


def test_unknown_paths_and_other_methods_are_refused(web: Web) -> None:
    assert web.get("/api/nothing").status == 404
    assert web.get("/../../etc/passwd").status == 404
    assert web.get("/api/status", method="POST").status == 405
    assert web.get("/healthz", method="HEAD").status == 503  # no aggregator runs here


def test_health_is_down_without_workers_and_degraded_with_unowned_shards(
    store: Settings, serving: Serving, client: redis.Redis
) -> None:
    with serving() as web:
        answer = web.get("/healthz")
        assert (answer.status, answer.json) == (503, {"health": "down"})
        status = web.get("/api/status")
        assert status.status == 200 and status.json["health"] == "down"
        assert [worker["role"] for worker in status.json["workers"]] == []
    load_functions(client)
    for role in ("ingest", "aggregate"):
        announce(client, store.keys, role, f"{role}-1")
        Heartbeat(store.keys, role, f"{role}-1", 0).beat(client, 1000, 5000, {"feeds": "", "connected": 0})
    with serving() as web:
        answer = web.get("/healthz")
        assert (answer.status, answer.json) == (200, {"health": "degraded"})  # its shards have no owner


def test_metrics_parse_as_prometheus_text(web: Web, client: redis.Redis, store: Settings) -> None:
    from prometheus_client.parser import text_string_to_metric_families as parse

    load_functions(client)
    announce(client, store.keys, "ingest", 'in"gest\\1')
    Heartbeat(store.keys, "ingest", 'in"gest\\1', 0).beat(client, 1000, 5000, {})
    answer = web.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in parse(answer.body.decode())
        for sample in family.samples
    }
    assert found[("pkb_redis_up",)] == 1 and found[("pkb_health", "down")] == 1
    name = f"{socket.gethostname()}-1"
    assert found[("pkb_ticks_total", "ingest", name)] == 5000
    assert found[("pkb_ticks_per_second", "ingest", name)] == 5000
    assert found[("pkb_check", "aggregate")] == 2 and found[("pkb_check", "memory")] == 0
    assert found[("pkb_shard_lag_entries", "0")] == 0
    assert found[("pkb_redis_memory_used_bytes", "")] > 0
    assert found[("pkb_web_requests_total",)] >= 1


def test_a_restart_of_the_workers_makes_no_new_series(web: Web, client: redis.Redis, store: Settings) -> None:
    def series() -> set[str]:
        lines = web.get("/metrics").body.decode().splitlines()
        return {line.rpartition(" ")[0] for line in lines if line.startswith("pkb_") and 'role="' in line}

    load_functions(client)
    for n in (1, 2):
        announce(client, store.keys, "aggregate", f"aggregate-host-abc-{n}")
        Heartbeat(store.keys, "aggregate", f"aggregate-host-abc-{n}", n).beat(client, 1000, 5, {})
    before = series()
    for n in (1, 2):
        client.delete(store.keys.worker(f"aggregate-host-abc-{n}"))
        announce(client, store.keys, "aggregate", f"aggregate-host-def-{n + 7}")
        Heartbeat(store.keys, "aggregate", f"aggregate-host-def-{n + 7}", n).beat(client, 1000, 5, {})
    assert len(before) == 6
    assert series() == before


def test_the_page_loads_nothing_and_runs_only_its_own_script(web: Web) -> None:
    answer = web.get("/")
    html, policy = answer.body.decode(), answer.headers["content-security-policy"]
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.search(r"(src|href)=\"?(https?:)?//", html) and "@import" not in html
    assert "innerHTML" not in html and "/*script*/" not in html and "/*style*/" not in html
    assert "default-src 'none'" in policy and "unsafe" not in policy
    script = re.search(r"<script>(.*)</script>", html, re.DOTALL)
    assert script is not None
    assert digest(script[1]) in policy


def digest(text: str) -> str:
    import base64
    import hashlib

    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def test_every_response_has_the_security_headers(web: Web) -> None:
    for path in ("/", "/healthz", "/api/nothing", "/api/candles/INFI/5m", "/metrics"):
        headers: dict[str, Any] = web.get(path).headers
        assert headers["x-content-type-options"] == "nosniff", path
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["server"] == "pkb"
