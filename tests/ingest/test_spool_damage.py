"""A spool on a disk that fails: what comes back is read again, what does not is counted, told and kept."""

from __future__ import annotations

import errno
import json
import os
import resource
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import redis

from pkbrokers_redis.ingest.buffer import Inbox
from pkbrokers_redis.ingest.spool import (
    RECORD_BYTES,
    UNREADABLE_SECONDS_MAX,
    Frame,
    Loss,
    Spool,
    head_of,
    read_record,
)
from pkbrokers_redis.ingest.worker import Ingest, forward
from pkbrokers_redis.kite.protocol import encode_frame, encode_packet
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import connect
from tests.ingest.test_spool import PLENTY, SIZE, Clock, died, emptied, filled, frame, segments

RECORD = RECORD_BYTES + SIZE
HEAD = len(head_of("a"))
AT = 1_700_000_000_000  # `frame` adds the seq


def damage(path: Path, record: int, at: int = RECORD_BYTES) -> None:
    """Flip a byte of a segment's record (from 0): of its data, unless `at` says otherwise."""
    data = bytearray(path.read_bytes())
    data[HEAD + record * RECORD + at] ^= 0x55
    path.write_bytes(data)


def fail_reads(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """The reads of these numbers (from 0) meet an error of the disk."""
    reads = iter(range(1_000))

    def failing(file: BinaryIO, source: str) -> Frame | None:
        if next(reads) in numbers:
            raise OSError(errno.EIO, "Input/output error")
        return read_record(file, source)

    monkeypatch.setattr("pkbrokers_redis.ingest.spool.read_record", failing)


def kept(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("*.damaged"))


# -- a disk that fails for a while -----------------------------------------------------------------


@pytest.fixture
def no_descriptors() -> Iterator[Callable[[], None]]:
    """From the call on no file can be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    yield lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_moment_without_descriptors_costs_no_frame(
    tmp_path: Path, no_descriptors: Callable[[], None]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spool = filled(tmp_path, 20)
    size = spool.size_bytes
    no_descriptors()
    assert (spool.read(5), spool.read(5)) == ([], [])
    assert spool.unreadable
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (spool.size_bytes, len(spool.losses)) == (size, 0)
    assert emptied(spool) == [frame(seq) for seq in range(1, 21)]
    assert not spool.unreadable and kept(tmp_path) == []


def test_an_error_inside_a_segment_gives_what_was_read_and_goes_on_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = filled(tmp_path, 10, segment_bytes=PLENTY)
    fail_reads(monkeypatch, 3, 4)
    assert [each.seq for each in spool.read(7)] == [1, 2, 3]
    spool.acknowledge(3)
    assert spool.read(7) == []
    assert spool.unreadable == "Input/output error"
    assert [each.seq for each in emptied(spool)] == list(range(4, 11))
    assert (list(spool.losses), kept(tmp_path)) == ([], [])


def test_nothing_newer_is_sent_while_the_disk_fails(tmp_path: Path) -> None:
    clock = Clock()
    inbox = Inbox("a", Spool(tmp_path, "a"), frames_max=2, clock=clock)
    for seq in (1, 2, 3):
        clock.now += 1.0
        inbox.put(bytes(SIZE), seq)
    (path,) = segments(tmp_path)
    path.rename(tmp_path / "away")
    assert inbox.peek(9, 0.0) == []
    inbox.put(bytes(SIZE), 4)
    assert inbox.peek(9, 0.0) == []
    assert inbox.spool_bytes == HEAD + 4 * RECORD
    (tmp_path / "away").rename(path)
    assert [each.seq for each in inbox.peek(9, 0.0)] == [1, 2, 3, 4]
    assert inbox.frames_lost == 0


def test_what_a_dead_process_left_goes_first_when_the_disk_gives_it_or_stays_for_the_next(
    tmp_path: Path,
) -> None:
    died(filled(tmp_path, 3, segment_bytes=PLENTY))
    (path,) = segments(tmp_path)
    path.rename(tmp_path / "away")
    path.mkdir()  # what opens it gets an error
    for put_back in (False, True):
        inbox = Inbox("b", Spool(tmp_path, "b"))
        inbox.inherit(Spool.of_the_dead(tmp_path))
        inbox.put(bytes(SIZE), 1)
        assert inbox.peek(9, 0.0) == []
        if put_back:
            path.rmdir()
            (tmp_path / "away").rename(path)
            assert [each.source for each in inbox.peek(9, 0.0)] == ["a"] * 3
        assert inbox.finish() > 0


def test_a_disk_that_goes_on_failing_is_given_up_and_its_file_kept(tmp_path: Path) -> None:
    clock = Clock()
    spool = Spool(tmp_path, "a", segment_bytes=HEAD + 5 * RECORD, clock=clock)
    assert all(spool.append(frame(seq), PLENTY) for seq in range(1, 11))
    first = segments(tmp_path)[0]
    first.unlink()
    first.mkdir()
    assert spool.read(9) == []
    clock.now = UNREADABLE_SECONDS_MAX - 1
    assert spool.read(9) == []
    clock.now += 1
    assert [each.seq for each in spool.read(9)] == [6, 7, 8, 9, 10]
    assert list(spool.losses) == [Loss(5, 0, AT + 6)]
    assert kept(tmp_path) == ["a-00000000000000000001.damaged"]


# -- damage ------------------------------------------------------------------------------------------


def test_a_damaged_record_costs_its_frame_and_the_file_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spool = filled(tmp_path, 10, segment_bytes=PLENTY)
    (path,) = segments(tmp_path)
    damage(path, 4)
    assert [each.seq for each in emptied(spool)] == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert list(spool.losses) == [Loss(1, AT + 4, AT + 6)]
    assert (segments(tmp_path), kept(tmp_path)) == ([], ["a-00000000000000000001.damaged"])
    told = capsys.readouterr().err
    assert told.count("spool_damaged") == 1 and "hint=" in told
    assert spool.size_bytes == 0
    spool.close()
    assert not spool.folder.exists()


def test_a_length_that_cannot_be_costs_the_rest_of_its_segment(tmp_path: Path) -> None:
    died(filled(tmp_path, 15, segment_bytes=HEAD + 5 * RECORD))
    damage(segments(tmp_path)[1], 2, at=0)
    (spool,) = Spool.of_the_dead(tmp_path)
    assert [each.seq for each in emptied(spool)] == [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 14, 15]
    assert list(spool.losses) == [Loss(3, AT + 7, AT + 11)]
    assert kept(tmp_path) == ["a-00000000000000000006.damaged"]


def test_damage_is_counted_once_though_it_is_read_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = filled(tmp_path, 10, segment_bytes=PLENTY)
    damage(segments(tmp_path)[0], 1)
    fail_reads(monkeypatch, 6)
    assert [each.seq for each in emptied(spool)] == [1, 3, 4, 5, 6, 7, 8, 9, 10]
    assert list(spool.losses) == [Loss(1, AT + 1, AT + 3)]


@pytest.mark.parametrize(
    ("inherited", "loss"), [(False, Loss(3, AT + 7, AT + 10)), (True, Loss(1, AT + 7, 0))]
)
def test_damage_up_to_the_end_reaches_to_what_was_written_last(
    tmp_path: Path, inherited: bool, loss: Loss
) -> None:
    spool = filled(tmp_path, 10, segment_bytes=PLENTY)
    damage(segments(tmp_path)[0], 7, at=0)
    if inherited:
        died(spool)
        (spool,) = Spool.of_the_dead(tmp_path)
    assert [each.seq for each in emptied(spool)] == [1, 2, 3, 4, 5, 6, 7]
    assert list(spool.losses) == [loss]
    assert len(kept(tmp_path)) == 1


def test_the_torn_end_that_a_kill_leaves_is_no_loss(tmp_path: Path) -> None:
    died(filled(tmp_path, 10, segment_bytes=PLENTY))
    (path,) = segments(tmp_path)
    os.truncate(path, path.stat().st_size - SIZE // 2)
    (spool,) = Spool.of_the_dead(tmp_path)
    assert [each.seq for each in emptied(spool)] == list(range(1, 10))
    assert (list(spool.losses), kept(tmp_path), segments(tmp_path)) == ([], [], [])


def test_frames_that_damage_has_cost_are_counted_and_their_span_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    died(filled(tmp_path, 10, segment_bytes=PLENTY))
    damage(segments(tmp_path)[0], 4)
    damage(segments(tmp_path)[0], 5)
    inbox = Inbox("b", Spool(tmp_path, "b"))
    told: list[tuple[int, int]] = []
    inbox.on_loss = lambda *span: told.append(span)
    inbox.inherit(Spool.of_the_dead(tmp_path))
    while frames := inbox.peek(3, 0.0):
        inbox.acknowledge(frames)
    assert (inbox.figures()["frames_lost"], told) == (2, [(AT + 4, AT + 7)])
    assert "the spool is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
def test_an_ingest_tells_the_outage_that_a_damaged_spool_is(settings: Settings, client: redis.Redis) -> None:
    opened = int(datetime.fromisoformat("2026-01-05 10:00:00+05:30").timestamp() * 1000)
    data = encode_frame([encode_packet("full", 408065, last_price=1500.0)])
    root = settings.data_dir / "spool"
    spool = Spool(root, "dead")
    for seq, seconds in enumerate((0, 5, 10, 15), start=1):
        assert spool.append(Frame("dead", seq, opened + seconds * 1000, data), PLENTY)
    died(spool)
    (path,) = segments(root)
    damaged = bytearray(path.read_bytes())
    damaged[len(head_of("dead")) + RECORD_BYTES + len(data) + RECORD_BYTES] ^= 0x55  # the second frame
    path.write_bytes(damaged)

    ingest = Ingest(
        lambda: connect(settings), settings, [(408065, "NSE:INFY")], now_ms=lambda: opened + 60_000.0
    )
    while forward(ingest.inbox, ingest.writer, lambda: opened + 60_000.0, threading.Event(), 0.0):
        pass
    ingest.outages.look()
    entries: Any = client.xrange(settings.keys.repairs(settings.keys.shard_of(408065)))
    ((_, fields),) = entries
    span = int(fields[b"from"]), int(fields[b"to"])
    assert (fields[b"kind"], json.loads(fields[b"tokens"]), span) == (
        b"gap", [408065], (opened, opened + 10_000),
    )  # fmt: skip
    ingest.inbox.finish()
