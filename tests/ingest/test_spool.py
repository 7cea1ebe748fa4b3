"""The spool on disk, and the inbox that fills memory first and the spool then."""

from __future__ import annotations

import resource
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkbrokers_redis.ingest.buffer import Inbox
from pkbrokers_redis.ingest.spool import RECORD_BYTES, Frame, Spool

PLENTY = 2**30
SIZE = 100  # of a test's frame
MEGABYTE = 2**20  # of one that a small disk has no room for; less would hit the test's own output


def frame(seq: int, source: str = "a") -> Frame:
    return Frame(source, seq, 1_700_000_000_000 + seq, bytes([seq % 256]) * SIZE)


def filled(root: Path, n: int, source: str = "a", segment_bytes: int = 500) -> Spool:
    spool = Spool(root, source, segment_bytes=segment_bytes)
    assert all(spool.append(frame(seq, source), PLENTY) for seq in range(1, n + 1))
    return spool


def died(spool: Spool) -> None:
    """The lock is gone, the files are as they were."""
    spool.close()


def emptied(spool: Spool, most: int = 7) -> list[Frame]:
    taken: list[Frame] = []
    while frames := spool.read(most):
        taken += frames
        spool.acknowledge(frames[-1].seq)
    return taken


def segments(root: Path) -> list[Path]:
    return sorted(root.rglob("*.spool"))


# -- the files -----------------------------------------------------------------------------------


def test_frames_come_back_in_their_order_and_the_disk_is_free_again(tmp_path: Path) -> None:
    spool = filled(tmp_path, 50)
    assert len(segments(tmp_path)) > 5
    assert spool.size_bytes == sum(path.stat().st_size for path in segments(tmp_path))
    assert emptied(spool) == [frame(seq) for seq in range(1, 51)]
    assert spool.size_bytes == 0
    assert segments(tmp_path) == []
    spool.close()
    assert not spool.folder.exists()


def test_what_is_not_acknowledged_is_read_again(tmp_path: Path) -> None:
    spool = filled(tmp_path, 5, segment_bytes=PLENTY)
    assert [each.seq for each in spool.read(3)] == [1, 2, 3]
    assert [each.seq for each in spool.read(3)] == [1, 2, 3]
    spool.acknowledge(2)
    assert [each.seq for each in spool.read(3)] == [3]
    spool.acknowledge(3)
    assert [each.seq for each in spool.read(3)] == [4, 5]


def test_frames_acknowledged_before_they_were_read_are_passed_over(tmp_path: Path) -> None:
    spool = filled(tmp_path, 10)
    spool.acknowledge(6)
    assert [each.seq for each in emptied(spool)] == [7, 8, 9, 10]


def test_appending_goes_on_while_it_is_read(tmp_path: Path) -> None:
    spool = filled(tmp_path, 3)
    taken = [each.seq for each in spool.read(2)]
    spool.acknowledge(2)
    assert spool.append(frame(4), PLENTY)
    assert taken + [each.seq for each in emptied(spool, most=1)] == [1, 2, 3, 4]
    assert spool.append(frame(5), PLENTY)
    assert [each.seq for each in emptied(spool)] == [5]


def test_a_successor_sends_what_a_dead_process_left_under_its_name_and_numbers(tmp_path: Path) -> None:
    died(filled(tmp_path, 20, source="host/1:α"))
    (spool,) = Spool.of_the_dead(tmp_path)
    assert spool.size_bytes > 0
    assert emptied(spool) == [frame(seq, "host/1:α") for seq in range(1, 21)]
    spool.close()
    assert Spool.of_the_dead(tmp_path) == []


def test_the_spool_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    living = filled(tmp_path, 3)
    assert Spool.of_the_dead(tmp_path) == []
    died(living)
    assert len(Spool.of_the_dead(tmp_path)) == 1


def test_two_successors_never_get_the_same_spool(tmp_path: Path) -> None:
    for source in "ab":
        died(filled(tmp_path, 3, source=source))
    first = Spool.of_the_dead(tmp_path)
    assert [each.source for each in first] == ["a", "b"]
    assert Spool.of_the_dead(tmp_path) == []


def test_a_successor_that_stops_halfway_leaves_the_rest_to_the_next(tmp_path: Path) -> None:
    died(filled(tmp_path, 30))
    (spool,) = Spool.of_the_dead(tmp_path)
    while (frames := spool.read(4))[-1].seq < 15:
        spool.acknowledge(frames[-1].seq)
    died(spool)
    (spool,) = Spool.of_the_dead(tmp_path)
    left = [each.seq for each in emptied(spool)]
    assert 1 < left[0] <= 15
    assert left == list(range(left[0], 31))


