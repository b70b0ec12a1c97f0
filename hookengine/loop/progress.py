"""The counters of a run: epoch, iteration, batch and optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class CountsSteps(Protocol):
    """The part of an optimizer wrapper that the counters need."""

    steps: int


class Progress:
    """Count the epochs, iterations, batches and optimizer steps of a run.

    The counters advance before the matching ``after_*`` event is emitted.

    Attributes:
        epoch: Finished epochs. An epoch is one pass over the training dataloader.
        iter: Finished iterations.
        batch: Batches of the current epoch already used for training. A run that resumes within an
            epoch with another batch size counts in its own batches, and begins with a shorter one.
        epoch_length: Batches per epoch, or None if the dataloader has no length.
        max_epochs: The limit in epochs, or None.
        max_iters: The limit in iterations, or None if it is unknown. When ``max_epochs`` is set,
            it is computed from ``epoch_length``.
        is_last: Whether the current batch is known to be the last one of its epoch or of the run.
        val_due: Whether a validation is due and has not run yet.
        stopped: Why training stopped before its limit, or None.
    """

    __slots__ = (
        "_optim_wrappers",
        "batch",
        "epoch",
        "epoch_length",
        "is_last",
        "iter",
        "max_epochs",
        "max_iters",
        "stopped",
        "val_due",
    )

    def __init__(self) -> None:
        self.epoch = 0
        self.iter = 0
        self.batch = 0
        self.epoch_length: int | None = None
        self.max_epochs: int | None = None
        self.max_iters: int | None = None
        self.is_last = False
        self.val_due = False
        self.stopped: str | None = None
        self._optim_wrappers: dict[str, CountsSteps] = {}

    @property
    def current_epoch(self) -> int:
        """The epoch of the last finished iteration, counted from 1; 0 before the first one."""
        return self.epoch + (self.batch > 0)

    @property
    def step(self) -> int:
        """The number of steps the first optimizer has taken; skipped steps do not count."""
        return next((wrapper.steps for wrapper in self._optim_wrappers.values()), 0)

    def count_steps_of(self, optim_wrappers: Mapping[str, CountsSteps]) -> None:
        """Include the ``steps`` of these wrappers in the counters and their saved state."""
        self._optim_wrappers = dict(optim_wrappers)

    def state_dict(self) -> dict[str, Any]:
        """Return the counters as plain numbers."""
        return {
            "epoch": self.epoch,
            "iter": self.iter,
            "batch": self.batch,
            "val_due": self.val_due,
            "steps": {name: wrapper.steps for name, wrapper in self._optim_wrappers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counters saved by ``state_dict``."""
        for name in ("epoch", "iter", "batch", "val_due"):
            setattr(self, name, state[name])
        for name, steps in state["steps"].items():
            if name in self._optim_wrappers:
                self._optim_wrappers[name].steps = steps

    def __repr__(self) -> str:
        counters = f"epoch={self.epoch}, iter={self.iter}, batch={self.batch}, step={self.step}"
        return f"Progress({counters})"
