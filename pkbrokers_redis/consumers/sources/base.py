"""What a source of candles is: something that may have day candles of symbols, and says so.

    class Mine(Source):
        name = "mine"

        def is_available(self) -> bool: ...
        def fetch_data(self, symbols, start_date, end_date) -> Frames: ...

and a row in `SOURCES` (`sources/table.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pkbrokers_redis.consumers.files.frames import Frames
from pkbrokers_redis.settings import Settings

if TYPE_CHECKING:
    from pkbrokers_redis.consumers.store import CandleStore


@dataclass
class Context:
    """What sources are made from. `now_ms` is market time; `store` opens the store, or raises."""

    settings: Settings
    folder: Path
    now_ms: Callable[[], float]
    store: Callable[[], CandleStore]
    names: dict[str, Path] = field(default_factory=dict)


class Source(ABC):
    """One place that day candles can come from. What it raises is the reason for which it is skipped."""

    name: ClassVar[str]
    has_history: ClassVar[bool] = True  # False: only the day at hand
    is_remote: ClassVar[bool] = False  # True: asked only for what nobody here has

    def __init__(self, context: Context) -> None:
        self.context = context
        self.reason = ""  # why it is not available, or what it left out; a short line
        self.refused = 0  # entries of its answer that were no candles

    @abstractmethod
    def is_available(self) -> bool:
        """Whether asking makes sense now; cheap, and with a `reason` if not."""

    @abstractmethod
    def fetch_data(self, symbols: Sequence[str] | None, start_date: date, end_date: date) -> Frames:
        """Symbol → frame (`files.frames`) of its days from `start_date` to `end_date`, both included.

        None means every symbol it has. Symbols it does not know are left out.
        """

    def as_of_ms(self) -> float | None:
        """When what it answered with was true, market time; None: as its newest row."""
        return None

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Give back what it holds."""