@given(cut=st.integers(0, 20 * (RECORD_BYTES + SIZE) + 11))
def test_a_file_cut_anywhere_gives_its_whole_frames(cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        died(filled(Path(folder), 20, segment_bytes=PLENTY))
        (path,) = segments(Path(folder))
        head = path.stat().st_size - 20 * (RECORD_BYTES + SIZE)
        with path.open("r+b") as file:
            file.truncate(cut)
        (spool,) = Spool.of_the_dead(Path(folder))
        whole = max(0, (cut - head) // (RECORD_BYTES + SIZE))
        assert emptied(spool) == [frame(seq) for seq in range(1, whole + 1)]
        spool.close()
        assert segments(Path(folder)) == []


@given(at=st.integers(0, 6 * (RECORD_BYTES + SIZE)), flip=st.integers(1, 255))
def test_a_damaged_byte_never_gives_a_false_frame_and_the_next_file_is_read(at: int, flip: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        died(filled(Path(folder), 12, segment_bytes=5 * (RECORD_BYTES + SIZE)))
        first, second = segments(Path(folder))[:2]
        damaged = bytearray(first.read_bytes())
        damaged[at % len(damaged)] ^= flip
        first.write_bytes(damaged)
        (spool,) = Spool.of_the_dead(Path(folder))
        found = emptied(spool)
        assert [each._replace(source="a") for each in found] == [frame(each.seq) for each in found]
        assert {each.seq for each in found} >= set(range(int(second.stem), 13))
        spool.close()


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], None]]:
    """`small_disk(n)`: no file grows beyond n bytes; a write that reaches it is cut short."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_inside_a_frame_leaves_no_half_of_it(
    tmp_path: Path, small_disk: Callable[[int], None]
) -> None:
    spool = Spool(tmp_path, "a")
    assert all(spool.append(Frame("a", seq, 0, bytes(MEGABYTE)), PLENTY) for seq in (1, 2, 3))
    small_disk(spool.size_bytes + MEGABYTE // 2)
    assert not spool.append(Frame("a", 4, 0, bytes(MEGABYTE)), PLENTY)
    assert spool.refusal
    small_disk(resource.RLIM_INFINITY)
    assert spool.append(frame(5), PLENTY)
    assert [each.seq for each in emptied(spool)] == [1, 2, 3, 5]


def test_a_folder_that_cannot_be_made_refuses_frames_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    spool = Spool(tmp_path / "file", "a")
    assert not spool.append(frame(1), PLENTY)
    assert "exists" in spool.refusal or "irectory" in spool.refusal
    spool.close()


# -- the inbox -----------------------------------------------------------------------------------


class Clock:
    """Seconds that pass when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def small_inbox(root: Path, clock: Clock, *, spool_bytes_max: int = PLENTY, frames_max: int = 4) -> Inbox:
    spool = Spool(root, "a", segment_bytes=600)
    return Inbox("a", spool, spool_bytes_max=spool_bytes_max, frames_max=frames_max, clock=clock)


def take(inbox: Inbox, most: int = 3) -> list[int]:
    """Everything that is there, acknowledged: the seqs."""
    taken: list[int] = []
    while frames := inbox.peek(most, 0.0):
        taken += [each.seq for each in frames]
        inbox.acknowledge(frames)
    return taken


def put(inbox: Inbox, n: int) -> None:
    for seq in range(inbox.seq + 1, inbox.seq + 1 + n):
        inbox.put(*reversed(frame(seq)[2:]))


def test_memory_holds_frames_until_redis_has_them(tmp_path: Path) -> None:
    inbox = small_inbox(tmp_path, Clock())
    put(inbox, 4)
    assert [each.seq for each in inbox.peek(2, 0.0)] == [1, 2]
    assert [each.seq for each in inbox.peek(2, 0.0)] == [1, 2]
    assert len(inbox) == 4
    assert take(inbox) == [1, 2, 3, 4]
    assert inbox.size_bytes == len(inbox) == 0
    assert not list(tmp_path.iterdir())


def test_a_full_inbox_goes_to_disk_when_redis_has_taken_nothing_for_a_second(tmp_path: Path) -> None:
    clock = Clock()
    inbox = small_inbox(tmp_path, clock)
    put(inbox, 4)
    clock.now = 1.0
    put(inbox, 6)
    assert len(inbox) == 0
    assert inbox.figures()["frames_spooled"] == 10
    assert take(inbox) == list(range(1, 11))
    assert inbox.spool_bytes == 0
    put(inbox, 2)
    assert len(inbox) == 2, "memory again"
    assert take(inbox) == [11, 12]


def test_frames_in_the_writers_hand_survive_the_move_to_disk(tmp_path: Path) -> None:
    clock = Clock()
    inbox = small_inbox(tmp_path, clock)
    put(inbox, 4)
    in_hand = inbox.peek(2, 0.0)
    clock.now = 1.0
    put(inbox, 1)
    inbox.acknowledge(in_hand)
    assert take(inbox) == [3, 4, 5]


def test_frames_go_to_disk_after_a_while_even_when_memory_has_room(tmp_path: Path) -> None:
    clock = Clock()
    inbox = small_inbox(tmp_path, clock, frames_max=1_000)
    put(inbox, 2)
    clock.now = 4.9
    put(inbox, 1)
    assert inbox.spool_bytes == 0
    clock.now = 5.0
    put(inbox, 1)
    assert inbox.figures()["frames_spooled"] == 4


