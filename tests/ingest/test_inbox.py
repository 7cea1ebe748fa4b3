"""The inbox at its end: what the disk does not take, Redis may."""

from __future__ import annotations

from pathlib import Path

from tests.ingest.test_spool import SIZE, Clock, put, small_inbox, take

TWO = 2 * (SIZE + 60)  # bytes on disk: two frames and a segment's head, not three


def test_what_the_disk_refuses_at_a_stop_redis_may_still_take(tmp_path: Path) -> None:
    inbox = small_inbox(tmp_path, Clock(), spool_bytes_max=TWO)
    put(inbox, 4)
    in_hand = inbox.peek(3, 0.0)
    assert inbox.save() == 2 and inbox.frames_lost == 0
    put(inbox, 1)  # a reader that has not heard yet
    inbox.acknowledge(in_hand)
    assert take(inbox) == [4, 5]
    assert inbox.finish() == 0 and inbox.frames_lost == 0


def test_what_neither_took_is_lost_and_counted_at_the_end(tmp_path: Path) -> None:
    inbox = small_inbox(tmp_path, Clock(), spool_bytes_max=TWO)
    put(inbox, 4)
    inbox.save()
    assert [each.seq for each in inbox.peek(4, 0.0)] == [1, 2]
    assert inbox.finish() > 0 and inbox.frames_lost == 2 and len(inbox) == 0
