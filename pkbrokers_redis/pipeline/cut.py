"""Feeds: the instrument list cut into connections. Pure.

    tokens → feeds of up to 3,000, one connection each; feed n uses api key n // 3 (Kite allows 3 per key)

Where a list changes while it is streamed, an instrument stays in its feed: `recut` takes out what left, and
puts what came into the feed with the most room. No other instrument is subscribed anew, so none has a gap.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pkbrokers_redis.core.errors import SettingsError
from pkbrokers_redis.kite.socket import CONNECTIONS_PER_KEY_MAX
from pkbrokers_redis.kite.subscriptions import TOKENS_PER_CONNECTION_MAX


@dataclass(frozen=True, slots=True)
class Feed:
    """What one connection reads: `tokens` ascending, `session` the api key to use (0 is the first)."""

    number: int
    session: int
    tokens: tuple[int, ...]


def feeds_needed(tokens: int, sessions: int) -> int:
    """The least number of feeds. Raises SettingsError when it is more than `sessions` api keys may have."""
    count = -(-tokens // TOKENS_PER_CONNECTION_MAX)
    keys = -(-count // CONNECTIONS_PER_KEY_MAX)
    if keys > sessions:
        most = TOKENS_PER_CONNECTION_MAX * CONNECTIONS_PER_KEY_MAX * sessions
        have = "one Kite api key" if sessions == 1 else f"{sessions} Kite api keys"
        raise SettingsError(
            f"{tokens:,} instruments are more than {have} may stream ({most:,})",
            f"name fewer in PKB_INSTRUMENTS, or {keys} api keys: PKB_KITE_API_KEY and PKB_KITE_ACCESS_TOKEN "
            "take comma lists of equal length",
        )
    return count


def cut_feeds(tokens: Collection[int], sessions: int) -> list[Feed]:
    """A first cut: as few feeds as possible, of even size (±1). The same instruments give the same feeds.

    Raises SettingsError when there are more than `sessions` api keys may stream.
    """
    ordered = sorted(set(tokens))
    count = feeds_needed(len(ordered), sessions)
    cuts = [n * len(ordered) // count for n in range(count)] + [len(ordered)] if count else []
    return feeds_of([ordered[cuts[n] : cuts[n + 1]] for n in range(count)])


def recut(cut: Sequence[Collection[int]], tokens: Collection[int], sessions: int) -> list[Feed]:
    """The next cut: whoever has a feed keeps it. Deterministic; a cut that cannot be kept is made anew.

    `cut` are the tokens of each feed so far, a foreign hand's maybe. New tokens go where most room is; a new
    feed is opened only when all are full. Feeds are not merged while they are read: that would interrupt
    thousands to save a connection. Raises SettingsError as `cut_feeds` does.
    """
    wanted = set(tokens)
    needed = feeds_needed(len(wanted), sessions)
    kept = [sorted(wanted.intersection(each)) for each in cut]
    has_repeats = sum(map(len, kept)) > len(set().union(*kept))
    is_too_big = any(len(each) > TOKENS_PER_CONNECTION_MAX for each in kept)
    if has_repeats or is_too_big or not any(kept) or len(kept) > sessions * CONNECTIONS_PER_KEY_MAX:
        return cut_feeds(wanted, sessions)
    kept += [[] for _ in range(needed - len(kept))]
    for token in sorted(wanted.difference(*kept)):
        roomiest = min(kept, key=len)
        if len(roomiest) >= TOKENS_PER_CONNECTION_MAX:
            kept.append(roomiest := [])
        roomiest.append(token)
    while not kept[-1]:
        kept.pop()
    return feeds_of([sorted(each) for each in kept])


def feeds_of(cut: Sequence[Sequence[int]]) -> list[Feed]:
    """Feeds from the tokens of each."""
    return [Feed(n, n // CONNECTIONS_PER_KEY_MAX, tuple(tokens)) for n, tokens in enumerate(cut)]


def list_id(tokens: Collection[int]) -> str:
    """A short name for an instrument list: workers with different ones must not share feeds."""
    text = ",".join(map(str, sorted(set(tokens))))
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
