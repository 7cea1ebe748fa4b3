"""Frames between the connections and the writer: in memory, and in SQLite while Redis is unavailable.

    put ──► memory ─────────────────────────► peek … acknowledge
              └─► SQLite, oldest frames first ──┘

Frames leave in the order of `seq`: the disk always holds older frames than memory and is read first, and the
spools of processes that died come before both. A frame leaves when Redis has it.

    <PKB_SPOOL_DIR>/<source>/lock             held (flock) for as long as the process lives
    <PKB_SPOOL_DIR>/<source>/frames.sqlite    frames(seq, at_ms, crc, data); deleted when Redis has all of it
    <PKB_SPOOL_DIR>/<source>.damaged          set aside because SQLite cannot read it

What is on disk survives the process. After a power cut the newest seconds may be missing. A successor reads a
spool from its start: entries that Redis has already are repeats, which the aggregator skips by their `seq`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sqlite3
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from pkbrokers_redis import logs
from pkbrokers_redis.settings import Settings

log = logs.get("ingest")

FRAMES_MAX = 20_000  # in memory, ~1 minute at the market's open
BYTES_MAX = 256 * 2**20  # in memory, whichever comes first (PKB_BUFFER_MAX_BYTES)
STALLED_SECONDS = 1.0  # without an acknowledgement Redis counts as unavailable
SPOOL_AFTER_SECONDS = 5.0  # then frames go to disk, full or not: memory dies with the process
SPOOL_CHECK_SECONDS = 0.1
SPOOL_RETRY_SECONDS = 10.0  # after a disk refused, and between two log lines about lost frames
TRANSACTION_BYTES_MAX = 8 * 2**20  # of frames written, or read, at once
DELETE_EVERY = 512  # acknowledged frames between two deletes
ROW_BYTES = 40  # what SQLite needs for a row next to its frame, roughly
UNREADABLE_SECONDS_MAX = 60.0  # a disk that gives nothing for so long counts as damaged
SAVE_SECONDS = 3.0  # after a stop, before memory goes to disk whatever the writer waits for


class Frame(NamedTuple):
    """One websocket frame as received: `seq` counts a source's frames from 1, `at_ms` is epoch ms."""

    source: str
    seq: int
    at_ms: int
    data: bytes


