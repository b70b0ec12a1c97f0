"""Early stopping: the run ends when a metric of validation gets no better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from hookengine import Plugin, greater_is_better, hookimpl, metric_value

__all__ = ["EarlyStop"]


class EarlyStop(Plugin, name="early_stop"):
    """Stop training when a metric has got no better for some validations.

    It is a request, granted at the next safe point: validation is over, what other plugins do
    after it is done, no gradients are half accumulated.
    """

    metric: str = Field(description="of validation, by its full name")
    patience: int = Field(
        default=5, ge=1, description="validations in a row without getting better"
    )
    min_delta: float = Field(default=0.0, ge=0, description="what counts as better")
    rule: Literal["greater", "less"] | None = Field(
        default=None, description="what is better; known by name for accuracy, loss and their kin"
    )
    threshold: float | None = Field(default=None, description="stop at once where it is reached")
    check_finite: bool = Field(
        default=True, description="stop at once where the metric is not finite"
    )

    def __post_init__(self) -> None:
        """Know which is better."""
        known = greater_is_better(self.metric)
        if self.rule is None and known is None:
            raise TypeError(
                f"early_stop: is more or less of {self.metric!r} better? Say rule='greater' or "
                "rule='less'"
            )
        greater = known if self.rule is None else self.rule == "greater"
        self._sign = 1.0 if greater else -1.0

    def configure(self, runner: Any) -> None:
        """Refuse a run that never validates."""
        self._best = -math.inf
        self._waited = 0
        self._stopped = False  # by what is no matter of patience
        self._asked = False  # for a stop, in this process
        if runner.train_cfg is not None and runner.val_cfg is None:
            raise ValueError(
                f"early_stop looks at {self.metric!r} of validation, and this Runner does not "
                "validate: pass val_dataloader and val_evaluator"
            )

    def before_train(self, runner: Any) -> None:
        """Who trains on after a stop has patience anew; a run that was resumed stops again."""
        ended = self._stopped or self._waited >= self.patience
        if ended and self._asked:
            self._waited, self._stopped = 0, False
        elif ended:
            runner.progress.stopped = "early_stop: the run had stopped here before it was resumed"
            runner.logger.info(f"{runner.progress.stopped}; call train() again to go on")
            self._asked = True

    @hookimpl(trylast=True)
    def after_val_epoch(self, runner: Any, metrics: Mapping[str, Any]) -> None:
        """Compare, after validations that training asked for."""
        if not runner.progress.val_due:
            return
        value = metric_value(metrics, self.metric)
        score = self._sign * value
        if self.check_finite and not math.isfinite(value):
            self._stopped = self._asked = True
            runner.stop(f"early_stop: {self.metric} is {value}")
        elif self.threshold is not None and score >= self._sign * self.threshold:
            self._stopped = self._asked = True
            runner.stop(f"early_stop: {self.metric} {value:.6g} has reached {self.threshold:.6g}")
        elif score > self._best + self.min_delta:
            self._best, self._waited = score, 0
        else:
            self._waited += 1
            if self._waited >= self.patience:
                self._asked = True
                by = f" by more than {self.min_delta:g}" if self.min_delta else ""
                runner.stop(
                    f"early_stop: {self.metric} has got no better than "
                    f"{self._sign * self._best:.6g}{by} for {self._waited} validations"
                )

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, and for how long there was none better."""
        return {"best": self._best, "waited": self._waited, "stopped": self._stopped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self._best, self._waited = state["best"], state["waited"]
        self._stopped = state["stopped"]
        self._asked = False
