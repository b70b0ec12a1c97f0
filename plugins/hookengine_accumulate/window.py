"""The micro-batches between two steps, and what they weigh."""

from __future__ import annotations

import torch
from torch import Tensor

from hookengine import Progress, dist

Weight = float | Tensor
"""A number, or a scalar tensor on the device, which is never read."""


class Window:
    """The micro-batches since the last step of one optimizer.

    The loss of each is multiplied by its weight over the *expected* total of the window, which is
    right at once where the guess is, and is corrected at the end where it was not.

    Attributes:
        held: Micro-batches in it.
        expected: The total weight that it will probably have; None until it is known.
        asked: Whether ``should_step`` was asked since the last backward pass: what follows is
            another micro-batch. Several losses without a question between are one.
        iteration: The iteration of the last one.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.held = 0
        self.expected: Weight | None = None
        self.asked = False
        self.iteration = -1
        self._total: Weight = 0.0

    def open(self) -> None:
        """Begin."""
        self.held = 0
        self._total = 0.0
        self.expected = None

    def add(self, weight: Weight, iteration: int) -> None:
        """Take a micro-batch in."""
        self.held += 1
        self.asked = False
        self.iteration = iteration
        self._total = self._total + weight

    def correction(self, device: torch.device, per_rank: bool) -> Weight:
        """By which the gradients are multiplied at the end.

        Args:
            device: Where ranks exchange tensors.
            per_rank: The totals of the ranks differ.
        """
        total, ranks = self._total, dist.get_world_size()
        expected = 1.0 if self.expected is None else self.expected
        if ranks > 1 and per_rank:
            # In float64 where the device has it: a count of tokens may pass float32's integers.
            dtype = torch.float32 if device.type == "mps" else torch.float64
            total = torch.as_tensor(total, dtype=dtype, device=device).clone()
            total = dist.sum_over_ranks(total) / ranks
            total = total.item() if device.type == "cpu" else total
        if isinstance(total, Tensor):  # stays on the device
            return torch.where(total > 0, expected / total, torch.zeros_like(total))
        return expected / total if total else 0.0


def micro_batches_left(progress: Progress, steps: int) -> int:
    """Micro-batches of the window that begins, as far as the lengths are known."""
    left = steps
    if progress.epoch_length is not None:
        left = min(left, progress.epoch_length - progress.batch)
    if progress.max_iters is not None:
        left = min(left, progress.max_iters - progress.iter)
    return max(left, 1)