class Spool:
    """The frames of one source on disk. One thread at a time; every method may raise OSError,
    sqlite3.Error."""

    def __init__(self, root: Path, source: str) -> None:
        self.source = source
        self.folder = root / quote(source, safe="")
        self.path = self.folder / "frames.sqlite"
        self.size_bytes = 0
        self.acked = self.last = self._deleted = 0  # seqs: Redis has, newest on disk, deleted up to
        self.last_ms = 0  # at_ms of the newest frame on disk, 0 if unknown
        self.is_used = False  # from the first frame on disk until `read` has come to the end
        self.losses: list[tuple[int, int, int]] = []  # frames, received from and to (ms; 0: unknown)
        self._read_to = (0, 0)  # seq and at_ms of the newest frame that was read whole
        self._malformed = 0  # rows behind it that are not what was written
        self._root = root
        self._lock: int | None = None
        self._db: sqlite3.Connection | None = None

    def append(self, frames: Sequence[Frame]) -> None:
        """Write frames that are newer than all before: all of them or none."""
        if self._lock is None:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(self._root):  # so that no successor claims a folder without its lock
                self.folder.mkdir(mode=0o700, exist_ok=True)
                self._lock = _lock_folder(self.folder)
        db = self._open()
        rows = [(each.seq, each.at_ms, _crc(each.seq, each.at_ms, each.data), each.data) for each in frames]
        try:
            with db:
                db.executemany("INSERT INTO frames VALUES (?, ?, ?, ?)", rows)
        except sqlite3.Error:
            self._disconnect()
            raise
        self.last, self.last_ms, self.is_used = rows[-1][0], rows[-1][1], True
        self.size_bytes += sum(len(each.data) + ROW_BYTES for each in frames)

    def read(self, most: int) -> list[Frame]:
        """Return the oldest unacknowledged frames; [] at the end, where the file is deleted."""
        db = self._open()
        if self.acked - self._deleted >= DELETE_EVERY:
            with contextlib.suppress(sqlite3.Error):  # a full disk: reading is what makes room in the end
                self._delete_acked(db)
        frames: list[Frame] = []
        size = 0
        query = "SELECT seq, at_ms, crc, data FROM frames WHERE seq > ? ORDER BY seq"
        for seq, at_ms, crc, data in db.execute(query, (self.acked,)):
            if len(frames) >= most or size >= TRANSACTION_BYTES_MAX:
                break
            if _crc(seq, at_ms, data) == crc:
                self._note_good(seq, at_ms)
                frames.append(Frame(self.source, seq, at_ms, data))
                size += len(data)
            elif seq > self._read_to[0]:
                self._malformed += 1
                self._read_to = (seq, self._read_to[1])
        if not frames:
            self._malformed += max(0, self.last - max(self.acked, self._read_to[0]))  # a file that shrank
            self._note_good(self.last, self.last_ms)
            self._disconnect()
            self.acked = self._deleted = max(self.acked, self.last)
            self.size_bytes, self.is_used = 0, False
            for path in self.folder.glob("frames.sqlite*"):
                path.unlink(missing_ok=True)
        return frames

    def _note_good(self, seq: int, at_ms: int) -> None:
        if self._malformed:
            self.losses.append((self._malformed, self._read_to[1], at_ms))
            self._malformed = 0
        self._read_to = max(self._read_to, (seq, at_ms))

    def set_aside(self) -> Path:
        """Keep a damaged spool for a person to look at; return where."""
        lost = max(1, self.last - max(self.acked, self._read_to[0])) + self._malformed
        self.losses.append((lost, self._read_to[1], self.last_ms or _changed_ms(self.path)))
        self._disconnect()
        kept = self._root / f"{self.folder.name}.damaged"
        shutil.rmtree(kept, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.rename(kept)
        self._unlock()
        self.acked, self.size_bytes, self._malformed = max(self.acked, self.last), 0, 0
        self.is_used = False
        return kept

    def close(self) -> None:
        """Release the folder: the next ingest sends what is left. An empty folder is removed."""
        with contextlib.suppress(OSError, sqlite3.Error):
            if self._db is not None:
                self._delete_acked(self._db)
        self._disconnect()
        if self._lock is not None:
            with contextlib.suppress(OSError), _locked(self._root):
                if not self.path.exists():
                    (self.folder / "lock").unlink()
                    self.folder.rmdir()
        self._unlock()

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            self._db = sqlite3.connect(self.path, check_same_thread=False, timeout=1.0)
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = NORMAL")
                columns = "seq INTEGER PRIMARY KEY, at_ms INTEGER, crc INTEGER, data BLOB"
                self._db.execute(f"CREATE TABLE IF NOT EXISTS frames ({columns})")
            except sqlite3.Error:
                self._disconnect()
                raise
        return self._db

    def _delete_acked(self, db: sqlite3.Connection) -> None:
        with db:
            total = "SELECT coalesce(sum(length(data) + ?), 0) FROM frames WHERE seq <= ?"
            ((size,),) = db.execute(total, (ROW_BYTES, self.acked))
            db.execute("DELETE FROM frames WHERE seq <= ?", (self.acked,))
        self._deleted = self.acked
        self.size_bytes = max(0, self.size_bytes - size)

    def _disconnect(self) -> None:
        db, self._db = self._db, None
        with contextlib.suppress(sqlite3.Error):
            if db is not None:
                db.close()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @classmethod
    def claim_abandoned(cls, root: Path) -> list[Spool]:
        """Lock and return the spools under `root` whose processes died, in the order of their last writes."""
        if not root.is_dir():
            return []
        spools: list[Spool] = []
        try:
            with _locked(root):
                for folder in sorted(root.iterdir()):
                    if folder.is_dir() and folder.suffix != ".damaged":
                        spools += cls._claim(root, folder)
        except OSError as error:
            log.error("spool_unreadable", folder=str(root), reason=error.strerror or str(error))
        return sorted(spools, key=lambda spool: _changed_ms(spool.path))

    @classmethod
    def _claim(cls, root: Path, folder: Path) -> list[Spool]:
        spool = cls(root, unquote(folder.name))
        spool.folder, spool.path = folder, folder / "frames.sqlite"
        try:
            spool._lock = _lock_folder(folder)
            if any(folder.glob("*.spool")):
                log.warning(
                    "spool_format_old", folder=str(folder), reason="the previous release wrote it",
                    hint="it can send it only before an upgrade: delete the folder, `pkb backfill` that time",
                )  # fmt: skip
            if spool.path.exists():
                spool.size_bytes = sum(path.stat().st_size for path in folder.glob("frames.sqlite*"))
                return [spool]
        except BlockingIOError:
            return []  # its process lives
        except OSError as error:
            log.error("spool_unreadable", folder=str(folder), reason=error.strerror or str(error))
        spool._unlock()
        return []


def _crc(seq: int, at_ms: Any, data: Any) -> int:
    """Return a row's checksum; -1 where damage changed its types."""
    is_row = isinstance(at_ms, int) and isinstance(data, bytes)
    return zlib.crc32(data, zlib.crc32(b"%d %d" % (seq, at_ms))) if is_row else -1


def _changed_ms(path: Path) -> int:
    try:
        wal = path.with_name(path.name + "-wal")
        return int(max(each.stat().st_mtime for each in (path, wal) if each.exists()) * 1000)
    except (OSError, ValueError):
        return 0


def _lock_folder(folder: Path, mode: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> int:
    """Return the descriptor that holds a folder's lock. Raises BlockingIOError where another has it."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, mode)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold the lock under which folders are made, claimed and removed."""
    descriptor = _lock_folder(root, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


class FrameBuffer:
    """Frames that Redis does not have yet, oldest first; bounded in memory and on disk.

    Threads: `put` in those of the connections, `peek` and `acknowledge` in the writer's, `run` in its own.
    Disk and memory have a lock each; nothing touches the disk under the lock that `put` takes.

    Bounds: `frames_max` and `bytes_max` in memory, `spool_bytes_max` on disk. Where both are reached and
    Redis is unavailable, the newest frames are lost, counted in `frames_lost`, and logged. A failing disk is
    counted in `spool_errors` and logged; frames stay in memory then.
    """

    def __init__(
        self,
        source: str,
        root: Path,
        *,
        spool_bytes_max: int = 2**30,
        frames_max: int = FRAMES_MAX,
        bytes_max: int = BYTES_MAX,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare a buffer that spools below the folder `root`; `source` is the producer's id."""
        self.source = source
        self.seq = 0
        self.frames_spooled = self.frames_lost = self.spool_errors = 0
        self.lost_spans: deque[tuple[int, int]] = deque(maxlen=1_000)  # of damaged spools, epoch ms
        self._frames: deque[Frame] = deque()
        self._frames_max, self._bytes_max, self._bytes = frames_max, bytes_max, 0
        self._spool = Spool(root, source)
        self._spool_bytes_max = spool_bytes_max
        self._refusal = ""  # why the last write to disk failed
        self._spool_retry_at = self._logged_at = self._unreadable_since = float("-inf")
        self._inherited: deque[Spool] = deque()
        self._clock = clock
        self._acked_at = clock()  # or when the first frame arrived in an empty buffer
        self._changed = threading.Condition()  # over memory, and `acked` and `last` of the spools
        self._disk = threading.Lock()  # over the spools; never taken under `_changed`
        self._finished = threading.Event()
        self._is_closed = False

    @classmethod
    def open(cls, settings: Settings, source: str) -> FrameBuffer:
        """Return the buffer of a source; it begins with what dead processes left on disk."""
        root = settings.spool_dir or settings.data_dir / "spool"
        quota, memory = settings.spool_max_bytes, settings.buffer_max_bytes
        buffer = cls(source, root, spool_bytes_max=quota, bytes_max=memory)
        buffer.inherit(Spool.claim_abandoned(root))
        return buffer

    def inherit(self, spools: Sequence[Spool]) -> None:
        """Send the frames of these spools before all others."""
        self._inherited.extend(spools)
        if spools:
            log.warning("spool_recovered", spools=len(spools), size_bytes=self.spool_bytes)

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def size_bytes(self) -> int:
        """Bytes of the frames in memory."""
        return self._bytes

    @property
    def oldest_ms(self) -> int | None:
        """Receive time of the oldest frame that would die with the process; None without one."""
        with self._changed:
            return self._frames[0].at_ms if self._frames else None

    @property
    def spool_bytes(self) -> int:
        """Bytes on disk that wait to be sent."""
        return self._spool.size_bytes + sum(spool.size_bytes for spool in tuple(self._inherited))

    def figures(self) -> dict[str, int]:
        """Return the buffer's counters for a heartbeat."""
        return {
            "buffer_frames": len(self), "buffer_bytes": self._bytes, "spool_bytes": self.spool_bytes,
            "frames_spooled": self.frames_spooled, "frames_lost": self.frames_lost,
            "spool_errors": self.spool_errors,
        }  # fmt: skip

    # -- connections' threads ----------------------------------------------------------------------------

    def put(self, data: bytes, at_ms: int) -> bool:
        """Number a frame and keep it; wait for room while the writer is merely slow.

        False: it is lost. Memory is full, Redis unavailable, and the disk takes nothing.
        """
        with self._changed:
            began = self._clock()
            while self._is_full(len(data)) and not self._is_closed:
                is_disk_stuck = self._clock() - began >= SPOOL_RETRY_SECONDS
                if self._idle_seconds() >= STALLED_SECONDS and (self._refusal or is_disk_stuck):
                    return self._lose(1, self._refusal or "the disk does not answer")
                self._changed.wait(STALLED_SECONDS)
            if self._finished.is_set():
                return self._lose(1, "stopped")
            if not (self._frames or self._has_spooled()):
                self._acked_at = self._clock()
            self.seq += 1
            self._frames.append(Frame(self.source, self.seq, at_ms, data))
            self._bytes += len(data)
            if len(self._frames) == 1:
                self._changed.notify_all()
            return True

    def _is_full(self, size: int, share: float = 1.0) -> bool:
        """Whether a frame of that size must wait; an empty buffer takes any."""
        has_too_many = len(self._frames) >= self._frames_max * share
        return bool(self._frames) and (has_too_many or self._bytes + size > self._bytes_max * share)

    def _idle_seconds(self) -> float:
        return self._clock() - self._acked_at

    def _has_spooled(self) -> bool:
        return bool(self._inherited) or self._spool.is_used

    def _lose(self, frames: int, reason: str) -> bool:
        self.frames_lost += frames
        if self._clock() - self._logged_at >= SPOOL_RETRY_SECONDS:
            self._logged_at = self._clock()
            log.error(
                "frames_lost", so_far=self.frames_lost, reason=reason,
                hint="start Redis, check the disk of PKB_SPOOL_DIR, or raise PKB_SPOOL_MAX_BYTES",
            )  # fmt: skip
        return False

    # -- the spool's thread ------------------------------------------------------------------------------

    def run(self, stop: threading.Event) -> None:
        """Move frames to disk while Redis is unavailable; save memory if a stopped writer does not finish."""
        while not stop.wait(SPOOL_CHECK_SECONDS):
            while self.spill():
                pass
        if not self._finished.wait(SAVE_SECONDS):
            self.save()

    def spill(self) -> int:
        """Move the oldest frames from memory to disk, if it is time. Returns how many."""
        with self._changed:
            if self._clock() < self._spool_retry_at:
                return 0
            idle_seconds = self._idle_seconds()
            is_behind = idle_seconds >= STALLED_SECONDS or self._has_spooled()
            if idle_seconds < SPOOL_AFTER_SECONDS and not (self._is_full(0, 0.5) and is_behind):
                return 0
        return self._move_to_disk()

    def _move_to_disk(self) -> int:
        with self._disk:
            room = self._spool_bytes_max - self.spool_bytes
            with self._changed:
                frames: list[Frame] = []
                size = 0
                for frame in self._frames:
                    size += len(frame.data) + ROW_BYTES
                    if size > min(room, TRANSACTION_BYTES_MAX) and (frames or size > room):
                        break
                    frames.append(frame)
                if not self._frames:
                    return 0
            try:
                if not frames:
                    raise OSError("PKB_SPOOL_MAX_BYTES is used up")
                is_first = not self._spool.is_used
                self._spool.append(frames)
            except (OSError, sqlite3.Error) as error:
                self._refuse(getattr(error, "strerror", None) or str(error))
                return 0
            with self._changed:
                self._refusal = ""
                self.frames_spooled += len(frames)
                self._drop_to(frames[-1].seq)
        if is_first:
            log.warning("spool_started", folder=str(self._spool.folder), frames=len(frames))
        return len(frames)

    def _refuse(self, reason: str) -> None:
        with self._changed:
            is_new, self._refusal = reason != self._refusal, reason
            self.spool_errors += 1
            self._spool_retry_at = self._clock() + SPOOL_RETRY_SECONDS
            self._changed.notify_all()
        if is_new:
            hint = "check PKB_SPOOL_DIR; frames stay in memory, the newest are lost when that is full"
            log.error("spool_write_failed", folder=str(self._spool.folder), reason=reason, hint=hint)

    def _drop_to(self, seq: int) -> None:
        while self._frames and self._frames[0].seq <= seq:
            self._bytes -= len(self._frames.popleft().data)
        self._changed.notify_all()

    # -- the writer's thread -----------------------------------------------------------------------------

    def peek(self, most: int, wait_seconds: float) -> list[Frame]:
        """Return up to `most` of the oldest frames, of one source; [] when none arrives in time.

        The same frames are returned again until they are acknowledged.
        """
        with self._changed:
            if not (self._frames or self._has_spooled() or self._is_closed):
                self._changed.wait(wait_seconds)
        while True:
            with self._changed:
                if not self._has_spooled():
                    return list(islice(self._frames, most))
                spool = self._inherited[0] if self._inherited else self._spool
            frames = self._read(spool, most)
            if frames is None:  # nothing newer may be sent before it
                with self._changed:
                    self._changed.wait(wait_seconds)
                return []
            if frames:
                return frames
            if spool is self._spool:
                log.info("spool_drained", frames_spooled=self.frames_spooled)
            else:
                self._inherited.popleft().close()

    def _read(self, spool: Spool, most: int) -> list[Frame] | None:
        """Read a spool: [] at its end, None where the disk gives nothing at the moment."""
        now = self._clock()
        with self._disk:
            try:
                frames = spool.read(most)
                self._unreadable_since = float("-inf")
            except (sqlite3.Error, OSError) as error:
                is_damaged = not isinstance(error, sqlite3.OperationalError | OSError)
                if self._unreadable_since == float("-inf"):
                    self._unreadable_since = now
                    if not is_damaged:
                        log.error("spool_unreadable", file=str(spool.path), reason=str(error))
                if not is_damaged and now - self._unreadable_since < UNREADABLE_SECONDS_MAX:
                    return None
                self._unreadable_since = float("-inf")
                kept = spool.set_aside()
                log.error("spool_damaged", kept_as=str(kept), reason=str(error), hint="check the disk")
                frames = []
            losses, spool.losses = spool.losses, []
        for count, from_ms, to_ms in losses:
            with self._changed:
                self._lose(count, "the spool is damaged")
            if from_ms and to_ms:
                self.lost_spans.append((from_ms, to_ms))
        return frames

    def acknowledge(self, frames: Sequence[Frame]) -> None:
        """Forget frames that `peek` returned: Redis has them."""
        if not frames:
            return
        source, seq = frames[-1].source, frames[-1].seq
        with self._changed:
            self._acked_at = self._clock()
            if source != self.source:
                if self._inherited:
                    self._inherited[0].acked = max(self._inherited[0].acked, seq)
                return
            self._spool.acked = max(self._spool.acked, seq)
            self._drop_to(seq)

    # -- the end -----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let no thread wait for room or for frames any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def save(self) -> int:
        """Move memory to disk, as far as it takes it; return how many frames moved."""
        self.close()
        saved = 0
        while moved := self._move_to_disk():
            saved += moved
        return saved

    def finish(self) -> int:
        """Save, count what fits nowhere as lost, release the spools; return the bytes left on disk."""
        self._finished.set()
        self.save()
        with self._changed:
            if self._frames:
                self._lose(len(self._frames), self._refusal or "stopped")
                self._drop_to(self.seq)
        with self._disk:
            for spool in (*self._inherited, self._spool):
                with contextlib.suppress(OSError, sqlite3.Error):
                    if spool.path.exists():
                        spool.read(1)  # deletes the file when Redis has everything
                spool.close()
            left = self.spool_bytes
            self._inherited.clear()
        return left
