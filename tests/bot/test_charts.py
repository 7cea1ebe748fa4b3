"""The chart shows exactly the rows."""

from __future__ import annotations

import io

import pytest
import redis
from matplotlib import image

from pkbrokers_redis.bot.charts import BACKGROUND, DOWN, FLAT, UP, draw, png
from pkbrokers_redis.candles.model import Candle
from pkbrokers_redis.settings import Settings
from tests.bot.telegram import BOB, Telegram
from tests.client.contract import INFY, OPEN_S, push, row

DAY = 86_400
OVERNIGHT = [
    Candle(OPEN_S + 22_200, 100.0, 104.0, 99.0, 103.0, 500, None, 9),
    Candle(OPEN_S + DAY, 103.5, 103.5, 101.0, 101.5, 700, None, 9),
    Candle(OPEN_S + DAY + 300, 101.5, 106.5, 101.5, 101.5, 0, None, 9),
]


def hex_of(colour: object) -> str:
    from matplotlib.colors import to_hex

    return to_hex(colour)  # type: ignore[arg-type]


def test_bodies_wicks_and_volumes_are_the_rows() -> None:
    figure = draw("NSE:INFY", "5m", OVERNIGHT)
    prices, volumes = figure.axes
    [bodies, *_] = prices.containers
    for place, (bar, candle) in enumerate(zip(bodies, OVERNIGHT, strict=True)):
        assert bar.get_x() + bar.get_width() / 2 == pytest.approx(place), "no gap for the night"
        assert (bar.get_y(), bar.get_y() + bar.get_height()) == pytest.approx((candle.open, candle.close))
    [wicks] = [lines for lines in prices.collections if lines.get_label() == "wicks"]
    for place, (line, candle) in enumerate(zip(wicks.get_segments(), OVERNIGHT, strict=True)):
        assert line.tolist() == [[place, candle.low], [place, candle.high]]
    [bars] = volumes.containers
    assert [bar.get_height() for bar in bars] == [candle.volume for candle in OVERNIGHT]
    assert [hex_of(bar.get_facecolor()) for bar in bodies] == [UP, DOWN, FLAT]


def test_the_last_the_highest_and_the_lowest_price_are_labelled() -> None:
    prices, _ = draw("NSE:INFY", "5m", OVERNIGHT).axes
    labels = {text.get_text(): text.xy for text in prices.texts}
    assert labels["106.50"] == (2, 106.5)
    assert labels["99.00"] == (0, 99.0)
    assert labels["101.50"][1] == 101.5


def test_times_are_in_india_and_a_new_day_has_its_date() -> None:
    _, volumes = draw("NSE:INFY", "5m", OVERNIGHT).axes
    assert [text.get_text() for text in volumes.get_xticklabels()] == [
        "15:25\n05 Jan",
        "09:15\n06 Jan",
        "09:20",
    ]


def test_every_visible_part_lies_inside_the_axes() -> None:
    prices, volumes = draw("NSE:INFY", "5m", OVERNIGHT).axes
    low, high = prices.get_ylim()
    assert low < 99.0 and high > 106.5
    assert volumes.get_ylim()[1] > 700


@pytest.mark.parametrize(
    "candles",
    [
        [Candle(OPEN_S, 5.0, 5.0, 5.0, 5.0, 0, None, 1)],
        [Candle(OPEN_S + n * DAY, 1e6 + n, 1e6 + n, 1e6 + n, 1e6 + n, 1e9, None, 1) for n in range(90)],
        [Candle(OPEN_S, 0.0025, 0.0025, 0.0025, 0.0025, 0.5, None, 1)] * 2,
    ],
)
def test_unusual_rows_are_drawn(candles: list[Candle]) -> None:
    picture = image.imread(io.BytesIO(png("NSE:A$B_$^x", "day", candles)), format="png")
    assert picture.shape[:2] == (1215, 1080)
    assert hex_of(picture[2, 2]) == BACKGROUND, "dark"


@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
def test_a_chart_is_sent_as_a_picture_of_redis_rows(
    running: None, telegram: Telegram, client: redis.Redis, bot_settings: Settings
) -> None:
    rows = [row(OPEN_S + n * 300, 100 + n, open=99 + n, high=101 + n, low=98 + n) for n in range(5)]
    push(client, bot_settings.keys, INFY, "5m", rows)
    telegram.say(BOB, "/chart INFY")
    sent = telegram.wait(lambda m: m.method == "sendPhoto")
    assert sent.text == "<b>NSE:INFY</b> 5m · 104.00"
    candles = [Candle(OPEN_S + n * 300, 99 + n, 101 + n, 98 + n, 100 + n, 10, None, 1) for n in range(5)]
    assert sent.content == png("NSE:INFY", "5m", candles), "the very rows of Redis, to the pixel"
    assert "no 15m candles" in telegram.ask(BOB, "/chart INFY 15m").text
