"""Alerts in Redis, and their messages on the way to Telegram.

    P:{bot}:alerts        hash     <id> → alert, `next` → the last id
    P:{bot}:alert_state   hash     <id> → what the alert remembers (`rules.Watch.state`)
    P:{bot}:position      hash     <shard> → last tick entry read, `rev` → number of the last change
    P:{bot}:outbox        stream   messages for Telegram: chat, text, tick_ms

The worker writes position, states and messages in one transaction, and only if neither a chat nor another
process has changed anything since it loaded (`rev`). If not, and after any crash, a worker resumes from a
consistent checkpoint: ticks that it reads again lead to the same crossings, which were not sent yet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec
import redis
from telegram.constants import ParseMode
from telegram.error import BadRequest, ChatMigrated, Forbidden, TelegramError
from telegram.ext import ExtBot

from pkbrokers_redis import logs
from pkbrokers_redis.bot.alerts.rules import Alert
from pkbrokers_redis.bot.telegram_client import FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS, with_retries
from pkbrokers_redis.bot.text import MESSAGE_CHARS_MAX
from pkbrokers_redis.clock import Backoff
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.keys import Keys

log = logs.get("bot")

ALERTS_PER_CHAT_MAX = 250
OUTBOX_MAX = 10_000  # messages that wait for Telegram; beyond it the oldest are dropped
MESSAGES_PER_READ = 2 * OUTBOX_MAX  # all of them: Redis trims by whole nodes, so there can be more
POLL_SECONDS = 5.0  # without a wake-up: messages that another process left
NEXT, REV = b"next", b"rev"

T = TypeVar("T")


class Notification(NamedTuple):
    """A message for a chat. `tick_ms` is the receive time of the tick that caused it, 0 for none."""

    chat_id: int
    html: str
    tick_ms: float


class Checkpoint(NamedTuple):
    """What the last commit wrote, and all alerts."""

    rev: int
    positions: dict[int, str]  # shard → stream id
    states: dict[int, list[Any]]  # alert id → state
    alerts: list[Alert]


class AlertStore:
    """The alerts of all chats. Methods block: call them in a thread."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._client, self._keys = client, keys
        self._malformed = logs.Once()

    def of_chat(self, chat_id: int) -> list[Alert]:
        """Return a chat's alerts, by id."""
        cells: Any = self._client.hgetall(self._keys.bot_alerts())
        return [alert for _, alert in sorted(self._decode(cells, Alert).items()) if alert.chat_id == chat_id]

    def add(self, alert: Alert, state: Sequence[Any]) -> Alert:
        """Store an alert under a new id and return it with the id. Raise PkbError at ALERTS_PER_CHAT_MAX."""
        if len(self.of_chat(alert.chat_id)) >= ALERTS_PER_CHAT_MAX:
            raise PkbError(
                f"this chat has {ALERTS_PER_CHAT_MAX} alerts", "remove one with /alert remove NUMBER"
            )
        number: Any = self._client.hincrby(self._keys.bot_alerts(), "next", 1)
        stored = msgspec.structs.replace(alert, id=int(number))
        pipeline = self._client.pipeline(transaction=True)
        if state:
            pipeline.hset(self._keys.bot_alert_state(), str(stored.id), msgspec.json.encode(state))
        pipeline.hset(self._keys.bot_alerts(), str(stored.id), msgspec.json.encode(stored))
        pipeline.hincrby(self._keys.bot_position(), "rev", 1)
        pipeline.execute()
        return stored

    def remove(self, ids: Iterable[int]) -> int:
        """Delete alerts and return how many existed."""
        names = [str(number) for number in ids]
        if not names:
            return 0
        pipeline = self._client.pipeline(transaction=True)
        pipeline.hdel(self._keys.bot_alerts(), *names)
        pipeline.hdel(self._keys.bot_alert_state(), *names)
        pipeline.hincrby(self._keys.bot_position(), "rev", 1)
        return int(pipeline.execute()[0])

    def load(self) -> Checkpoint:
        """Return everything that the worker resumes from."""
        pipeline = self._client.pipeline(transaction=True)
        pipeline.hgetall(self._keys.bot_position())
        pipeline.hgetall(self._keys.bot_alert_state())
        pipeline.hgetall(self._keys.bot_alerts())
        position, states, alerts = pipeline.execute()
        return Checkpoint(
            int(position.get(REV, 0)),
            {int(shard): entry.decode() for shard, entry in position.items() if shard.isdigit()},
            self._decode(states, list[Any]),
            list(self._decode(alerts, Alert).values()),
        )

    def commit(
        self,
        rev: int,
        positions: Mapping[int, str],
        states: Mapping[int, Sequence[Any] | None],
        notifications: Sequence[Notification],
    ) -> bool:
        """Write positions, states and messages in one transaction; None as a state deletes the alert.

        Return False, and write nothing, when the alerts were changed after `rev`.
        """
        keys = self._keys
        with self._client.pipeline(transaction=True) as pipeline:
            pipeline.watch(keys.bot_position())  # type: ignore[no-untyped-call]
            stored: Any = pipeline.hget(keys.bot_position(), "rev")
            if int(stored or 0) != rev:
                return False
            if not (positions or states or notifications):
                return True
            pipeline.multi()
            written: dict[Any, Any] = {**positions, "rev": rev + 1}
            pipeline.hset(keys.bot_position(), mapping=written)
            for number, state in states.items():
                if state is None:
                    pipeline.hdel(keys.bot_alert_state(), str(number))
                    pipeline.hdel(keys.bot_alerts(), str(number))
                else:
                    pipeline.hset(keys.bot_alert_state(), str(number), msgspec.json.encode(state))
            for chat_id, html, tick_ms in notifications:
                fields: dict[Any, Any] = {"chat": chat_id, "text": html, "tick_ms": int(tick_ms)}
                pipeline.xadd(keys.bot_outbox(), fields, maxlen=OUTBOX_MAX, approximate=True)
            try:
                pipeline.execute()
            except redis.WatchError:
                return False
            return True

    def _decode(self, cells: dict[bytes, bytes], kind: type[T]) -> dict[int, T]:
        """Return id → value. A malformed one is logged once and left out."""
        values: dict[int, T] = {}
        for name, text in cells.items():
            try:
                if name != NEXT:
                    values[int(name)] = msgspec.json.decode(text, type=kind)
            except (ValueError, msgspec.DecodeError) as error:
                if self._malformed.first((kind, name)):
                    log.warning("alert_malformed", id=name.decode(errors="replace"), reason=str(error)[:120])
        return values


