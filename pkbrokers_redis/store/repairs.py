"""The repair streams: how ingest and jobs have candle rows marked, replaced or deleted.

P:{S}:repairs   kind gap    from, to <epoch ms, half-open: the feed was down>  tokens <JSON array>  why
                kind rows   token  interval  from, to <epoch s, half-open: the span that history covers>
                            rows <JSON array of [start,open,high,low,close,volume,oi], oldest first>  why
                kind forget tokens <JSON array: tokens that belong to other contracts now>  why

Only the aggregator writes candle rows. It applies an entry exactly once, in one commit with the cursor's
field `repair`, and after every tick that was in the shard's stream before the entry. `why` is a word for
people.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import redis

from pkbrokers_redis.candles.model import TOKEN_MAX
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.streams import id_order

ENTRIES_MAX = 10_000  # of a shard's stream, applied or not; a day's repairs of 10,000 instruments on 8 shards
TOKENS_MAX = 5_000  # of one entry; more are sent as further entries
FORGET_MAX = 200  # instruments forgotten in one commit: ~3,000 keys, a few ms of Redis
ROWS_MAX = 2_000  # of one entry, more than any exchange's minutes of a day; more are sent as further entries
TIME_MIN_MS, TIME_MAX_MS = 631_152_000_000, 4_102_444_800_000  # 1990 and 2100, as for ticks
GAP_MS_MAX = 10 * 86_400_000  # a longer outage is malformed: no list of minutes is that long
TEXT_BYTES_MAX = 1 << 20  # of `rows` or `tokens`; a longer text is malformed
POLL_SECONDS = 0.05

_tokens_decoder = msgspec.json.Decoder(list[int])
_rows_decoder = msgspec.json.Decoder(list[list[float | int | str | None]])

HistoryRow = Sequence[float | int | None]  # start (epoch s), open, high, low, close, volume, oi


def send_gap(
    client: redis.Redis, keys: Keys, tokens: Iterable[int], from_ms: float, to_ms: float, why: str
) -> int:
    """Report that the feed of these instruments was down in [from_ms, to_ms). It may be sent twice."""
    if not to_ms > from_ms:
        return 0
    span = {"from": int(from_ms), "to": int(to_ms)}
    return _send_tokens(client, keys, tokens, TOKENS_MAX, {"kind": "gap", **span, "why": why})


def send_forget(client: redis.Redis, keys: Keys, tokens: Iterable[int], why: str) -> int:
    """Have rows, quote and state of these instruments deleted. Return the number of entries written.

    Their next ticks are treated as the first ones. It may be sent twice.
    """
    return _send_tokens(client, keys, tokens, FORGET_MAX, {"kind": "forget", "why": why})


def _send_tokens(
    client: redis.Redis, keys: Keys, tokens: Iterable[int], most: int, fields: Mapping[str, Any]
) -> int:
    """Write entries with these fields and at most `most` tokens each. Return how many."""
    of_shard: dict[int, list[int]] = {}
    for token in tokens:
        of_shard.setdefault(keys.shard_of(token), []).append(int(token))
    pipeline = client.pipeline(transaction=False)
    entries = 0
    for shard, group in of_shard.items():
        for first in range(0, len(group), most):
            entry: Any = {**fields, "tokens": msgspec.json.encode(group[first : first + most])}
            pipeline.xadd(keys.repairs(shard), entry, maxlen=ENTRIES_MAX, approximate=True)
            entries += 1
    pipeline.execute()
    return entries


def send_rows(
    client: redis.Redis,
    keys: Keys,
    token: int,
    interval: str,
    from_s: int,
    to_s: int,
    rows: Sequence[HistoryRow],
    why: str,
) -> str:
    """Send Kite's historical rows of one instrument and interval.

    Rows of the shortest interval also repair the longer ones. No rows at all is information, too: nothing was
    traded in the span. Times are epoch seconds, `to_s` exclusive. Return the last entry's id.
    """
    if to_s <= from_s:
        raise PkbError(
            f"an empty span for a repair: {from_s} to {to_s}", "give epoch seconds, from before to"
        )
    parts: list[tuple[int, int, Sequence[HistoryRow]]] = []
    end_s = int(to_s)
    for last in range(len(rows), 0, -ROWS_MAX):  # newest part first: the repaired span grows backwards
        part = rows[max(0, last - ROWS_MAX) : last]
        begin_s = int(part[0][0] or 0) if last > ROWS_MAX else int(from_s)
        parts.append((begin_s, end_s, part))
        end_s = begin_s
    key = keys.repairs(keys.shard_of(token))
    entry_id: Any = b""
    for begin_s, end_s, part in parts or [(int(from_s), int(to_s), ())]:
        fields = {
            "kind": "rows",
            "token": int(token),
            "interval": interval,
            "from": begin_s,
            "to": end_s,
            "rows": msgspec.json.encode(part),
            "why": why,
        }
        entry_id = client.xadd(key, fields, maxlen=ENTRIES_MAX, approximate=True)  # type: ignore[arg-type]
    return entry_id.decode() if isinstance(entry_id, bytes) else str(entry_id)


class Gap(NamedTuple):
    """An entry of kind `gap`."""

    tokens: list[int]
    from_ms: int
    to_ms: int


class Rows(NamedTuple):
    """An entry of kind `rows`. The cells of the rows are unchecked."""

    token: int
    interval: str
    from_s: int
    to_s: int
    rows: list[list[float | int | str | None]]


class Forget(NamedTuple):
    """An entry of kind `forget`."""

    tokens: list[int]


def is_forget(fields: Mapping[bytes, bytes]) -> bool:
    """Return whether an entry states the kind `forget`."""
    return fields.get(b"kind") == b"forget"


def read_repair(fields: Mapping[bytes, bytes]) -> Gap | Rows | Forget:
    """Parse one entry's fields. Raise ValueError with the reason when it is malformed."""
    kind = fields.get(b"kind")
    if kind not in (b"gap", b"rows", b"forget"):
        raise ValueError("its kind is not gap, rows or forget")
    first, last = (0, 0) if kind == b"forget" else (_count(fields, b"from"), _count(fields, b"to"))
    name = "rows" if kind == b"rows" else "tokens"
    text = fields.get(name.encode(), b"")
    if len(text) > TEXT_BYTES_MAX:
        raise ValueError(f"{len(text)} bytes of {name}")
    try:
        if kind != b"rows":
            tokens = _tokens_decoder.decode(text)
            if len(tokens) > TOKENS_MAX or not all(1 <= token <= TOKEN_MAX for token in tokens):
                raise ValueError("too many tokens, or an invalid one")
            if kind == b"forget":
                return Forget(tokens)
            if not TIME_MIN_MS <= first < last < TIME_MAX_MS or last - first > GAP_MS_MAX:
                raise ValueError("from and to are not the span of an outage")
            return Gap(tokens, first, last)
        rows = _rows_decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{name} are not readable: {error}") from None
    token = _count(fields, b"token")
    if len(rows) > ROWS_MAX or not 1 <= token <= TOKEN_MAX:
        raise ValueError("too many rows, or an invalid token")
    if not TIME_MIN_MS <= first * 1000 < last * 1000 < TIME_MAX_MS:
        raise ValueError("from and to are not a span of epoch seconds")
    return Rows(token, fields.get(b"interval", b"").decode(errors="replace"), first, last, rows)


def _count(fields: Mapping[bytes, bytes], name: bytes) -> int:
    text = fields.get(name, b"")
    if not text.isdigit() or len(text) > 18:
        raise ValueError(f"{name.decode()} is not a number")
    return int(text)


def is_applied(client: redis.Redis, keys: Keys, token: int, entry_id: str) -> bool:
    """Return whether the aggregator has processed an entry: applied it, or counted it as malformed."""
    done: Any = client.hget(keys.cursor(keys.shard_of(token)), "repair")
    text = done.decode() if isinstance(done, bytes) else done
    return bool(text) and id_order(text) >= id_order(entry_id)


def wait_applied(
    client: redis.Redis, keys: Keys, token: int, entry_id: str, timeout_seconds: float = 30.0
) -> bool:
    """Wait until `is_applied`. Return False after the timeout (no aggregator, or a long queue)."""
    deadline = time.monotonic() + timeout_seconds
    while not is_applied(client, keys, token, entry_id):
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True
