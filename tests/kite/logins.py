"""A simulated Kite to log in at, and the settings that do."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from pkbrokers_redis.settings import Settings
from pkbrokers_redis.simulator.accounts import Account
from pkbrokers_redis.simulator.kite import SimulatedKite
from pkbrokers_redis.simulator.universe import universe

MakeSettings = Callable[..., Settings]
WEB = ("kite_user_id", "kite_password", "kite_totp_secret")
APP = ("kite_api_key", "kite_api_secret")


@contextlib.contextmanager
def simulated_kite(instruments: int = 20, **options: Any) -> Iterator[SimulatedKite]:
    with SimulatedKite(universe(instruments), **options) as kite:
        yield kite


def fields_of(kite: SimulatedKite, *names: str) -> dict[str, Any]:
    """Settings fields that point at this Kite, with those credentials of its test account."""
    given = {name.removeprefix("PKB_").lower(): value for name, value in kite.environment().items()}
    addresses = ("kite_ws_url", "kite_api_url", "kite_login_url")
    return {name: given[name] for name in (*addresses, *names)}


def secrets_of(account: Account) -> list[str]:
    return [account.password, account.totp_secret, account.api_secret]


def everything_shown(error: BaseException) -> str:
    """Return all that a person or a log can see of an error: text, fields, traceback with causes."""
    return "".join([str(error), repr(error), *traceback.format_exception(error)])


def requests_to(kite: SimulatedKite, path: str) -> int:
    return sum(seen.path == path for seen in kite.limits.seen)
