"""Which checkpoint is the best one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


class Best:
    """The best checkpoint so far, and a better validation whose weights are not saved yet.

    Args:
        metric: What is compared; None for no comparison.
        greater: Whether more of it is better.

    Attributes:
        known: ``{"metric", "value", "number"}`` of the best checkpoint, or None.
    """

    def __init__(self, metric: str | None, greater: bool) -> None:
        self.metric = metric
        self.greater = greater
        self.known: dict[str, Any] | None = None
        self._waiting: tuple[float, list[int]] | None = None  # the value, and the steps until then
        self._before: tuple[dict[str, Any] | None, ...] = ()  # while the save is under way

    @property
    def number(self) -> int | None:
        """The number of the best checkpoint."""
        return None if self.known is None else int(self.known["number"])

    @property
    def waits(self) -> bool:
        """Whether weights are to be saved, or marked, as the best."""
        return self._waiting is not None

    def see(self, value: float, steps: Sequence[int]) -> None:
        """Compare a validation; NaN is never the best.

        Args:
            value: Of the metric.
            steps: The steps of all optimizers, by which weights are told apart.
        """
        best = None if self.known is None else self.known["value"]
        lies_beyond = best is not None and (value > best if self.greater else value < best)
        if lies_beyond or (best is None and not math.isnan(value)):
            self._waiting = value, list(steps)

    def expire(self, steps: Sequence[int]) -> bool:
        """Forget what waits if its weights have been trained on since; returns whether so."""
        if self._waiting is None or self._waiting[1] == list(steps):
            return False
        self._waiting = None
        return True

    def call(self, number: int) -> None:
        """The weights that wait are in the checkpoint of that number."""
        if self._waiting is not None:
            self._before = (self.known,)
            self.known = {"metric": self.metric, "value": self._waiting[0], "number": number}
            self._waiting = None

    def settle(self) -> None:
        """That checkpoint is on the disk."""
        self._before = ()

    def take_back(self, steps: Sequence[int] | None = None) -> None:
        """It could not be saved.

        Args:
            steps: Those of the optimizers, if the weights are the same still: they wait again.
        """
        if self._before:
            if self.known is not None and steps is not None:
                self._waiting = self.known["value"], list(steps)
            self.known, self._before = self._before[0], ()

    def line(self, name: str) -> str:
        """What is said of it, as the checkpoint of that name."""
        known = self.known or {}
        return (
            f"checkpoint: the best {known.get('metric')} so far, {known.get('value'):.6g}, is "
            f"kept: {name}"
        )
