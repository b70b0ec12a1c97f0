"""The warm-up: a factor that multiplies the learning rates of a scheduler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

from torch.optim import Optimizer

from hookengine_schedule.groups import set_rate


class Warmup:
    """Multiplies the learning rates by a factor that grows linearly to 1 (arXiv:1706.02677).

    Unlike ``torch.optim.lr_scheduler.LinearLR``, it keeps the learning rates without the factor,
    and removes the factor while another scheduler steps. Learning rates that anything else sets
    during the warm-up are overwritten.

    Args:
        optimizer: The optimizer, whose learning rates are multiplied immediately.
        steps: The number of optimizer steps until the factor is 1.
        start: The factor at the start.

    Attributes:
        done: The number of steps taken.
    """

    def __init__(self, optimizer: Optimizer, steps: int, start: float) -> None:
        self.optimizer = optimizer
        self.steps = steps
        self.done = 0
        self._start = start
        self._base = self._read()
        self.apply()

    @property
    def over(self) -> bool:
        """Whether the factor is 1."""
        return self.done >= self.steps

    @property
    def factor(self) -> float:
        """The current factor."""
        return self._start + (1 - self._start) * min(self.done / self.steps, 1)

    def step(self) -> None:
        """Count an optimizer step, and set the learning rates for the next one."""
        self.done += 1
        self._write([lr * self.factor for lr in self._base])

    def apply(self) -> None:
        """Multiply the learning rates by the factor, unless the warm-up is over."""
        if not self.over:
            self._write([lr * self.factor for lr in self._base])

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Remove the factor within the block, and keep the learning rates that are set there."""
        self._write(self._base)
        try:
            yield
            self._base = self._read()
        finally:
            self.apply()

    def set_base(self, index: int, lr: float) -> None:
        """Set the learning rate of a parameter group without the factor; see ``apply``."""
        self._base[index : index + 1] = [lr]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain numbers."""
        return {
            "steps": self.steps,
            "start": self._start,
            "done": self.done,
            "base": self._base,
        }

    @classmethod
    def from_state_dict(cls, optimizer: Optimizer, state: Mapping[str, Any]) -> Self:
        """Restore a warm-up; the learning rates are restored with the optimizer's state."""
        warmup = cls.__new__(cls)
        warmup.optimizer = optimizer
        warmup.steps, warmup._start = state["steps"], state["start"]
        warmup.done, warmup._base = state["done"], state["base"]
        return warmup

    def _read(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def _write(self, rates: Sequence[float]) -> None:
        for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
            set_rate(group, lr)
