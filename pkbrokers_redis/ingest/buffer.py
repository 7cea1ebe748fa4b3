"""The inbox: numbered frames between the reader threads and the writer, in memory and then on disk.

    put → memory ──────────────────────────► peek … acknowledge
             └─► spool, while Redis is away ──┘

A frame leaves when Redis has it. Order is kept by one rule: as soon as one frame is in the spool, all are
(what memory held is written ahead of it), and memory is used again when the spool has been emptied. What a
dead process left in its spool goes before everything.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from pkbrokers_redis import logs
from pkbrokers_redis.ingest.spool import RECORD_BYTES, Frame, Spool

log = logs.get("ingest")

FRAMES_MAX = 20_000  # in memory, ~1 min at the open; then the spool if Redis is away, else the readers wait
BYTES_MAX = 256 * 2**20  # in memory, whichever comes first (PKB_BUFFER_MAX_BYTES)
STALLED_SECONDS = 1.0  # without an acknowledgement: Redis is away, and waiting for room would not help
SPOOL_AFTER_SECONDS = 5.0  # without one: to disk, full or not; what is only in memory dies with the process
TELL_EVERY_SECONDS = 10.0
SEGMENT_HEADS = 4096  # bytes to spare for them when memory is written to the spool


class Inbox:
    """Frames that Redis does not have yet, oldest first; bounded in memory and on disk.

    Any thread may `put`; one `peek`s and acknowledges. Where both bounds are reached and Redis is away, the
    newest frames are lost, counted in `frames_lost`, and logged. Without a spool `put` waits for room.
    """

    def __init__(
        self,
        source: str = "",
        spool: Spool | None = None,
        *,
        spool_bytes_max: int = 2**30,
        frames_max: int = FRAMES_MAX,
        bytes_max: int = BYTES_MAX,
        stalled_seconds: float = STALLED_SECONDS,
        spool_after_seconds: float = SPOOL_AFTER_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.source = source
        self.seq = 0
        self.frames_spooled = 0
        self.frames_lost = 0
        self.on_loss: Callable[[int, int], None] = lambda from_ms, to_ms: None  # a damaged spool's span
        self._frames: deque[Frame] = deque()
        self._frames_max = frames_max
        self._bytes_max = bytes_max
        self._bytes = 0
        self._spool = spool
        self._spool_bytes_max = spool_bytes_max
        self._spooling = False  # what is on disk is older than what is in memory, which is empty until `save`
        self._spill_again_at = 0.0
        self._inherited: deque[Spool] = deque()
        self._stalled_seconds = stalled_seconds
        self._spool_after_seconds = spool_after_seconds
        self._clock = clock
        self._moved_at = clock()  # when a frame was last acknowledged, or the first one came
        self._told_at = float("-inf")
        self._changed = threading.Condition()
        self._closed = False
        self._finished = False

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def size_bytes(self) -> int:
        """Of the frames in memory."""
        return self._bytes

    @property
    def oldest_ms(self) -> int | None:
        """When the oldest frame came that would die with us; None when there is none."""
        with self._changed:
            return self._frames[0].at_ms if self._frames else None

    @property
    def spool_bytes(self) -> int:
        """Of everything on disk that we have to send."""
        inherited = sum(spool.size_bytes for spool in tuple(self._inherited))
        return inherited + (self._spool.size_bytes if self._spool is not None else 0)

    def figures(self) -> dict[str, int]:
        """For a heartbeat."""
        return {
            "inbox_frames": len(self),
            "inbox_bytes": self._bytes,
            "spool_bytes": self.spool_bytes,
            "frames_spooled": self.frames_spooled,
            "frames_lost": self.frames_lost,
        }

    def inherit(self, spools: Iterable[Spool]) -> None:
        """Send what is in these spools first (`Spool.of_the_dead`)."""
        with self._changed:
            self._inherited.extend(spools)

    # -- the readers' side -----------------------------------------------------------------------

    def put(self, data: bytes, at_ms: int) -> bool:
        """Number a frame and keep it; wait for room while the writer is merely slow. False: it is lost."""
        with self._changed:
            while True:
                frame = Frame(self.source, self.seq + 1, at_ms, data)
                if self._spooling and not self._frames:
                    if self._append(frame):
                        return True
                    if self._closed or self._is_stalled():
                        return self._lose(1)
                elif self._spool is not None and self._must_spool(len(data)) and self._spill():
                    continue
                elif self._closed or not self._is_full(len(data)):
                    return self._remember(frame)
                elif self._spool is not None and self._is_stalled():
                    return self._lose(1)
                self._changed.wait(self._stalled_seconds if self._spool is not None else None)

    def _remember(self, frame: Frame) -> bool:
        if self._finished:
            return self._lose(1)
        if not self._frames:
            self._moved_at = max(self._moved_at, self._clock())
        self.seq = frame.seq
        self._frames.append(frame)
        self._bytes += len(frame.data)
        if len(self._frames) == 1:
            self._changed.notify_all()
        return True

    def _is_full(self, size: int) -> bool:
        """Whether a frame of that size must wait; an empty inbox takes any."""
        too_many = len(self._frames) >= self._frames_max or self._bytes + size > self._bytes_max
        return bool(self._frames) and too_many

    def _is_stalled(self) -> bool:
        return self._clock() - self._moved_at >= self._stalled_seconds

    def _must_spool(self, size: int) -> bool:
        if self._closed or not self._frames or self._clock() < self._spill_again_at:
            return False
        if self._is_full(size):
            return bool(self._inherited) or self._is_stalled()
        return self._clock() - self._moved_at >= self._spool_after_seconds

    def _append(self, frame: Frame) -> bool:
        assert self._spool is not None  # noqa: S101  _spooling says so
        room = self._spool_bytes_max - (self.spool_bytes - self._spool.size_bytes)
        if self._finished or not self._spool.append(frame, room):
            return False
        self.seq = max(self.seq, frame.seq)
        self.frames_spooled += 1
        return True

    def _spill(self) -> bool:
        """Memory → spool, all or nothing: what is newer must not be sent before what is older."""
        assert self._spool is not None  # noqa: S101  the callers asked
        self._spill_again_at = self._clock() + TELL_EVERY_SECONDS
        needed = self._bytes + len(self._frames) * RECORD_BYTES + SEGMENT_HEADS
        if self.spool_bytes + needed > self._spool_bytes_max:
            self._spool.refusal = "PKB_SPOOL_MAX_BYTES leaves no room for it"
            return False
        before = self.frames_spooled
        if not all(map(self._append, self._frames)):
            self.frames_spooled = before
            self._spool.discard()
            return False
        log.warning("spooling", frames=len(self._frames), folder=str(self._spool.folder))
        self._spooling = True
        self._forget_memory()
        self._spill_again_at = 0.0
        return True

    def _forget_memory(self) -> None:
        self._frames.clear()
        self._bytes = 0
        self._changed.notify_all()

    def _lose(self, frames: int) -> bool:
        self.frames_lost += frames
        now = self._clock()
        if now - self._told_at >= TELL_EVERY_SECONDS:
            self._told_at = now
            log.error(
                "frames_lost", so_far=self.frames_lost, why=self._spool.refusal if self._spool else "stopped",
                hint="bring Redis back, or raise PKB_SPOOL_MAX_BYTES",
            )  # fmt: skip
        return False

    # -- the writer's side -----------------------------------------------------------------------

    def peek(self, most: int, wait_seconds: float) -> list[Frame]:
        """Up to `most` of the oldest frames, of one source; none after waiting in vain.

        They stay ours until acknowledged: asked again, the same ones come first.
        """
        with self._changed:
            if not (self._frames or self._spooling or self._inherited or self._closed):
                self._changed.wait(wait_seconds)
            while self._inherited:
                if (frames := self._read(self._inherited[0], most, wait_seconds)) is not None:
                    return frames
                self._inherited.popleft().close()
            if self._spooling and self._spool is not None:
                if (frames := self._read(self._spool, most, wait_seconds)) is not None:
                    return frames
                self._spooling = False
                self._moved_at = self._clock()
                log.info("spool_drained", frames_spooled=self.frames_spooled)
            return list(islice(self._frames, most))

    def _read(self, spool: Spool, most: int, wait_seconds: float) -> list[Frame] | None:
        """Frames of a spool; none where its disk does not give them now; None at its end."""
        frames = spool.read(most)
        while spool.losses:
            loss = spool.losses.popleft()
            self.frames_lost += loss.frames
            log.error(
                "frames_lost", so_far=self.frames_lost, why="the spool is damaged", spool=str(spool.folder),
                hint="check the disk of PKB_SPOOL_DIR",
            )  # fmt: skip
            if loss.from_ms and loss.to_ms:
                self.on_loss(loss.from_ms, loss.to_ms)
        if spool.unreadable:  # and nothing that is newer may be sent before it
            self._changed.wait(wait_seconds)
            return []
        return frames or None

    def acknowledge(self, frames: Sequence[Frame]) -> None:
        """Redis has these, which `peek` gave."""
        if not frames:
            return
        last = frames[-1]
        with self._changed:
            self._moved_at = self._clock()
            if last.source != self.source:
                if self._inherited:
                    self._inherited[0].acknowledge(last.seq)
            else:
                if self._spooling and self._spool is not None:
                    self._spool.acknowledge(last.seq)
                while self._frames and self._frames[0].seq <= last.seq:
                    self._bytes -= len(self._frames.popleft().data)
            self._changed.notify_all()

    # -- the end ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Let nobody wait any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def save(self) -> int:
        """Put on disk what is only in memory, so that even a kill loses nothing. Returns frames saved.

        What does not fit, the newest, stays in memory: Redis may still take it.
        """
        with self._changed:
            self._closed = True
            saved = 0
            while self._spool is not None and self._frames and self._append(self._frames[0]):
                self._bytes -= len(self._frames.popleft().data)
                self._spooling = True
                saved += 1
            self._changed.notify_all()
            return saved

    def finish(self) -> int:
        """The end: nothing can be put or peeked any more. Returns the bytes that wait on disk.

        What does not fit there is lost, and counted.
        """
        with self._changed:
            self.save()
            self._finished = True
            if self._frames:
                self._lose(len(self))
                self._forget_memory()
            left = 0
            for spool in [*self._inherited, *([self._spool] if self._spool is not None else [])]:
                spool.read(1)  # deletes what Redis has
                left += spool.size_bytes
                spool.close()
            self._inherited.clear()
            return left
