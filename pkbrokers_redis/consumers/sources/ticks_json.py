"""ticks.json: the day so far of every symbol, from this machine's file or a published one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date

from pkbrokers_redis.consumers.files.frames import Frames, cut
from pkbrokers_redis.consumers.files.ticks_json import BYTES_MAX, NAME, ReadTicks, read_ticks_json
from pkbrokers_redis.consumers.sources.base import Context, Source
from pkbrokers_redis.consumers.sources.published import Published, fetch, folder_of

ZIPPED = NAME + ".zip"  # as upstream publishes it


class TicksFileSource(Source):
    """The file beside the pickles, if `pkb snapshot ticks` or somebody else writes one."""

    name = "ticks.json"
    has_history = False

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._as_of_ms: float | None = None

    def is_available(self) -> bool:
        path = self.context.folder / NAME
        if path.exists():
            return True
        self.reason = f"there is no {NAME} in {self.context.folder}"
        return False

    def fetch_data(self, symbols: Sequence[str] | None, start_date: date, end_date: date) -> Frames:
        return self._chosen(read_ticks_json(self.context.folder / NAME), symbols, start_date, end_date)

    def _chosen(
        self, found: ReadTicks, symbols: Sequence[str] | None, start_date: date, end_date: date
    ) -> Frames:
        self.refused += found.refused
        self.reason = found.why
        self._as_of_ms = found.as_of_ms
        wanted = (
            found.frames
            if symbols is None
            else {name: found.frames[name] for name in symbols if name in found.frames}
        )
        frames = {symbol: cut(frame, start_date, end_date) for symbol, frame in wanted.items()}
        return {symbol: frame for symbol, frame in frames.items() if len(frame)}

    def as_of_ms(self) -> float | None:
        return self._as_of_ms


class RemoteTicksSource(Published, TicksFileSource):
    """The published one."""

    name = "remote ticks.json"

    def fetch_data(self, symbols: Sequence[str] | None, start_date: date, end_date: date) -> Frames:
        folder = folder_of(self.context.settings) or ""
        fetched = fetch(folder, NAME, BYTES_MAX) or fetch(folder, ZIPPED, BYTES_MAX)
        if fetched is None:
            self.reason = f"there is no {NAME} at PKB_FILES_URL"
            return {}
        return self._chosen(read_ticks_json(fetched.data), symbols, start_date, end_date)
