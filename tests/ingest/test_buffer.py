"""The frame buffer: memory first, then disk, in order; what a disk loses is counted and reported."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from pkbrokers_redis.ingest.buffer import (
    ROW_BYTES,
    SPOOL_RETRY_SECONDS,
    UNREADABLE_SECONDS_MAX,
    Frame,
    FrameBuffer,
    Spool,
)
from pkbrokers_redis.ingest.worker import Ingest
from pkbrokers_redis.ingest.writer import forward
from pkbrokers_redis.kite.protocol import encode_frame, encode_packet
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import connect

PLENTY = 2**30
SIZE = 100  # of a test's frame
ROW = SIZE + ROW_BYTES
MEGABYTE = 2**20  # of a frame that a small disk has no room for
AT_MS = 1_700_000_000_000  # the receive time of frame n is n ms later


class Clock:
    """Seconds that pass when the test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def frame(seq: int, source: str = "a") -> Frame:
    return Frame(source, seq, AT_MS + seq, bytes([seq % 256]) * SIZE)


def make_buffer(root: Path, clock: Clock | None = None, **options: Any) -> FrameBuffer:
    """A buffer of source `a` with room for 4 frames in memory."""
    source = options.pop("source", "a")
    return FrameBuffer(source, root, **{"frames_max": 4, "clock": clock or Clock(), **options})


def put(buffer: FrameBuffer, n: int) -> None:
    for seq in range(buffer.seq + 1, buffer.seq + 1 + n):
        buffer.put(*reversed(frame(seq)[2:]))


def take(buffer: FrameBuffer, most: int = 3) -> list[int]:
    """Acknowledge everything that is there; return the seqs."""
    taken: list[int] = []
    while frames := buffer.peek(most, 0.0):
        taken += [each.seq for each in frames]
        buffer.acknowledge(frames)
    return taken


def spool_files(root: Path) -> list[Path]:
    return sorted(root.rglob("frames.sqlite"))


def leave_spool(root: Path, n: int, source: str = "a") -> Path:
    """A process died with `n` frames on disk. Returns its file."""
    spool = Spool(root, source)
    spool.append([frame(seq, source) for seq in range(1, n + 1)])
    spool.close()
    return spool.path


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], None]]:
    """`small_disk(n)`: no file grows beyond n bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """No file can be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# -- memory ------------------------------------------------------------------------------------------------


def test_memory_holds_frames_until_redis_has_them(tmp_path: Path) -> None:
    buffer = make_buffer(tmp_path)
    put(buffer, 4)
    assert [each.seq for each in buffer.peek(2, 0.0)] == [1, 2]
    assert [each.seq for each in buffer.peek(2, 0.0)] == [1, 2]
    assert len(buffer) == 4 and buffer.oldest_ms == AT_MS + 1
    assert take(buffer) == [1, 2, 3, 4]
    assert buffer.size_bytes == len(buffer) == 0 and buffer.oldest_ms is None
    assert not list(tmp_path.iterdir())


def test_connections_wait_for_a_writer_that_is_merely_slow(tmp_path: Path) -> None:
    buffer = make_buffer(tmp_path)
    put(buffer, 4)
    connection = threading.Thread(target=put, args=(buffer, 20), daemon=True)
    connection.start()
    taken: list[int] = []
    while len(taken) < 24:
        frames = buffer.peek(2, 5.0)
        taken += [each.seq for each in frames]
        buffer.acknowledge(frames)
    connection.join(10)
    assert taken == list(range(1, 25))
    assert buffer.figures()["frames_spooled"] == 0


# -- disk --------------------------------------------------------------------------------------------------


