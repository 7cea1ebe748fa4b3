"""Ingest: frames become the stream entries and quotes of the contract, whatever the frames and Redis do."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pkbrokers_redis.errors import PkbError, SettingsError
from pkbrokers_redis.ingest.connections import Connections, FeedLiveness, FeedSession
from pkbrokers_redis.ingest.feeds import Feed
from pkbrokers_redis.ingest.worker import Ingest
from pkbrokers_redis.ingest.writer import FrameWriter
from pkbrokers_redis.kite.protocol import encode_frame, encode_packet
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.simulator.market import Market
from pkbrokers_redis.simulator.universe import universe
from pkbrokers_redis.simulator.websocket_server import SimulatorServer
from pkbrokers_redis.store import tick_writer
from pkbrokers_redis.store.connect import connect
from tests.support import running_server, wait_until

INFY, RELIANCE, NIFTY, USDINR = 408065, 738561, 256265, 1201 << 8 | 3
SYMBOLS = {INFY: "NSE:INFY", RELIANCE: "NSE:RELIANCE", NIFTY: "NSE:NIFTY 50", USDINR: "CDS:USDINR"}
AT_MS = 1_767_584_705_027  # 2026-01-05T09:15:05.027+05:30
TRADED = datetime(2026, 1, 5, 3, 45, 4, tzinfo=UTC)
OHLC = {"open": 1490.0, "high": 1510.0, "low": 1485.5, "close": 1480.0}
ValkeyOnly = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)


def full(token: int, price: float, volume: int, **fields: Any) -> bytes:
    return encode_packet(
        "full", token, last_price=price, last_traded_quantity=5, volume_traded=volume, ohlc=OHLC,
        last_trade_time=TRADED, exchange_timestamp=TRADED, **fields,
    )  # fmt: skip


def ltp(token: int, price: float = 100.0) -> bytes:
    return encode_packet("ltp", token, last_price=price)


class Desk:
    """A writer on a store, and what it left there."""

    def __init__(self, settings: Settings, client: redis.Redis, **options: Any) -> None:
        self.client, self.keys = client, settings.keys
        options = {"source": "desk", "only_known": True, **options}
        self.writer = FrameWriter(lambda: connect(settings), settings, SYMBOLS, **options)
        self.now_ms = AT_MS

    def write(self, *frames: bytes, at_ms: int = AT_MS, stop: threading.Event | None = None) -> bool:
        return self.writer.write(self.writer.parse_new([(each, at_ms) for each in frames]), self.now_ms, stop)

    def entries(self) -> list[dict[str, str]]:
        """All shards' entries, by seq."""
        found: list[dict[str, str]] = []
        for shard in range(self.keys.shards):
            for _, fields in self.client.xrange(self.keys.ticks(shard)):  # type: ignore[union-attr]
                found.append({name.decode(): value.decode() for name, value in fields.items()})
        return sorted(found, key=lambda each: int(each["seq"]))

    def rows(self) -> list[list[Any]]:
        return [row for entry in self.entries() for row in json.loads(entry["ticks"])]


@pytest.fixture
def desk(settings: Settings, client: redis.Redis) -> Desk:
    return Desk(settings, client)


