"""Taking over a shard: its book as the last commit left it, read back from Redis."""

from __future__ import annotations

from collections.abc import Callable

import redis
from redis.exceptions import ResponseError

from pkbrokers_redis.core.book import Book
from pkbrokers_redis.core.errors import WrongKeyType
from pkbrokers_redis.core.keys import Keys
from pkbrokers_redis.core.model import TOKEN_MAX

INSTRUMENTS_AT_ONCE = 1000  # a pipeline's bound: about 1 MB of replies


def load_book(
    client: redis.Redis, keys: Keys, shard: int, book: Book, on_odd: Callable[[str], None]
) -> dict[bytes, bytes]:
    """Restore every instrument of a shard into an empty book.

    One that cannot be read (a foreign hand) is reported through `on_odd` and starts anew with its next
    tick. Returns the state fields that are not per-candle: `<token>:revs`.
    """
    key = keys.state(shard)
    try:
        fields: dict[bytes, bytes] = client.hgetall(key)  # type: ignore[assignment]
    except ResponseError as error:
        if "WRONGTYPE" in str(error):
            raise WrongKeyType(key, bytes(client.type(key)).decode(), "hash") from None  # type: ignore[arg-type]
        raise
    others = {name: value for name, value in fields.items() if name.endswith(b":revs")}
    tokens = [token for token in map(_token_of, fields) if token]
    for first in range(0, len(tokens), INSTRUMENTS_AT_ONCE):
        chunk = tokens[first : first + INSTRUMENTS_AT_ONCE]
        pipeline = client.pipeline(transaction=False)
        for token in chunk:
            pipeline.hgetall(keys.current(token))
        replies = pipeline.execute(raise_on_error=False)
        for token, reply in zip(chunk, replies, strict=True):
            rows = {} if isinstance(reply, Exception) else {k.decode(): v for k, v in reply.items()}
            hot = fields[b"%d" % token]
            try:
                book.restore(token, hot, fields.get(b"%d:marks" % token), rows)
            except ValueError as error:
                on_odd(str(error))
                book.forget(token)
    return others


def _token_of(name: bytes) -> int:
    """The token a state field is named after; 0 for other fields, and for those of a foreign hand."""
    token = int(name) if name.isdigit() and len(name) <= 10 else 0
    return token if token <= TOKEN_MAX and name == b"%d" % token else 0
