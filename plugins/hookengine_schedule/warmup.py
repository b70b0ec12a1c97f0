"""The warm-up: a factor on whatever learning rates a scheduler sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

from torch import Tensor
from torch.optim import Optimizer


class Warmup:
    """Multiplies the learning rates by a factor that grows linearly to 1 (arXiv:1706.02677).

    As ``torch.optim.lr_scheduler.LinearLR``, but absolute: it keeps the learning rates as they are
    without it, and lifts itself while a scheduler moves on beneath it. What others set meanwhile
    does not last.

    Args:
        optimizer: Its learning rates are multiplied at once.
        steps: Optimizer steps until the factor is 1.
        start: The factor at the start.

    Attributes:
        done: Steps taken.
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
        """The present factor."""
        return self._start + (1 - self._start) * min(self.done / self.steps, 1)

    def step(self) -> None:
        """Go on after an optimizer step."""
        self.done += 1
        self._write([lr * self.factor for lr in self._base])

    def apply(self) -> None:
        """Set the learning rates, unless the warm-up is over."""
        if not self.over:
            self._write([lr * self.factor for lr in self._base])

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """The learning rates without the warm-up; those that are set meanwhile count."""
        self._write(self._base)
        try:
            yield
            self._base = self._read()
        finally:
            self.apply()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "steps": self.steps,
            "start": self._start,
            "done": self.done,
            "base": self._base,
        }

    @classmethod
    def from_state_dict(cls, optimizer: Optimizer, state: Mapping[str, Any]) -> Self:
        """Go on; the optimizer has its learning rates from a state of its own."""
        warmup = cls.__new__(cls)
        warmup.optimizer = optimizer
        warmup.steps, warmup._start = state["steps"], state["start"]
        warmup.done, warmup._base = state["done"], state["base"]
        return warmup

    def _read(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def _write(self, rates: Sequence[float]) -> None:
        for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
