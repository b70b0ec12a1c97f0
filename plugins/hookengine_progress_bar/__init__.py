"""A progress bar on terminals, and now and then a line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ClassVar

from pydantic import Field
from rich.console import Console

from hookengine import Plugin, Runner, dist, hookimpl, length_of
from hookengine_progress_bar.bar import Bar
from hookengine_progress_bar.lines import Lines

__all__ = ["ProgressBar"]


class ProgressBar(Plugin, name="progress_bar"):
    """Show the progress of the epoch, of validation, and of other long passes.

    On a terminal, a thread of rich draws a bar from the Runner's counters, so the bar costs
    training nothing. Other output appears above it. Elsewhere, in a file or a notebook, a line is
    logged whenever no record was written for ``line_interval`` seconds. Only rank 0 shows either.
    """

    refresh_per_second: float = Field(default=5.0, gt=0, description="how often the bar is drawn")
    line_interval: float = Field(
        default=60.0,
        gt=0,
        description="seconds without a record after which a line is logged, if there is no bar",
    )
    clock: ClassVar[Callable[[], float]] = time.monotonic

    def configure(self) -> None:
        """Start without a bar."""
        self._bar: Bar | None = None
        self._lines: Lines | None = None

    def before_run(self, runner: Runner) -> None:
        """Start drawing, on a terminal and on rank 0 only."""
        self._lines = None
        self._start(runner, draw=True)

    def _start(self, runner: Runner, draw: bool) -> None:
        console = Console()
        if not dist.is_main_process():
            return
        # In a notebook, rich would wrap the lines of the log at its own width.
        if not console.is_terminal or console.is_jupyter:
            clock = type(self).clock
            self._lines = Lines(runner, self.plugin_name, self.line_interval, clock)
        elif draw:
            self._bar = Bar(runner, console, self.refresh_per_second)
            self._bar.start()

    def after_run(self) -> None:
        """Remove the bar."""
        self._lines = None
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def unconfigure(self) -> None:
        """Restore the terminal, even if the plugin is removed during a run."""
        self.after_run()

    # -- training -------------------------------------------------------------------------------

    def before_train_epoch(self, runner: Runner) -> None:
        """Follow the pass of the epoch."""
        if self._lines is not None:
            self._lines.begin_epoch(runner.progress)

    @hookimpl(after="logging")  # no line right before a record
    def after_train_iter(self, runner: Runner) -> None:
        """Log a line if one is due."""
        if self._lines is not None:
            self._lines.train(runner.progress)

    def after_train(self) -> None:
        """Follow training no longer."""
        if self._lines is not None:
            self._lines.end_training()

    def write(self) -> None:
        """Put off the next line, since a record tells of the progress, too."""
        if self._lines is not None:
            self._lines.postpone()

    # -- other passes ---------------------------------------------------------------------------

    def before_val_epoch(self, runner: Runner) -> None:
        """Show the progress of the validation."""
        self._begin("val", length_of(runner.dataloaders["val"]))

    def before_test_epoch(self, runner: Runner) -> None:
        """Show the progress of the test."""
        self._begin("test", length_of(runner.dataloaders["test"]))

    def after_val_iter(self, batch_idx: int, prefix: str) -> None:
        """Update the number of evaluated batches."""
        self._count("val", prefix, batch_idx + 1)

    def after_test_iter(self, batch_idx: int, prefix: str) -> None:
        """Update the number of evaluated batches."""
        self._count("test", prefix, batch_idx + 1)

    def after_val(self) -> None:
        """Show the progress of training again."""
        self._end()

    def after_test(self) -> None:
        """Hide the progress of the test."""
        self._end()

    def on_progress(self, runner: Runner, name: str, done: int, total: int | None) -> None:
        """Show the progress of a pass by another plugin."""
        if self._bar is None and self._lines is None:  # it is no part of a run
            self._start(runner, draw=False)
        if done == total:
            self._end()
        elif done == 0:
            self._begin(name, total)
        else:
            self._count(name, "", done)

    def _begin(self, name: str, total: int | None) -> None:
        display = self._bar or self._lines
        if display is not None:
            display.begin(name, total)

    def _count(self, name: str, prefix: str, done: int) -> None:
        if self._bar is not None:
            self._bar.done = done
        elif self._lines is not None:
            self._lines.count(f"{name} {prefix}" if prefix else name, done)

    def _end(self) -> None:
        display = self._bar or self._lines
        if display is not None:
            display.end()
