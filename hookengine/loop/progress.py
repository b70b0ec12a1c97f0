"""Where a run stands: epoch, iteration, batch, step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class CountsSteps(Protocol):
    """What an optimizer wrapper is to the counters."""

    steps: int


class Progress:
    """The counters of a run. They move before an ``after_*`` event.

    Attributes:
        epoch: Finished epochs, passes over the training dataloader.
        iter: Finished iterations.
        batch: Batches of the present epoch that were trained on.
        epoch_length: Batches per epoch, or None where the dataloader does not tell.
        max_epochs: The limit in epochs, or None.
        max_iters: The limit in iterations; with ``max_epochs`` it follows from ``epoch_length``;
            None where unknown.
        is_last: Whether the present batch is known to be the last one of its epoch or of the run.
        val_due: Whether a validation is still owed.
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
        """The epoch, from 1, that the last iteration belongs to; 0 before the first one."""
        return self.epoch + (self.batch > 0)

    @property
    def step(self) -> int:
        """Optimizer steps really taken, by the first optimizer."""
        return next((wrapper.steps for wrapper in self._optim_wrappers.values()), 0)

    def count_steps_of(self, optim_wrappers: Mapping[str, CountsSteps]) -> None:
        """Keep the ``steps`` of these wrappers with the counters."""
        self._optim_wrappers = dict(optim_wrappers)

    def state_dict(self) -> dict[str, Any]:
        """The counters as plain numbers."""
        return {
            "epoch": self.epoch,
            "iter": self.iter,
            "batch": self.batch,
            "val_due": self.val_due,
            "steps": {name: wrapper.steps for name, wrapper in self._optim_wrappers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the counters back to what ``state_dict`` returned."""
        self.epoch = state["epoch"]
        self.iter = state["iter"]
        self.batch = state["batch"]
        self.val_due = state["val_due"]
        for name, steps in state["steps"].items():
            if name in self._optim_wrappers:
                self._optim_wrappers[name].steps = steps

    def __repr__(self) -> str:
        counters = f"epoch={self.epoch}, iter={self.iter}, batch={self.batch}, step={self.step}"
        return f"Progress({counters})"
