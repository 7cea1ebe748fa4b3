"""Candlesticks with volume as a PNG: dark, without gaps for nights, readable on a phone.

Drawn in a process of its own: matplotlib holds the interpreter for tenths of a second, and the loop that
answers all chats, and the thread that watches the alerts, must not wait for it.
"""

from __future__ import annotations

import io
import multiprocessing
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

from pkbrokers_redis.bot.text import clock_time, count, day_time, money, percent
from pkbrokers_redis.candles.model import Candle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES, HEIGHT_INCHES, DPI = 7.2, 8.1, 150  # 1080 × 1215 pixels: a phone's width, upright
BACKGROUND, GRID, INK, FAINT = "#10141a", "#252c36", "#e6e9ee", "#8a94a3"
UP, DOWN, FLAT = "#26a69a", "#ef5350", "#8a94a3"
TICKS_MAX = 6  # labels below the axis
BODY_WIDTH = 0.7
DAY_SECONDS = 86_400


def draw(symbol: str, interval: str, candles: Sequence[Candle]) -> Figure:
    """The figure: candle i stands at x = i, so that nights and holidays take no room.

    `candles` is not empty, in ascending order; the last may still be forming.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=DPI, facecolor=BACKGROUND)
    prices, volumes = figure.subplots(2, 1, sharex=True, height_ratios=[3.6, 1])
    figure.subplots_adjust(left=0.03, right=0.865, top=0.885, bottom=0.075, hspace=0.05)
    for axes in (prices, volumes):
        _style(axes)
    _candles(prices, candles)
    _volumes(volumes, candles)
    _labels(prices, candles)
    _times(volumes, candles)
    _title(figure, symbol, interval, candles)
    return figure


def png(symbol: str, interval: str, candles: Sequence[Candle]) -> bytes:
    """The picture of `draw`."""
    out = io.BytesIO()
    draw(symbol, interval, candles).savefig(out, format="png", facecolor=BACKGROUND)
    return out.getvalue()


def _style(axes: Axes) -> None:
    axes.set_facecolor(BACKGROUND)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.tick_right()
    axes.tick_params(colors=INK, labelsize=11, length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _colour(candle: Candle) -> str:
    return UP if candle.close > candle.open else DOWN if candle.close < candle.open else FLAT


def _candles(axes: Axes, candles: Sequence[Candle]) -> None:
    places = range(len(candles))
    colours = [_colour(candle) for candle in candles]
    axes.vlines(
        places,
        [c.low for c in candles],
        [c.high for c in candles],
        colors=colours,
        linewidth=1.3,
        label="wicks",
    )
    spread = max(c.high for c in candles) - min(c.low for c in candles)
    spread = spread or abs(candles[-1].close) * 0.001 or 1.0
    axes.bar(
        places,
        [c.close - c.open for c in candles],
        BODY_WIDTH,
        bottom=[c.open for c in candles],
        color=colours,
        # A body without height is still a line that one sees.
        edgecolor=colours,
        linewidth=1.0,
        label="bodies",
    )
    low, high = min(c.low for c in candles), max(c.high for c in candles)
    axes.set_ylim(low - 0.06 * spread, high + 0.08 * spread)
    axes.set_xlim(-1, len(candles) + 0.2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.{_places(spread)}f}")


def _places(spread: float) -> int:
    return 0 if spread > 50 else 1 if spread > 5 else 2 if spread > 0.05 else 4


def _volumes(axes: Axes, candles: Sequence[Candle]) -> None:
    axes.bar(
        range(len(candles)),
        [c.volume for c in candles],
        BODY_WIDTH,
        color=[_colour(candle) for candle in candles],
        alpha=0.75,
        label="volume",
    )
    axes.set_ylim(0, max((c.volume for c in candles), default=0) * 1.15 or 1)
    axes.yaxis.set_major_formatter(lambda value, _: _short(value))
    axes.locator_params(axis="y", nbins=3)


def _short(value: float) -> str:
    """`1.2L` and `3.4Cr` as India counts, `950` below."""
    for size, unit in ((1e7, "Cr"), (1e5, "L"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def _labels(axes: Axes, candles: Sequence[Candle]) -> None:
    """The last price on the axis, the highest and the lowest beside their candles."""
    last, n = candles[-1], len(candles)
    axes.axhline(last.close, color=_colour(last), linewidth=1.0, linestyle=(0, (4, 3)))
    axes.annotate(
        money(last.close),
        (1.0, last.close),
        xycoords=("axes fraction", "data"),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        fontsize=11.5,
        fontweight="bold",
        color=BACKGROUND,
        bbox={"boxstyle": "round,pad=0.25", "fc": _colour(last), "ec": "none"},
        annotation_clip=False,
        zorder=5,
    )
    top = max(range(n), key=lambda i: candles[i].high)
    bottom = min(range(n), key=lambda i: candles[i].low)
    for place, price, offset, where in (
        (top, candles[top].high, 4, "bottom"),
        (bottom, candles[bottom].low, -4, "top"),
    ):
        side = "left" if place < 0.2 * n else "right" if place > 0.8 * n else "center"
        axes.annotate(
            money(price),
            (place, price),
            xytext=(0, offset),
            textcoords="offset points",
            ha=side,
            va=where,
            fontsize=11,
            color=INK,
            annotation_clip=False,
        )


def _times(axes: Axes, candles: Sequence[Candle]) -> None:
    """Times in India; a date instead where a new day begins."""
    n = len(candles)
    step = max(1, -(-n // TICKS_MAX))
    places = list(range(0, n, step))
    days = [_day(candle) for candle in candles]
    texts: list[str] = []
    for i, place in enumerate(places):
        start = candles[place].start
        new_day = i == 0 or days[place] != days[places[i - 1]]
        date = day_time(start)[:6]
        if days[-1] - days[0] >= n - 1 and n > 1:
            texts.append(date)  # day candles: no time of day says anything
        else:
            texts.append(
                f"{clock_time(start, seconds=False)}\n{date}" if new_day else clock_time(start, False)
            )
    axes.set_xticks(places, texts)


def _day(candle: Candle) -> int:
    return (candle.start + 19_800) // DAY_SECONDS


def _title(figure: Figure, symbol: str, interval: str, candles: Sequence[Candle]) -> None:
    first, last = candles[0], candles[-1]
    change = (last.close / first.open - 1) * 100 if first.open else None
    figure.text(
        0.03, 0.955, _plain(f"{symbol}  {interval}"), color=INK, fontsize=17, fontweight="bold", va="center"
    )
    figure.text(
        0.03,
        0.912,
        _plain(
            f"{money(last.close)}  {percent(change)} since {day_time(first.start)} · "
            f"volume {count(sum(c.volume for c in candles))}"
        ),
        color=FAINT,
        fontsize=11.5,
        va="center",
    )


def _plain(text: str) -> str:
    """matplotlib reads $ as the beginning of a formula."""
    return text.replace("$", r"\$")


class ChartPool:
    """One drawing process, started with the first chart. A drawing that crashes it costs that chart only."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._lock = threading.Lock()

    def png(self, symbol: str, interval: str, candles: Sequence[Candle]) -> bytes:
        """Blocks until it is drawn: call it in a thread."""
        for last_try in (False, True):
            pool = self._started()
            try:
                return pool.submit(png, symbol, interval, list(candles)).result()
            except BrokenProcessPool:
                self.close()
                if last_try:
                    raise
        raise AssertionError("unreachable")

    def close(self) -> None:
        """End the process."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def _started(self) -> ProcessPoolExecutor:
        with self._lock:
            if self._pool is None:
                # Spawned: a fork would copy our threads' locks in whatever state they are.
                self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
            return self._pool