def test_readers_wait_for_a_writer_that_is_merely_slow(tmp_path: Path) -> None:
    inbox = small_inbox(tmp_path, Clock())
    put(inbox, 4)
    reader = threading.Thread(target=put, args=(inbox, 20), daemon=True)
    reader.start()
    taken: list[int] = []
    while len(taken) < 24:
        frames = inbox.peek(2, 5.0)
        taken += [each.seq for each in frames]
        inbox.acknowledge(frames)
    reader.join(10)
    assert taken == list(range(1, 25))
    assert inbox.figures()["frames_spooled"] == 0


def test_beyond_the_quota_the_newest_frames_are_lost_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    inbox = small_inbox(tmp_path, clock, spool_bytes_max=10_000)
    put(inbox, 4)
    clock.now = 1.0
    for _ in range(200):
        inbox.put(bytes(SIZE), 0)
    kept = inbox.seq
    assert 10 < kept < 100
    assert inbox.frames_lost == 204 - kept
    assert inbox.spool_bytes <= 10_000
    told = capsys.readouterr().err
    assert told.count("frames_lost") == 1, "not a line a frame"
    assert "PKB_SPOOL_MAX_BYTES" in told
    assert take(inbox) == list(range(1, kept + 1))
    put(inbox, 3)
    assert take(inbox) == [kept + 1, kept + 2, kept + 3]


def test_without_any_room_on_disk_memory_keeps_the_oldest(tmp_path: Path) -> None:
    clock = Clock()
    inbox = small_inbox(tmp_path, clock, spool_bytes_max=0)
    put(inbox, 4)
    clock.now = 1.0
    for _ in range(5):
        inbox.put(b"newest", 0)
    assert (inbox.frames_lost, take(inbox)) == (5, [1, 2, 3, 4])


def test_a_disk_that_fails_halfway_through_memory_loses_and_doubles_none_of_it(
    tmp_path: Path, small_disk: Callable[[int], None]
) -> None:
    clock = Clock()
    inbox = Inbox("a", Spool(tmp_path, "a"), frames_max=4, clock=clock)
    for _ in range(4):
        inbox.put(bytes(MEGABYTE), 0)
    clock.now = 1.0
    small_disk(2 * MEGABYTE + MEGABYTE // 2)
    inbox.put(b"lost", 0)
    small_disk(resource.RLIM_INFINITY)
    assert (inbox.frames_lost, take(inbox)) == (1, [1, 2, 3, 4])


@pytest.mark.parametrize("spooling", [False, True])
def test_what_is_left_at_the_end_is_sent_by_the_next_process_first(tmp_path: Path, spooling: bool) -> None:
    clock = Clock()
    inbox = small_inbox(tmp_path, clock)
    put(inbox, 4)
    if spooling:
        clock.now = 1.0
        put(inbox, 5)
    total = inbox.seq
    assert inbox.finish() > 0

    spool = Spool(tmp_path, "b")
    after = Inbox("b", spool)
    after.inherit(Spool.of_the_dead(tmp_path))
    put(after, 2)
    sent: list[tuple[str, int]] = []
    while frames := after.peek(3, 0.0):
        assert len({each.source for each in frames}) == 1
        sent += [(each.source, each.seq) for each in frames]
        after.acknowledge(frames)
    assert sent == [("a", seq) for seq in range(1, total + 1)] + [("b", 1), ("b", 2)]
    assert after.finish() == 0
    assert segments(tmp_path) == []


def test_saving_at_a_stop_keeps_what_the_writer_may_still_send(tmp_path: Path) -> None:
    inbox = small_inbox(tmp_path, Clock())
    put(inbox, 4)
    in_hand = inbox.peek(2, 0.0)
    assert inbox.save() == 4
    inbox.acknowledge(in_hand)
    assert take(inbox) == [3, 4]
    assert inbox.finish() == 0


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.integers(1, 6)),
            st.tuples(st.just("take"), st.integers(1, 5)),
            st.tuples(st.just("peek"), st.integers(1, 5)),
            st.tuples(st.just("wait"), st.integers(1, 6)),
        ),
        max_size=40,
    ),
    spool_bytes_max=st.sampled_from([0, 5_000, PLENTY]),
)
def test_whatever_happens_frames_leave_in_order_and_none_is_lost_uncounted(
    steps: list[tuple[str, int]], spool_bytes_max: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock()
        inbox = small_inbox(Path(folder), clock, spool_bytes_max=spool_bytes_max)
        taken: list[int] = []
        offered = 0
        for what, n in steps:
            if what == "put":
                for _ in range(n):
                    offered += 1
                    clock.now += 1.0  # so that a reader never waits here: Redis has not moved for a second
                    inbox.put(bytes(SIZE), 0)
            elif what == "wait":
                clock.now += n
            else:
                frames = inbox.peek(n, 0.0)
                if what == "take":
                    taken += [each.seq for each in frames]
                    inbox.acknowledge(frames)
        taken += take(inbox)
        assert taken == list(range(1, len(taken) + 1))
        assert len(taken) + inbox.frames_lost == offered
        assert inbox.finish() == 0
