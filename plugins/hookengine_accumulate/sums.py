"""Sums of gradients with a low precision, in float32."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

Weight = float | Tensor
"""A number, or a scalar tensor on the device whose value the host never reads."""


class GradientSums:
    """The gradients of the earlier micro-batches of a window, of parameters with a low precision.

    In bfloat16, the sum over some hundred micro-batches hardly grows with the next one. These sums
    are therefore kept in float32. Other gradients are summed by autograd, in ``grad``.
    """

    def __init__(self) -> None:
        self._parameters: list[nn.Parameter] = []
        self._sums: dict[nn.Parameter, Tensor] = {}

    def use(self, parameters: Iterable[nn.Parameter]) -> None:
        """Choose those of the parameters that have a low precision."""
        self._parameters = [p for p in parameters if p.dtype.itemsize <= 2]

    def clear(self) -> None:
        """Discard the sums."""
        self._sums.clear()

    def take(self) -> None:
        """Move the gradients from the parameters into the sums, before the next backward pass."""
        for parameter in self._parameters:
            grad = parameter.grad
            if grad is None or grad.layout != torch.strided:
                continue
            if parameter in self._sums:
                self._sums[parameter].add_(grad)
            else:
                self._sums[parameter] = grad.float()
            parameter.grad = None

    def give(self, factor: Weight) -> set[nn.Parameter]:
        """Set the gradients to the sums, multiplied by a factor, and start over.

        Returns:
            The parameters whose gradients it has set.
        """
        sums, self._sums = self._sums, {}
        for parameter, total in sums.items():
            if parameter.grad is not None:
                total.add_(parameter.grad)
            total.mul_(factor.to(total.device) if isinstance(factor, Tensor) else factor)
            parameter.grad = total.to(parameter.dtype)
        return {*sums}
