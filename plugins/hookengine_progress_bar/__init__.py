"""A progress bar on terminals, and nothing elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import Field
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from hookengine import Phase, Plugin, Runner, dist, length_of

__all__ = ["ProgressBar"]


class ProgressBar(Plugin, name="progress_bar"):
    """Show the progress of the epoch and of validation.

    A thread of rich draws the bar from the Runner's counters, so the bar costs training nothing.
    Other output appears above it.
    """

    refresh_per_second: float = Field(default=5.0, gt=0, description="how often the bar is drawn")

    def configure(self) -> None:
        """Start without a bar."""
        self._bar: _Bar | None = None

    def before_run(self, runner: Runner) -> None:
        """Start drawing, on a terminal and on rank 0 only."""
        console = Console()
        # In a notebook, rich would wrap the lines of the log at its own width.
        if dist.is_main_process() and console.is_terminal and not console.is_jupyter:
            self._bar = _Bar(runner, console, self.refresh_per_second)
            self._bar.start()

    def after_run(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def unconfigure(self) -> None:
        """Restore the terminal, even if the plugin is removed during a run."""
        self.after_run()

    def before_val_epoch(self, runner: Runner) -> None:
        """Show the progress of the validation."""
        self._show(runner, "val")

    def before_test_epoch(self, runner: Runner) -> None:
        """Show the progress of the test."""
        self._show(runner, "test")

    def _show(self, runner: Runner, phase: Phase) -> None:
        if self._bar is not None:
            self._bar.begin(phase, runner.dataloaders[phase])

    def after_val_iter(self, batch_idx: int) -> None:
        """Update the number of evaluated batches."""
        if self._bar is not None:
            self._bar.evaluated = batch_idx + 1

    def after_test_iter(self, batch_idx: int) -> None:
        """Update the number of evaluated batches."""
        if self._bar is not None:
            self._bar.evaluated = batch_idx + 1

    def after_val(self) -> None:
        """Show the progress of training again."""
        self._end()

    def after_test(self) -> None:
        """Hide the progress of the test."""
        self._end()

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.end()


class _Bar(Progress):
    """A progress bar of rich that reads the Runner's counters each time it is drawn."""

    def __init__(self, runner: Runner, console: Console, refresh_per_second: float) -> None:
        self.runner = runner
        self.evaluated = 0
        self.evaluating = False
        super().__init__(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=refresh_per_second,
            transient=True,
        )
        self._training = self.add_task("train", visible=False)
        self._evaluation = self.add_task("val", visible=False)

    def begin(self, phase: Phase, dataloader: Iterable[Any]) -> None:
        """Show the progress of a pass over ``dataloader``."""
        self.evaluated = 0
        self.evaluating = True
        total = length_of(dataloader)
        self.reset(self._evaluation, description=phase, total=total, visible=True)

    def end(self) -> None:
        """Hide the progress of that pass."""
        self.evaluating = False
        self.update(self._evaluation, visible=False)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Read the counters, and return what rich draws."""
        progress = self.runner.progress
        if not self.task_ids:  # rich calls this once before any task exists
            return ()
        if progress.iter:
            by_epoch = progress.max_epochs is not None
            name = f"epoch {progress.epoch + 1}/{progress.max_epochs}" if by_epoch else "train"
            self.update(
                self._training,
                description=name,
                completed=progress.batch if by_epoch else progress.iter,
                total=progress.epoch_length if by_epoch else progress.max_iters,
                visible=not self.evaluating and bool(progress.batch),
            )
        self.update(self._evaluation, completed=self.evaluated)
        return super().get_renderables()