# -- frames → entries --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("packet", "row"),
    [
        (full(INFY, 1500.05, 123, oi=7), f"[{INFY},1500.05,5,123,7,1490,1510,1485.5,1767584704000]"),
        (
            encode_packet(
                "quote", INFY, last_price=1500.05, last_traded_quantity=5, volume_traded=123, ohlc=OHLC
            ),
            f"[{INFY},1500.05,5,123,null,1490,1510,1485.5,{AT_MS}]",
        ),
        (ltp(INFY, 1500.05), f"[{INFY},1500.05,null,null,null,null,null,null,{AT_MS}]"),
        (
            encode_packet("full", NIFTY, last_price=24_050.5, ohlc=OHLC, exchange_timestamp=TRADED),
            f"[{NIFTY},24050.5,null,null,null,1490,1510,1485.5,1767584704000]",
        ),
        (
            encode_packet("quote", NIFTY, last_price=24_050.5, ohlc=OHLC),
            f"[{NIFTY},24050.5,null,null,null,1490,1510,1485.5,{AT_MS}]",
        ),
        (ltp(USDINR, 85.1234567), f"[{USDINR},85.1234567,null,null,null,null,null,null,{AT_MS}]"),
        (full(INFY, 1500.05, 0)[:44].ljust(184, b"\0"), None),
    ],
    ids=["full", "quote", "ltp", "index full", "index quote", "currency", "no times"],
)
def test_a_packet_of_every_mode_becomes_its_tick_row(desk: Desk, packet: bytes, row: str | None) -> None:
    assert desk.write(encode_frame([packet]))
    row = row or f"[{INFY},1500.05,5,0,0,1490,1510,1485.5,{AT_MS}]"
    assert desk.entries() == [{"src": "desk", "seq": "1", "at": str(AT_MS), "n": "1", "ticks": f"[{row}]"}]


def test_a_frame_is_an_entry_a_shard_with_one_number(desk: Desk) -> None:
    desk.write(encode_frame([ltp(INFY), ltp(RELIANCE), ltp(INFY, 101.0)]), encode_frame([ltp(INFY, 102.0)]))
    assert [(each["seq"], each["n"]) for each in desk.entries()] in (
        [("1", "2"), ("1", "1"), ("2", "1")], [("1", "1"), ("1", "2"), ("2", "1")],
    )  # fmt: skip
    prices = [row[1] for row in desk.rows() if row[0] == INFY]
    assert prices == [100, 101, 102]
    assert desk.writer.counts["entries"] == 3 and desk.writer.counts["ticks"] == 4


def test_quotes_are_written_beside_the_ticks(desk: Desk) -> None:
    desk.write(encode_frame([full(INFY, 1500.05, 123), ltp(NIFTY)]))
    quote: Any = desk.client.hgetall(desk.keys.quote(INFY))
    assert quote[b"symbol"] == b"NSE:INFY" and quote[b"volume"] == b"123" and quote[b"mode"] == b"full"
    assert desk.client.hget(desk.keys.quote(NIFTY), "last_price") == b"100.0"


# -- hostile frames ----------------------------------------------------------------------------------

PACKETS = [full(INFY, 100.0, 1), full(RELIANCE, 200.0, 2)]
WHOLE = encode_frame(PACKETS)


@pytest.mark.parametrize(
    ("frame", "ticks", "counted"),
    [
        (b"", 0, "truncated_frames"),
        (b"\x00", 0, None),  # a heartbeat
        (b"\xff\xff", 0, "truncated_frames"),
        (WHOLE[:-1], 1, "truncated_frames"),
        (WHOLE[:100], 0, "truncated_frames"),
        (WHOLE + b"more", 2, "trailing_bytes"),
        (b"\x00\x00garbage", 0, "trailing_bytes"),
        (encode_frame([PACKETS[0], b"x" * 17, PACKETS[1]]), 2, "unknown_packets"),
        (encode_frame([b"x" * 164, PACKETS[1]]), 1, "unknown_packets"),
        (struct.pack(">HH", 1, 65_535) + b"x" * 65_535, 0, "unknown_packets"),
        (encode_frame([ltp(12345 << 8 | 1), ltp(0xFFFFFFFF), PACKETS[0]]), 1, "unknown_tokens"),
        (encode_frame([struct.pack(">Ii", 0, 1)]), 0, "unknown_tokens"),
    ],
)
def test_a_hostile_frame_is_counted_told_once_and_gives_what_can_be_saved(
    desk: Desk, frame: bytes, ticks: int, counted: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        assert desk.write(frame, encode_frame([ltp(NIFTY)]))
    assert desk.writer.counts["ticks"] == 3 * ticks + 3 == len(desk.rows())
    assert desk.writer.counts["frames"] == 6
    lines = [line for line in capsys.readouterr().err.splitlines() if "level=warning" in line]
    if counted is None:
        assert lines == []
    else:
        assert desk.writer.counts[counted] >= 3
        assert len(lines) == 1 and len(lines[0]) < 500
    known = {desk.keys.quote(token) for token in SYMBOLS}
    assert {key.decode() for key in desk.client.scan_iter("pkb:*:quote:*")} <= known


@ValkeyOnly
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=600), st.booleans())
def test_no_bytes_break_the_writer(desk: Desk, data: bytes, after_a_good_head: bool) -> None:
    frame = WHOLE[: 2 + 2 + 184] + data if after_a_good_head else data
    assert desk.write(frame, WHOLE)
    assert all(row[0] in SYMBOLS for row in desk.rows()[-2:])


