"""Models whose weights are running averages of another model's."""

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
    """Base class of averaged models: a subclass implements ``avg_func``.

    It holds a copy of the model, and moves it towards the model at each ``update_parameters``. The
    first update copies; of the later ones each ``interval``-th averages. Averages are taken in
    groups of tensors at once, without synchronising the device, and in place: where the copy has
    the model's device and dtype, it needs no memory beside it.

    Args:
        model: The model to average; it is copied.
        interval: Updates between two averages.
        device: Where the copy lives; by default where the model does.
        update_buffers: Average the floating-point buffers too, in place of copying them. Integer
            buffers (``num_batches_tracked``) are always copied.

    Attributes:
        module: The averaged copy; its parameters require no gradient.
        steps: Updates so far, an int64 scalar tensor; part of the state.

    Raises:
        ValueError: ``interval`` below 1.
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
        """Move an averaged tensor, in place, towards the model's.

        Args:
            averaged_param: The average so far.
            source_param: The model's present value, on the same device and of the same dtype.
            steps: Updates before this one.
        """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the averaged copy returns."""
        return self.module(*args, **kwargs)

    def update_parameters(self, model: nn.Module) -> None:
        """Take the model's present weights in.

        Args:
            model: The model that was copied, or one with the same parameters and buffers.

        Raises:
            ValueError: its parameters or buffers have other names or shapes; nothing is changed.
        """
        pairs = self._pairs
        if pairs is None or not pairs.are_of(model):
            self._pairs = None  # if the next line refuses the model, it does so again
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
        """The weight of the model's value, where the average is a linear interpolation."""
        raise NotImplementedError

    def _lerps(self) -> bool:
        """Whether it is one, so that all tensors can be averaged at once.

        Not where ``avg_func`` is overridden without the weight, by a class, a mixin or an instance.
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
    """The value of ``steps``, read from the device only where somebody else has set it."""

    def __init__(self) -> None:
        self._tensor: Tensor | None = None
        self._version = self._value = 0

    def read(self, tensor: Tensor) -> int:
        """The value."""
        if tensor is not self._tensor or tensor._version != self._version:
            self.set(tensor, int(tensor))
        return self._value

    def set(self, tensor: Tensor, value: int) -> None:
        """Note the value that the tensor has now."""
        self._tensor, self._version, self._value = tensor, tensor._version, value


class StochasticWeightAverage(BaseAveragedModel):
    """The mean of all weights taken in, SWA (arXiv:1803.05407)."""

    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: int) -> None:
        """Move by 1 over the number of values."""
        averaged_param.lerp_(source_param, self._lerp_weight(steps))

    def _lerp_weight(self, steps: int) -> float:
        return 1 / (steps // self.interval + 1)


class ExponentialMovingAverage(BaseAveragedModel):
    """The exponential moving average: ``(1 - momentum) * average + momentum * value``.

    Args:
        model: The model to average.
        momentum: Weight of the present value, a small number; not what optimizers call momentum.
        interval: See ``BaseAveragedModel``.
        device: Likewise.
        update_buffers: Likewise.

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
            raise ValueError(f"momentum must lie between 0 and 1, got {momentum}")
        if momentum > 0.5:
            warnings.warn(
                f"momentum={momentum} is the weight of the present value, usually a small number: "
                f"is {1 - momentum:.4g} meant?",
                stacklevel=2,
            )
        self.momentum = momentum

    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: int) -> None:
        """Interpolate by ``momentum``."""
        averaged_param.lerp_(source_param, self._lerp_weight(steps))

    def _lerp_weight(self, steps: int) -> float:
        return self.momentum


class MomentumAnnealingEMA(ExponentialMovingAverage):
    """An exponential moving average that begins with a larger momentum.

    It is ``max(momentum, gamma / (gamma + steps))``, so that early updates weigh as in a mean.

    Args:
        model: The model to average.
        momentum: See ``ExponentialMovingAverage``.
        gamma: Updates after which half of the annealing is over.
        interval: See ``BaseAveragedModel``.
        device: Likewise.
        update_buffers: Likewise.

    Raises:
        ValueError: ``gamma`` is not above 0, or ``momentum`` not between 0 and 1.
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
        """Interpolate by the annealed momentum."""
        averaged_param.lerp_(source_param, self._lerp_weight(steps))

    def _lerp_weight(self, steps: int) -> float:
        return max(self.momentum, self.gamma / (self.gamma + steps))
