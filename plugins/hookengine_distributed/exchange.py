"""When the ranks exchange gradients: once per optimizer step, and always before it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from hookengine import OptimWrapper, dist


class Exchange:
    """Tracks which gradients of a model were exchanged.

    Attributes:
        reached: Whether a forward pass has gone through the wrapper since the iteration began.
        armed: The ids of wrappers that will exchange in the backward pass of a forward pass.
    """

    def __init__(self) -> None:
        self.reached = False
        self.armed: set[int] = set()
        self._within: set[int] = set()
        self._one: OptimWrapper | None = None
        self._all: list[OptimWrapper] = []
        self._local: set[str] = set()

    def begin(self, optim_wrapper: OptimWrapper | Mapping[str, OptimWrapper]) -> None:
        """Begin an iteration in which these optimizers step."""
        self.reached = False
        self.armed.clear()
        self._within.clear()
        if isinstance(optim_wrapper, Mapping):
            self._one, self._all = None, [*optim_wrapper.values()]
        else:
            self._one, self._all = optim_wrapper, [optim_wrapper]

    def expect(self, optim_wrapper: OptimWrapper) -> None:
        """Note that the next forward pass is for a step of this optimizer."""
        self._one = optim_wrapper

    def decide(self, wrapper: int, allowed: bool = True) -> bool:
        """Return whether the backward pass of this forward pass exchanges gradients.

        Args:
            wrapper: The ``id`` of the wrapper that asks.
            allowed: Whether it may exchange; False within ``no_sync()``.
        """
        self.reached = True
        one = self._one
        if one is not None and not one.stepping and self._stepping():
            return False  # Runner.repeat for another optimizer: there is no backward pass
        if one is None:  # several, and unknown which one steps: an extra exchange does no harm
            exchanges = allowed and (not self._all or any(w.will_step for w in self._all))
        else:
            exchanges = allowed and one.will_step
        if not exchanges:
            self._note_local()
            return False
        if one is not None and not self.armed:
            self._local.discard(one.name)
        self.armed.add(wrapper)
        return True

    def before_backward(self) -> None:
        """Note that a backward pass begins; without a forward pass for it, it exchanges nothing."""
        if not self.armed:
            self._note_local()

    def within_backward(self, wrapper: int) -> None:
        """Note that a backward pass has reached an output of a wrapper; it exchanges at most once.

        Gradients reach the outputs of one or several forward passes one after another.
        """
        if wrapper in self._within:
            return
        self._within.add(wrapper)
        torch.autograd.Variable._execution_engine.queue_callback(
            lambda: self._within.discard(wrapper)
        )
        if wrapper in self.armed:
            self.armed.discard(wrapper)
        else:
            self._note_local()

    def _note_local(self) -> None:
        candidates = self._all if self._one is None else [self._one]
        for optim_wrapper in self._stepping() or candidates:
            self._local.add(optim_wrapper.name)

    def _stepping(self) -> list[OptimWrapper]:
        """Return the optimizer whose step ``Runner.repeat`` computes again, if any."""
        return [optim_wrapper for optim_wrapper in self._all if optim_wrapper.stepping]

    def take_local(self, name: str) -> bool:
        """Return whether the optimizer has gradients left to exchange, and mark them exchanged."""
        local = name in self._local
        self._local.discard(name)
        return local

    def check(self, model: str, call: str = "self(...)") -> None:
        """Raise if the gradients of an iteration could not be exchanged.

        Args:
            model: The name of the class whose iteration it was.
            call: The call that it should have made.

        Raises:
            RuntimeError: No forward pass went through the wrapper.
        """
        if not self.reached:
            raise RuntimeError(
                f"the train_step of {model} never called {call} with gradients enabled, so the "
                "gradients are not exchanged and the ranks would diverge. Call the model as "
                f"{call} (not its forward(...), and not its layers one by one), or exchange the "
                "gradients yourself with dict(type='distributed', strategy='none')"
            )


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients over all ranks; a parameter that has none on any rank gets none.

    Args:
        parameters: The parameters, in the same order on all ranks.
    """
    by_kind: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            by_kind.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    for group in by_kind.values():
        there = [float(p.grad is not None) for p in group]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
        flat = torch.cat([grads[0].new_tensor(there), *(grad.flatten() for grad in grads)])
        torch_dist.all_reduce(flat)
        counts, *sums = torch.split(flat, [len(group), *(p.numel() for p in group)])
        for parameter, count, total in zip(group, counts.tolist(), sums, strict=True):
            if count:
                parameter.grad = (total / dist.get_world_size()).view_as(parameter)


def find_tensors(value: Any, losses: bool = False) -> list[Tensor]:
    """Return the tensors that require gradients in the outputs of a model.

    Args:
        value: The outputs.
        losses: Whether to take only dict entries with ``loss`` in their names, if there are any.
    """
    if isinstance(value, Tensor):
        return [value] if value.requires_grad else []
    if isinstance(value, (dict, Mapping)):
        named = {name: item for name, item in value.items() if losses and "loss" in str(name)}
        value = [*(named or value).values()]
    elif is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in find_tensors(item, losses)]
    return []
