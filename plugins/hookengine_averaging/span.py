"""Lengths in epochs, iterations or optimizer steps, and how many of them a run has."""

from __future__ import annotations

import math
import re
from typing import Any, Literal, NamedTuple

from hookengine import Progress

Unit = Literal["epochs", "iterations", "steps"]
_UNITS: dict[str, Unit] = {
    **dict.fromkeys(("epoch", "epochs"), "epochs"),
    **dict.fromkeys(("iteration", "iterations", "iter", "iters"), "iterations"),
    **dict.fromkeys(("step", "steps"), "steps"),
}


class Span(NamedTuple):
    """A number of epochs, iterations or optimizer steps."""

    number: int
    unit: Unit

    def __str__(self) -> str:
        return f"{self.number} {self.unit[:-1] if self.number == 1 else self.unit}"


def parse_span(name: str, value: Any, least: int = 1) -> Span:
    """Parse an option such as ``3``, ``"2 epochs"``, ``"500 iterations"`` or ``"500 steps"``.

    Args:
        name: The name of the option, for the message.
        value: A number, which counts epochs, or a text.
        least: The least number.

    Raises:
        TypeError: The value is anything else.
    """
    number, unit = value, "epochs"
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+)\s*([a-z]+)\s*", value)
        number, unit = (int(match[1]), match[2]) if match else (None, "")
    whole = isinstance(number, int) and not isinstance(number, bool)
    if not whole or number < least or unit not in _UNITS:
        raise TypeError(
            f"swa: {name}={value!r} must be a whole number of epochs, {least} or more, or a text "
            "such as '2 epochs', '500 iterations' or '500 steps' (of the optimizer)"
        )
    return Span(number, _UNITS[unit])


class Clock:
    """Converts between the units of a run, from where it is now, as far as its lengths are known.

    Args:
        progress: The counters of the run.
        window: The number of iterations per optimizer step; None if it is unknown.
    """

    def __init__(self, progress: Progress, window: int | None) -> None:
        self._progress = progress
        self._window = window

    def averages(self, begin: Span, interval: Span, end: Span) -> int | None:
        """Return how many averages a run has at most up to its end, or None if that is unknown."""
        last = self._convert(end, begin.unit)
        if last is not None and begin.number >= last:
            return 0
        first, last = self._convert(begin, interval.unit), self._convert(end, interval.unit)
        if first is None or last is None:
            return None
        return max(last - first, 0) // interval.number

    def _convert(self, point: Span, unit: Unit) -> int | None:
        """Return how many of another unit are finished at a point."""
        if point.unit == unit:
            return point.number
        iteration = self._iteration_of(point)
        return None if iteration is None else self._count_at(iteration, unit)

    def _iteration_of(self, point: Span) -> int | None:
        """Return the first iteration that a point may have."""
        progress, length = self._progress, self._progress.epoch_length
        if point.unit == "iterations":
            return point.number
        if point.unit == "epochs":
            ahead = point.number - progress.epoch
            return None if length is None else progress.iter + ahead * length - progress.batch
        per_epoch = self._steps_per_epoch()
        if per_epoch is None or length is None or self._window is None:
            return None
        epochs, rest = divmod(point.number - progress.step, per_epoch)
        return progress.iter - progress.batch + epochs * length + rest * self._window

    def _count_at(self, iteration: int, unit: Unit) -> int | None:
        """Return how many epochs or steps may be finished at an iteration."""
        progress, length = self._progress, self._progress.epoch_length
        if unit == "iterations":
            return iteration
        if length is None:
            return None
        epochs, rest = divmod(progress.batch + iteration - progress.iter, length)
        if unit == "epochs":
            return progress.epoch + epochs
        per_epoch = self._steps_per_epoch()
        if per_epoch is None or self._window is None:
            return None
        return progress.step + epochs * per_epoch + math.ceil(rest / self._window)

    def _steps_per_epoch(self) -> int | None:
        """Return the steps of an epoch, whose last window may be a short one."""
        length = self._progress.epoch_length
        return None if length is None or not self._window else math.ceil(length / self._window)


def steps_left(progress: Progress, window: int) -> int | None:
    """Return how many optimizer steps a run still has, or None if that is unknown.

    A window of accumulated gradients ends with its epoch, and with the run. If the length of an
    epoch is unknown, it counts as long as the finished epochs are on average.

    Args:
        progress: The counters of the run.
        window: The number of iterations per optimizer step.
    """
    length, batch = progress.epoch_length, progress.batch
    if length is None and progress.epoch:
        length = max(round((progress.iter - batch) / progress.epoch), 1)
    if progress.max_iters is not None:
        left = progress.max_iters - progress.iter
    elif progress.max_epochs is not None and length is not None:
        left = (progress.max_epochs - progress.epoch) * length - batch
    else:
        return None
    if left <= 0:
        return 0
    length = length or batch + left
    ahead = batch + left  # counted from the start of this epoch
    epochs, rest = divmod(ahead, length)
    done = math.ceil(batch / window) if batch >= length else batch // window
    return epochs * math.ceil(length / window) + math.ceil(rest / window) - done
