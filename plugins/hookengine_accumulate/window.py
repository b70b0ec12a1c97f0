"""The micro-batches between two steps, and their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from hookengine import Progress, dist
from hookengine_accumulate.sums import GradientSums, Weight


class Window:
    """The micro-batches since the last step of one optimizer.

    The loss of each micro-batch is multiplied by its weight over the *expected* total weight of
    the window. If the expectation was wrong, the gradients are corrected at the end.

    Attributes:
        held: Micro-batches in the window.
        stepped: Micro-batches of the last window that was closed.
        expected: The expected total weight; None until it is known.
        asked: Whether ``should_step`` was called since the last backward pass, so that the next
            loss belongs to another micro-batch. Losses without such a call between them belong to
            the same one.
        iteration: The iteration of the last micro-batch.
        sums: The sums of gradients with a low precision.
        groups: Number of parameter groups of the optimizer when ``sums`` was set up.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.held = self.stepped = 0
        self.expected: Weight | None = None
        self.asked = False
        self.iteration = -1
        self.sums = GradientSums()
        self.groups = 0
        self._total: Weight = 0.0

    def open(self, expected: Weight | None = None) -> None:
        """Empty the window for its first micro-batch.

        Args:
            expected: The expected total weight, if it is known.
        """
        self.held = 0
        self.sums.clear()
        self._total = 0.0
        self.expected = expected

    def add(self, weight: Weight, iteration: int) -> None:
        """Add a micro-batch."""
        self.held += 1
        self.asked = False
        self.iteration = iteration
        self._total = self._total + weight

    def correction(self, device: torch.device, per_rank: bool) -> Weight:
        """Return the factor that corrects the gradients at the end of the window.

        Args:
            device: The device on which the ranks exchange tensors.
            per_rank: Whether the total weights of the ranks may differ.
        """
        total, ranks = self._total, dist.get_world_size()
        expected = 1.0 if self.expected is None else self.expected
        if ranks > 1 and per_rank:
            # In float64 if the device has it: a token count may exceed the integers of float32.
            dtype = torch.float32 if device.type == "mps" else torch.float64
            total = torch.as_tensor(total, dtype=dtype, device=device).clone()
            total = dist.sum_over_ranks(total) / ranks
            total = total.item() if device.type == "cpu" else total
        if isinstance(total, Tensor):  # stays on the device
            return torch.where(total > 0, expected / total, torch.zeros_like(total))
        return expected / total if total else 0.0


def micro_batches_left(progress: Progress, steps: int) -> int:
    """Return how many micro-batches remain for the window, as far as the lengths are known."""
    left = steps
    if progress.epoch_length is not None:
        left = min(left, progress.epoch_length - progress.batch)
    if progress.max_iters is not None:
        left = min(left, progress.max_iters - progress.iter)
    return max(left, 1)
