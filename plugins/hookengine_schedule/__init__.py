"""Learning-rate schedules: those of ``torch.optim.lr_scheduler``, and a warm-up."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from pydantic import Field
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from hookengine import OptimWrapper, Plugin, hookimpl, metric_value
from hookengine_schedule.build import Built, build_scheduler, check_plain, is_by_step
from hookengine_schedule.length import total_epochs, total_steps
from hookengine_schedule.warmup import Warmup

__all__ = ["Schedule"]


class Schedule(Plugin, name="schedule"):
    """Change the learning rates of each optimizer while the run goes on.

    The scheduler moves on after each step that was really taken, or after each epoch in which one
    was. What a scheduler of torch needs to know of the run's length (``T_max`` of
    CosineAnnealingLR, ``total_iters`` of PolynomialLR, ``total_steps`` of OneCycleLR) is filled in
    where it is not given, in optimizer steps or in epochs; beyond that length the learning rate
    stays where it ended.

    A warm-up multiplies the learning rates by a factor that grows linearly to 1 over the first
    optimizer steps. A scheduler by step begins after it; one by epoch counts its epochs all along.
    """

    scheduler: Any = Field(
        description="NAME of torch.optim.lr_scheduler, dict(type=..., ...), a scheduler, a "
        "function of the optimizer; or a list of these, one after the other at the milestones"
    )
    by_epoch: bool | None = Field(
        default=None,
        description="move on per epoch, else per optimizer step; by default as train_cfg, "
        "OneCycleLR and CyclicLR per step",
    )
    milestones: Sequence[int] = Field(
        default=(), description="for a list: after how many epochs (or steps) the next one follows"
    )
    warmup: int | float = Field(
        default=0, ge=0, description="optimizer steps, or below 1 their share of the run"
    )
    warmup_factor: float = Field(
        default=0.01, gt=0, le=1, description="at which the warm-up begins"
    )
    metric: str | None = Field(default=None, description="of validation, for ReduceLROnPlateau")
    optimizer: str | None = Field(default=None, description="only this one of several optimizers")

    def __post_init__(self) -> None:
        """Refuse a warm-up that is neither a number of steps nor a share."""
        if self.warmup >= 1 and isinstance(self.warmup, float):
            raise TypeError(
                f"schedule: warmup={self.warmup} is neither a whole number of optimizer steps nor "
                "a share of the run below 1"
            )

    def configure(self) -> None:
        """Know no optimizer yet."""
        self._tracks: dict[str, _Track] = {}

    @hookimpl(trylast=True)  # whoever accumulates has said by then how many iterations make a step
    def setup_optimizer(self, runner: Any, optim_wrapper: OptimWrapper) -> None:
        """Make the scheduler of this optimizer."""
        name = self._optimizer_of_an_instance(runner) or self.optimizer
        if runner.train_cfg is None or optim_wrapper.name not in runner.optim_wrapper.by_name(name):
            return
        for other_name, other in runner.plugins.items():
            if isinstance(other, Schedule) and optim_wrapper.name in other._tracks:
                raise ValueError(
                    f"the optimizer {optim_wrapper.name!r} has a schedule already, of the plugin "
                    f"{other_name!r}. One after another is scheduler=[...] with milestones=[...], "
                    "a warm-up is warmup=...; torch's ChainedScheduler multiplies several"
                )
        by_epoch = self.by_epoch
        if by_epoch is None:
            by_epoch = runner.train_cfg.by_epoch and not is_by_step(self.scheduler)
        steps = total_steps(runner.progress, optim_wrapper.window_length)
        warmup = self._warmup_steps(steps)
        total = total_epochs(runner.progress) if by_epoch else steps and max(steps - warmup, 1)
        built = build_scheduler(
            self.scheduler, optim_wrapper.optimizer, self.milestones, total, self.metric
        )
        self._check_metric(runner, isinstance(built.scheduler, ReduceLROnPlateau))
        if self.by_epoch is None and is_by_step(built.kind):
            by_epoch = False  # a function has returned it
        track = _Track(optim_wrapper, built, by_epoch)
        if warmup:
            track.warmup = Warmup(optim_wrapper.optimizer, warmup, self.warmup_factor)
        check_plain(built.scheduler)
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
        return max(round(self.warmup * steps), 1)

    def _check_metric(self, runner: Any, wanted: bool) -> None:
        if not wanted:
            if self.metric is not None:
                raise TypeError(
                    f"schedule: metric={self.metric!r} is for ReduceLROnPlateau, which alone "
                    "looks at one"
                )
            return
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
        """Say what was made of the options; warn where it does not fit the length of this run."""
        for track in self._tracks.values():
            of = f" of {track.optim_wrapper.name!r}" if len(self._tracks) > 1 else ""
            runner.logger.info(f"schedule{of}: {track.describe()}")
            steps = total_steps(runner.progress, track.optim_wrapper.window_length)
            total = total_epochs(runner.progress) if track.by_epoch else steps
            planned = track.planned
            if total is not None and planned is not None and total > planned:
                unit = "epochs" if track.by_epoch else "optimizer steps"
                runner.logger.warning(
                    f"schedule: the {track.kind} was made for {planned} {unit}, and this run goes "
                    f"on to {total}: from there on the learning rate stays where it ended"
                )
            if track.warmup is not None:
                track.warmup.apply()
            if steps is not None and track.warmup_steps >= steps:
                runner.logger.warning(
                    f"schedule: the warm-up of {track.warmup_steps} optimizer steps does not end "
                    f"within this run of {steps}"
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

    def after_load_checkpoint(self, runner: Any, checkpoint: Mapping[str, Any]) -> None:
        """Where the optimizer was allowed to begin anew, have it at the same share of its rate.

        torch's schedulers go on from the rate that they find, which was part of its state.
        """
        saved = checkpoint.get("optimizer", {})
        for name, track in self._tracks.items():
            old = saved if "param_groups" in saved else saved.get(name, {})
            track.match_rates(old.get("param_groups", ()))


class _Track:
    """The schedule of one optimizer.

    Args:
        optim_wrapper: The optimizer's.
        built: The scheduler of torch, and where it ends.
        by_epoch: It moves on per epoch.
    """

    def __init__(self, optim_wrapper: OptimWrapper, built: Built, by_epoch: bool) -> None:
        self.optim_wrapper = optim_wrapper
        self.scheduler, self.kind, self.length, self.end = built
        self.by_epoch: bool | None = by_epoch
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.by_epoch = None  # per validation
        self.warmup: Warmup | None = None
        self._steps = optim_wrapper.steps  # when the last epoch ended

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of the warm-up."""
        return 0 if self.warmup is None else self.warmup.steps

    @property
    def planned(self) -> int | None:
        """The epochs or optimizer steps that it was made for, where they were filled in."""
        if self.length is None:
            return None
        return self.length + (0 if self.by_epoch else self.warmup_steps)

    @property
    def ended(self) -> bool:
        """Whether it has reached the length that was filled in."""
        return self.end is not None and self.scheduler.last_epoch >= self.end

    @property
    def how(self) -> str:
        """What it is, and when it moves on."""
        how = {None: "per validation", True: "per epoch", False: "per optimizer step"}
        return f"{self.kind} {how[self.by_epoch]}"

    def describe(self) -> str:
        """What it is, for people to read."""
        text = self.how
        if self.planned is not None:
            text += f", made for {self.planned}"
        return f"{text}, warm-up over {self.warmup_steps} steps" if self.warmup_steps else text

    def after_step(self) -> None:
        """A step was taken."""
        if self.warmup is not None and not self.warmup.over:
            self.warmup.step()
        elif self.by_epoch is False and not self.ended:
            self.scheduler.step()

    def after_epoch(self) -> None:
        """An epoch is over; one without a step does not count."""
        moved = self.optim_wrapper.steps > self._steps
        if self.by_epoch and moved and not self.ended:
            self.step()
        self._steps = self.optim_wrapper.steps

    def step(self, *metric: float) -> None:
        """Move the scheduler on; it does not see the factor of a warm-up that goes on."""
        step: Callable[..., None] = self.scheduler.step
        going_on = self.warmup is not None and not self.warmup.over
        lifted = self.warmup.lifted() if self.warmup is not None and going_on else nullcontext()
        with lifted, warnings.catch_warnings():
            # torch knows only of steps in this process: after a resume there may be none yet.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            step(*metric)

    def match_rates(self, saved: Iterable[Mapping[str, Any]]) -> None:
        """Give parameter groups that were not loaded the share of their rate that others had."""
        for group, old in zip(self.optim_wrapper.param_groups, saved, strict=False):
            first = old.get("initial_lr")
            if first and group["lr"] != old["lr"]:  # it was not loaded
                group["lr"] = group["initial_lr"] * (old["lr"] / first)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers."""
        return {
            "how": self.how,
            "scheduler": self.scheduler.state_dict(),
            "length": self.length,
            "end": self.end,
            "warmup": {} if self.warmup is None else self.warmup.state_dict(),
            "steps": self._steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the schedule as it was made, whatever the length of this run.

        The learning rates themselves are part of the optimizer's state.

        Raises:
            ValueError: it is the state of another scheduler.
        """
        if state["how"] != self.how:
            raise ValueError(
                f"schedule: the state is of {state['how']}, and this run has {self.how}: go "
                "on with the same one. To begin a schedule anew, drop the state of 'schedule' from "
                "checkpoint['plugins'] and allow=['schedule']"
            )
        self.length, self.end = state["length"], state["end"]
        self.scheduler.load_state_dict(state["scheduler"])
        self.warmup = None
        if state["warmup"]:
            self.warmup = Warmup.from_state_dict(self.optim_wrapper.optimizer, state["warmup"])
        self._steps = state["steps"]
