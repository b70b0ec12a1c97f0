"""The warm-up: a factor on whatever learning rates a scheduler sets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.optim import Optimizer


class Warmup:
    """Multiplies the learning rates by a factor that grows linearly to 1 (arXiv:1706.02677).

    As ``torch.optim.lr_scheduler.LinearLR``, but it can be lifted while a scheduler by epoch, or
    one that sets the learning rates absolutely, moves on beneath it.

    Args:
        optimizer: Its learning rates are multiplied at once.
        steps: Optimizer steps until the factor is 1.
        factor: At the start.

    Attributes:
        done: Steps taken.
    """

    def __init__(self, optimizer: Optimizer, steps: int, factor: float) -> None:
        self.optimizer = optimizer
        self.steps = steps
        self.done = 0
        self._start = factor
        self._multiply(factor)

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
        before = self.factor
        self.done += 1
        self._multiply(self.factor / before)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """The learning rates as they are without the warm-up."""
        self._multiply(1 / self.factor)
        try:
            yield
        finally:
            self._multiply(self.factor)

    def _multiply(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].mul_(factor)
            else:
                group["lr"] *= factor
