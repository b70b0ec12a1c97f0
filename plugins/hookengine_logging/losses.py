"""The search for a loss that is NaN or infinite."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any, Literal


class RecentLosses:
    """Keep the losses since the last record, to name the first iteration that went wrong.

    Args:
        response: What a loss that is not finite leads to: ``stop``, an error, or ``warn``, one
            warning for the whole run.

    Attributes:
        by_iteration: Iterations, each with its losses by name (floats, and tensors without
            dimensions), and the number of samples in its batch if it is known.
    """

    def __init__(self, response: Literal["stop", "warn"]) -> None:
        self.by_iteration: list[tuple[int, Mapping[str, Any], int | None]] = []
        self._response = response
        self._warned = False
        self._advice = _ADVICE

    def names(self) -> set[str]:
        """Return the names of all terms of the loss."""
        return {name for _, losses, _ in self.by_iteration for name in losses}

    def find_nonfinite(self, progress: Any) -> str | None:
        """Describe the first loss that is not finite; None if there is none, or it is known."""
        if self._warned:
            return None
        for iteration, losses, size in self.by_iteration:
            values = {name: float(value) for name, value in losses.items()}
            bad = [f"{name} {value}" for name, value in values.items() if not isfinite(value)]
            if bad:
                good = [f"{name} {v:.4g}" for name, v in values.items() if isfinite(v)]
                others = f" ({', '.join(good)})" if good else ""
                ago = progress.iter - iteration
                epoch = progress.current_epoch - (ago >= progress.batch > 0)
                self._advice = _ADVICE if size != 0 else _ADVICE_IF_EMPTY
                return (
                    f"the loss is not finite in iteration {iteration}, epoch {epoch}: "
                    f"{', '.join(bad)}{others}{', because its batch has no samples' * (size == 0)}"
                )
        return None

    def report(self, problem: str, logger: Any) -> None:
        """Raise an error, or log a warning.

        Args:
            problem: What ``find_nonfinite`` returned.
            logger: The run's logger.

        Raises:
            FloatingPointError: The response is ``stop``.
        """
        if self._response == "warn":
            self._warned = True
            logger.warning(problem)
            return
        raise FloatingPointError(
            f"{problem}. {self._advice}; to continue anyway, use dict(type='logging', "
            "nonfinite='warn')"
        )


_ADVICE = (
    "The weights may be corrupted. Inspect that batch and the step before it, lower the learning "
    "rate, or clip the gradients"
)
_ADVICE_IF_EMPTY = (
    "Leave batches without samples out of the dataloader: check the dataset, its filters, the "
    "sampler and the collate function"
)
