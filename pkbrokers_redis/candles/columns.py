"""The columns of a shard's arrays. Import it as `col`: `inst[col.CUM_VOLUME]`, `candles[i, k, 0, col.HIGH]`.

All columns are float64, so that one compiled pass over a batch of ticks applies every rule.
NaN means that a value is unknown. Times ending in `_TIME`, `_AT`, `_FROM`, `_TO` are epoch milliseconds.
"""

from __future__ import annotations

from pkbrokers_redis.candles.model import BATCH_WIDTH

# `inst`, one row an instrument. The columns before WINDOW_SIZE are stored in Redis, in this order.
(
    FIRST_AT, FIRST_TIME, FIRST_VOLUME,  # the first tick: receive time (0: no tick yet), trade time, volume
    DAY_S,  # local midnight of the newest trade date, epoch seconds
    CUM_VOLUME, BASELINE,  # the day's highest cumulative volume; the part of it that is in no candle
    OI_TIME, OI_VOLUME,  # trade time and volume of the tick that gave the newest open interest
    GAP_FROM, GAP_TO,  # half-open span of the last outage that is not backfilled; both 0: none
    BACKFILLED_FROM, BACKFILLED_TO,  # half-open span that Kite's history covered last; both 0: none
    OFF_SESSION_TIME, OFF_SESSION_VOLUME,  # the latest tick outside the windows; both 0: none
    WINDOW_SIZE,  # how many rows of `window` are in use
    HEARD,  # until when its feed was received, as ingest records it; 0: no feed is known
    RAISED_TIME, RAISED_SOURCE,  # trade time and producer of the tick that gave CUM_VOLUME; 0: not known
    LOWER_COUNT, LOWER_VOLUME, LOWER_AT,  # packets that agree on a lower volume; the last one of them
    LOWER_BASE,  # the day's volume before the tick that they contradict
) = range(22)  # fmt: skip
INST_WIDTH = 22

# `window`, one row a tick: the instrument's recent ticks, newest first
TICK_TIME, TICK_VOLUME, TICK_PRICE, TICK_DAY_HIGH, TICK_DAY_LOW = range(5)
TICK_STATE_WIDTH = 5
WINDOW_MAX = 16  # ticks; Kite sends about one a second and the grace is 2 s

# `candles`, one row a recent candle. START and END are epoch seconds; START 0 marks an unused row.
(
    START, END, DAY,  # DAY is the local midnight of its trade date
    OPEN, HIGH, LOW, CLOSE,
    VOL_START, VOL_END,  # cumulative volume before and at the end of the candle
    OPEN_INTEREST, TICKS, FLAG,
    OPEN_TIME, OPEN_VOLUME, CLOSE_TIME, CLOSE_VOLUME,  # sort keys of the ticks that gave open and close
    REV,  # revision announced last, or UNANNOUNCED
    COMPLETE, LISTED, DIRTY, ANNOUNCE,  # 0 or 1: over; in the list; changed; to be announced by the commit
    UNHEARD,  # 1: flagged `gap` because its feed was not heard to its end, and no outage is known yet
) = range(22)  # fmt: skip
CANDLE_WIDTH = 22
UNANNOUNCED = -1.0

# `evicted` and `late`: an instrument and an interval index, then the row described at `ShardArrays`
EVICTED_WIDTH = 2 + CANDLE_WIDTH
LATE_TICK_WIDTH = 2 + BATCH_WIDTH + 2

# `scalars`
(
    WATERMARK,  # the latest trade time applied, ms
    NEXT_DUE,  # when the next candle must be closed, ms; inf: none is open
    CLOSE_CURSOR,  # instrument where the pass of `close_due` resumes; 0: no pass is under way
    INSTRUMENTS, DIRTY_SIZE, EVICTED_SIZE, LATE_SIZE,  # rows in use of the arrays of that name
    DAYS, LAST_DAY,  # rows in use of `day_ms`, and the one found last
    UNHEARD_SIZE,  # at least so many candles are UNHEARD
) = range(10)  # fmt: skip
SCALARS = 10

# `counts`: what became of the ticks
(
    C_TICKS, C_FIRST, C_NEWS, C_REPEAT, C_OFF_SESSION, C_INVALID, C_CLAMPED, C_LATE, C_BEYOND_WINDOW, C_EARLY,
    C_BACKFILLED, C_UNHEARD, C_TAKEN_BACK,
) = range(13)  # fmt: skip
COUNT_NAMES = (
    "ticks", "first_sight", "news", "repeats", "off_session", "invalid", "future_clamped", "late",
    "late_beyond_window", "before_baseline", "already_backfilled",
    "closed_unheard", "volumes_taken_back",
)  # fmt: skip

# Why `rules.apply` returned
DONE, NEED_DAY, FULL, LOG_FULL, LIMIT = range(5)
