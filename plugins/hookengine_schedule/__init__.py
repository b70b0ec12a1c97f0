"""Learning-rate schedules: those of ``torch.optim.lr_scheduler``, with a warm-up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from hookengine import MonitoredMetric, OptimWrapper, Plugin, Runner, hookimpl
from hookengine_schedule.build import build_scheduler, check_plain, is_by_step
from hookengine_schedule.length import total_epochs, total_steps
from hookengine_schedule.track import Track
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

    A parameter group that is added during training follows the schedule as if it had been there
    from the start: its ``lr`` is the initial learning rate. The same holds for a new ``initial_lr``
    that you set in a group before training.
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
        self._another: tuple[str, str] | None = None  # what the plateau compared, and compares
        self._tracks: dict[str, Track] = {}
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

        def build(length: int | None, optimizer: Optimizer) -> LRScheduler:
            length = total if length is None else length
            cfg, milestones = self.scheduler, self.milestones
            return build_scheduler(cfg, optimizer, milestones, length, self.metric).scheduler

        given = self.scheduler if isinstance(self.scheduler, (list, tuple)) else [self.scheduler]
        made_before = any(isinstance(one, LRScheduler) for one in given)
        track = Track(optim_wrapper, built, by_epoch, None if made_before else build)
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
            before, now = self._another
            runner.logger.warning(
                f"schedule: in the checkpoint, ReduceLROnPlateau compares {before}, in this run "
                f"{now}: it starts over, at the current learning rate"
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
            self._fit(runner, track)
            track.follow_initial_rates()
            if steps is not None and track.warmup_steps >= steps:
                runner.logger.warning(
                    f"schedule: the warm-up of {track.warmup_steps} optimizer steps does not end "
                    f"within this run of {steps}"
                )
        self._resumed = False

    @hookimpl(tryfirst=True)  # the others see the learning rate of this step
    def before_optim_step(self, runner: Runner, optim_wrapper: OptimWrapper) -> None:
        """Let parameter groups that were added since the last step follow the schedule."""
        track = self._tracks.get(optim_wrapper.name)
        if track is not None:
            self._fit(runner, track)

    @hookimpl(tryfirst=True)  # before a plugin that takes the step
    def optim_step(self, optim_wrapper: OptimWrapper) -> None:
        """Do the same for groups that other plugins have added in ``before_optim_step``."""
        track = self._tracks.get(optim_wrapper.name)
        if track is not None:
            track.fit()

    def _fit(self, runner: Runner, track: Track) -> None:
        for index in track.fit():
            wrapper = track.optim_wrapper
            group = wrapper.param_groups[index]
            initial = float(group.get("initial_lr", group["lr"]))
            runner.logger.info(
                f"schedule: parameter group {index} of {wrapper.name!r}, which was added, has the "
                f"initial learning rate {initial:g}, and now {float(group['lr']):g}"
            )

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
            saved = state[name]
            metric = saved.get("metric", self.metric)
            if metric == self.metric:
                self._read.seen = saved.get("seen", False)
            direction = saved["scheduler"].get("mode") if track.direction else None
            start_over = track.direction is not None and (
                (metric, direction) != (self.metric, track.direction)
            )
            track.load_state_dict(saved, start_over)
            if start_over:
                self._another = f"{metric} ({direction})", f"{self.metric} ({track.direction})"

    def after_load_checkpoint(self, runner: Runner, checkpoint: Mapping[str, Any]) -> None:
        """Compute the learning rates of an optimizer whose state was not loaded.

        The option ``allow`` permits that. torch's schedulers continue from the current learning
        rate, which is part of the optimizer's state, so it is computed again.
        """
        self._resumed = True
        saved = checkpoint.get("optimizer", {})
        for name, track in self._tracks.items():
            old = saved if "param_groups" in saved else saved.get(name, {})
            track.match_rates(old.get("param_groups", ()))
            if track.replaced:
                runner.logger.warning(
                    f"schedule: the run continues the schedule in the checkpoint, which has "
                    f"{', '.join(track.replaced)} in the script. For another schedule, start a new "
                    "run with load_from="
                )
