"""Faults on demand: the table by itself, then as REST and websocket clients meet them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import websocket
from kiteconnect import KiteConnect
from kiteconnect import exceptions as kite_errors

from pkbrokers_redis.candles import model
from pkbrokers_redis.errors import SettingsError
from pkbrokers_redis.kite.protocol import parse_frame
from pkbrokers_redis.simulator.faults import FAULTS_MAX, KINDS, Faults, parse_fault
from pkbrokers_redis.simulator.kite import SimulatedKite
from pkbrokers_redis.simulator.universe import universe
from tests.simulator.conftest import INFY, NIFTY
from tests.support import wait_until

HEARTBEAT = b"\x00"
TOKENS = np.array([1, 2, 3, 4, 5, 6, 7, 8], np.int64)


class ManualClock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_fault_with_a_count_ends_after_that_many_strikes() -> None:
    faults = Faults()
    faults.add("429", count=2, on="rest")
    struck = [faults.strike("rest", "429", path="/quote") is not None for _ in range(4)]
    assert struck == [True, True, False, False]
    assert faults.struck == {"429": 2}
    assert faults.active() == []


def test_a_fault_with_a_duration_ends_after_it() -> None:
    clock = ManualClock()
    faults = Faults(now_s=clock)
    faults.add("mute", seconds=5)
    rows = np.arange(len(TOKENS))
    assert faults.unmuted(rows, TOKENS).size == 0
    clock.now_s = 5.0
    assert faults.unmuted(rows, TOKENS).size == len(TOKENS)


def test_a_fault_strikes_on_its_side_and_path_only() -> None:
    faults = Faults()
    faults.add("503", on="rest", path="/instruments/historical")
    assert faults.strike("ws", "503") is None
    assert faults.strike("rest", "503", path="/quote") is None
    assert faults.strike("rest", "503", path="/instruments/historical/1/day") is not None


def test_clearing_one_kind_keeps_the_other_faults() -> None:
    faults = Faults()
    faults.add("mute")
    faults.add("stall")
    assert faults.stalled()
    faults.clear("stall")
    assert not faults.stalled()
    assert [fault["kind"] for fault in faults.active()] == ["mute"]
    faults.clear()
    assert faults.active() == []


def test_mute_some_mutes_the_same_instruments_while_it_lasts() -> None:
    faults, tokens = Faults(), np.arange(1000, dtype=np.int64) << 8 | 1
    faults.add("mute_some", share=0.3)
    unmuted = faults.unmuted(np.arange(1000), tokens)
    assert 500 < unmuted.size < 900
    assert np.array_equal(unmuted, faults.unmuted(np.arange(1000), tokens))
    faults.clear()
    faults.add("mute_some", tokens=[2, 4])
    assert TOKENS[faults.unmuted(np.arange(len(TOKENS)), TOKENS)].tolist() == [1, 3, 5, 6, 7, 8]


def test_duplicate_reorder_and_garbage_change_frames_by_the_seed() -> None:
    def played(kind: str, seed: int = 1) -> list[bytes]:
        faults, held = Faults(seed=seed), list[bytes]()
        faults.add(kind, share=0.5)
        return [sent for n in range(40) for sent in faults.damage(bytes([n] * 30), held)]

    frames = [bytes([n] * 30) for n in range(40)]
    assert sorted(set(played("duplicate"))) == frames
    assert len(played("duplicate")) > 45
    assert sorted(played("reorder")) in (frames, frames[:-1])
    assert played("reorder") != frames
    damaged = [frame for frame in played("garbage") if frame not in frames]
    assert 5 < len(damaged) < 35
    assert played("garbage") == played("garbage")
    assert played("garbage") != played("garbage", seed=2)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("flood", {}),
        ("mute", {"on": "rest"}),
        ("html", {"on": "ws"}),
        ("duplicate", {"share": 0}),
        ("slow", {"delay_seconds": -1}),
    ],
)
def test_invalid_fault_options_are_refused(kind: str, options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        Faults().add(kind, **options)


def test_the_number_of_active_faults_is_bounded() -> None:
    faults = Faults()
    for _ in range(FAULTS_MAX):
        faults.add("mute")
    with pytest.raises(SettingsError, match="clear some"):
        faults.add("mute")


def test_a_fault_is_parsed_from_a_command_line_option() -> None:
    assert parse_fault("429") == {"kind": "429"}
    assert parse_fault("slow,path=/quote,delay_seconds=3") == {
        "kind": "slow",
        "path": "/quote",
        "delay_seconds": 3.0,
    }
    assert parse_fault("mute_some,tokens=1+2,count=3")["tokens"] == [1, 2]
    for text in ("flood", "mute,when=now", "mute,count=many", "mute,count"):
        with pytest.raises(SettingsError):
            parse_fault(text)


# --- REST ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("403", kite_errors.TokenException),
        ("429", kite_errors.NetworkException),
        ("500", kite_errors.GeneralException),
        ("502", kite_errors.DataException),
        ("503", kite_errors.NetworkException),
        ("html", kite_errors.DataException),
        ("garbage_json", kite_errors.DataException),
        ("drop", requests.ConnectionError),
    ],
)
def test_each_rest_fault_raises_kiteconnects_exception(
    kite: SimulatedKite, connect: KiteConnect, kind: str, expected: type[Exception]
) -> None:
    kite.faults.add(kind, count=1)
    with pytest.raises(expected) as met:
        connect.profile()
    if isinstance(met.value, kite_errors.KiteException) and kind.isdigit():
        assert met.value.code == int(kind)
    assert connect.profile()


def test_the_slow_fault_exceeds_the_clients_timeout(kite: SimulatedKite, connect: KiteConnect) -> None:
    connect.timeout = 0.2
    kite.faults.add("slow", count=1, delay_seconds=20, path="/user")
    with pytest.raises(requests.ReadTimeout):
        connect.profile()
    connect.timeout = 10
    assert connect.ltp("NSE:INFY")


def test_faults_apply_to_the_login_pages(kite: SimulatedKite) -> None:
    kite.faults.add("html", count=1, path="/api/login")
    answer = requests.post(kite.login_url + "/api/login", data={"user_id": "x"}, timeout=10)
    assert answer.status_code == 503
    assert "maintenance" in answer.text


def test_the_control_api_adds_shows_and_clears_faults(kite: SimulatedKite, connect: KiteConnect) -> None:
    page = kite.api_url + "/_sim/faults"
    added = requests.post(page, json={"kind": "429", "count": 2, "path": "/quote"}, timeout=10).json()["data"]
    assert (added[0]["kind"], added[0]["count"], added[0]["path"]) == ("429", 2, "/quote")
    with pytest.raises(kite_errors.NetworkException):
        connect.quote("NSE:INFY")
    assert requests.get(page, timeout=10).json()["data"][0]["count"] == 1
    assert requests.delete(page, params={"kind": "429"}, timeout=10).json()["data"] == []
    stats = requests.get(kite.api_url + "/_sim/stats", timeout=10).json()["data"]
    assert stats["struck"] == {"429": 1}
    for wrong in ({"kind": "flood"}, {"kind": "mute", "color": "red"}, ["mute"], {"count": 1}):
        answer = requests.post(page, json=wrong, timeout=10)
        assert (answer.status_code, answer.json()["error_type"]) == (400, "InputException")
    requests.post(kite.api_url + "/_sim/expire", timeout=10)
    with pytest.raises(kite_errors.TokenException):
        connect.profile()


# --- websocket ----------------------------------------------------------------------------------------


@pytest.fixture
def lively() -> Iterator[SimulatedKite]:
    """Many packets a second, and heartbeats as fast."""
    with SimulatedKite(universe(20), rate=400, heartbeat_seconds=0.05) as kite:
        yield kite


def subscribed(kite: SimulatedKite, tokens: list[int] | None = None) -> websocket.WebSocket:
    query = f"?api_key={kite.accounts.first.api_key}&access_token={kite.accounts.open_session()}"
    link = websocket.create_connection(kite.ws_url + query, timeout=10)
    subscribed_tokens = tokens or kite.market.tokens.tolist()
    link.send(json.dumps({"a": "subscribe", "v": subscribed_tokens}))
    next_ticks(link)
    return link


def next_binary(link: websocket.WebSocket) -> bytes:
    while True:
        opcode, data = link.recv_data()
        if opcode == websocket.ABNF.OPCODE_BINARY:
            return bytes(data)


def next_ticks(link: websocket.WebSocket) -> set[int]:
    while True:
        frame = next_binary(link)
        if frame != HEARTBEAT:
            return set(parse_frame(frame, 0).ticks[:, model.TOKEN].astype(int).tolist())


@pytest.mark.parametrize("status", [403, 429, 503])
def test_a_status_fault_refuses_the_handshake(lively: SimulatedKite, status: int) -> None:
    query = f"?api_key={lively.accounts.first.api_key}&access_token={lively.accounts.open_session()}"
    lively.faults.add(str(status), count=1, on="ws")
    with pytest.raises(websocket.WebSocketBadStatusException) as refused:
        websocket.create_connection(lively.ws_url + query, timeout=10)
    assert refused.value.status_code == status
    websocket.create_connection(lively.ws_url + query, timeout=10).close()


def test_a_mute_feed_has_heartbeats_and_no_ticks(lively: SimulatedKite) -> None:
    link = subscribed(lively)
    lively.faults.add("mute")
    wait_until(lambda: all(next_binary(link) == HEARTBEAT for _ in range(10)))
    lively.faults.clear()
    assert next_ticks(link)


def test_a_partly_mute_feed_lacks_some_instruments(lively: SimulatedKite) -> None:
    link = subscribed(lively, [INFY, NIFTY])
    lively.faults.add("mute_some", tokens=[INFY])
    wait_until(lambda: all(next_ticks(link) == {NIFTY} for _ in range(5)))
    lively.faults.clear()
    wait_until(lambda: INFY in next_ticks(link))


def test_a_stalled_feed_sends_nothing_at_all(lively: SimulatedKite) -> None:
    link = subscribed(lively)
    lively.faults.add("stall")
    link.settimeout(0.4)

    def is_silent() -> bool:
        try:
            next_binary(link)
        except websocket.WebSocketTimeoutException:
            return True
        return False

    wait_until(is_silent)
    assert lively.server.clients == 1
    lively.faults.clear()
    link.settimeout(10)
    assert next_ticks(link)


def test_the_drop_fault_aborts_a_connection_and_a_new_one_works(lively: SimulatedKite) -> None:
    link = subscribed(lively)
    lively.faults.add("drop", count=1, on="ws")
    with pytest.raises((websocket.WebSocketConnectionClosedException, ConnectionError)):
        while True:
            next_binary(link)
    subscribed(lively)


def test_damaged_frames_do_not_change_the_history(lively: SimulatedKite) -> None:
    link = subscribed(lively, [INFY])
    lively.faults.add("garbage", share=1)
    lively.faults.add("duplicate", share=0.5)
    lively.faults.add("reorder", share=0.5)
    wait_until(lambda: is_malformed(next_binary(link)))
    assert all(lively.faults.struck.get(kind) for kind in ("garbage",))
    row = lively.market.row_of[INFY]
    now_s = int(lively.now_ms() // 1000)
    lively.stop()
    minutes = lively.history.rows(
        INFY, "minute", now_s // 86_400 * 86_400 - 86_400, now_s + 60, lively.now_ms()
    )
    today = (now_s + 19_800) // 86_400
    volume = sum(row[5] for row in minutes if (row[0] + 19_800) // 86_400 == today)
    assert volume == lively.market.volume[row]


def is_malformed(frame: bytes) -> bool:
    parsed = parse_frame(frame, 0)
    return frame != HEARTBEAT and bool(parsed.unknown or parsed.truncated or parsed.trailing)


def test_the_documented_faults_equal_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "simulator.md"
    rows = [
        line.strip("| \n").split(" | ") for line in page.read_text().splitlines() if line.startswith("| `")
    ]
    expected = [[f"`{kind}`", ", ".join(sorted(sides)), text] for kind, (sides, text) in KINDS.items()]
    assert [row for row in expected if row not in rows] == [], "no such row in docs/simulator.md"
    assert rows == expected


def test_every_fault_kind_is_implemented() -> None:
    sources = "".join(
        path.read_text()
        for path in (Path(__file__).parents[2] / "pkbrokers_redis" / "simulator").glob("*.py")
    )
    assert [kind for kind in KINDS if sources.count(f'"{kind}"') < 2] == [], "only in the table"
