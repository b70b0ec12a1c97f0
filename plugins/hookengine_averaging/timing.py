"""When ``swa`` begins, and when it averages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hookengine import Progress
from hookengine_averaging.span import Clock, Span, Unit, parse_span


class Timing:
    """When averaging begins, and the intervals since then.

    Args:
        begin: The option ``begin``.
        interval: The option ``interval``.

    Raises:
        TypeError: An option is neither a number of epochs nor a text with a unit.
    """

    def __init__(self, begin: int | float | str, interval: int | str) -> None:
        if isinstance(begin, float) and not 0 < begin < 1:
            raise TypeError(
                f"swa: begin={begin} must be an int, the number of epochs, a text such as "
                "'500 iterations', or a fraction of the run between 0 and 1"
            )
        self._fraction = begin if isinstance(begin, float) else None
        self._begin = Span(0, "epochs") if self._fraction else parse_span("begin", begin)
        self._interval = parse_span("interval", interval)
        self._end = Span(0, "epochs")
        self.start_over()

    def start_over(self) -> None:
        """Forget that averaging has begun."""
        self._begun: int | None = None  # where it began, in the unit of the interval
        self._passed = 0  # intervals since then

    @property
    def has_begun(self) -> bool:
        """Whether averaging has begun; its begin does not move any more."""
        return self._begun is not None

    @property
    def by_epoch(self) -> bool:
        """Whether it only changes at the end of an epoch."""
        return self._begin.unit == self._interval.unit == "epochs"

    def set_limits(self, epochs: int | None, iterations: int | None) -> None:
        """Set the limit of the run, which a fraction is of."""
        self._end = _limit(epochs, iterations)
        if self._fraction and not self.has_begun:
            self._begin = Span(int(self._fraction * self._end.number), self._end.unit)

    def count_averages(
        self, clock: Clock, epochs: int | None = None, iterations: int | None = None
    ) -> int | None:
        """Return how many averages the run will have, or one of another limit; None if unknown."""
        other = epochs is not None or iterations is not None
        end = _limit(epochs, iterations) if other else self._end
        return clock.averages(self._begin, self._interval, end)

    def begins(self, progress: Progress, within: bool = False) -> bool:
        """Return whether averaging begins now.

        Args:
            progress: The counters of the run.
            within: Leave out a begin in epochs, which is at the start of the next epoch.
        """
        if self.has_begun or (within and self._begin.unit == "epochs"):
            return False
        # An epoch that ends with this iteration is not one after the begin.
        epochs = progress.epoch + (within and progress.batch == progress.epoch_length)
        if _count(progress, self._begin.unit, epochs) < self._begin.number:
            return False
        now = _count(progress, self._interval.unit, epochs)
        self._begun = self._begin.number if self._begin.unit == self._interval.unit else now
        self._passed = (now - self._begun) // self._interval.number
        return True

    def averages(self, progress: Progress, closes_epoch: bool = False) -> bool:
        """Return whether another interval has passed, and count it.

        Args:
            progress: The counters of the run.
            closes_epoch: Whether a complete epoch counts although it has not been closed yet.
        """
        if self._begun is None:
            return False
        complete = closes_epoch and progress.batch == progress.epoch_length
        now = _count(progress, self._interval.unit, progress.epoch + complete)
        passed = (now - self._begun) // self._interval.number
        if passed <= self._passed:
            return False
        self._passed = passed
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain containers."""
        return {
            "begin": self._begin.number,
            "unit": self._begin.unit,
            "interval": list(self._interval),
            "begun": self._begun,
            "passed": self._passed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state saved by ``state_dict``; another interval starts from here."""
        self.start_over()
        if state["begun"] is not None:
            self._begin = Span(state["begin"], state.get("unit", "epochs"))
            if [*self._interval] == state["interval"]:
                self._begun, self._passed = state["begun"], state["passed"]

    @property
    def plan(self) -> str:
        """When the first value is averaged, for messages."""
        return (
            f"averaging begins after {self._begin}, and the first value is averaged "
            f"{self._interval} later"
        )

    def __str__(self) -> str:
        return f"{self.plan}, but this run ends after {self._end}"


def _limit(epochs: int | None, iterations: int | None) -> Span:
    """Return the limit of a run; the one in epochs, if there is one, is the user's."""
    return Span(iterations or 0, "iterations") if epochs is None else Span(epochs, "epochs")


def _count(progress: Progress, unit: Unit, epochs: int) -> int:
    """Return the finished epochs, iterations or steps."""
    if unit == "epochs":
        return epochs
    return progress.iter if unit == "iterations" else progress.step
