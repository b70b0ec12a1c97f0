"""Which checkpoint is the best one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hookengine import MonitoredMetric, Runner


def optimizer_steps(runner: Runner) -> list[int]:
    """Return the steps of all optimizers, which tell whether weights have changed."""
    return [wrapper.steps for wrapper in runner.optim_wrappers.values()]


class Best:
    """The best checkpoint so far, and a better validation whose weights are not saved yet.

    Args:
        metric: The metric to compare; None compares nothing.
        greater: Whether a greater value is better.

    Attributes:
        another: The metric that a loaded state has compared instead, or in the other direction.
        known: ``{"metric", "value", "number", "greater"}`` of the best checkpoint, or None.
        read: Reads the metric of a validation.
    """

    def __init__(self, metric: str | None, greater: bool) -> None:
        self.metric = metric
        self.greater = greater
        self.another: str | None = None
        self.read = MonitoredMetric(metric or "", "checkpoint")
        self.known: dict[str, Any] | None = None
        self._pending: tuple[float, list[int]] | None = None  # the value, and the steps until then
        self._previous: tuple[dict[str, Any] | None, ...] = ()  # while the save is in progress

    @property
    def number(self) -> int | None:
        """The number of the best checkpoint, or None."""
        return None if self.known is None else int(self.known["number"])

    @property
    def is_pending(self) -> bool:
        """Whether the current weights are better than the best checkpoint, and not saved yet."""
        return self._pending is not None

    def compare(self, value: float, steps: Sequence[int]) -> None:
        """Compare a validation with the best one so far. NaN is never the best.

        Args:
            value: The value of the metric.
            steps: The steps of all optimizers at the validation.
        """
        best = None if self.known is None else self.known["value"]
        is_better = best is not None and (value > best if self.greater else value < best)
        if is_better or (best is None and not math.isnan(value)):
            self._pending = value, list(steps)

    def expire(self, steps: Sequence[int]) -> bool:
        """Forget a pending validation if its weights have been trained on; return whether so.

        Args:
            steps: The steps of all optimizers now.
        """
        if self._pending is None or self._pending[1] == list(steps):
            return False
        self._pending = None
        return True

    def assign(self, number: int) -> None:
        """Make the checkpoint of that number the best one if a validation is pending."""
        if self._pending is not None:
            self._previous = (self.known,)
            self.known = {
                "metric": self.metric,
                "value": self._pending[0],
                "number": number,
                "greater": self.greater,
            }
            self._pending = None

    def commit(self) -> None:
        """Keep the last assignment: its checkpoint is on the disk."""
        self._previous = ()

    def roll_back(self, steps: Sequence[int] | None = None) -> None:
        """Undo an assignment that is not committed: its checkpoint could not be saved.

        Args:
            steps: The steps of all optimizers, if the weights are still the same. The validation
                is then pending again.
        """
        if self._previous:
            if self.known is not None and steps is not None:
                self._pending = self.known["value"], list(steps)
            self.known, self._previous = self._previous[0], ()

    def describe(self, name: str) -> str:
        """Return the log line that announces the best checkpoint under its folder's name."""
        known = self.known or {}
        return (
            f"checkpoint: best {known.get('metric')} so far, {known.get('value'):.6g}: {name} is "
            "kept"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the best checkpoint so far, and whether a validation has reported the metric."""
        best = {} if self.known is None else {"best": self.known}
        return {**best, "seen": self.metric} if self.read.seen else best

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the best checkpoint, unless another metric or direction is compared now."""
        self.read.seen = self.metric is not None and state.get("seen") == self.metric
        best = state.get("best")
        if best is None:
            return
        same = best["metric"] == self.metric and best.get("greater", self.greater) == self.greater
        self.another = None if self.metric is None or same else str(best["metric"])
        if self.another is None:
            self.known = dict(best)
