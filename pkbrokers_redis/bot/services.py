"""What commands work with, made once per process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import redis

from pkbrokers_redis import logs
from pkbrokers_redis.bot.access import Access
from pkbrokers_redis.bot.alerts.book import AlertBook
from pkbrokers_redis.bot.charts import ChartPool
from pkbrokers_redis.bot.movers import Movers
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.clock import Clock
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.settings import Settings

log = logs.get("bot")

BACKGROUND_MAX = 200  # watches and file jobs at once; then a command is refused politely


@dataclass
class Services:
    """`store` and `client` are for threads (`Ask.read`), everything else for the loop."""

    settings: Settings
    client: redis.Redis
    store: CandleStore
    access: Access
    market: Clock
    alerts: AlertBook
    charts: ChartPool
    alerts_changed: Callable[[], None] = lambda: None
    movers: Movers | None = None
    jobs_client: redis.Redis | None = None  # where PKB_RQ_REDIS_URL is set
    background: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    @property
    def keys(self) -> Keys:
        """Key names of the store."""
        return self.settings.keys

    def start(self, name: str, work: Coroutine[Any, Any, None]) -> bool:
        """Run something beside the chats' commands. False: one of that name runs, or too many do."""
        running = self.background.get(name)
        if (running is not None and not running.done()) or len(self.background) >= BACKGROUND_MAX:
            work.close()
            return False
        task = asyncio.get_running_loop().create_task(work, name=name)
        self.background[name] = task
        task.add_done_callback(lambda done: self._ended(name, done))
        return True

    def stop(self, prefix: str) -> int:
        """Cancel what runs under names that begin so; how many there were."""
        found = [task for name, task in self.background.items() if name.startswith(prefix)]
        for task in found:
            task.cancel()
        return len(found)

    async def close(self) -> None:
        """End what runs."""
        tasks = list(self.background.values())
        self.stop("")
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self.charts.close)

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        if self.background.get(name) is task:
            del self.background[name]
        if not task.cancelled() and task.exception() is not None:
            log.error("failed", what=name.partition(" ")[0], exc_info=task.exception())
