"""Learning-rate schedules: those of ``torch.optim.lr_scheduler``, and a warm-up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import Field
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from hookengine import OptimWrapper, Plugin, hookimpl, metric_value
from hookengine_schedule.build import build_scheduler
from hookengine_schedule.length import total_epochs, total_steps
from hookengine_schedule.warmup import Warmup

__all__ = ["Schedule"]


class Schedule(Plugin, name="schedule"):
    """Change the learning rates of each optimizer while the run goes on.

    The scheduler moves on after each step that was really taken, or after each epoch in which one
    was. What a scheduler of torch needs to know of the run's length (``T_max`` of
    CosineAnnealingLR, ``total_steps`` of OneCycleLR) is filled in where it is not given, in
    optimizer steps or in epochs.

    A warm-up multiplies the learning rates by a factor that grows linearly to 1 over the first
    optimizer steps. A scheduler by step begins after it; one by epoch counts its epochs all along.
    """

    after = ("accumulate",)  # which announces how many iterations make a step

    scheduler: Any = Field(
        description="NAME of torch.optim.lr_scheduler, dict(type=..., ...), a scheduler, a "
        "function of the optimizer; or a list of these, one after the other at the milestones"
    )
    by_epoch: bool | None = Field(
        None, description="move on per epoch, else per optimizer step; by default as train_cfg"
    )
    milestones: Sequence[int] = Field(
        (), description="for a list: after how many epochs (or steps) the next one follows"
    )
    warmup: int | float = Field(
        0, ge=0, description="optimizer steps, or below 1 their share of the run"
    )
    warmup_factor: float = Field(0.01, gt=0, le=1, description="at which the warm-up begins")
    metric: str | None = Field(None, description="of validation, for ReduceLROnPlateau")
    optimizer: str | None = Field(None, description="only this one of several optimizers")

    def __post_init__(self) -> None:
        """Refuse a warm-up that is neither a number of steps nor a share."""
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise TypeError(
                f"schedule: warmup={self.warmup} is neither a whole number of optimizer steps nor "
                "a share of the run below 1"
            )

    def configure(self) -> None:
        """Know no optimizer yet."""
        self._tracks: dict[str, _Track] = {}

    def setup_optimizer(self, runner: Any, optim_wrapper: OptimWrapper) -> None:
        """Make the scheduler of this optimizer."""
        name = self._optimizer_of_an_instance(runner) or self.optimizer
        if runner.train_cfg is None or optim_wrapper.name not in runner.optim_wrapper.by_name(name):
            return
        by_epoch = runner.train_cfg.by_epoch if self.by_epoch is None else self.by_epoch
        steps = total_steps(runner.progress, optim_wrapper.window_length)
        warmup = self._warmup_steps(steps)
        total = total_epochs(runner.progress) if by_epoch else steps and max(steps - warmup, 1)
        scheduler = build_scheduler(
            self.scheduler, optim_wrapper.optimizer, self.milestones, total, self.metric
        )
        if isinstance(scheduler, ReduceLROnPlateau):
            self._check_metric(runner)
        track = _Track(optim_wrapper, scheduler, by_epoch, total)
        if warmup:
            track.warmup = Warmup(optim_wrapper.optimizer, warmup, self.warmup_factor)
        self._tracks[optim_wrapper.name] = track

    def _optimizer_of_an_instance(self, runner: Any) -> str | None:
        if not isinstance(self.scheduler, LRScheduler):
            return None
        if self.milestones:
            raise TypeError("schedule: milestones are for a list of schedulers, not for one")
        wrappers = runner.optim_wrapper.by_name().values()
        names: list[str] = [w.name for w in wrappers if w.optimizer is self.scheduler.optimizer]
        if not names or self.optimizer not in (None, names[0]):
            raise ValueError(
                f"schedule: the {type(self.scheduler).__name__} belongs to an optimizer that this "
                f"Runner {'has not' if not names else f'calls {names[0]!r}'}: build it from the "
                "optimizer that the Runner gets, or pass dict(type=..., ...)"
            )
        return names[0]

    def _warmup_steps(self, steps: int | None) -> int:
        if self.warmup >= 1 or self.warmup == 0:
            return int(self.warmup)
        if steps is None:
            raise ValueError(
                f"schedule: warmup={self.warmup} is a share of the run, whose length is not known "
                "(the dataloader does not tell): give a number of steps"
            )
        return round(self.warmup * steps)

    def _check_metric(self, runner: Any) -> None:
        if self.metric is None:
            raise TypeError(
                "schedule: ReduceLROnPlateau needs metric=, the name of a metric of validation"
            )
        if runner.val_cfg is None:
            raise ValueError(
                f"schedule: ReduceLROnPlateau looks at {self.metric!r} of validation, and this "
                "Runner does not validate: pass val_dataloader and val_evaluator"
            )

    def before_train(self, runner: Any) -> None:
        """Warn where this run is longer than what the schedule was made for."""
        for track in self._tracks.values():
            if track.total is None or track.by_epoch is None:
                continue
            total = total_epochs(runner.progress)
            if not track.by_epoch:
                total = total_steps(runner.progress, track.optim_wrapper.window_length)
            planned = track.total + (0 if track.by_epoch else track.warmup_steps)
            if total is not None and total > planned:
                unit = "epochs" if track.by_epoch else "optimizer steps"
                runner.logger.warning(
                    f"schedule: the {type(track.scheduler).__name__} was made for {planned} "
                    f"{unit}, and this run goes on to {total}"
                )

    @hookimpl(tryfirst=True)  # others see the learning rate of the next step
    def after_optim_step(self, optim_wrapper: OptimWrapper) -> None:
        """Move on, by step."""
        track = self._tracks.get(optim_wrapper.name)
        if track is not None:
            track.after_step()

    def after_train_epoch(self) -> None:
        """Move on, by epoch."""
        for track in self._tracks.values():
            track.after_epoch()

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, Any]) -> None:
        """Tell ReduceLROnPlateau the metric, after validations that training asked for."""
        if not runner.progress.val_due:
            return
        for track in self._tracks.values():
            if isinstance(track.scheduler, ReduceLROnPlateau):
                track.step(metric_value(metrics, self.metric or ""))

    def state_dict(self) -> dict[str, Any]:
        """Where the schedules stand."""
        return {name: track.state_dict() for name, track in self._tracks.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        for name, track in self._tracks.items():
            track.load_state_dict(state[name])


class _Track:
    """The schedule of one optimizer.

    Args:
        optim_wrapper: The optimizer's.
        scheduler: Of torch.
        by_epoch: It moves on per epoch.
        total: The epochs or steps that it was made for, if known.
    """

    def __init__(
        self,
        optim_wrapper: OptimWrapper,
        scheduler: LRScheduler,
        by_epoch: bool,
        total: int | None,
    ) -> None:
        self.optim_wrapper = optim_wrapper
        self.scheduler = scheduler
        self.total = total
        self.by_epoch: bool | None = by_epoch
        if isinstance(scheduler, ReduceLROnPlateau):
            self.by_epoch = None  # per validation
        self.warmup: Warmup | None = None
        self._steps = optim_wrapper.steps  # when the last epoch ended

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of the warm-up."""
        return 0 if self.warmup is None else self.warmup.steps

    def after_step(self) -> None:
        """A step was taken."""
        if self.warmup is not None and not self.warmup.over:
            self.warmup.step()
        elif self.by_epoch is False:
            self.scheduler.step()

    def after_epoch(self) -> None:
        """An epoch is over; one without a step does not count."""
        if self.by_epoch and self.optim_wrapper.steps > self._steps:
            self.step()
        self._steps = self.optim_wrapper.steps

    def step(self, *metric: float) -> None:
        """Move the scheduler on; it does not see the factor of a warm-up that goes on."""
        step: Callable[..., None] = self.scheduler.step
        if self.warmup is None or self.warmup.over:
            step(*metric)
        else:
            with self.warmup.lifted():
                step(*metric)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers."""
        warmed = 0 if self.warmup is None else self.warmup.done
        return {"scheduler": self.scheduler.state_dict(), "warmup": warmed, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on; the learning rates themselves are part of the optimizer's state."""
        self.scheduler.load_state_dict(state["scheduler"])
        if self.warmup is not None:
            self.warmup.done = state["warmup"]
        self._steps = state["steps"]
