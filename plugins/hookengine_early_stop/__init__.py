"""Early stopping: end the run when a validation metric no longer improves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from hookengine import MonitoredMetric, Plugin, Runner, greater_is_better, hookimpl

__all__ = ["EarlyStop"]


class EarlyStop(Plugin, name="early_stop"):
    """Stop training when a metric has not improved for several validations.

    The plugin requests the stop, and training stops at the next safe point: the validation is over,
    other plugins have acted on it, and no window of accumulated gradients is open.
    """

    metric: str = Field(description="the validation metric, by its full name")
    patience: int = Field(
        default=5, ge=1, description="validations in a row without an improvement"
    )
    min_delta: float = Field(
        default=0.0, ge=0, description="only a larger change counts as an improvement"
    )
    rule: Literal["greater", "less"] | None = Field(
        default=None,
        description="which values are better; by default the name decides (accuracy, loss, ...)",
    )
    threshold: float | None = Field(default=None, description="stop at once when it is reached")
    check_finite: bool = Field(
        default=True, description="stop at once when the metric is not finite"
    )

    def __post_init__(self) -> None:
        """Determine whether greater values of the metric are better."""
        known = greater_is_better(self.metric)
        if self.rule is None and known is None:
            raise TypeError(
                f"early_stop: the name of metric={self.metric!r} does not tell whether greater "
                "values are better. Pass rule='greater' or rule='less'"
            )
        greater = known if self.rule is None else self.rule == "greater"
        self._sign = 1.0 if greater else -1.0

    def configure(self, runner: Runner) -> None:
        """Reset the state; raise a ValueError if training never validates."""
        self._best = -math.inf
        self._read = MonitoredMetric(self.metric, "early_stop")
        self._waited = 0
        self._recent: list[float] = []  # of the validations since the best one
        self._reason: str | None = None  # why training is to stop after the last validation
        self._before: str | None = None  # why the resumed run had stopped
        self._asked = False  # this process has requested a stop
        self._another: str | None = None  # what was monitored before a resume
        if runner.train_cfg is not None and runner.val_cfg is None:
            raise ValueError(
                f"early_stop needs {self.metric!r} from validation, but this Runner does not "
                "validate. Pass val_dataloader and val_evaluator"
            )

    def before_train(self, runner: Runner) -> None:
        """Reset the patience if training continues after a stop; stop a resumed run again."""
        if self._another is not None:
            runner.logger.warning(
                f"early_stop: the checkpoint monitored {self._another}, this run monitors "
                f"{self._monitored()}: the patience starts over"
            )
            self._another = None
        before, self._before = self._before, None
        if self._reason is None:
            if before:
                runner.logger.info(
                    f"early_stop: the run had stopped here because {before}. With the options of "
                    "this run, it continues"
                )
        elif self._asked:
            self._start_over()
        else:
            if before:
                reason = "early_stop: the run had stopped here before it was resumed"
            else:
                reason = f"early_stop: by the options of this run, {self._reason}"
            runner.stop(reason, now=True)
            runner.logger.info(f"{reason}; call train() again to continue")
            self._asked = True

    def _start_over(self) -> None:
        self._waited, self._recent, self._reason = 0, [], None

    @hookimpl(after="*")  # other plugins may add metrics
    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, Any]) -> None:
        """Compare the metric with the best one, after a validation that training requested."""
        if not runner.progress.val_due:
            return
        value = self._read.read(runner, metrics)
        if value is None:
            return
        self._compare(value)
        if self._reason is not None:
            self._asked = True
            runner.stop(f"early_stop: {self._reason}")

    def _compare(self, value: float) -> None:
        """Compare a value with the best one and with the options; determine the reason to stop."""
        score = self._sign * value
        self._reason = None
        if self.check_finite and not math.isfinite(value):
            self._reason = f"{self.metric} is {value}"
        elif self.threshold is not None and score >= self._sign * self.threshold:
            self._reason = f"{self.metric} {value:.6g} has reached {self.threshold:.6g}"
        elif score > self._best + self.min_delta:
            self._best = score
            self._start_over()
            return
        else:
            self._waited += 1
            if self._waited >= self.patience:
                by = f" by more than {self.min_delta:g}" if self.min_delta else ""
                self._reason = (
                    f"{self.metric} has not improved on "
                    f"{self._sign * self._best:.6g}{by} for {self._waited} validations"
                )
        self._recent.append(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the best value, the values since it, and the reason if the run has stopped."""
        return {
            "best": self._best,
            "waited": self._waited,
            "values": [*self._recent],
            "stopped": self._reason or self._before,
            "monitored": self._monitored(),
            "seen": self._read.seen,
        }

    def _monitored(self) -> str:
        return f"{self.metric} ({'greater' if self._sign > 0 else 'less'} is better)"

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state saved by ``state_dict``, unless another metric was monitored.

        The values since the best one are compared again, with the options of this run. With other
        options, a run that had stopped may therefore continue, or one that had not may stop.
        """
        self._asked = False
        self._start_over()
        self._before = None
        before = state.get("monitored", self._monitored())
        if before != self._monitored():
            self._another = before
            return
        self._best = state["best"]
        if "values" in state:
            self._before = state["stopped"]
            for value in state["values"]:
                self._compare(value)
        else:  # of an earlier version
            self._waited = state["waited"]
            if state["stopped"] or self._waited >= self.patience:
                self._before = self._reason = "it had stopped"
        self._read.seen = state.get("seen", False)
