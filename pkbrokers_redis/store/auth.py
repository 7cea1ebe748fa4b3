"""`P:auth`: the Kite session that all processes share, and `P:login`: what logging in has taught us.

    P:auth         hash     id api_key user_id access_token enctoken login_at expires_at refused
                            TTL until 06:00 in India
    P:login        hash     attempts attempted_at refused mend refused_at totp_window
    P:login:lock   string   the worker that logs in (`lease.try_lease`), TTL

A session is never deleted by who finds it dead, it is marked: `refused` is the id of the session that Kite
answered with 403. So the mark of a slow worker cannot hit the session that another made meanwhile, and no
script is needed to compare and delete. Times in Redis are ISO 8601 with +05:30.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Literal

import redis
from pydantic import SecretStr
from redis.exceptions import ResponseError

from pkbrokers_redis.candles.calendar import IST
from pkbrokers_redis.errors import LoginRefused, WrongKeyType
from pkbrokers_redis.keys import Keys

EXPIRES_AT_HOUR = 6  # Kite's docs: tokens are flushed at 06:00. Some die earlier: the 403 decides, not this
OUTAGE_SECONDS = 3600.0  # attempts older than this belong to another outage
TOTP_PERIOD_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Session:
    """One login at Kite: an access token (official flow) or an enctoken (web login). No repr shows either.

    `login_at`, `expires_at` are epoch seconds, 0 where nobody knows: a token out of the settings.
    """

    api_key: str = ""
    user_id: str = ""
    access_token: SecretStr | None = None
    enctoken: SecretStr | None = None
    login_at: float = 0.0
    expires_at: float = 0.0
    id: str = ""  # of a session in P:auth; "" out of the settings

    @property
    def kind(self) -> Literal["access_token", "enctoken"]:
        """Which of the two it is. An access token goes first."""
        return "access_token" if self.access_token is not None else "enctoken"

    @property
    def token(self) -> str:
        """The secret itself: for headers and the websocket's URL, for nothing else."""
        secret = self.access_token if self.access_token is not None else self.enctoken
        return "" if secret is None else secret.get_secret_value()

    def is_same(self, other: Session | None) -> bool:
        """Whether both carry the same token of the same api key."""
        return other is not None and (self.kind, self.token, self.api_key) == (
            other.kind,
            other.token,
            other.api_key,
        )


def expires_at(login_at: float) -> float:
    """The first 06:00 in India after a login; epoch seconds."""
    moment = datetime.fromtimestamp(login_at, IST)
    end = moment.replace(hour=EXPIRES_AT_HOUR, minute=0, second=0, microsecond=0)
    return (end if end > moment else end + timedelta(days=1)).timestamp()


def save_session(client: redis.Redis, keys: Keys, session: Session) -> Session:
    """Make it everybody's session. Returns it with its id. An earlier refusal is forgotten."""
    saved = replace(
        session,
        id=secrets.token_hex(4),
        expires_at=session.expires_at or expires_at(session.login_at),
    )
    fields: dict[Any, Any] = {
        "id": saved.id,
        "api_key": saved.api_key,
        "user_id": saved.user_id,
        "login_at": _iso(saved.login_at),
        "expires_at": _iso(saved.expires_at),
        saved.kind: saved.token,
    }
    pipe: Any = client.pipeline(transaction=True)
    pipe.execute_command("DEL", keys.auth())  # redis-py's `delete` goes its own way on a cluster
    pipe.hset(keys.auth(), mapping=fields)
    pipe.expireat(keys.auth(), int(saved.expires_at))
    pipe.execute()
    client.hdel(keys.login(), "refused", "hint", "refused_at")
    return saved


def load_session(client: redis.Redis, keys: Keys) -> Session | None:
    """The shared session; None where there is none, Kite refused it, or a foreign hand wrote the hash.

    Raises WrongKeyType.
    """
    found = _hash(client, keys.auth())
    if found.get("refused", "") == found.get("id", ""):  # both absent: nothing is there
        return None
    access_token, enctoken = found.get("access_token"), found.get("enctoken")
    if not (access_token or enctoken):
        return None
    return Session(
        found.get("api_key", ""),
        found.get("user_id", ""),
        SecretStr(access_token) if access_token else None,
        SecretStr(enctoken) if enctoken and not access_token else None,
        _epoch(found.get("login_at", "")),
        _epoch(found.get("expires_at", "")),
        found.get("id", ""),
    )


def forget_session(client: redis.Redis, keys: Keys, failed: Session) -> None:
    """Kite answered 403 to this session: nobody may load it again. A newer one is not touched."""
    if not failed.id:
        return  # out of the settings: not in Redis
    pipe = client.pipeline(transaction=True)
    pipe.hset(keys.auth(), "refused", failed.id)
    # The hash may have run out since: then the mark stands alone, and must run out too.
    pipe.expireat(keys.auth(), int(failed.expires_at), nx=True)
    pipe.execute()


@dataclass(frozen=True, slots=True)
class LoginState:
    """What all processes know of the logins of this outage. Epoch seconds."""

    attempts: int = 0
    attempted_at: float = 0.0
    refused: str = ""  # why Kite refused our credentials: a person must act
    hint: str = ""  # and how
    refused_at: float = 0.0
    totp_window: int = 0  # the last half minute (since the epoch) whose TOTP was used


def load_login_state(client: redis.Redis, keys: Keys, now: float) -> LoginState:
    """As `P:login` has it; attempts of an outage an hour ago no longer count. Raises WrongKeyType."""
    found = _hash(client, keys.login())
    attempted_at = _epoch(found.get("attempted_at", ""))
    recent = abs(now - attempted_at) < OUTAGE_SECONDS
    return LoginState(
        _count(found.get("attempts", "")) if recent else 0,
        attempted_at,
        found.get("refused", ""),
        found.get("hint", ""),
        _epoch(found.get("refused_at", "")),
        _count(found.get("totp_window", "")),
    )


def note_attempt(client: redis.Redis, keys: Keys, state: LoginState, now: float) -> None:
    """One more attempt in this outage. Only the holder of `P:login:lock` writes."""
    client.hset(keys.login(), mapping={"attempts": state.attempts + 1, "attempted_at": _iso(now)})


def note_refusal(client: redis.Redis, keys: Keys, error: LoginRefused, now: float) -> None:
    """Kite refused our credentials: nobody tries them again before `pkb login`."""
    fields = {"refused": error.message, "hint": error.hint, "refused_at": _iso(now)}
    client.hset(keys.login(), mapping=fields)  # type: ignore[arg-type]  # dict is invariant


def clear_outage(client: redis.Redis, keys: Keys) -> None:
    """Attempts and refusals are forgotten: a person takes over."""
    client.hdel(keys.login(), "attempts", "attempted_at", "refused", "hint", "refused_at")


def note_totp_window(client: redis.Redis, keys: Keys, window: int) -> None:
    """The TOTP of this half minute is used up: Kite takes each once."""
    client.hset(keys.login(), "totp_window", window)


def _hash(client: redis.Redis, key: str) -> dict[str, str]:
    try:
        found: Any = client.hgetall(key)
    except ResponseError as error:
        if "WRONGTYPE" in str(error):
            kind: Any = client.type(key)
            raise WrongKeyType(key, kind.decode(), "hash") from None
        raise
    return {name.decode(errors="replace"): value.decode(errors="replace") for name, value in found.items()}


def _iso(epoch_s: float) -> str:
    return datetime.fromtimestamp(epoch_s, IST).isoformat(timespec="seconds")


def _epoch(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        return 0.0


def _count(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 16 else 0
