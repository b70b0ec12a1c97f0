"""Checkpoints: written atomically while training continues, and resumed exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from pydantic import Field
from torch import nn

from hookengine import (
    Plugin,
    Runner,
    dist,
    greater_is_better,
    hookimpl,
    metric_numbers,
)
from hookengine_checkpoint.background import BackgroundWriter
from hookengine_checkpoint.best import Best, optimizer_steps
from hookengine_checkpoint.checks import (
    UnsavableError,
    check_additions,
    check_before_training,
    warn_of_later_changes,
)
from hookengine_checkpoint.export import export_weights
from hookengine_checkpoint.interval import SaveTimer, parse_interval
from hookengine_checkpoint.preemption import EXIT_CODE, Preemption
from hookengine_checkpoint.resuming import find_on_all_ranks, load_initial_weights, load_run, shard
from hookengine_checkpoint.retention import RunCheckpoints
from hookengine_checkpoint.saving import Saver
from hookengine_checkpoint.weights import find_weights
from hookengine_checkpoint.workers import protected

__all__ = ["EXIT_CODE", "Checkpoint", "export_weights", "find_weights"]


class Checkpoint(Plugin, name="checkpoint"):
    """Save the run, and resume it from a checkpoint.

    A checkpoint is a folder in ``checkpoints`` in the folder of the run: ``state.pth``, which
    ``torch.load(weights_only=True)`` reads anywhere, and ``manifest.json``. It is saved only at a
    ``safe_point``: at the interval ``every``, at the end, when training is stopped, and on request
    (``runner.requests["save"] = "why"``). The state is copied to host memory, where one copy of it
    is kept, and written by a thread; at most one write is in progress. ``latest`` and ``best`` are
    symbolic links.

    If a save fails, a warning is logged and training continues. If the last save fails, ``train()``
    raises the error.

    SIGTERM, SIGINT and SIGUSR1 end training at the next safe point, with a checkpoint and exit code
    75. A second signal ends the process at once.
    """

    every: int | str | None = Field(
        default=None,
        description="the interval: '2 epochs', '500 iterations', '10 minutes'; a number counts "
        "epochs, or iterations if these limit the run; by default every epoch, or every 1000 "
        "iterations",
    )
    keep_last: int | None = Field(
        default=1, gt=0, description="how many of the last checkpoints to keep; None keeps all"
    )
    keep_best: str | None = Field(
        default=None, description="a metric; the checkpoint with its best value is kept, too"
    )
    greater_is_better: bool | None = Field(
        default=None,
        description="whether a greater value of that metric is better; by default its name decides",
    )
    asynchronous: bool = Field(
        default=True, description="write on a thread while training continues"
    )
    allow: list[str] = Field(
        default_factory=list,
        description="what may differ from the checkpoint that is resumed: names of plugins, "
        "'optimizer', 'dataset', 'world_size'",
    )
    signals: list[Literal["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"]] = Field(
        default=["SIGTERM", "SIGINT", "SIGUSR1"],
        description="signals that end training with a checkpoint",
    )

    def __post_init__(self) -> None:
        """Check the interval, and whether greater values of the metric are better."""
        parse_interval(self.every, by_epoch=True)
        greater = self.greater_is_better
        if self.keep_best is not None and greater is None:
            greater = greater_is_better(self.keep_best)
            if greater is None:
                raise TypeError(
                    f"checkpoint: the name of keep_best={self.keep_best!r} does not tell whether "
                    "greater values are better: set greater_is_better=True or False"
                )
        self.allow = sorted(self.allow)  # it may have been a set
        self._best = Best(self.keep_best, bool(greater))

    @property
    def best(self) -> dict[str, Any] | None:
        """``{"metric", "value", "number", "greater"}`` of the best checkpoint, or None."""
        return self._best.known

    @property
    def written(self) -> bool:
        """Whether no write is in progress."""
        return self._writer.written

    # -- starting and resuming ------------------------------------------------------------------

    def configure(self, runner: Runner) -> None:
        """Find the checkpoint to resume from, so that the run continues in its folder."""
        self._best = Best(self.keep_best, self._best.greater)
        self._checkpoints = RunCheckpoints(self.keep_last)
        self._writer = BackgroundWriter(self._checkpoints, self._best)
        self._saver = Saver(self._writer, self._checkpoints, self._best, self.plugin_name)
        self._preemption: Preemption | None = None
        self._validated: tuple[int, dict[str, float]] = (-1, {})
        self._training = self._loading = False
        self._restore: list[Callable[[], None]] = []  # what dataloaders had before
        self._log: list[str] = []  # until the log of the run is open
        self._found = find_on_all_ranks(runner, self._log.append)

    @hookimpl(tryfirst=True, before=("distributed", "seed"))  # before they copy it
    def setup_dataloader(self, dataloader: Iterable[Any]) -> Any:
        """Keep signals to the whole group of processes from ending the workers."""
        changed, restore = protected(dataloader) if self.signals else (dataloader, None)
        if restore is not None:
            self._restore.append(restore)
        return changed

    @hookimpl(after="*")  # after all initialization, before plugins copy or convert the model
    def initialize_model(self, runner: Runner, model: nn.Module) -> None:
        """Load the weights of ``Runner(load_from=...)``, unless a checkpoint is resumed."""
        if runner.load_from is not None and self._found is None:
            load_initial_weights(model, runner.load_from, self._log.append)

    def resume(self, runner: Runner) -> None:
        """Load the state of the checkpoint to resume from.

        Raises:
            ValueError: The state does not fit the Runner; the message names all differences.
        """
        found = self._found
        if found is None:
            return
        self._loading = True
        load_run(runner, found, self.allow, self._log.append)
        self._loading = False
        if found.continues(runner) and dist.is_main_process():
            self._checkpoints.adopt(found)
        if not dist.broadcast_object(self._checkpoints.holds(self._best.number)):
            self._best.known = None  # a validation that is still due finds the best one again
        if self._best.another is not None:
            self._log.append(
                f"the best checkpoint so far was chosen by {self._best.another}, this run has "
                f"keep_best={self.keep_best!r}: the comparison starts over"
            )
        self._writer.mark_saved(runner.progress)
        self._log.append(f"resuming from {found.path}: {runner.progress}")

    @hookimpl(after="*")  # after plugins that add parameter groups
    def before_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Read the tensors of a sharded checkpoint."""
        if self._loading and self._found is not None:
            shard(runner, self._found, checkpoint)

    def before_run(self, runner: Runner) -> None:
        """Log how the run starts, now that its log is open."""
        for text in self._log:
            runner.logger.info(f"checkpoint: {text}")
        self._log.clear()

    @hookimpl(tryfirst=True)  # before the history of the run is truncated
    def before_train(self, runner: Runner) -> None:
        """Start the timer and handle signals; refuse states that could not be saved."""
        for path in self._checkpoints.abandon_later():
            runner.logger.warning(
                f"checkpoint: a checkpoint that is damaged or later than the resumed one was moved "
                f"to {path}"
            )
        check_before_training(runner)
        self._checked = False
        warn_of_later_changes(runner, self)
        self._timer = SaveTimer(self.every, runner.progress)
        can_agree = dist.get_world_size() == 1 or "agree" in runner.plugins.calls()
        if self._timer.interval.unit == "minutes" and not can_agree:
            raise ValueError(
                f"every={self.every!r} needs a plugin that implements the event 'agree', since the "
                "processes must save at the same time: give every in epochs or iterations"
            )
        self._training = True
        # Without agreement, the processes could not end at the same time.
        self._preemption = Preemption(runner, self.signals if can_agree else [])

    @hookimpl(tryfirst=True)
    def before_train_epoch(self, runner: Runner) -> None:
        """Before the first iteration, refuse what plugins would add that could not be saved."""
        if not self._checked:  # by now, all plugins are ready to train
            self._checked = True
            check_additions(runner)

    # -- saving ---------------------------------------------------------------------------------

    @hookimpl(after="*")  # other plugins may add metrics
    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, Any]) -> None:
        """Compare a validation of training with the best one so far."""
        self._validated = runner.progress.iter, metric_numbers(metrics)
        if self.keep_best is None or not runner.progress.val_due:
            return
        self._best.known = dist.broadcast_object(self.best)  # only rank 0 learns of a failed save
        value = self._best.read.read(runner, metrics)
        if value is not None:
            self._best.compare(value, optimizer_steps(runner))

    @hookimpl(after="*")  # changes that other plugins make at a safe point are saved, too
    def safe_point(self, runner: Runner, agreed: Mapping[str, str]) -> None:
        """Save if a checkpoint is due, or if the current weights are the best so far."""
        self._writer.poll(runner)
        if self._best.is_pending and self._best.expire(optimizer_steps(runner)):
            runner.logger.warning(
                f"checkpoint: the best {self.keep_best} so far was validated within a window of "
                "accumulated gradients, and its weights have been trained on since, so they are "
                "not kept. Make val_interval a multiple of the window"
            )
        if agreed and self._preemption is not None:
            self._preemption.note(agreed)
        is_due = self._timer.is_due(runner, agreed) and not self._writer.is_saved(runner.progress)
        if is_due or (self._best.is_pending and not self._writer.mark_best(runner)):
            self.begin_save(runner)

    def save(self, runner: Runner) -> None:
        """Save now. A run can only be resumed exactly from a save within ``safe_point``.

        Raises:
            OSError: The checkpoint could not be saved. During training, this is only logged.
            TypeError: The state holds something that a checkpoint cannot hold.
        """
        self.begin_save(runner)
        if not self._training:
            self._writer.finish(runner)
            self._writer.rest()
            if self._writer.error is not None:
                kind = UnsavableError if self._writer.unsavable else OSError
                raise kind(self._writer.error)

    def begin_save(self, runner: Runner) -> None:
        """Copy the state and write it on the thread; without ``asynchronous``, wait for it."""
        self._writer.finish(runner)
        if self._training:
            self._timer.restart()
        iteration, metrics = self._validated
        self._saver.begin(runner, metrics if iteration == runner.progress.iter else {})
        if not self.asynchronous:
            self._writer.finish(runner)

    def wait(self, runner: Runner) -> None:
        """Wait until the checkpoint in progress is on the disk; log an error."""
        self._writer.wait(runner)

    # -- ending ---------------------------------------------------------------------------------

    def after_train(self, runner: Runner) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            OSError: It could not be saved, nor at a second try.
            TypeError: The state holds something that a checkpoint cannot hold.
        """
        self._writer.finish(runner)
        if dist.broadcast_object(self._writer.error) is not None:
            self.begin_save(runner)
            self._writer.finish(runner)
        self._training = False
        if self._preemption is not None:
            self._preemption.agree()
        error, unsavable = dist.broadcast_object((self._writer.error, self._writer.unsavable))
        if error is not None:
            when = "after the fix" if unsavable else "once there is room again"
            raise (UnsavableError if unsavable else OSError)(
                f"training has ended, but its last checkpoint could not be saved: {error}. The "
                f"weights are still in runner.bare_model; {when}, call "
                "runner.plugins['checkpoint'].save(runner)"
            )

    @hookimpl(after="*")  # it may end the process
    def after_run(self, runner: Runner) -> None:
        """Restore the signal handlers, and end the process if a signal has asked for it."""
        self._training = False
        self._writer.finish(runner)
        self._writer.rest()
        preemption, self._preemption = self._preemption, None
        if preemption is not None:
            preemption.finish()

    def on_exception(self) -> None:
        """Restore the signal handlers: the run ends with its error, not with an exit code."""
        if self._preemption is not None:
            self._preemption.restore_handlers()
            self._preemption = None

    def unconfigure(self, runner: Runner) -> None:
        """Finish what is being written, and end the thread."""
        while self._restore:
            self._restore.pop()()
        self._writer.close(runner)

    def state_dict(self) -> dict[str, Any]:
        """Return the best checkpoint so far."""
        return self._best.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the best checkpoint saved by ``state_dict``."""
        self._best.load_state_dict(state)
