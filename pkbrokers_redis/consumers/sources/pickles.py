"""The pickles of days that upstream publishes each evening, from this machine's folder or from afar."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta

from pkbrokers_redis.consumers.files.frames import KOLKATA_SECONDS, Frames, cut
from pkbrokers_redis.consumers.files.pickles import DAILY_LATEST, ReadFrames, daily_name, read_frames
from pkbrokers_redis.consumers.files.unpickler import PICKLE_BYTES_MAX
from pkbrokers_redis.consumers.sources.base import Context, Source
from pkbrokers_redis.consumers.sources.published import Published, fetch, folder_of

DAYS_BACK = 10  # as far as upstream looks for the last evening's file: the longest row of holidays


def candidates(now_ms: float) -> list[str]:
    """File names, the best first: the dated ones of the last days, then the undated one."""
    today = datetime.fromtimestamp(now_ms / 1000 + KOLKATA_SECONDS, UTC).date()
    return [*(daily_name(today - timedelta(days=n)) for n in range(DAYS_BACK)), DAILY_LATEST]


class PickleSource(Source):
    """`stock_data_DDMMYYYY.pkl` or `daily_candles.pkl` in the data folder, read by our unpickler."""

    name = "pickle"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._as_of_ms: float | None = None

    def is_available(self) -> bool:
        if any((self.context.folder / name).exists() for name in candidates(self.context.now_ms())):
            return True
        self.reason = f"there is no stock_data_….pkl in {self.context.folder}"
        return False

    def fetch_data(self, symbols: Sequence[str] | None, start_date: date, end_date: date) -> Frames:
        paths = [self.context.folder / name for name in candidates(self.context.now_ms())]
        path = next(path for path in paths if path.exists())
        self._as_of_ms = path.stat().st_mtime * 1000
        return self._chosen(read_frames(path), symbols, start_date, end_date)

    def _chosen(
        self, found: ReadFrames, symbols: Sequence[str] | None, start_date: date, end_date: date
    ) -> Frames:
        self.refused += found.refused
        self.reason = found.why
        names = found.frames if symbols is None else [name for name in symbols if name in found.frames]
        frames = {name: cut(found.frames[name], start_date, end_date) for name in names}
        return {name: frame for name, frame in frames.items() if len(frame)}

    def as_of_ms(self) -> float | None:
        return self._as_of_ms


class RemotePickleSource(Published, PickleSource):
    """The published ones."""

    name = "remote pickle"

    def fetch_data(self, symbols: Sequence[str] | None, start_date: date, end_date: date) -> Frames:
        folder = folder_of(self.context.settings) or ""
        for name in candidates(self.context.now_ms()):
            fetched = fetch(folder, name, PICKLE_BYTES_MAX)
            if fetched is not None:
                self._as_of_ms = fetched.written_ms
                return self._chosen(read_frames(fetched.data), symbols, start_date, end_date)
        self.reason = "there is no stock_data_….pkl at PKB_FILES_URL"
        return {}
