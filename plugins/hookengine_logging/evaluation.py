"""The metrics of an evaluation, and how long it took."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Any

from hookengine_logging.meter import Medium, Meter


class Evaluation:
    """Collect the metrics of a validation or a test, and measure its time.

    Args:
        meters: Collect the values, by phase: ``val`` and ``test``.
    """

    def __init__(self, meters: Mapping[str, Meter]) -> None:
        self._meters = meters
        self._began = self._seconds = 0.0

    def start(self) -> None:
        """Start the clock."""
        self._began = perf_counter()

    def add_metrics(self, phase: str, metrics: Mapping[str, Any]) -> None:
        """Collect the metrics, and stop the clock."""
        self._meters[phase].add(metrics)
        self._seconds = perf_counter() - self._began

    def finish(self, phase: str) -> tuple[dict[str, float], dict[str, Medium]]:
        """Return the scalars and the media of the record, both by name.

        ``seconds`` is among the scalars, unless the user has logged a value of that name.
        """
        means, media = self._meters[phase].reduce()
        scalars = {name: mean.value for name, mean in means.items()}
        scalars.setdefault("seconds", self._seconds)
        return scalars, media
