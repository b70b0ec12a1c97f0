"""How long iterations take."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter


class Stopwatch:
    """The time of iterations, and the part of it spent waiting for data.

    The events of an iteration change these numbers themselves, which saves calls.

    Attributes:
        mark: When the current iteration began, in seconds.
        seconds: Time of the iterations since the last record.
        data_seconds: The part of it spent waiting for their batches.
        iterations: Number of iterations since the last record.
        samples: Number of samples in them; None if it is not known for all of them.
    """

    __slots__ = (
        "_session_iterations",
        "_session_seconds",
        "data_seconds",
        "iterations",
        "mark",
        "samples",
        "seconds",
    )

    def __init__(self) -> None:
        self._clear()
        self.restart()

    def _clear(self) -> None:
        self.iterations = 0
        self.samples: int | None = 0
        self.seconds = self.data_seconds = 0.0

    def restart(self) -> None:
        """Start a session: the speed before an interruption does not count in it."""
        self._session_seconds = 0.0
        self._session_iterations = 0
        self.mark = perf_counter()

    def start_interval(self) -> None:
        """Add the iterations since the last record to the session, and start at zero."""
        self._session_seconds += self.seconds
        self._session_iterations += self.iterations
        self._clear()

    def state_dict(self) -> dict[str, float | None]:
        """Return the number and the time of the iterations since the last record."""
        names = ("iterations", "samples", "seconds", "data_seconds")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Restore what ``state_dict`` returned."""
        for name, value in state.items():
            setattr(self, name, value)

    @property
    def seconds_per_iteration(self) -> float:
        """The mean over this session."""
        seconds = self._session_seconds + self.seconds
        return seconds / max(self._session_iterations + self.iterations, 1)
