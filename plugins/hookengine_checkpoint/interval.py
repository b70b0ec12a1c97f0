"""When to save: at an interval of epochs, iterations or time, on request, and at the end."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Literal, NamedTuple

from hookengine import Progress, Runner, dist

Unit = Literal["epochs", "iterations", "minutes"]
_UNITS: dict[str, Unit] = {
    **dict.fromkeys(("epoch", "epochs"), "epochs"),
    **dict.fromkeys(("iteration", "iterations", "iter", "iters"), "iterations"),
    **dict.fromkeys(("minute", "minutes", "min"), "minutes"),
    **dict.fromkeys(("second", "seconds", "s", "hour", "hours", "h"), "minutes"),
}
_MINUTES = {
    **dict.fromkeys(("second", "seconds", "s"), 1 / 60),
    **dict.fromkeys(("hour", "hours", "h"), 60.0),
}


class Interval(NamedTuple):
    """A number of epochs, iterations or minutes."""

    number: float
    unit: Unit


def parse_interval(every: int | str | None, by_epoch: bool) -> Interval:
    """Parse the option ``every``.

    Args:
        every: ``"500 iterations"``, ``"10 minutes"``, ``"1 hour"`` or ``"2 epochs"``. A number
            counts epochs, or iterations if the run is limited by these. None means every epoch, or
            every 1000 iterations.
        by_epoch: Whether the run is limited by epochs.

    Raises:
        ValueError: ``every`` is anything else.
    """
    if every is None:
        return Interval(1, "epochs") if by_epoch else Interval(1000, "iterations")
    if isinstance(every, int):
        number, name = str(every), "epochs" if by_epoch else "iterations"
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", every)
        number, name = match.groups() if match else ("0", "")
    unit = _UNITS.get(name)
    count = float(number)
    if unit is None or count <= 0 or (unit != "minutes" and count != int(count)):
        raise ValueError(
            f"every={every!r} is not an interval: give a number, or a string such as "
            "'500 iterations', '2 epochs' or '10 minutes'"
        )
    return Interval(count * _MINUTES.get(name, 1.0), unit)


class SaveTimer:
    """Decides at each safe point whether a checkpoint is due.

    Args:
        every: The option of the plugin, see ``parse_interval``.
        progress: The counters of the run.

    Raises:
        ValueError: ``every`` is not an interval.
    """

    def __init__(self, every: int | str | None, progress: Progress) -> None:
        self.interval = parse_interval(every, by_epoch=progress.max_epochs is not None)
        self._every = every
        self._progress = progress
        self.restart()

    def restart(self) -> None:
        """Restart the interval from the current epoch, iteration and time."""
        count = int(self.interval.number)
        if self.interval.unit == "epochs":
            self._next = (self._progress.epoch // count + 1) * count
        elif self.interval.unit == "iterations":
            self._next = (self._progress.iter // count + 1) * count
        else:
            self._deadline = time.monotonic() + 60 * self.interval.number

    def is_due(self, runner: Runner, agreed: Mapping[str, str]) -> bool:
        """Return whether to save at this safe point; the answer is the same on all ranks.

        The clocks of ranks differ. When time is up, rank 0 only requests a save, which is due at
        the safe point where all ranks have agreed on it.
        """
        unit, progress = self.interval.unit, self._progress
        if unit == "minutes" and time.monotonic() >= self._deadline and dist.is_main_process():
            runner.requests.setdefault("save", f"every {self._every}")
        if agreed and agreed.keys() & {"save", "stop"}:
            return True
        if progress.stopped is not None:  # runner.stop(now=True), on all ranks
            return True
        if unit != "minutes":
            count = progress.iter if unit == "iterations" else progress.epoch
            if count >= self._next:
                return True
        return _is_last_safe_point(runner)


def _is_last_safe_point(runner: Runner) -> bool:
    progress, loop = runner.progress, runner.train_loop
    may_end = progress.batch == 0 or progress.iter == progress.max_iters
    return may_end and loop is not None and loop.done
