"""India's time. It has no daylight saving time, so an offset says all of it."""

from __future__ import annotations

from datetime import timedelta, timezone
from typing import Final
from zoneinfo import ZoneInfo

IST_SECONDS: Final = 19_800  # +05:30
IST_MS: Final = IST_SECONDS * 1000
IST: Final = timezone(timedelta(seconds=IST_SECONDS), "IST")
KOLKATA: Final = ZoneInfo("Asia/Kolkata")  # the same under its name, which pandas shows and compares
