"""The bar on a terminal."""

from __future__ import annotations

from collections.abc import Iterable

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

from hookengine import Runner


class Bar(Progress):
    """A progress bar of rich that reads the Runner's counters each time it is drawn."""

    def __init__(self, runner: Runner, console: Console, refresh_per_second: float) -> None:
        self.runner = runner
        self.done = 0
        self.name: str | None = None
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
        self._other = self.add_task("val", visible=False)

    def begin(self, name: str, total: int | None) -> None:
        """Show the progress of a pass outside training."""
        self.done = 0
        self.name = name
        self.reset(self._other, description=name, total=total, visible=True)

    def end(self) -> None:
        """Hide the progress of that pass."""
        self.name = None
        self.update(self._other, visible=False)

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
                visible=self.name is None and bool(progress.batch),
            )
        self.update(self._other, completed=self.done)
        return super().get_renderables()
