"""Models whose weights are running averages of the weights of another model."""

from __future__ import annotations

import functools
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hookengine_averaging.copies import copy_model
from hookengine_averaging.dtypes import Dtypes
from hookengine_averaging.match import (
    buffers_of,
    is_averaged_buffer,
    is_continuous,
    parameters_of,
)
from hookengine_averaging.pairs import Pairs
from hookengine_averaging.precise import PreciseValues, wide


class BaseAveragedModel(nn.Module):
    """Base class of averaged models; a subclass implements ``avg_func``.

    It holds a copy of the model, and ``update_parameters`` moves the copy toward the model. The
    first update copies the weights; after that, every ``interval``-th update averages them. Groups
    of tensors are averaged at once, in place and without synchronizing the device: if the copy has
    the model's device and dtype, no extra memory is needed.

    Averages of bfloat16, float16 and float8 weights are kept in float32 beside the copy, which
    takes 4 bytes per weight: each update moves an average by less than these dtypes can hold. The
    copy holds the averages in the model's dtype, so it is called as the model is. ``state_dict``
    has them in float32. A state with lower precision can be loaded.

    Where the model changes the dtype of a tensor later, so does the copy, unless you have converted
    the copy to a dtype of your choice.

    Args:
        model: The model to average; it is copied.
        interval: The number of updates from one average to the next.
        device: The device of the copy; by default the model's.
        update_buffers: Average the floating-point buffers too, instead of copying them. Integer
            (``num_batches_tracked``) and sparse buffers are always copied. Buffers outside the
            state dict (``persistent=False``) are neither: the copy keeps and computes its own.

    Attributes:
        module: The averaged copy; its parameters require no gradient.
        steps: The number of updates so far, an int64 scalar tensor; part of the state.

    Raises:
        ValueError: ``interval`` is less than 1, a layer of the model is lazy and has not been
            called yet, or a function that was set on the model uses its layers in a way that the
            copy cannot follow.
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
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if is_lazy(tensor):
                raise ValueError(
                    f"{name} has no shape yet, because its layer is lazy, and cannot be averaged. "
                    "Run one batch through the model before it is copied or passed to the Runner"
                )
        self.module = copy_model(model).requires_grad_(False)
        if device is not None:
            self.module = self.module.to(device)
        self.register_buffer("steps", torch.tensor(0, dtype=torch.long, device=device))
        self.interval = interval
        self.update_buffers = update_buffers
        self._pairs: Pairs | None = None
        self._precise = PreciseValues()
        self._dtypes = Dtypes()
        self._counter = _Counter()
        self.register_state_dict_post_hook(_add_precise_values)  # type: ignore[no-untyped-call]

    @abstractmethod
    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: int) -> None:
        """Move an averaged tensor, in place, toward the tensor of the model.

        Args:
            averaged_param: The average so far, in float32 or a wider dtype.
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
        # Where a changed dtype would not raise, each tensor is looked at in any case.
        if pairs is None or not pairs.are_of(model, not pairs.alike or not self._lerps()):
            self._pairs = None  # if the next line raises, it raises at the next update, too
            pairs = self._pairs = self._pair(model)
        counter = self._counter
        steps: Any = self._buffers["steps"]  # faster than self.steps
        done = counter.read(steps)
        with torch.no_grad():
            if done == 0:
                pairs.copy_all()
            else:
                if done % self.interval == 0:
                    for averages, sources in pairs.groups():
                        self._average(averages, sources, done)
                    pairs.store()
                    if self._pairs is None:
                        pairs = self._pairs = self._pair(model)
                try:
                    pairs.copy_rest()
                except RuntimeError:  # a buffer has got another shape in place
                    pairs = self._pairs = self._pair(model)
                    pairs.copy_rest()
            steps.add_(1)
        counter.set(steps, done + 1)

    def _pair(self, model: nn.Module) -> Pairs:
        with torch.no_grad():
            return Pairs(self.module, model, self.update_buffers, self._precise, self._dtypes)

    def _average(self, averaged: list[Tensor], sources: list[Tensor], steps: int) -> None:
        if not self._lerps():
            for average, source in zip(averaged, sources, strict=True):
                self.avg_func(average, source, steps)
            return
        weight = self._lerp_weight(steps)
        try:
            torch._foreach_lerp_(averaged, sources, weight)
        except RuntimeError:
            # The model has changed a dtype or device. torch has averaged the tensors before it.
            both = [*zip(averaged, sources, strict=True)]
            alike = [a.dtype == s.dtype and a.device == s.device for a, s in both]
            if all(alike):
                raise
            begin = alike.index(False)
            converted = [source.to(average) for average, source in both[begin:]]
            torch._foreach_lerp_(averaged[begin:], converted, weight)
            self._pairs = None

    def _lerp_weight(self, steps: int) -> float:
        """Return the weight of the model's value, if the average is a linear interpolation."""
        raise NotImplementedError

    def _weight_of_start(self, updates: int) -> float | None:
        """Return how much of the average its first weights make up, or None if it is unknown.

        Only shares above a tenth are exact.
        """
        if not self._lerps():
            return None
        share = 1.0
        for done in range(self.interval, updates, self.interval):
            share *= 1 - self._lerp_weight(done)
            if share < 0.1:
                break
        return share

    def _lerps(self) -> bool:
        """Return whether it is a linear interpolation, so that all tensors are averaged at once.

        It is not if a class, a mixin or an instance overrides ``avg_func`` but not the weight.
        """
        return "avg_func" not in self.__dict__ and _weight_belongs_to_avg_func(type(self))  # type: ignore[arg-type]

    def _averages(self) -> dict[str, Tensor]:
        """Return the tensors of the copy that are averaged, by their names; tied ones have several.

        ``Pairs`` uses the first name of each.
        """
        found = {n: s.tensor for n, s in parameters_of(self.module).items()}
        averages = {n: t for n, t in found.items() if t is not None and is_continuous(t)}
        if self.update_buffers:
            held = {n: s.tensor for n, s in buffers_of(self.module).items()}
            averages |= {n: b for n, b in held.items() if b is not None and is_averaged_buffer(b)}
        return averages

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._pairs = None  # moving a module replaces its buffers
        with torch.no_grad():
            before = self._precise.before_conversion(self._averages())
            moved = super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
            self._precise.after_conversion(self._averages(), before)
        return moved

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self._pairs = None  # load_state_dict(assign=True) replaces all tensors
        for name, tensor in self._averages().items():
            self._precise.load(name, tensor, state_dict.get(f"{prefix}module.{name}"))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "_pairs": None, "_dtypes": Dtypes(), "_counter": _Counter()}


def _add_precise_values(
    averaged: BaseAveragedModel, state: dict[str, Any], prefix: str, _: Any
) -> None:
    """Put the precise averages into a state dict, in place of the rounded ones."""
    with torch.no_grad():
        firsts: dict[int, str] = {}
        for name, tensor in averaged._averages().items():
            first = firsts.setdefault(id(tensor), name)
            if wide(tensor.dtype) != tensor.dtype and (key := f"{prefix}module.{name}") in state:
                state[key] = averaged._precise.of(first, tensor)


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

    def _weight_of_start(self, updates: int) -> float | None:
        if type(self)._lerp_weight is not ExponentialMovingAverage._lerp_weight:
            return super()._weight_of_start(updates)
        averages = max(updates - 1, 0) // self.interval
        return (1 - self.momentum) ** averages if self._lerps() else None


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
