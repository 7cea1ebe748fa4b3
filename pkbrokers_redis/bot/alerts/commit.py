"""What the alerts' reader writes, in one step: how far it read, what the alerts remember, what is to be told.

All of it or nothing, and only if nobody else has committed since we looked (`rev`): a process that lost its
lease without noticing is refused. So after any crash the reader goes on from a picture in which position,
memory and messages belong together, and ticks that it reads again lead to the same crossings, untold ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import redis

from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.functions import fcall

OUTBOX_MAX = 10_000  # messages that wait for Telegram; the oldest go first beyond it


class Told(NamedTuple):
    """A message for a chat; `tick_ms` is when the frame that caused it was received."""

    chat_id: int
    html: str
    tick_ms: float


@dataclass
class Picture:
    """Where the reader stands, as Redis has it."""

    rev: int = 0
    positions: dict[int, str] = field(default_factory=dict)  # shard → stream id
    armed: dict[int, list[Any]] = field(default_factory=dict)  # alert id → state


def load_picture(client: redis.Redis, keys: Keys) -> Picture:
    """What the last commit left."""
    pipeline = client.pipeline(transaction=True)
    pipeline.hgetall(keys.bot_position())
    pipeline.hgetall(keys.bot_alert_state())
    position, armed = pipeline.execute()
    picture = Picture(int(position.pop(b"rev", b"0")))
    picture.positions = {int(shard): at.decode() for shard, at in position.items() if shard.isdigit()}
    picture.armed = {int(name): _cells(text) for name, text in armed.items() if name.isdigit()}
    return picture


def load_armed(client: redis.Redis, keys: Keys, ids: Sequence[int]) -> dict[int, list[Any]]:
    """What some alerts remember: those that were set since the picture."""
    if not ids:
        return {}
    found: Any = client.hmget(keys.bot_alert_state(), [str(number) for number in ids])
    return {number: _cells(text) for number, text in zip(ids, found, strict=True)}


def _cells(text: bytes | None) -> list[Any]:
    """A state; empty, so that the alert begins anew, for none and for a foreign hand's."""
    try:
        return msgspec.json.decode(text or b"[]", type=list[Any])
    except msgspec.DecodeError:
        return []


def commit(
    client: redis.Redis,
    keys: Keys,
    rev: int,
    positions: Mapping[int, str],
    states: Mapping[int, Sequence[Any] | None],
    told: Sequence[Told],
) -> bool:
    """Write it all; `states` None removes the alert. False: refused, somebody else has committed."""
    places = [cell for shard, at in positions.items() for cell in (shard, at)]
    cells: list[Any] = []
    for number, state in states.items():
        cells += [number, b"" if state is None else msgspec.json.encode(state)]
    messages = [cell for each in told for cell in (each.chat_id, each.html, int(each.tick_ms))]
    redis_keys = [keys.bot_position(), keys.bot_alert_state(), keys.bot_alerts(), keys.bot_outbox()]
    sections = [len(positions), *places, len(states), *cells, len(told), *messages]
    return bool(fcall(client, "alert_commit", redis_keys, rev, OUTBOX_MAX, *sections))
