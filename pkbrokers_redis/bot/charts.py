"""Candlesticks with volume as a PNG: dark, without gaps for nights, readable on a phone."""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pkbrokers_redis.bot.text import clock_time, count, day_time, money, percent
from pkbrokers_redis.candles.calendar import IST_SECONDS
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
DRAWING = threading.Lock()  # matplotlib is not thread-safe


def png(symbol: str, interval: str, candles: Sequence[Candle]) -> bytes:
    """Return the picture of `draw`. It takes tenths of a second: call it in a thread."""
    out = io.BytesIO()
    with DRAWING:
        draw(symbol, interval, candles).savefig(out, format="png", facecolor=BACKGROUND)
    return out.getvalue()


def draw(symbol: str, interval: str, candles: Sequence[Candle]) -> Figure:
    """Return the figure: candle i stands at x = i, so that nights and holidays take no room.

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
    volumes.set_xticks(*_times(candles))
    _title(figure, f"{symbol}  {interval}", candles)
    return figure


def _style(axes: Axes) -> None:
    axes.set_facecolor(BACKGROUND)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.tick_right()
    axes.tick_params(colors=INK, labelsize=11, length=0)
    axes.spines[:].set_visible(False)


def _colour(candle: Candle) -> str:
    return UP if candle.close > candle.open else DOWN if candle.close < candle.open else FLAT


def _candles(axes: Axes, candles: Sequence[Candle]) -> None:
    places = range(len(candles))
    colours = [_colour(candle) for candle in candles]
    lows, highs = [c.low for c in candles], [c.high for c in candles]
    axes.vlines(places, lows, highs, colors=colours, linewidth=1.3, label="wicks")
    bodies, opens = [c.close - c.open for c in candles], [c.open for c in candles]
    # The edge: a body without height is still a line that one sees.
    axes.bar(places, bodies, BODY_WIDTH, bottom=opens, color=colours, edgecolor=colours, linewidth=1.0)
    low, high = min(lows), max(highs)
    spread = high - low or abs(candles[-1].close) * 0.001 or 1.0
    axes.set_ylim(low - 0.06 * spread, high + 0.08 * spread)
    axes.set_xlim(-1, len(candles) + 0.2)
    decimals = 0 if spread > 50 else 1 if spread > 5 else 2 if spread > 0.05 else 4
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.{decimals}f}")


def _volumes(axes: Axes, candles: Sequence[Candle]) -> None:
    volumes, colours = [c.volume for c in candles], [_colour(c) for c in candles]
    axes.bar(range(len(candles)), volumes, BODY_WIDTH, color=colours, alpha=0.75)
    axes.set_ylim(0, max(volumes) * 1.15 or 1)
    axes.yaxis.set_major_formatter(lambda value, _: _short(value))
    axes.locator_params(axis="y", nbins=3)


def _short(value: float) -> str:
    """`1.2L` and `3.4Cr` as India counts, `950` below."""
    for size, unit in ((1e7, "Cr"), (1e5, "L"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def _labels(axes: Axes, candles: Sequence[Candle]) -> None:
    """Write the last price on the axis, the highest and the lowest next to their candles."""
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
    for place, price, offset in ((top, candles[top].high, 4), (bottom, candles[bottom].low, -4)):
        axes.annotate(
            money(price),
            (place, price),
            xytext=(0, offset),
            textcoords="offset points",
            ha="left" if place < 0.2 * n else "right" if place > 0.8 * n else "center",
            va="bottom" if offset > 0 else "top",
            fontsize=11,
            color=INK,
            annotation_clip=False,
        )


def _times(candles: Sequence[Candle]) -> tuple[list[int], list[str]]:
    """Return places and their times in India; a date where a new day begins, and for day candles."""
    places = list(range(0, len(candles), -(-len(candles) // TICKS_MAX)))
    days = [(candle.start + IST_SECONDS) // DAY_SECONDS for candle in candles]
    is_daily = len(candles) > 1 and days[-1] - days[0] >= len(candles) - 1
    texts: list[str] = []
    day_before = None
    for place in places:
        start, date = candles[place].start, day_time(candles[place].start)[:6]
        time_text = clock_time(start, seconds=False)
        if is_daily:
            texts.append(date)
        else:
            texts.append(time_text if days[place] == day_before else f"{time_text}\n{date}")
        day_before = days[place]
    return places, texts


def _title(figure: Figure, title: str, candles: Sequence[Candle]) -> None:
    first, last = candles[0], candles[-1]
    change = (last.close / first.open - 1) * 100 if first.open else None
    details = (
        f"{money(last.close)}  {percent(change)} since {day_time(first.start)} · "
        f"volume {count(sum(c.volume for c in candles))}"
    )
    title = title.replace("$", r"\$")  # matplotlib reads $ as the beginning of a formula
    figure.text(0.03, 0.955, title, color=INK, fontsize=17, fontweight="bold", va="center")
    figure.text(0.03, 0.912, details, color=FAINT, fontsize=11.5, va="center")
