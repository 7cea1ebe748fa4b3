"""Admin commands wait for a button: it works once, for a minute, and only for who asked.

P:{bot}:confirm:<nonce>   string, TTL   {"user_id", "chat_id", "name", "words"}
"""

from __future__ import annotations

import secrets

import msgspec
import redis

from pkbrokers_redis.keys import Keys

SECONDS = 60
YES, NO = "yes", "no"


class Pending(msgspec.Struct, frozen=True):
    """A command that waits."""

    user_id: int
    chat_id: int
    name: str
    words: list[str]


def ask_for(client: redis.Redis, keys: Keys, pending: Pending) -> tuple[tuple[str, str], tuple[str, str]]:
    """Remember it; its two buttons."""
    nonce = secrets.token_urlsafe(12)
    client.set(keys.bot_confirm(nonce), msgspec.json.encode(pending), ex=SECONDS)
    return ("Yes", f"{YES}:{nonce}"), ("No", f"{NO}:{nonce}")


def peek(client: redis.Redis, keys: Keys, nonce: str) -> Pending | None:
    """What waits under this nonce; None where it expired or was used."""
    found = client.get(keys.bot_confirm(nonce))
    if not isinstance(found, bytes):
        return None
    try:
        return msgspec.json.decode(found, type=Pending)
    except msgspec.DecodeError:
        return None


def use(client: redis.Redis, keys: Keys, nonce: str) -> bool:
    """Take it, once: True for one caller only."""
    return client.delete(keys.bot_confirm(nonce)) == 1