def test_frames_go_to_disk_when_memory_fills_and_redis_has_taken_nothing_for_a_second(tmp_path: Path) -> None:
    clock = Clock()
    buffer = make_buffer(tmp_path, clock)
    put(buffer, 4)
    assert buffer.spill() == 0
    clock.now = 1.0
    assert buffer.spill() == 4
    put(buffer, 4)
    assert buffer.spill() == 4 and len(buffer) == 0
    assert buffer.figures()["frames_spooled"] == 8 and buffer.spool_bytes == 8 * ROW
    put(buffer, 1)
    assert take(buffer) == list(range(1, 10))
    assert buffer.spool_bytes == 0 and spool_files(tmp_path) == []
    put(buffer, 2)
    assert buffer.spill() == 0 and take(buffer) == [10, 11]
    assert buffer.finish() == 0 and [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_frames_go_to_disk_after_a_while_even_when_memory_has_room(tmp_path: Path) -> None:
    clock = Clock()
    buffer = make_buffer(tmp_path, clock, frames_max=1_000)
    put(buffer, 2)
    clock.now = 4.9
    put(buffer, 1)
    assert buffer.spill() == 0
    clock.now = 5.0
    assert buffer.spill() == 3
    put(buffer, 1)
    assert buffer.spill() == 1


def test_while_the_disk_is_drained_memory_that_fills_up_goes_behind_it(tmp_path: Path) -> None:
    clock = Clock()
    buffer = make_buffer(tmp_path, clock)
    put(buffer, 4)
    clock.now = 1.0
    buffer.spill()
    buffer.acknowledge(buffer.peek(1, 0.0))
    put(buffer, 2)
    assert buffer.spill() == 2
    assert take(buffer) == [2, 3, 4, 5, 6]


def test_frames_in_the_writers_hand_survive_the_move_to_disk(tmp_path: Path) -> None:
    clock = Clock()
    buffer = make_buffer(tmp_path, clock)
    put(buffer, 4)
    in_hand = buffer.peek(2, 0.0)
    clock.now = 1.0
    assert buffer.spill() == 4
    buffer.acknowledge(in_hand)
    put(buffer, 1)
    assert take(buffer) == [3, 4, 5]


def test_putting_a_frame_never_waits_for_the_disk(tmp_path: Path) -> None:
    clock = Clock()
    buffer = make_buffer(tmp_path, clock, frames_max=100)
    put(buffer, 1)
    clock.now = 10.0
    with buffer._disk:  # the disk hangs inside a write
        spooler = threading.Thread(target=buffer.spill, daemon=True)
        spooler.start()
        connection = threading.Thread(target=put, args=(buffer, 50), daemon=True)
        connection.start()
        connection.join(10)
        assert not connection.is_alive() and len(buffer) == 51
    spooler.join(10)


def test_beyond_the_quota_the_newest_frames_are_lost_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    buffer = make_buffer(tmp_path, clock, spool_bytes_max=10 * ROW)
    put(buffer, 4)
    clock.now = 1.0
    for n in range(4, 204):
        clock.now += SPOOL_RETRY_SECONDS / 100
        buffer.spill()
        assert buffer.put(bytes(SIZE), n) is (n < 14)
    assert buffer.seq == 14 and buffer.frames_lost == 190 and buffer.spool_bytes == 10 * ROW
    printed = capsys.readouterr().err
    assert printed.count("frames_lost") == 2, "a line every ten seconds, not one per frame"
    assert printed.count("spool_write_failed") == 1 and "PKB_SPOOL_MAX_BYTES" in printed
    assert take(buffer) == list(range(1, 15))
    put(buffer, 3)
    assert take(buffer) == [15, 16, 17]


def test_a_full_disk_loses_and_doubles_no_frame_that_was_kept(
    tmp_path: Path, small_disk: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    buffer = make_buffer(tmp_path, clock)
    for n in range(4):
        buffer.put(bytes(MEGABYTE), n)
    clock.now = 1.0
    small_disk(2 * MEGABYTE + MEGABYTE // 2)
    assert buffer.spill() == 0 and not buffer.put(b"lost", 9)
    small_disk(resource.RLIM_INFINITY)
    assert buffer.frames_lost == 1 and buffer.figures()["spool_errors"] == 1
    assert capsys.readouterr().err.count("spool_write_failed") == 1
    clock.now += SPOOL_RETRY_SECONDS
    assert buffer.spill() == 4, "the disk is tried again"
    assert take(buffer) == [1, 2, 3, 4]


def test_a_folder_that_cannot_be_made_keeps_frames_in_memory_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    clock = Clock()
    buffer = make_buffer(tmp_path / "file", clock)
    put(buffer, 4)
    clock.now = 1.0
    assert buffer.spill() == 0
    printed = capsys.readouterr().err
    assert "spool_write_failed" in printed and ("exists" in printed or "irectory" in printed)
    assert take(buffer) == [1, 2, 3, 4] and buffer.finish() == 0


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.integers(1, 6)),
            st.tuples(st.just("take"), st.integers(1, 5)),
            st.tuples(st.just("peek"), st.integers(1, 5)),
            st.tuples(st.just("wait"), st.integers(1, 12)),
        ),
        max_size=40,
    ),
    spool_bytes_max=st.sampled_from([0, 20 * ROW, PLENTY]),
)
def test_in_any_order_of_events_frames_leave_in_order_and_none_is_lost_uncounted(
    steps: list[tuple[str, int]], spool_bytes_max: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock()
        buffer = make_buffer(Path(folder), clock, spool_bytes_max=spool_bytes_max)
        taken: list[int] = []
        offered = 0
        for what, n in steps:
            if what == "put":
                for _ in range(n):
                    offered += 1
                    clock.now += 2.0  # so that nothing waits here: Redis has acknowledged nothing meanwhile
                    if not buffer.spill() and buffer._is_full(SIZE):
                        clock.now += SPOOL_RETRY_SECONDS
                        buffer.spill()
                    buffer.put(bytes(SIZE), 0)
            elif what == "wait":
                clock.now += n
                buffer.spill()
            else:
                frames = buffer.peek(n, 0.0)
                if what == "take":
                    taken += [each.seq for each in frames]
                    buffer.acknowledge(frames)
        taken += take(buffer)
        assert taken == list(range(1, len(taken) + 1))
        assert len(taken) + buffer.frames_lost == offered
        assert buffer.finish() == 0


# -- stop and restart --------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_spooling", [False, True])
def test_frames_left_at_the_end_are_sent_by_the_next_process_first(tmp_path: Path, is_spooling: bool) -> None:
    clock = Clock()
    buffer = make_buffer(tmp_path, clock, source="host/1:α")
    put(buffer, 4)
    if is_spooling:
        clock.now = 1.0
        buffer.spill()
        put(buffer, 3)
    total = buffer.seq
    assert buffer.finish() > 0
    assert not buffer.put(b"late", 0) and buffer.frames_lost == 1

    after = make_buffer(tmp_path, source="b")
    after.inherit(Spool.claim_abandoned(tmp_path))
    put(after, 2)
    sent: list[tuple[str, int]] = []
    while frames := after.peek(3, 0.0):
        assert len({each.source for each in frames}) == 1
        sent += [(each.source, each.seq) for each in frames]
        after.acknowledge(frames)
    assert sent == [("host/1:α", seq) for seq in range(1, total + 1)] + [("b", 1), ("b", 2)]
    assert after.finish() == 0
    assert spool_files(tmp_path) == [] and Spool.claim_abandoned(tmp_path) == []


def test_saving_at_a_stop_keeps_what_the_writer_may_still_send(tmp_path: Path) -> None:
    buffer = make_buffer(tmp_path)
    put(buffer, 4)
    in_hand = buffer.peek(2, 0.0)
    assert buffer.save() == 4
    buffer.acknowledge(in_hand)
    assert take(buffer) == [3, 4]
    assert buffer.finish() == 0


def test_frames_that_the_disk_refuses_at_a_stop_may_still_be_sent(tmp_path: Path) -> None:
    buffer = make_buffer(tmp_path, spool_bytes_max=2 * ROW)
    put(buffer, 4)
    in_hand = buffer.peek(3, 0.0)
    assert buffer.save() == 2 and buffer.frames_lost == 0
    put(buffer, 1)  # a connection that has not stopped yet
    buffer.acknowledge(in_hand)
    assert take(buffer) == [4, 5]
    assert buffer.finish() == 0 and buffer.frames_lost == 0


def test_frames_that_fit_nowhere_at_the_end_are_lost_and_counted(tmp_path: Path) -> None:
    buffer = make_buffer(tmp_path, spool_bytes_max=2 * ROW)
    put(buffer, 4)
    buffer.save()
    assert [each.seq for each in buffer.peek(4, 0.0)] == [1, 2]
    assert buffer.finish() > 0 and buffer.frames_lost == 2 and len(buffer) == 0


def test_a_stopped_writer_that_hangs_does_not_keep_frames_off_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pkbrokers_redis.ingest.buffer.SAVE_SECONDS", 0.01)
    buffer = make_buffer(tmp_path)
    put(buffer, 4)
    stop = threading.Event()
    stop.set()
    buffer.run(stop)
    assert len(buffer) == 0 and len(spool_files(tmp_path)) == 1


def test_only_the_spools_of_dead_processes_are_claimed_and_each_once(tmp_path: Path) -> None:
    living = Spool(tmp_path, "living")
    living.append([frame(1)])
    assert Spool.claim_abandoned(tmp_path) == []
    for source in "ab":
        leave_spool(tmp_path, 3, source)
    assert sorted(each.source for each in Spool.claim_abandoned(tmp_path)) == ["a", "b"]
    assert Spool.claim_abandoned(tmp_path) == []


def test_a_successor_that_stops_halfway_leaves_the_rest_to_the_next(tmp_path: Path) -> None:
    leave_spool(tmp_path, 30)
    buffer = make_buffer(tmp_path, source="b")
    buffer.inherit(Spool.claim_abandoned(tmp_path))
    while (frames := buffer.peek(4, 0.0))[-1].seq < 15:
        buffer.acknowledge(frames)
    assert buffer.finish() > 0
    (spool,) = Spool.claim_abandoned(tmp_path)
    assert [each.seq for each in spool.read(99)] == list(range(13, 31))


def test_a_spool_of_the_previous_release_is_named_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "a" / "00000000000000000001.spool"
    old.parent.mkdir()
    old.write_bytes(b"PKBSPL1\n")
    assert Spool.claim_abandoned(tmp_path) == []
    assert "spool_format_old" in capsys.readouterr().err and old.exists()


# -- a disk that fails -------------------------------------------------------------------------------------


def test_a_moment_without_descriptors_loses_no_frame_and_sends_nothing_newer(tmp_path: Path) -> None:
    leave_spool(tmp_path, 3)
    buffer = make_buffer(tmp_path, source="b")
    buffer.inherit(Spool.claim_abandoned(tmp_path))
    put(buffer, 1)
    with no_descriptors():
        assert (buffer.peek(9, 0.0), buffer.peek(9, 0.0)) == ([], [])
    assert [each.source for each in buffer.peek(9, 0.0)] == ["a"] * 3
    assert buffer.frames_lost == 0


def test_a_disk_that_keeps_failing_is_given_up_and_its_file_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = leave_spool(tmp_path, 3)
    path.unlink()
    path.mkdir()  # opening it is an error
    clock = Clock()
    buffer = make_buffer(tmp_path, clock, source="b")
    buffer.inherit(Spool.claim_abandoned(tmp_path))
    put(buffer, 1)
    assert buffer.peek(9, 0.0) == []
    clock.now = UNREADABLE_SECONDS_MAX - 1
    assert buffer.peek(9, 0.0) == []
    clock.now += 1
    assert [each.source for each in buffer.peek(9, 0.0)] == ["b"]
    assert buffer.frames_lost == 1 and (tmp_path / "a.damaged").is_dir()
    printed = capsys.readouterr().err
    assert printed.count("spool_unreadable") == printed.count("spool_damaged") == 1


def test_a_damaged_file_is_set_aside_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    buffer = make_buffer(tmp_path, clock)
    put(buffer, 4)
    clock.now = 1.0
    buffer.spill()
    buffer._spool._disconnect()
    buffer._spool.path.write_bytes(b"no database, whatever it was" * 100)
    put(buffer, 1)
    assert take(buffer) == [5]
    assert buffer.frames_lost == 4 and buffer.spool_bytes == 0
    assert capsys.readouterr().err.count("spool_damaged") == 1 and (tmp_path / "a.damaged").is_dir()
    put(buffer, 1)
    clock.now = 9.0
    assert buffer.spill() == 1, "a new file"
    assert take(buffer) == [6]


def test_a_row_that_is_not_what_was_written_costs_that_frame_and_its_span_is_known(tmp_path: Path) -> None:
    path = leave_spool(tmp_path, 10)
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE frames SET data = ? WHERE seq IN (5, 6)", (b"\x55" * SIZE,))
    buffer = make_buffer(tmp_path, source="b")
    buffer.inherit(Spool.claim_abandoned(tmp_path))
    assert take(buffer) == [1, 2, 3, 4, 7, 8, 9, 10]
    assert buffer.frames_lost == 2 and list(buffer.lost_spans) == [(AT_MS + 4, AT_MS + 7)]


@given(at=st.integers(0, 100_000), flip=st.integers(1, 255))
def test_a_damaged_byte_never_gives_a_false_frame(at: int, flip: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = leave_spool(Path(folder), 12)
        damaged = bytearray(path.read_bytes())
        damaged[at % len(damaged)] ^= flip
        path.write_bytes(damaged)
        buffer = make_buffer(Path(folder), source="b")
        buffer._unreadable_since = -UNREADABLE_SECONDS_MAX  # no minute of waiting
        buffer.inherit(Spool.claim_abandoned(Path(folder)))
        taken: list[Frame] = []
        while frames := buffer.peek(5, 0.0):
            taken += frames
            buffer.acknowledge(frames)
        assert taken == [frame(each.seq) for each in taken]
        buffer.finish()


@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
def test_frames_lost_in_a_damaged_spool_are_an_outage(settings: Settings, client: redis.Redis) -> None:
    opened = int(datetime.fromisoformat("2026-01-05 10:00:00+05:30").timestamp() * 1000)
    data = encode_frame([encode_packet("full", 408065, last_price=1500.0)])
    spool = Spool(settings.data_dir / "spool", "dead")
    spool.append([Frame("dead", n + 1, opened + 5_000 * n, data) for n in range(4)])
    spool.close()
    with contextlib.closing(sqlite3.connect(spool.path)) as db, db:
        db.execute("UPDATE frames SET crc = crc + 1 WHERE seq = 2")
    ingest = Ingest(
        lambda: connect(settings), settings, [(408065, "NSE:INFY")], now_ms=lambda: opened + 60_000.0
    )
    while forward(ingest.buffer, ingest.writer, threading.Event(), 0.0):
        pass
    ingest.outages.report()
    entries: Any = client.xrange(settings.keys.repairs(settings.keys.shard_of(408065)))
    ((_, fields),) = entries
    span = int(fields[b"from"]), int(fields[b"to"])
    assert (fields[b"kind"], json.loads(fields[b"tokens"]), span) == (
        b"gap", [408065], (opened, opened + 10_000),
    )  # fmt: skip
    ingest.buffer.finish()