class Outbox:
    """Sends what waits for a chat, joined, in order; `chats` are the ids of PKB_TELEGRAM_CHATS.

    An entry leaves the outbox after Telegram has accepted it. A crash, a timeout or a failed deletion between
    the two can show it twice; none is lost while fewer than OUTBOX_MAX wait. What Telegram refuses
    for good is dropped and logged.
    """

    def __init__(self, bot: ExtBot[Any], client: redis.Redis, keys: Keys, chats: Collection[int]) -> None:
        self._bot, self._client, self._key, self._chats = bot, client, keys.bot_outbox(), chats
        self._added = asyncio.Event()

    def wake(self) -> None:
        """Send now. Call it in the event loop's thread."""
        self._added.set()

    async def run(self) -> None:
        """Send what waits, whenever something was added, until cancelled."""
        backoff = Backoff(FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS)
        while True:
            self._added.clear()
            try:
                await self.flush()
                backoff.reset()
            except (TelegramError, redis.RedisError) as error:
                log.warning("alerts_delayed", reason=type(error).__name__)
                await asyncio.sleep(backoff.next())
                continue
            try:
                async with asyncio.timeout(POLL_SECONDS):
                    await self._added.wait()
            except TimeoutError:
                pass

    async def flush(self) -> None:
        """Send everything, chats in parallel; after all others were sent raise what a chat failed with."""
        waiting: dict[int, list[tuple[bytes, str]]] = {}
        entries: Any = await asyncio.to_thread(self._client.xrange, self._key, count=MESSAGES_PER_READ)
        for entry_id, fields in entries:
            try:
                waiting.setdefault(int(fields[b"chat"]), []).append((entry_id, fields[b"text"].decode()))
            except (KeyError, ValueError):
                await asyncio.to_thread(self._client.xdel, self._key, entry_id)  # malformed
        sent = await asyncio.gather(
            *(self._send(chat_id, texts) for chat_id, texts in waiting.items()), return_exceptions=True
        )
        for result in sent:
            if isinstance(result, BaseException):
                raise result

    async def _send(self, chat_id: int, waiting: list[tuple[bytes, str]]) -> None:
        """Send one chat's entries, as many in a message as it holds. Raise at the first that fails."""
        while waiting:
            number, html = 1, waiting[0][1]
            for _, text in waiting[1:]:
                if len(html) + 1 + len(text) > MESSAGE_CHARS_MAX:
                    break
                number, html = number + 1, f"{html}\n{text}"
            try:
                await self._post(chat_id, html)
            except (BadRequest, ChatMigrated, Forbidden) as error:
                # Blocked, deleted, or moved to an id that the settings do not name: refused forever.
                log.warning("alert_refused", chat=chat_id, reason=f"{type(error).__name__}: {error}")
            await asyncio.to_thread(self._client.xdel, self._key, *(entry for entry, _ in waiting[:number]))
            waiting = waiting[number:]

    async def _post(self, chat_id: int, html: str) -> None:
        """Send a message, to a moved group's new id if the settings name that."""
        try:
            await with_retries(
                self._bot.send_message, chat_id, html[:MESSAGE_CHARS_MAX], parse_mode=ParseMode.HTML
            )
        except ChatMigrated as error:
            if error.new_chat_id not in self._chats:
                raise
            await self._post(error.new_chat_id, html)
