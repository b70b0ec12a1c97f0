"""How often to save: by epochs, iterations or time."""

from __future__ import annotations

import re
import time
from typing import Any, Literal, NamedTuple

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


class Every(NamedTuple):
    """A number of some unit."""

    number: float
    unit: Unit


def parse(every: int | str | None, by_epoch: bool) -> Every:
    """What the option ``every`` says.

    Args:
        every: ``"500 iterations"``, ``"10 minutes"``, ``"1 hour"``, ``"2 epochs"``; a number is
            one of epochs, or of iterations where these are the run's limit; None is an epoch, or
            1000 iterations.
        by_epoch: Whether the run counts epochs.

    Raises:
        ValueError: it says something else.
    """
    if every is None:
        return Every(1, "epochs") if by_epoch else Every(1000, "iterations")
    if isinstance(every, int):
        number, name = str(every), "epochs" if by_epoch else "iterations"
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", every)
        number, name = match.groups() if match else ("0", "")
    unit = _UNITS.get(name)
    count = float(number)
    if unit is None or count <= 0 or (unit != "minutes" and count != int(count)):
        raise ValueError(
            f"every={every!r}: give a number, or a text such as '500 iterations', '2 epochs' or "
            "'10 minutes'"
        )
    return Every(count * _MINUTES.get(name, 1.0), unit)


class Rhythm:
    """Tells when a save is due.

    Args:
        every: How often.
        progress: The counters of the run.
    """

    def __init__(self, every: Every, progress: Any) -> None:
        self.every = every
        self._progress = progress
        self.restart()

    def restart(self) -> None:
        """Count from here."""
        count = int(self.every.number)
        if self.every.unit == "epochs":
            self._next = (self._progress.epoch // count + 1) * count
        elif self.every.unit == "iterations":
            self._next = (self._progress.iter // count + 1) * count
        else:
            self._deadline = time.monotonic() + 60 * self.every.number

    @property
    def due(self) -> bool:
        """Whether epochs or iterations call for a save."""
        if self.every.unit == "iterations":
            return bool(self._progress.iter >= self._next)
        return self.every.unit == "epochs" and bool(self._progress.epoch >= self._next)

    @property
    def overdue(self) -> bool:
        """Whether the clock does, on which ranks may differ."""
        return self.every.unit == "minutes" and time.monotonic() >= self._deadline
