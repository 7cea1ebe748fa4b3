"""What of a mirror belongs to its process (locks, thread, reader): a forked child makes its own."""

from __future__ import annotations

import os
import threading
import time

from pkbrokers_redis.consumers.follow import Follower


class Machinery:
    """Locks, the thread, the reader of the streams: what does not survive a fork."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.work = threading.RLock()  # one at a time fills, applies, refreshes
        self.reading = threading.Lock()  # one at a time waits for the streams
        self.follower: Follower | None = None
        self.stop = threading.Event()
        self.thread: threading.Thread | None = None
        self.is_broken = False  # Redis was away since the last fill
        self.complete_at = 0.0  # when we last had everything, monotonic seconds
        self.named_at = time.monotonic()  # when the master was last asked who has which name
