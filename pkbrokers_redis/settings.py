"""All settings: environment variables `PKB_…`, a `.env` file, or one file per setting in /run/secrets.

`pkb config` prints them. Secrets are `SecretStr`, so that no repr, log or traceback shows them.
"""

from __future__ import annotations

import difflib
import os
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import platformdirs
from dotenv import dotenv_values
from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from pkbrokers_redis.candles.model import DEFAULT_INTERVALS, Interval, parse_intervals
from pkbrokers_redis.errors import SettingsError
from pkbrokers_redis.keys import Keys

SECRETS_DIR = Path("/run/secrets")  # where Docker and Kubernetes mount them; a file's name is the variable's

DEFAULT_INTERVALS_TEXT = ",".join(interval.name for interval in DEFAULT_INTERVALS)

URL_SCHEMES = {
    "kite_ws_url": ("wss", "ws"),
    "kite_api_url": ("https", "http"),
    "kite_login_url": ("https", "http"),
    "turso_url": ("libsql", "https", "http", "wss", "ws"),
    "telegram_api_url": ("https", "http"),
}


def _default_data_dir() -> Path:
    """Return the user's data folder; a user without a home (a container's uid) has one in the temp folder."""
    try:
        return platformdirs.user_data_path("pkbrokers-redis")
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"pkbrokers-redis-{os.getuid()}"


