"""`P:auth`: the Kite session that all processes share. `P:login`: the state of logging in.

    P:auth         hash     id api_key user_id access_token enctoken login_at expires_at refused
                            TTL until 06:00 in India
    P:login        hash     attempts attempted_at refused hint refused_at totp_window
    P:login:lock   string   the worker that logs in (a `leases.LeaderLease`), TTL

A dead session is marked, never deleted: `refused` is the id of the session that Kite answered with 403. So
the mark of a slow worker cannot hit a session that another worker has made meanwhile, and needs no script
that compares and deletes. Times in Redis are ISO 8601 with +05:30.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Literal

import redis
from pydantic import SecretStr

from pkbrokers_redis.candles.calendar import IST
from pkbrokers_redis.errors import LoginRefused
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.errors import expect_type

EXPIRES_AT_HOUR = 6  # Kite's docs: tokens are flushed at 06:00. Some end earlier: the 403 decides
OUTAGE_SECONDS = 3600.0  # attempts older than this belong to another outage
TOTP_PERIOD_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Session:
    """One login at Kite: an access token (official flow) or an enctoken (web login). No repr shows either.

    `login_at` and `expires_at` are epoch seconds, 0 for a token from the settings, whose times are unknown.
    """

    api_key: str = ""
    user_id: str = ""
    access_token: SecretStr | None = None
    enctoken: SecretStr | None = None
    login_at: float = 0.0
    expires_at: float = 0.0
    id: str = ""  # of a session in P:auth; "" for one from the settings

    @property
    def kind(self) -> Literal["access_token", "enctoken"]:
        """Return which of the two it carries. An access token takes precedence."""
        return "access_token" if self.access_token is not None else "enctoken"

    @property
    def token(self) -> str:
        """Return the secret, for headers and the websocket's URL only."""
        secret = self.access_token if self.access_token is not None else self.enctoken
        return "" if secret is None else secret.get_secret_value()

    def is_same(self, other: Session | None) -> bool:
        """Return whether both carry the same token of the same api key."""
        return other is not None and (self.kind, self.token, self.api_key) == (
            other.kind,
            other.token,
            other.api_key,
        )


def expires_at(login_at: float) -> float:
    """Return the first 06:00 in India after a login, epoch seconds."""
    moment = datetime.fromtimestamp(login_at, IST)
    end = moment.replace(hour=EXPIRES_AT_HOUR, minute=0, second=0, microsecond=0)
    return (end if end > moment else end + timedelta(days=1)).timestamp()


def save_session(client: redis.Redis, keys: Keys, session: Session) -> Session:
    """Share a session with all processes, and clear an earlier refusal. Return the session with its id."""
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
    pipe.execute_command("DEL", keys.auth())  # redis-py's cluster pipelines do not pass `delete` on
    pipe.hset(keys.auth(), mapping=fields)
    pipe.expireat(keys.auth(), int(saved.expires_at))
    pipe.execute()
    client.hdel(keys.login(), "refused", "hint", "refused_at")
    return saved


def load_session(client: redis.Redis, keys: Keys) -> Session | None:
    """Return the shared session; None when there is none, Kite refused it, or the hash is malformed."""
    found = _hash(client, keys.auth())
    if found.get("refused", "") == found.get("id", ""):  # both absent: there is no session
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
    """Mark a session that Kite answered with 403, so that no process loads it. A newer one is unaffected."""
    if not failed.id:
        return  # from the settings: not in Redis
    pipe = client.pipeline(transaction=True)
    pipe.hset(keys.auth(), "refused", failed.id)
    # The hash may have expired: then the mark is its only field, and must expire, too.
    pipe.expireat(keys.auth(), int(failed.expires_at), nx=True)
    pipe.execute()


@dataclass(frozen=True, slots=True)
class LoginState:
    """What all processes know of the logins of this outage. Times are epoch seconds."""

    attempts: int = 0
    attempted_at: float = 0.0
    refused: str = ""  # why Kite refused the credentials: a person must act
    hint: str = ""  # what to do about it
    refused_at: float = 0.0
    totp_window: int = 0  # the last half minute (since the epoch) whose TOTP was used


def load_login_state(client: redis.Redis, keys: Keys, now: float) -> LoginState:
    """Read `P:login`. Attempts older than an hour belong to another outage. Raise WrongKeyType."""
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
    """Count one more attempt in this outage. Only the holder of `P:login:lock` writes."""
    client.hset(keys.login(), mapping={"attempts": state.attempts + 1, "attempted_at": _iso(now)})


def note_refusal(client: redis.Redis, keys: Keys, error: LoginRefused, now: float) -> None:
    """Record that Kite refused the credentials. No process tries them again before `pkb login`."""
    fields = {"refused": error.message, "hint": error.hint, "refused_at": _iso(now)}
    client.hset(keys.login(), mapping=fields)  # type: ignore[arg-type]  # dict is invariant


def clear_outage(client: redis.Redis, keys: Keys) -> None:
    """Clear attempts and refusals, because a person logs in."""
    client.hdel(keys.login(), "attempts", "attempted_at", "refused", "hint", "refused_at")


def note_totp_window(client: redis.Redis, keys: Keys, window: int) -> None:
    """Record that the TOTP of this half minute was used: Kite accepts each once."""
    client.hset(keys.login(), "totp_window", window)


def _hash(client: redis.Redis, key: str) -> dict[str, str]:
    with expect_type(client, key, "hash"):
        found: Any = client.hgetall(key)
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
