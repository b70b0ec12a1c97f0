"""The axes of a chart, and how a curve with more values than there is room for is reduced."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

Point = tuple[float, float]
LARGEST = 1e300
"""Larger values are drawn as a gap, like NaN: the length of an axis must be finite."""
SMALLEST = 1e-300
"""Smaller values do not fit on a logarithmic axis: they have few digits, or are zero."""


@dataclass(frozen=True)
class Scale:
    """A mapping from values to places between 0 and 1.

    Attributes:
        low: The value at 0.
        high: The value at 1.
        ticks: Values between them.
        log: Whether equal distances stand for equal factors.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Return the place of a value."""
        if self.log:
            low, high = math.log10(self.low), math.log10(self.high)
            return (math.log10(value) - low) / (high - low)
        return (value - self.low) / (self.high - self.low)


def value_scale(values: Iterable[float], may_be_log: bool = False) -> Scale:
    """Return a scale that fits all finite values, with a little room.

    Args:
        values: The values of all lines; NaN and infinities are ignored.
        may_be_log: Use a logarithmic scale if all values are positive and span a factor of 50.
    """
    finite = [value for value in values if abs(value) <= LARGEST]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    if may_be_log and low >= SMALLEST and low <= high / 50:
        return _log_scale(low, high)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # flat
        room = abs(low) * 0.1 or 1.0
    else:
        room = (high - low) * 0.06
    # Values that are never negative get no axis below zero.
    bottom = max(low - room, 0.0) if low >= 0 else low - room
    return Scale(bottom, high + room, _ticks(bottom, high + room, 6))


def iteration_scale(end: float, epoch_ends: Sequence[int] = ()) -> Scale:
    """Return a scale from 0 to the last iteration, with ticks at the ends of epochs if given."""
    end = max(end, 1.0)
    if len(epoch_ends) < 2:
        ticks = tuple(t for t in _ticks(0.0, end, 5) if t == int(t) > 0)
        return Scale(0.0, end, ticks)
    step = next(s for s in _steps() if len(epoch_ends) / s <= 8)
    ends = tuple(float(x) for n, x in enumerate(epoch_ends, start=1) if n % step == 0)
    return Scale(0.0, end, tuple(e for e in ends if e <= end))


def _steps() -> Iterable[int]:
    size = 1
    while True:
        yield from (size, 2 * size, 5 * size)
        size *= 10


def _ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    ticks = MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    slack = 1e-9 * (high - low)
    return tuple(float(t) for t in ticks if low - slack <= t <= high + slack)


def _log_scale(low: float, high: float) -> Scale:
    room = 10 ** (0.06 * (math.log10(high) - math.log10(low)))
    low, high = max(low / room, 1e-307), min(high * room, 1e307)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = math.ceil(len(powers) / 8)
    for subs in ((1,), (1, 3), (1, 2, 5)) if every == 1 else ((1,),):
        exact = [float(f"{sub}e{p}") for p in powers[::every] for sub in subs]
        ticks = tuple(t for t in exact if low <= t <= high)
        if len(ticks) >= 4:
            break
    return Scale(low, high, ticks, log=True)


@dataclass(frozen=True)
class Trace:
    """The part of a curve that is drawn.

    Attributes:
        points: (iteration, value); NaN is a gap.
        band: (iteration, lowest, highest) around each point if it is the mean of several values;
            empty if the points are the values themselves.
        together: How many values a point stands for.
        missing: How many values were not finite.
    """

    points: list[Point]
    band: list[tuple[float, float, float]]
    together: int
    missing: int

    @property
    def values(self) -> Iterable[float]:
        """All values that the value axis must have room for."""
        yield from (y for _, y in self.points)
        yield from (y for _, *limits in self.band for y in limits)


def trace(points: Sequence[Point], limit: int) -> Trace:
    """Return all points or, if there are too many, the mean and range of each stretch of them.

    Args:
        points: The points, ordered by iteration.
        limit: The largest number of points to return unchanged; at least 3.
    """
    clean = [(x, y if abs(y) <= LARGEST else math.nan) for x, y in points]
    missing = sum(math.isnan(y) for _, y in clean)
    if len(clean) <= limit:
        return Trace(clean, [], 1, missing)
    together = math.ceil(len(clean) / (limit // 3))
    means: list[Point] = []
    band = []
    for start in range(0, len(clean), together):
        stretch = clean[start : start + together]
        finite = [y for _, y in stretch if not math.isnan(y)]
        middle = (stretch[0][0] + stretch[-1][0]) / 2
        mean = math.fsum(y / len(finite) for y in finite) if finite else math.nan
        means.append((middle, mean))
        band.append((middle, min(finite, default=math.nan), max(finite, default=math.nan)))
    return Trace(means, band, together, missing)
