"""Lines about the progress of a pass, where no bar can be drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hookengine import Runner


@dataclass
class Pass:
    """A pass over a dataloader.

    Attributes:
        name: What the line begins with.
        total: The number of batches, or None if it is unknown.
        began: When it began, or rather the count ``first`` was reached, in seconds.
        first: The number of batches at that time.
        done: The number of batches so far.
        unit: What is counted.
    """

    name: str
    total: int | None
    began: float
    first: int = 0
    done: int = 0
    unit: str = "batches"

    def line(self, now: float) -> str:
        """Describe the progress, and estimate how long the rest will take."""
        elapsed = now - self.began
        if self.total is None or self.done > self.total:
            return f"{self.name}  {self.done} {self.unit}, {duration(elapsed)} elapsed"
        share = f"{100 * self.done // max(self.total, 1)} %"
        line = f"{self.name}  {self.done}/{self.total} {self.unit}, {share}, {duration(elapsed)}"
        counted = self.done - self.first
        if counted <= 0:
            return f"{line} elapsed"
        left = elapsed / counted * (self.total - self.done)
        return f"{line} elapsed, about {duration(left)} left"


class Lines:
    """Log a line when nothing was logged about the progress for a while.

    Args:
        runner: The Runner.
        plugin: The name of the plugin, for the log.
        interval: Seconds from one line or record to the next line.
        clock: Returns the time in seconds, such as ``time.monotonic``.
    """

    def __init__(
        self, runner: Runner, plugin: str, interval: float, clock: Callable[[], float]
    ) -> None:
        self._runner = runner
        self._plugin = plugin
        self._interval = interval
        self._clock = clock
        self._training: Pass | None = None
        self._other: Pass | None = None
        self.postpone()

    def postpone(self) -> None:
        """Wait for another interval: something was just logged."""
        self._due = self._clock() + self._interval

    def begin_epoch(self, progress: Any) -> None:
        """Follow training: the pass of an epoch, or all iterations up to their limit."""
        if progress.max_epochs is None:
            if self._training is None:
                total = progress.max_iters
                self._training = Pass("train", total, self._clock(), progress.iter)
                self._training.unit = "iterations"
            return
        name = f"train  epoch {progress.epoch + 1}/{progress.max_epochs}"
        self._training = Pass(name, progress.epoch_length, self._clock(), progress.batch)

    def end_training(self) -> None:
        """Follow training no longer."""
        self._training = None

    def train(self, progress: Any) -> None:
        """Log a line if one is due after an iteration of training."""
        if self._clock() >= self._due and self._training is not None:
            by_iter = self._training.unit == "iterations"
            self._training.done = progress.iter if by_iter else progress.batch
            self._log(self._training)

    def begin(self, name: str, total: int | None) -> None:
        """Follow a pass outside training."""
        self._other = Pass(name, total, self._clock())

    def count(self, name: str, done: int) -> None:
        """Log a line if one is due after a batch of that pass; another name begins another one."""
        other = self._other
        if other is None:
            return
        now = self._clock()
        if name != other.name or done < other.done:  # a pass of the next model
            other = self._other = Pass(name, other.total, now, first=done)
        other.done = done
        if now >= self._due:
            self._log(other)

    def end(self) -> None:
        """Follow training again."""
        self._other = None

    def _log(self, current: Pass) -> None:
        self._runner.logger.info(current.line(self._clock()), plugin=self._plugin)
        self.postpone()


def duration(seconds: float) -> str:
    """Return a time as ``M:SS`` or ``H:MM:SS``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
