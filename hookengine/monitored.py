"""A validation metric that a plugin compares, and that some validations may lack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hookengine.evaluator import metric_value

if TYPE_CHECKING:
    from hookengine.runner import Runner


class MonitoredMetric:
    """Read one metric of each validation, and skip validations that do not report it.

    A detector that finds no boxes yet has no average precision, say.

    Args:
        name: The metric, by its full name.
        owner: The plugin that compares it, for messages.

    Attributes:
        seen: Whether a validation has reported the metric. A plugin that saves its state saves this
            too, and sets it again when the state is loaded.
    """

    def __init__(self, name: str, owner: str) -> None:
        self.name = name
        self.owner = owner
        self.seen = False

    def read(self, runner: Runner, metrics: Mapping[str, Any]) -> float | None:
        """Return the metric as a Python number, or None, with a warning, if it is missing.

        Args:
            runner: The Runner that validates.
            metrics: The metrics of this validation.

        Raises:
            KeyError: No validation can report a metric of this name, because every metric of the
                evaluator has reported others. The message suggests the nearest name.
            TypeError: The metric was never a number.
        """
        missing = metrics.get(self.name) is None
        try:
            if not missing:
                value = metric_value(metrics, self.name)
                self.seen = True
                return value
            if self.name not in metrics and not (self.seen or self._may_come(runner, metrics)):
                metric_value(metrics, self.name)
        except TypeError:
            if not self.seen:
                raise
        what = "does not report" if missing else "reports no number as"
        names = ", ".join(sorted(metrics)) or "nothing"
        runner.logger.warning(
            f"{self.owner}: this validation {what} the metric {self.name!r} (it reports {names}), "
            "so it is skipped"
        )
        return None

    def _may_come(self, runner: Runner, metrics: Mapping[str, Any]) -> bool:
        """Return whether a later validation may report the metric, which none has reported yet."""
        evaluator = None if runner.val_loop is None else runner.val_loop.evaluator
        silent = () if evaluator is None else evaluator.silent
        return not metrics or any(
            metric.prefix is None or f"{metric.prefix}/" in self.name for metric in silent
        )
