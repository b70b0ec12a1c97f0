"""Writing checkpoints on a thread while training continues, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from hookengine import Runner, dist
from hookengine_checkpoint.best import Best, optimizer_steps
from hookengine_checkpoint.checks import UnsavableError
from hookengine_checkpoint.files import Saved
from hookengine_checkpoint.retention import RunCheckpoints


class BackgroundWriter:
    """Runs one write at a time on a thread, and reports its outcome on the main thread.

    A write that fails is logged, and the next save tries again.

    Args:
        checkpoints: The checkpoints of the run.
        best: The best checkpoint so far.

    Attributes:
        error: Why the last save failed, or None.
        unsavable: Whether that was because of the state, and not of the disk.
    """

    def __init__(self, checkpoints: RunCheckpoints, best: Best) -> None:
        self.error: str | None = None
        self.unsavable = False
        self._checkpoints = checkpoints
        self._best = best
        self._executor = _one_thread()
        self._write: Future[Any] | None = None
        self._prune_to: tuple[int | None, str] = (None, "")
        self._pruning: Future[None] | None = None
        self._position: tuple[Any, ...] | None = None

    def mark_saved(self, progress: Any) -> None:
        """Note that the run is being saved at this point, or was resumed here."""
        self._position = _position(progress)

    def is_saved(self, progress: Any) -> bool:
        """Return whether a save was tried at this point; another one would write the same."""
        return self._position == _position(progress)

    def start(self, write: Callable[[], object], best: int | None, name: str) -> None:
        """Start a write; ``finish`` must have ended the one before.

        Args:
            write: Called on the thread; returns a ``Saved`` if it has published a checkpoint.
            best: The number of the best checkpoint once this one is published.
            name: The name for this one, if it is free when old ones have been removed.
        """
        self._write = self._executor.submit(write)
        self._prune_to = best, name

    @property
    def written(self) -> bool:
        """Whether no write is in progress."""
        return self._write is None or self._write.done()

    def poll(self, runner: Runner) -> None:
        """Report a write that has ended; do not wait for one in progress."""
        if self._write is not None and self._write.done():
            self.wait(runner)

    def wait(self, runner: Runner) -> None:
        """Wait for the write in progress and report its outcome."""
        write, self._write = self._write, None
        if write is None:
            return
        try:
            saved = write.result()
        except Exception as error:
            self.report(runner, error)
            return
        self.error = None
        self._best.commit()
        if not isinstance(saved, Saved):  # this rank has only written its shards
            return
        is_best = saved.number == self._best.number
        if is_best:
            runner.logger.info(self._best.describe(saved.name))
        runner.logger.debug(f"checkpoint: saved {saved.path}")
        best, name = self._prune_to
        try:  # plugins may still find the checkpoint under the path that they are given
            runner.hooks.after_save_checkpoint(runner, saved.path, is_best)
        finally:
            self.prune(runner, best, name)

    def finish(self, runner: Runner) -> None:
        """Wait for the write in progress and for the removal of old checkpoints."""
        self.wait(runner)
        if self._pruning is not None:
            self._pruning.result()

    def rest(self) -> None:
        """End the thread, since nothing is in progress; the next write starts another one."""
        self._executor.shutdown()
        self._executor = _one_thread()

    def close(self, runner: Runner) -> None:
        """Finish what is in progress, and end the thread."""
        self.finish(runner)
        self._executor.shutdown()

    def report(self, runner: Runner, error: Exception) -> None:
        """Log that a checkpoint could not be saved, and forget that it was to be the best one."""
        self.unsavable = isinstance(error, UnsavableError)
        self.error = str(error) if self.unsavable else f"{type(error).__name__}: {error}"
        alone = dist.get_world_size() == 1  # several ranks would act differently
        unchanged = alone and self.is_saved(runner.progress)
        self._best.roll_back(optimizer_steps(runner) if unchanged else None)
        newest = self._checkpoints.newest
        before = "no checkpoint has been saved yet"
        if newest is not None:
            before = f"the previous checkpoint, {newest.name}, is intact"
        fix = "The" if self.unsavable else "Free disk space or fix the folder; the"
        runner.logger.warning(
            f"checkpoint: saving failed ({self.error}); training continues, and {before}. {fix} "
            "next save tries again"
        )

    def prune(self, runner: Runner, best: int | None, name: str | None = None) -> None:
        """Remove old checkpoints on the thread, see ``RunCheckpoints.prune``.

        Freeing disk space takes a while, so ``wait`` does not wait for it.
        """
        self._pruning = self._executor.submit(self._prune, runner, best, name)

    def _prune(self, runner: Runner, best: int | None, name: str | None) -> None:
        try:
            self._checkpoints.prune(best, name)
        except OSError as error:
            runner.logger.warning(f"checkpoint: old checkpoints could not be removed: {error}")

    def mark_best(self, runner: Runner) -> bool:
        """Make the newest checkpoint the best one if it holds the weights that were validated.

        All ranks call it together.

        Returns:
            Whether it holds them; if not, they must be saved.
        """
        self.finish(runner)
        newest = self._checkpoints.newest
        same = newest is not None and newest.iter == runner.progress.iter
        if (number := dist.broadcast_object(newest.number if newest and same else None)) is None:
            return False
        self._best.assign(number)
        self._best.commit()
        if newest is not None:
            runner.logger.info(self._best.describe(newest.name))
            runner.hooks.after_save_checkpoint(runner, newest.path, True)
            self.prune(runner, number)
        return True


def _one_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="checkpoint")


def _position(progress: Any) -> tuple[Any, ...]:
    """Return where a run stands; two saves at one position would be the same."""
    return progress.epoch, progress.iter, progress.batch, progress.val_due