def test_prices_of_0_and_unset_times_go_through_as_kite_sent_them(desk: Desk) -> None:
    """The rules refuse them, and count them; the stream holds what came."""
    desk.write(encode_frame([encode_packet("full", INFY, last_price=0)]))
    assert desk.rows() == [[INFY, 0, 0, 0, 0, None, None, None, AT_MS]]


def test_an_instrument_that_comes_later_is_no_stranger_then(desk: Desk) -> None:
    late = 12345 << 8 | 1
    desk.write(encode_frame([ltp(late)]))
    assert desk.rows() == []
    desk.writer.add_symbols({late: "NSE:LATE"})
    desk.write(encode_frame([ltp(late), ltp(INFY)]))
    assert [row[0] for row in desk.rows()] in ([late, INFY], [INFY, late])
    assert desk.client.hget(desk.keys.quote(late), "symbol") == b"NSE:LATE"


def test_a_replays_writer_takes_every_token(settings: Settings, client: redis.Redis) -> None:
    desk = Desk(settings, client, only_known=False)
    desk.write(encode_frame([ltp(12345 << 8 | 1)]))
    assert desk.rows()[0][0] == 12345 << 8 | 1
    assert client.hget(settings.keys.quote(12345 << 8 | 1), "symbol") == str(12345 << 8 | 1).encode()


# -- a Redis that will not ---------------------------------------------------------------------------


def client_entries(desk: Desk, token: int) -> list[Any]:
    return desk.client.xrange(desk.keys.ticks(desk.keys.shard_of(token)))  # type: ignore[return-value]