class Settings(BaseSettings):
    """All settings, frozen. Workers receive this object, and nothing else reads the environment.

    Example:
        settings = load_settings(shards=4)
        settings.keys.ticks(0)  # "pkb:{0}:ticks"
    """

    model_config = SettingsConfigDict(
        env_prefix="PKB_", env_file=".env", extra="ignore", frozen=True, env_ignore_empty=True
    )

    # the store
    redis_url: SecretStr | None = Field(None, description="Redis to use; unset: the embedded server")
    rq_redis_url: SecretStr | None = Field(None, description="Redis of the jobs; unset: PKB_REDIS_URL")
    prefix: str = Field("pkb", description="first part of every key", pattern=r"^[A-Za-z0-9_.\-]{1,32}$")
    shards: int = Field(8, ge=1, le=4096, description="number of shards; fixed once the store exists")
    intervals_text: str = Field(
        DEFAULT_INTERVALS_TEXT,
        validation_alias="PKB_INTERVALS",
        description="candle intervals; `5m:200` keeps 200 completed rows",
    )
    data_dir: Path = Field(
        default_factory=_default_data_dir,
        description="embedded server's data, spool files, snapshots",
    )
    embedded_server: str = Field(
        "valkey", description="`valkey` (shipped), `redis` (redis-server 7 on PATH), or a path to a binary"
    )
    embedded_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="embedded server: TCP port on 127.0.0.1, with a password; 0: any free; unset: no TCP",
    )
    compact: bool = Field(False, description="embedded server: smaller lists, 1.7-2 times slower bulk reads")
    stream_retention_seconds: float = Field(
        120, gt=0, allow_inf_nan=False, description="age at which applied ticks are trimmed"
    )
    stream_max_entries: int = Field(200_000, ge=100, description="hard cap of a tick stream, in entries")
    closed_max_entries: int = Field(100_000, ge=100, description="cap of a closed-candle stream, in entries")
    buffer_max_bytes: int = Field(
        256 * 2**20, ge=10_000, description="ingest: frames kept in memory until Redis has them"
    )
    spool_max_bytes: int = Field(
        2**30, ge=0, description="ingest: frames kept on disk while Redis is unavailable"
    )
    spool_dir: Path | None = Field(None, description="folder of these frames; unset: `spool` in PKB_DATA_DIR")

    # Kite
    kite_api_key: str | None = Field(None, description="Kite Connect api key; several as a comma list")
    kite_api_secret: SecretStr | None = Field(None, description="Kite Connect api secret")
    kite_access_token: SecretStr | None = Field(
        None, description="Kite Connect access token of the day, one per api key"
    )
    kite_user_id: str | None = Field(None, description="Kite user id (web login)")
    kite_password: SecretStr | None = Field(None, description="Kite password (web login)")
    kite_totp_secret: SecretStr | None = Field(None, description="TOTP seed (web login)")
    kite_enctoken: SecretStr | None = Field(None, description="enctoken of a web session")
    kite_ws_url: str = Field("wss://ws.kite.trade", description="websocket endpoint")
    kite_api_url: str = Field("https://api.kite.trade", description="REST endpoint")
    kite_login_url: str = Field("https://kite.zerodha.com", description="web login endpoint")
    kite_mode: Literal["ltp", "quote", "full"] = Field("full", description="ltp, quote or full")
    instruments: str = Field("", description="NSE:INFY, tokens, indices, a file, nse-equity, nfo-nifty, all")

    # time
    sessions: Literal["market", "always"] = Field("market", description="`always`: no session filter")
    timezone: str = Field("Asia/Kolkata", description="midnight of PKB_SESSIONS=always")
    clock: Literal["wall", "event"] = Field("wall", description="`event`: candles close by event time only")
    close_grace_seconds: float = Field(
        2, ge=0, le=3600, description="a completed candle waits so long for late ticks"
    )
    lease_seconds: float = Field(
        3, ge=0.5, le=300, description="maximum time until a dead aggregator's shards have a new owner"
    )
    time_shift: str | None = Field(
        None, description="rehearsals: `market,machine,speed`, two epoch seconds that coincide and a factor"
    )
    calendar: Path | None = Field(None, description="a calendar file that overrides the shipped one")

    # files and other databases
    files_dir: Path | None = Field(
        None, description="ticks.json, pickles, candles.db, Parquet; unset: `files` in PKB_DATA_DIR"
    )
    files_url: str | None = Field(
        None, description="URL or folder of the published files; unset: PKB_GITHUB_REPO's"
    )
    turso_url: str | None = Field(None, description="a libSQL (Turso) database that shares the candle file")
    turso_token: SecretStr | None = Field(None, description="its token")

    # sync and bot
    github_repo: str | None = Field(None, description="owner/name of the sync target")
    github_branch: str = Field("actions-data-download", description="branch of the sync target")
    github_path: str = Field("actions-data-download", description="folder in that branch")
    github_token: SecretStr | None = Field(None, description="token with contents:write")
    github_url: str | None = Field(None, description="clone URL, may be a local bare repository")
    telegram_token: SecretStr | None = Field(None, description="bot token")
    telegram_chats: str = Field("", description="chat ids that may use the bot")
    telegram_admins: str = Field("", description="user ids that may use admin commands")
    telegram_api_url: str = Field("https://api.telegram.org/bot", description="Bot API endpoint")
    telegram_file_max_bytes: int = Field(
        50_000_000, ge=1_000, description="largest file that the bot sends; a larger one is sent in parts"
    )

    # web
    web_host: str = Field("127.0.0.1", description="address that `pkb web` listens on")
    web_port: int = Field(8377, ge=0, le=65535, description="its port; 0 uses any free one")
    web_token: SecretStr | None = Field(None, description="if set, every request but /healthz must carry it")

    # logs
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="lowest level shown")
    log_format: Literal["text", "json"] = Field(
        "text", description="`text` is key=value, `json` one object per line"
    )

    @field_validator(*URL_SCHEMES)
    @classmethod
    def _check_url(cls, text: str | None, info: ValidationInfo) -> str | None:
        schemes = URL_SCHEMES[info.field_name or ""]
        if text is not None and not (_is_url(text) and urlsplit(text).scheme in schemes):
            begin = " or ".join(f"{scheme}://" for scheme in schemes)
            raise ValueError(f"is not a URL that begins with {begin} and names a host")
        return text

    @field_validator("files_url", "github_url")
    @classmethod
    def _check_url_or_path(cls, text: str | None) -> str | None:
        if text is not None and text.startswith(("https://", "http://")) and not _is_url(text):
            raise ValueError("is not a URL that names a host")
        return text

    @field_validator(
        "kite_api_key", "kite_access_token", "kite_enctoken", "github_token", "telegram_token", "turso_token"
    )
    @classmethod
    def _check_header_value(cls, value: str | SecretStr | None) -> str | SecretStr | None:
        text = value.get_secret_value() if isinstance(value, SecretStr) else value or ""
        if not (text.isascii() and text.strip().isprintable()):
            raise ValueError("holds a character that no HTTP header can carry, such as a typographic quote")
        return value

    @field_validator("timezone")
    @classmethod
    def _check_timezone(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError("is not a time zone; use a name such as Asia/Kolkata") from None
        return name

    @field_validator("time_shift")
    @classmethod
    def _check_time_shift(cls, text: str | None) -> str | None:
        try:
            if text is not None:
                market, machine, speed = map(float, text.split(","))
                if not (0 < market < 4e9 and 0 < machine < 4e9 and 0.01 <= speed <= 10_000):
                    raise ValueError
        except ValueError:
            raise ValueError("is not `market,machine,speed`: two epoch seconds and a factor") from None
        return text

    @cached_property
    def intervals(self) -> tuple[Interval, ...]:
        """Return the interval table in ascending length."""
        return parse_intervals(self.intervals_text)

    @property
    def files_folder(self) -> Path:
        """Return the folder of the snapshots."""
        return self.files_dir or self.data_dir / "files"

    @cached_property
    def keys(self) -> Keys:
        """Return the key names for this prefix and shard count."""
        return Keys(self.prefix, self.shards)


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return bool(parts.hostname) and parts.port != 0 and text.split() == [text]
    except ValueError:  # an unclosed bracket, an invalid port
        return False


def env_name(field: str) -> str:
    """Return the variable of a field: `PKB_CLOSE_GRACE_SECONDS` for `close_grace_seconds`."""
    return "PKB_INTERVALS" if field == "intervals_text" else f"PKB_{field.upper()}"


def set_names() -> dict[str, str]:
    """Return the `PKB_…` variables that are set and not empty → `environment` or `.env`."""
    found = dict.fromkeys((name.upper() for name, value in dotenv_values(".env").items() if value), ".env")
    found |= dict.fromkeys((name.upper() for name, value in os.environ.items() if value), "environment")
    return {name: place for name, place in found.items() if name.startswith("PKB_")}


def unknown_names() -> dict[str, str]:
    """Return the variables that are set and are not settings → the setting probably meant, or ""."""
    known = [env_name(field) for field in Settings.model_fields]
    return {
        name: next(iter(difflib.get_close_matches(name, known, 1)), "")
        for name in sorted(set_names().keys() - known)
    }


def load_settings(**overrides: Any) -> Settings:
    """Load the settings: overrides first, then the environment, `.env`, and files in /run/secrets.

    Args:
        **overrides: By field name. A secret's file is named as its variable, in either case:
            `/run/secrets/pkb_kite_access_token`.

    Raises:
        SettingsError: It names the variable and what is wrong, and never a secret's value.
    """
    if "intervals_text" in overrides:
        overrides["PKB_INTERVALS"] = overrides.pop("intervals_text")
    try:
        overrides["_secrets_dir"] = SECRETS_DIR if SECRETS_DIR.is_dir() else None
        settings = Settings(**overrides)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        field = str(problem["loc"][0]) if problem["loc"] else "?"
        name = field if field.startswith("PKB_") else env_name(field)
        text = problem["msg"].removeprefix("Value error, ")
        raise SettingsError(f"{name} {text[:1].lower()}{text[1:]}", f"correct or unset {name}") from None
    except OSError as error:
        raise SettingsError(
            f"{error.filename} cannot be read ({error.strerror})",
            "make it readable for the user of this process",
        ) from None
    settings.intervals  # noqa: B018  an invalid table must fail here and not in a worker's loop
    return settings
