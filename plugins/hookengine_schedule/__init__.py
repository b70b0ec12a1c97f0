"""Learning-rate schedules: those of ``torch.optim.lr_scheduler``, with a warm-up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from pydantic import Field
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from hookengine import MonitoredMetric, OptimWrapper, Plugin, Runner, hookimpl
from hookengine_schedule.build import Built, build_scheduler, check_plain, is_by_step
from hookengine_schedule.length import total_epochs, total_steps
from hookengine_schedule.warmup import Warmup

__all__ = ["Schedule"]


class Schedule(Plugin, name="schedule"):
    """Schedule the learning rates of each optimizer.

    The scheduler steps after each optimizer step that was taken, not skipped, or after each epoch
    that had at least one. Some of torch's schedulers need the length of the run: ``T_max`` of
    CosineAnnealingLR, ``total_iters`` of PolynomialLR and ``total_steps`` of OneCycleLR. If you
    leave these out, the plugin fills them in, in optimizer steps or in epochs. Beyond that length,
    the learning rate keeps its last value.

    A warm-up multiplies the learning rates by a factor that grows linearly to 1 over the first
    optimizer steps. A scheduler that steps per optimizer step starts after the warm-up. One that
    steps per epoch also counts the epochs of the warm-up.
    """

    scheduler: Any = Field(
        description="NAME in torch.optim.lr_scheduler, dict(type=..., ...), a scheduler or a "
        "function of the optimizer; or a list of these, which follow each other at the milestones"
    )
    by_epoch: bool | None = Field(
        default=None,
        description="step per epoch instead of per optimizer step; by default as train_cfg counts, "
        "but OneCycleLR and CyclicLR per optimizer step",
    )
    milestones: Sequence[int] = Field(
        default=(), description="for a list: the epochs (or steps) after which the next one starts"
    )
    warmup: int | float = Field(
        default=0, ge=0, description="number of optimizer steps, or below 1 their share of the run"
    )
    warmup_factor: float = Field(
        default=0.01, gt=0, le=1, description="factor at the start of the warm-up"
    )
    metric: str | None = Field(default=None, description="validation metric for ReduceLROnPlateau")
    optimizer: str | None = Field(default=None, description="name of the one optimizer to schedule")

    def __post_init__(self) -> None:
        """Reject a warm-up that is neither a number of steps nor a share."""
        if self.warmup >= 1 and isinstance(self.warmup, float):
            raise TypeError(
                f"schedule: warmup={self.warmup} is invalid. Pass an integer number of optimizer "
                "steps, or a share of the run below 1"
            )

    def configure(self) -> None:
        """Start without schedules; ``setup_optimizer`` adds one per optimizer."""
        self._another: str | None = None  # the metric of the plateau before a resume
        self._tracks: dict[str, _Track] = {}
        self._resumed = False
        self._read = MonitoredMetric(self.metric or "", "schedule")

    @hookimpl(trylast=True)  # after plugins that accumulate gradients have set window_length
    def setup_optimizer(self, runner: Runner, optim_wrapper: OptimWrapper) -> None:
        """Create the scheduler of this optimizer."""
        name = self._optimizer_of_an_instance(runner) or self.optimizer
        if runner.train_cfg is None or optim_wrapper.name not in runner.optim_wrapper.by_name(name):
            return
        for other_name, other in runner.plugins.items():
            if isinstance(other, Schedule) and optim_wrapper.name in other._tracks:
                raise ValueError(
                    f"the optimizer {optim_wrapper.name!r} already has a schedule, from the plugin "
                    f"{other_name!r}. Use scheduler=[...] with milestones=[...] for a sequence, "
                    "warmup=... for a warm-up, or torch's ChainedScheduler to multiply several"
                )
        by_epoch = self.by_epoch
        if by_epoch is None:
            by_epoch = bool(runner.train_cfg.by_epoch) and not is_by_step(self.scheduler)
        steps = total_steps(runner.progress, optim_wrapper.window_length)
        warmup = self._warmup_steps(steps)
        total = total_epochs(runner.progress) if by_epoch else steps and max(steps - warmup, 1)
        built = build_scheduler(
            self.scheduler, optim_wrapper.optimizer, self.milestones, total, self.metric
        )
        self._check_metric(runner, isinstance(built.scheduler, ReduceLROnPlateau))
        if self.by_epoch is None and is_by_step(built.kind):
            by_epoch = False  # the scheduler comes from a function
        track = _Track(optim_wrapper, built, by_epoch)
        if warmup:
            track.warmup = Warmup(optim_wrapper.optimizer, warmup, self.warmup_factor)
        check_plain(built.scheduler)
        self._tracks[optim_wrapper.name] = track

    def _optimizer_of_an_instance(self, runner: Runner) -> str | None:
        if not isinstance(self.scheduler, LRScheduler):
            return None
        if self.milestones:
            raise TypeError("schedule: milestones need a list of schedulers, got a single one")
        wrappers = runner.optim_wrappers.values()
        names = [w.name for w in wrappers if w.optimizer is self.scheduler.optimizer]
        if not names or self.optimizer not in (None, names[0]):
            raise ValueError(
                f"schedule: the {type(self.scheduler).__name__} belongs to an optimizer that this "
                f"Runner {'does not have' if not names else f'calls {names[0]!r}'}. Build it from "
                "the optimizer that you pass to the Runner, or pass dict(type=..., ...)"
            )
        return names[0]

    def _warmup_steps(self, steps: int | None) -> int:
        if self.warmup >= 1 or self.warmup == 0:
            return int(self.warmup)
        if steps is None:
            raise ValueError(
                f"schedule: warmup={self.warmup} is a share of the run, but the length of the run "
                "is unknown because the dataloader has no length. Pass a number of steps"
            )
        return max(round(self.warmup * steps), 1)

    def _check_metric(self, runner: Runner, wanted: bool) -> None:
        if not wanted:
            if self.metric is not None:
                raise TypeError(
                    f"schedule: metric={self.metric!r} has no effect, because only "
                    "ReduceLROnPlateau uses a metric. Remove it"
                )
            return
        if self.metric is None:
            raise TypeError(
                "schedule: ReduceLROnPlateau needs metric=, the name of a validation metric"
            )
        if runner.val_cfg is None:
            raise ValueError(
                f"schedule: ReduceLROnPlateau needs the validation metric {self.metric!r}, but "
                "this Runner does not validate. Pass val_dataloader and val_evaluator"
            )

    def before_train(self, runner: Runner) -> None:
        """Log each schedule, and warn if it does not fit the length of this run."""
        if self._another is not None:
            runner.logger.warning(
                f"schedule: in the checkpoint, ReduceLROnPlateau compares {self._another}, in this "
                f"run {self.metric}: it starts over, at the current learning rate"
            )
            self._another = None
        for track in self._tracks.values():
            of = f" of {track.optim_wrapper.name!r}" if len(self._tracks) > 1 else ""
            runner.logger.info(f"schedule{of}: {track.describe()}")
            steps = total_steps(runner.progress, track.optim_wrapper.window_length)
            total = total_epochs(runner.progress) if track.by_epoch else steps
            planned = track.planned
            if total is not None and planned is not None and total > planned:
                unit = "epochs" if track.by_epoch else "optimizer steps"
                runner.logger.warning(
                    f"schedule: the {track.kind} was made for {planned} {unit}, but this run "
                    f"continues to {total}. Beyond its end, the learning rate keeps its last value"
                )
            if total is not None and planned is not None and self._resumed and total < planned:
                unit = "epochs" if track.by_epoch else "optimizer steps"
                runner.logger.warning(
                    f"schedule: the {track.kind} was made for {planned} {unit}, but the resumed "
                    f"run ends after {total}. The learning rate does not reach its last value"
                )
            if track.warmup is not None:
                track.warmup.apply()
            if steps is not None and track.warmup_steps >= steps:
                runner.logger.warning(
                    f"schedule: the warm-up of {track.warmup_steps} optimizer steps does not end "
                    f"within this run of {steps}"
                )
        self._resumed = False

    @hookimpl(tryfirst=True)  # others see the learning rate of the next step
    def after_optim_step(self, optim_wrapper: OptimWrapper) -> None:
        """Step the warm-up, or the scheduler if it steps per optimizer step."""
        track = self._tracks.get(optim_wrapper.name)
        if track is not None:
            track.after_step()

    def after_train_epoch(self) -> None:
        """Step the schedulers that step per epoch."""
        for track in self._tracks.values():
            track.after_epoch()

    @hookimpl(after="*")  # other plugins may add metrics
    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, Any]) -> None:
        """Step ReduceLROnPlateau with the metric of a validation that training has started."""
        if not runner.progress.val_due:
            return
        tracks = [t for t in self._tracks.values() if isinstance(t.scheduler, ReduceLROnPlateau)]
        value = self._read.read(runner, metrics) if tracks else None
        if value is not None:
            for track in tracks:
                track.step(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each optimizer's schedule."""
        return {
            name: {**track.state_dict(), "metric": self.metric, "seen": self._read.seen}
            for name, track in self._tracks.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the schedules saved by ``state_dict``."""
        for name, track in self._tracks.items():
            track.load_state_dict(state[name])
            before = state[name].get("metric", self.metric)
            if before == self.metric:
                self._read.seen = state[name].get("seen", False)
            if isinstance(track.scheduler, ReduceLROnPlateau) and before != self.metric:
                track.forget_the_best()
                self._another = before

    def after_load_checkpoint(self, runner: Runner, checkpoint: Mapping[str, Any]) -> None:
        """Scale the learning rates of an optimizer whose state was not loaded.

        The option ``allow`` permits that. torch's schedulers continue from the current learning
        rate, which is part of the optimizer's state, so it is set to the same share of the initial
        learning rate as in the checkpoint.
        """
        self._resumed = True
        saved = checkpoint.get("optimizer", {})
        for name, track in self._tracks.items():
            old = saved if "param_groups" in saved else saved.get(name, {})
            track.match_rates(old.get("param_groups", ()))


class _Track:
    """The schedule of one optimizer.

    Args:
        optim_wrapper: The wrapper of the optimizer.
        built: torch's scheduler, and where it ends.
        by_epoch: Whether it steps per epoch instead of per optimizer step.
    """

    def __init__(self, optim_wrapper: OptimWrapper, built: Built, by_epoch: bool) -> None:
        self.optim_wrapper = optim_wrapper
        self.scheduler, self.kind, self.length, self.end = built
        self.by_epoch: bool | None = by_epoch
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.by_epoch = None  # per validation
        self.warmup: Warmup | None = None
        self._steps = optim_wrapper.steps  # at the end of the last epoch
        # torch knows only the steps of this process, and would warn where a resume took none yet.
        optim_wrapper.optimizer._opt_called = True  # type: ignore[attr-defined]

    @property
    def warmup_steps(self) -> int:
        """The number of optimizer steps of the warm-up."""
        return 0 if self.warmup is None else self.warmup.steps

    @property
    def planned(self) -> int | None:
        """The epochs or optimizer steps that it was made for; None if no length was filled in."""
        if self.length is None:
            return None
        return self.length + (0 if self.by_epoch else self.warmup_steps)

    @property
    def ended(self) -> bool:
        """Whether it has reached the length that was filled in."""
        return self.end is not None and self.scheduler.last_epoch >= self.end

    @property
    def how(self) -> str:
        """The scheduler's class, and when it steps."""
        how = {None: "per validation", True: "per epoch", False: "per optimizer step"}
        return f"{self.kind} {how[self.by_epoch]}"

    def describe(self) -> str:
        """Return a description for the log."""
        text = self.how
        if self.planned is not None:
            text += f", made for {self.planned}"
        return f"{text}, warm-up over {self.warmup_steps} steps" if self.warmup_steps else text

    def after_step(self) -> None:
        """Step the warm-up; once it is over, step a scheduler that steps per optimizer step."""
        if self.warmup is not None and not self.warmup.over:
            self.warmup.step()
        elif self.by_epoch is False and not self.ended:
            self.scheduler.step()

    def after_epoch(self) -> None:
        """Step a scheduler that steps per epoch, unless the epoch had no optimizer step."""
        moved = self.optim_wrapper.steps > self._steps
        if self.by_epoch and moved and not self.ended:
            self.step()
        self._steps = self.optim_wrapper.steps

    def step(self, *metric: float) -> None:
        """Step the scheduler, which does not see the factor of a warm-up in progress."""
        step: Callable[..., None] = self.scheduler.step
        going_on = self.warmup is not None and not self.warmup.over
        lifted = self.warmup.lifted() if self.warmup is not None and going_on else nullcontext()
        with lifted:
            step(*metric)

    def forget_the_best(self) -> None:
        """Let ReduceLROnPlateau compare only values from now on."""
        scheduler: Any = self.scheduler
        scheduler.best = scheduler.mode_worse
        scheduler.num_bad_epochs = scheduler.cooldown_counter = 0

    def match_rates(self, saved: Iterable[Mapping[str, Any]]) -> None:
        """Scale the learning rates of groups that were not loaded as the saved ones were scaled."""
        for group, old in zip(self.optim_wrapper.param_groups, saved, strict=False):
            first = old.get("initial_lr")
            if first and group["lr"] != old["lr"]:  # it was not loaded
                group["lr"] = group["initial_lr"] * (old["lr"] / first)

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain containers."""
        return {
            "how": self.how,
            "scheduler": self.scheduler.state_dict(),
            "length": self.length,
            "end": self.end,
            "warmup": {} if self.warmup is None else self.warmup.state_dict(),
            "steps": self._steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the schedule as it was made, whatever the length of this run.

        The learning rates themselves are part of the optimizer's state.

        Raises:
            ValueError: The state belongs to another scheduler.
        """
        if state["how"] != self.how:
            raise ValueError(
                f"schedule: the saved state is of {state['how']}, but this run has {self.how}. "
                "Resume with the same scheduler. To start a new schedule, delete 'schedule' from "
                "checkpoint['plugins'] and set allow=['schedule']"
            )
        self.length, self.end = state["length"], state["end"]
        self.scheduler.load_state_dict(state["scheduler"])
        self.warmup = None
        if state["warmup"]:
            self.warmup = Warmup.from_state_dict(self.optim_wrapper.optimizer, state["warmup"])
        self._steps = state["steps"]