def test_a_wrong_typed_quote_and_stream_refuse_alone_and_are_named(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = desk.keys.ticks(desk.keys.shard_of(RELIANCE))
    desk.client.set(desk.keys.quote(INFY), "mine")
    desk.client.set(stream, "mine")
    for n in range(3):
        desk.now_ms += 1_000
        assert desk.write(
            encode_frame([ltp(INFY), ltp(RELIANCE)]), encode_frame([ltp(INFY), ltp(RELIANCE, 7.0 + n)])
        )
    assert len(client_entries(desk, INFY)) == 6
    assert desk.client.hget(desk.keys.quote(RELIANCE), "last_price") == b"9.0"
    assert desk.client.get(desk.keys.quote(INFY)) == desk.client.get(stream) == b"mine"
    assert desk.writer.counts["refused_writes"] == 3 + 6
    lines = [line for line in capsys.readouterr().err.splitlines() if "write_refused" in line]
    assert len(lines) == 2 and all(
        any(key in line for line in lines) for key in (desk.keys.quote(INFY), stream)
    )


def frames(count: int, first: int = 0) -> list[bytes]:
    return [
        encode_frame([full(INFY, 100.0, n), full(RELIANCE, 200.0, n)]) for n in range(first, first + count)
    ]


@contextlib.contextmanager
def writing(desk: Desk, todo: list[bytes], a_round: int = 7) -> Iterator[threading.Event]:
    """Writes the frames in rounds in a thread; the event is set when Redis has them all."""
    stop, done = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            for n in range(0, len(todo), a_round):
                desk.now_ms += 1_000
                if not desk.write(*todo[n : n + a_round], stop=stop):
                    return
            done.set()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join(20)
    assert not thread.is_alive() and not failures, failures


def volumes(desk: Desk, token: int) -> list[int]:
    """In the order of the stream, without the repeats an aggregator would skip."""
    seen, last = [], 0
    for _, fields in desk.client.xrange(desk.keys.ticks(desk.keys.shard_of(token))):  # type: ignore[union-attr]
        if int(fields[b"seq"]) > last:
            last = int(fields[b"seq"])
            seen += [row[3] for row in json.loads(fields[b"ticks"]) if row[0] == token]
    return seen


def test_a_full_redis_is_waited_for_and_then_has_every_frame_in_order(desk: Desk) -> None:
    desk.write(*frames(1))
    desk.client.config_set("maxmemory", "1")
    try:
        with writing(desk, frames(300, 1)) as done:
            wait_until(lambda: desk.writer.counts["resent_batches"] >= 2, what="it to be refused twice")
            assert not done.is_set()
            desk.client.config_set("maxmemory", "0")
            wait_until(done.is_set, what="all frames")
    finally:
        desk.client.config_set("maxmemory", "0")
    for token in (INFY, RELIANCE):
        assert volumes(desk, token) == list(range(301))
    assert desk.client.hget(desk.keys.quote(INFY), "volume") is not None


@ValkeyOnly
def test_memory_that_runs_out_again_and_again_loses_no_frame_between_others(
    make_settings: Callable[..., Settings], client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit flickers while half a megabyte is read: what is refused must not be overtaken."""
    monkeypatch.setattr(tick_writer, "RETRY_SECONDS_MAX", 0.001)
    monkeypatch.setattr(tick_writer, "RETRY_SECONDS_MIN", 0.001)
    desk = Desk(make_settings(shards=1), client, only_known=False)
    crowd = [n << 8 | 1 for n in range(1, 151)]
    big = [encode_frame([full(INFY, 100.0, n), *(ltp(token) for token in crowd)]) for n in range(500)]
    rng = random.Random(1)
    with writing(desk, big, a_round=64) as done:
        while not done.is_set():
            client.config_set("maxmemory", rng.choice(["0", "0", "1"]))
        client.config_set("maxmemory", "0")
    assert desk.writer.counts["resent_batches"] > 0
    assert volumes(desk, INFY) == list(range(500))


@ValkeyOnly
def test_a_redis_that_is_killed_and_comes_back_has_every_frame_in_order(
    tmp_path: Path, make_settings: Callable[..., Settings], server_kind: str
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    options = ("--port", str(port), "--appendonly", "yes")
    settings = make_settings(redis_url=f"redis://127.0.0.1:{port}/0")
    with redis.Redis(port=port) as client, contextlib.ExitStack() as life:
        life.enter_context(running_server(tmp_path / "aof", *options, kind=server_kind))
        desk = Desk(settings, client)
        with writing(desk, frames(2_000), a_round=2) as done:
            wait_until(lambda: desk.writer.counts["frames"] > 50, what="some frames")
            life.close()  # kill -9
            wait_until(lambda: desk.writer.counts["resent_batches"] >= 1, what="it to notice")
            assert not done.is_set()
            life.enter_context(running_server(tmp_path / "aof", *options, kind=server_kind))
            wait_until(done.is_set, timeout_seconds=30, what="all frames")
        for token in (INFY, RELIANCE):
            assert volumes(desk, token) == list(range(2_000))
        seqs: dict[tuple[str, str], set[str]] = {}
        for each in desk.entries():  # a repeat says the same under the same number
            seqs.setdefault((each["seq"], each["ticks"].partition(",")[0]), set()).add(each["ticks"])
        assert all(len(texts) == 1 for texts in seqs.values())
        desk.now_ms += 10_000
        desk.write()
        assert client.hget(settings.keys.quote(INFY), "volume") == b"1999"


def test_told_to_stop_while_redis_is_away_it_says_that_it_has_not_written(
    make_settings: Callable[..., Settings], client: redis.Redis
) -> None:
    desk = Desk(make_settings(redis_url="redis://127.0.0.1:1/0"), client)
    stop = threading.Event()
    stop.set()
    assert desk.write(*frames(1), stop=stop) is False


def test_a_store_that_can_never_take_it_is_an_error_of_one_line(
    client: redis.Redis, server: Any, make_settings: Callable[..., Settings]
) -> None:
    client.execute_command(
        "ACL", "SETUSER", "reader", "on", ">pw", "~*", "+@read", "+info", "+function", "+@connection"
    )
    try:
        with redis.Redis.from_url(server.url) as probe:
            path = probe.connection_pool.connection_kwargs["path"]
        desk = Desk(make_settings(redis_url=f"unix://reader:pw@{path}"), client)
        with pytest.raises(PkbError, match="denies this user") as error:
            desk.write(*frames(1))
        assert "pw" not in str(error.value).replace("denies this user", "") and "\n" not in str(error.value)
    finally:
        client.execute_command("ACL", "DELUSER", "reader")


def test_the_hard_cap_is_counted_and_shown(
    make_settings: Callable[..., Settings], client: redis.Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    desk = Desk(make_settings(stream_max_entries=200, shards=1), client)
    for n in range(20):
        desk.now_ms += 1_000
        desk.write(*frames(50, 50 * n))
    kept = client.xlen(desk.keys.ticks(0))
    assert 200 <= kept <= 300  # whole nodes
    assert desk.writer.counts["dropped_at_cap"] == 1_000 - kept
    assert "event=stream_full" in capsys.readouterr().err
    assert volumes(desk, INFY)[-1] == 999


# -- the whole of it ---------------------------------------------------------------------------------


def test_more_instruments_than_a_key_may_stream_is_an_error_that_counts_the_keys(settings: Settings) -> None:
    instruments = [(n << 8 | 1, f"NSE:S{n}") for n in range(1, 20_002)]
    with pytest.raises(SettingsError, match=r"20,001 instruments .* \(9,000\)") as error:
        Ingest(lambda: connect(settings), settings, instruments, now_ms=lambda: 0.0)
    assert "3 api keys" in error.value.hint


@ValkeyOnly
def test_frames_of_a_socket_are_in_the_streams_when_it_stops(
    make_settings: Callable[..., Settings], client: redis.Redis
) -> None:
    kite = SimulatorServer(None)
    kite.start()
    try:
        settings = make_settings(kite_ws_url=kite.url, lease_seconds=0.5)
        ingest = Ingest(
            lambda: connect(settings),
            settings,
            list(SYMBOLS.items()),
            now_ms=lambda: time.time() * 1000,
            source="one",
        )
        stop = threading.Event()
        thread = threading.Thread(target=ingest.run, args=(stop,), daemon=True)
        thread.start()
        wait_until(
            lambda: kite.clients == 1 and ingest.connections.figures()["connected"] == 1, what="a connection"
        )
        for frame in frames(200):
            kite.publish(frame)
        kite.publish('{"type": "error", "data": "no such thing"}')
        kite.publish(b"\xff" * 100)
        kite.publish("not json")
        wait_until(lambda: ingest.writer.counts["frames"] >= 201, what="the frames")
        kite.publish(frames(1, 200)[0])
        wait_until(lambda: ingest.writer.counts["frames"] >= 202, what="a frame after the hostile ones")
        stop.set()
        thread.join(20)
        assert not thread.is_alive()
    finally:
        kite.stop()
    desk = Desk(settings, client)
    assert volumes(desk, INFY) == list(range(201))
    assert client.hget(settings.keys.quote(INFY), "volume") is not None


class Listed:
    """An instrument list that can change."""

    unknown: tuple[str, ...] = ()

    def __init__(self, *tokens: int) -> None:
        self.tokens, self.names = tokens, dict(SYMBOLS)

    def version(self, client: redis.Redis) -> str:
        return str((self.tokens, self.names))

    def read(self, client: redis.Redis) -> list[tuple[int, str]]:
        return [(token, self.names[token]) for token in self.tokens]


@contextlib.contextmanager
def ingesting(settings: Settings, listed: Listed, client: redis.Redis) -> Iterator[Ingest]:
    ingest = Ingest(
        lambda: connect(settings),
        settings,
        listed.read(client),
        now_ms=lambda: time.time() * 1000,
        list_source=listed,
    )
    stop = threading.Event()
    thread = threading.Thread(target=ingest.run, args=(stop,), daemon=True)
    thread.start()
    try:
        yield ingest
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


@ValkeyOnly
def test_instruments_come_and_go_on_a_running_connection_and_candles_stay(
    make_settings: Callable[..., Settings], client: redis.Redis
) -> None:
    market = Market([row for row in universe(20) if row["instrument_token"] in SYMBOLS], 0, rate=50)
    kite = SimulatorServer(market)
    kite.start()
    settings = make_settings(kite_ws_url=kite.url, lease_seconds=0.5)
    listed = Listed(INFY, NIFTY)
    try:
        with ingesting(settings, listed, client) as ingest:
            wait_until(lambda: kite.subscriptions == 2 and client.exists(settings.keys.quote(INFY)))
            listed.tokens = (INFY, RELIANCE)
            wait_until(lambda: client.exists(settings.keys.quote(RELIANCE)), what="the one that came")
            wait_until(lambda: kite.subscriptions == 2, what="the other to go")
            assert kite.stats.connections == 1
            assert [feed.tokens for feed in ingest.feeds] == [(INFY, RELIANCE)]
            figures = ingest.figures()
            assert figures["list"] == ingest.assignments.own_id and figures["instruments"] == 2
            assert figures["unknown_tokens"] == 0
            assert client.hget(settings.keys.quote(RELIANCE), "symbol") == b"NSE:RELIANCE"
            listed.names[INFY] = "NSE:INFOSYS"  # a newer master, the same instruments
            wait_until(lambda: client.hget(settings.keys.quote(INFY), "symbol") == b"NSE:INFOSYS")
        assert client.exists(settings.keys.quote(NIFTY))
        assert client.hexists(settings.keys.feed_progress(), "0")
    finally:
        kite.stop()


@ValkeyOnly
def test_frames_that_find_no_room_are_an_outage_of_their_feed(settings: Settings) -> None:
    has_room = threading.Event()
    kept: list[bytes] = []

    def put(frame: bytes, at_ms: int) -> bool:
        if has_room.is_set():
            kept.append(frame)
        return has_room.is_set()

    buffer: Any = SimpleNamespace(put=put)
    clock = iter(range(0, 10_000_000, 1_000))
    kite = SimulatorServer(None, heartbeat_seconds=100)
    kite.start()
    local = settings.model_copy(update={"kite_ws_url": kite.url})
    failures: list[BaseException] = []
    connections = Connections(
        [FeedSession(local, lambda: connect(settings))],
        "full",
        buffer,
        now_ms=lambda: float(next(clock)),
        on_failure=failures.append,
    )
    liveness = FeedLiveness()
    try:
        connections.open(Feed(0, 0, (INFY,)), liveness)
        wait_until(lambda: connections.figures()["connected"] == 1 and kite.clients == 1)
        has_room.set()
        kite.publish(frames(1)[0])
        wait_until(lambda: len(kept) == 1)
        received_to_ms = liveness.received_to_ms
        has_room.clear()
        for frame in frames(5):
            kite.publish(frame)
        wait_until(lambda: connections.figures()["socket_frames"] == 6)
        has_room.set()
        kite.publish(frames(1)[0])
        wait_until(lambda: liveness.first_outage is not None)
        assert liveness.first_outage is not None and liveness.first_outage.from_ms == received_to_ms
        assert liveness.first_outage.to_ms == liveness.ticked_ms
    finally:
        connections.close([0])
        kite.stop()
    assert not failures
