"""Models whose weights are running averages of the weights of another model."""

from __future__ import annotations

import copy
import functools
import warnings
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from hookengine_averaging.pairs import Pairs


class BaseAveragedModel(nn.Module):
    """Base class of averaged models; a subclass implements ``avg_func``.

    It holds a copy of the model, and ``update_parameters`` moves the copy toward the model. The
    first update copies the weights; after that, every ``interval``-th update averages them. Groups
    of tensors are averaged at once, in place and without synchronizing the device: if the copy has
    the model's device and dtype, no extra memory is needed.

    Args:
        model: The model to average; it is copied.
        interval: The number of updates from one average to the next.
        device: The device of the copy; by default the model's.
        update_buffers: Average the floating-point buffers too, instead of copying them. Integer
            buffers (``num_batches_tracked``) are always copied.

    Attributes:
        module: The averaged copy; its parameters require no gradient.
        steps: The number of updates so far, an int64 scalar tensor; part of the state.

    Raises:
        ValueError: ``interval`` is less than 1.
    """

    steps: Tensor

    def __init__(
        self,
        model: nn.Module,
        interval: int = 1,
        device: torch.device | str | None = None,
        update_buffers: bool = False,
    ) -> None:
        super().__init__()
        if interval < 1:
            raise ValueError(f"interval must be 1 or more, got {interval}")
        self.module = copy.deepcopy(model).requires_grad_(False)
        if device is not None:
            self.module = self.module.to(device)
        self.register_buffer("steps", torch.tensor(0, dtype=torch.long, device=device))
        self.interval = interval
        self.update_buffers = update_buffers
        self._pairs: Pairs | None = None
        self._counter = _Counter()

    @abstractmethod
    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: int) -> None:
        """Move an averaged tensor, in place, toward the tensor of the model.

        Args:
            averaged_param: The average so far.
            source_param: The model's current value, on the same device and of the same dtype.
            steps: The number of updates before this one.
        """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass of the averaged copy."""
        return self.module(*args, **kwargs)

    def update_parameters(self, model: nn.Module) -> None:
        """Update the average with the current weights of the model.

        Args:
            model: The model that was copied, or one with the same parameters and buffers.

        Raises:
            TypeError: ``model`` is not a module.
            ValueError: Its parameters or buffers have other names or shapes; nothing is changed.
        """
        pairs = self._pairs
        if pairs is None or not pairs.are_of(model):
            self._pairs = None  # if the next line raises, it raises at the next update, too
            pairs = self._pairs = Pairs(self.module, model, self.update_buffers)
        counter = self._counter
        steps: Any = self._buffers["steps"]  # faster than self.steps
        done = counter.read(steps)
        with torch.no_grad():
            if done == 0:
                pairs.copy_all()
            else:
                if done % self.interval == 0:
                    self._average(pairs.averaged, pairs.sources(), done)
                pairs.copy_rest()
            steps.add_(1)
        counter.set(steps, done + 1)

    def _average(self, averaged: list[Tensor], sources: list[Tensor], steps: int) -> None:
        if self._lerps():
            torch._foreach_lerp_(averaged, sources, self._lerp_weight(steps))
            return
        for average, source in zip(averaged, sources, strict=True):
            self.avg_func(average, source, steps)

    def _lerp_weight(self, steps: int) -> float:
        """Return the weight of the model's value, if the average is a linear interpolation."""
        raise NotImplementedError

    def _lerps(self) -> bool:
        """Return whether it is a linear interpolation, so that all tensors are averaged at once.

        It is not if a class, a mixin or an instance overrides ``avg_func`` but not the weight.
        """
        return "avg_func" not in self.__dict__ and _weight_belongs_to_avg_func(type(self))  # type: ignore[arg-type]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._pairs = None  # moving a module replaces its buffers
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._pairs = None  # load_state_dict(assign=True) replaces all tensors
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "_pairs": None, "_counter": _Counter()}


@functools.cache
def _weight_belongs_to_avg_func(cls: type) -> bool:
    owners = [
        next(base for base in cls.__mro__ if name in vars(base))
        for name in ("avg_func", "_lerp_weight")
    ]
    return owners[0] is owners[1] is not BaseAveragedModel


class _Counter:
    """The value of ``steps``, read from the device only after other code has set it."""

    def __init__(self) -> None:
        self._tensor: Tensor | None = None
        self._version = self._value = 0

    def read(self, tensor: Tensor) -> int:
        """Return the value."""
        if tensor is not self._tensor or tensor._version != self._version:
            self.set(tensor, int(tensor))
        return self._value

    def set(self, tensor: Tensor, value: int) -> None:
        """Note the current value of the tensor."""
        self._tensor, self._version, self._value = tensor, tensor._version, value


class StochasticWeightAverage(BaseAveragedModel):
    """The mean of all averaged weights, SWA (arXiv:1803.05407)."""

    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: int) -> None:
        """Interpolate with a weight of 1 over the number of values, this one included."""
        averaged_param.lerp_(source_param, self._lerp_weight(steps))

    def _lerp_weight(self, steps: int) -> float:
        return 1 / (steps // self.interval + 1)


class ExponentialMovingAverage(BaseAveragedModel):
    """The exponential moving average: ``(1 - momentum) * average + momentum * value``.

    Args:
        model: The model to average.
        momentum: The weight of the current value, a small number; not the momentum of optimizers.
        interval: See ``BaseAveragedModel``.
        device: See ``BaseAveragedModel``.
        update_buffers: See ``BaseAveragedModel``.

    Raises:
        ValueError: ``momentum`` is not between 0 and 1.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0002,
        interval: int = 1,
        device: torch.device | str | None = None,
        update_buffers: bool = False,
    ) -> None:
        super().__init__(model, interval, device, update_buffers)
        if not 0 < momentum < 1:
            raise ValueError(f"momentum must be between 0 and 1, got {momentum}")
        if momentum > 0.5:
            warnings.warn(
                f"momentum={momentum} is the weight of the current value, usually a small number. "
                f"Did you mean {1 - momentum:.4g}?",
                stacklevel=2,
            )
        self.momentum = momentum

    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: int) -> None:
        """Interpolate with the weight ``momentum``."""
        averaged_param.lerp_(source_param, self._lerp_weight(steps))

    def _lerp_weight(self, steps: int) -> float:
        return self.momentum


class MomentumAnnealingEMA(ExponentialMovingAverage):
    """An exponential moving average that starts with a larger momentum.

    The momentum is ``max(momentum, gamma / (gamma + steps))``, so that early updates
    weigh as much as in a mean.

    Args:
        model: The model to average.
        momentum: See ``ExponentialMovingAverage``.
        gamma: The number of updates after which the annealing is half over.
        interval: See ``BaseAveragedModel``.
        device: See ``BaseAveragedModel``.
        update_buffers: See ``BaseAveragedModel``.

    Raises:
        ValueError: ``gamma`` is not above 0, or ``momentum`` is not between 0 and 1.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0002,
        gamma: int = 100,
        interval: int = 1,
        device: torch.device | str | None = None,
        update_buffers: bool = False,
    ) -> None:
        super().__init__(model, momentum, interval, device, update_buffers)
        if gamma <= 0:
            raise ValueError(f"gamma must be above 0, got {gamma}")
        self.gamma = gamma

    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: int) -> None:
        """Interpolate with the annealed momentum as the weight."""
        averaged_param.lerp_(source_param, self._lerp_weight(steps))

    def _lerp_weight(self, steps: int) -> float:
        return max(self.momentum, self.gamma / (self.gamma + steps))
