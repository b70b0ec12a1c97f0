"""Gradient accumulation that gives the gradient of the one big batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from hookengine import OptimWrapper, Plugin, Progress, batch_size, did_you_mean, dist, hookimpl

__all__ = ["Accumulate"]

Weight = float | Tensor


class Accumulate(Plugin, name="accumulate"):
    """Step once per ``steps`` micro-batches, with the gradient of all of them as one batch.

    A loss is a mean over what a batch holds: over its samples, or its valid tokens. Micro-batches
    are weighted by that number, so those of unequal size give the gradient of the one big batch.
    The last, shorter window of an epoch or a run is closed, and weighted by what it really holds.

    Over several ranks, whose gradients are averaged as DDP does it, the weights of all ranks
    count; that takes one all-reduce of a single number per window.
    """

    after = ("amp",)

    steps: int = Field(ge=1, description="micro-batches per optimizer step")
    weight: Literal["sample", "batch", "token"] = Field(
        "sample", description="what a loss is a mean over: samples, nothing known, or valid tokens"
    )
    tokens: str | int | Callable[[Any], Any] | None = Field(
        None,
        description="for weight='token': where in the batch the count is, a number or a tensor "
        "that is summed (lengths, a mask); or a function of the batch",
    )
    ignore_index: int | None = Field(
        None, description="count what differs from it in the tensor of labels that tokens names"
    )
    optimizer: str | None = Field(None, description="only this one of several optimizers")

    def __post_init__(self) -> None:
        """Refuse options that do not go together."""
        if (self.weight == "token") != (self.tokens is not None):
            raise TypeError(
                "accumulate: weight='token' goes together with tokens=, the key of the count in "
                "the batch or a function, as in tokens=lambda batch: batch['mask'].sum()"
            )
        if self.ignore_index is not None and (self.tokens is None or callable(self.tokens)):
            raise TypeError("accumulate: ignore_index needs tokens=KEY, the labels in the batch")

    def configure(self) -> None:
        """Know no optimizer yet."""
        self._windows: dict[str, _Window] = {}
        self._reference: float | None = None
        self._weight: Weight = 1.0

    def setup_optimizer(self, runner: Any, optim_wrapper: OptimWrapper) -> None:
        """Announce the window's length."""
        if optim_wrapper.name not in runner.optim_wrapper.by_name(self.optimizer):
            return
        if optim_wrapper.window_length != 1:
            raise ValueError(
                f"the gradients of the optimizer {optim_wrapper.name!r} are accumulated over "
                f"{optim_wrapper.window_length} steps by another plugin already"
            )
        optim_wrapper.window_length = self.steps
        if self.steps > 1:
            self._windows[optim_wrapper.name] = _Window(self.steps)

    @hookimpl(trylast=True)  # the batch is what it will be
    def before_train_iter(self, runner: Any, data_batch: Any) -> None:
        """Count what the loss of this batch will be a mean over."""
        if self.weight == "sample":
            self._weight = float(batch_size(data_batch))
        elif self.weight == "token":
            self._weight = self._count_tokens(data_batch)

    def should_step(self, runner: Any, optim_wrapper: OptimWrapper) -> bool:
        """Step with the last micro-batch of a window, an epoch, or the run."""
        window = self._windows.get(optim_wrapper.name)
        if window is None:
            return True
        window.asked = True
        held = window.held if optim_wrapper.window_open else 0
        return held + 1 >= self.steps or runner.progress.is_last

    @hookimpl(trylast=True)  # the loss is complete; amp, which comes before, is still later
    def scale_loss(self, runner: Any, optim_wrapper: OptimWrapper, loss: Tensor) -> Tensor | None:
        """Weight the loss of this micro-batch."""
        window = self._windows.get(optim_wrapper.name)
        if window is None:
            return None
        if not optim_wrapper.window_open:
            window.open(self._expected(runner, window))
        if window.asked or window.held == 0 or window.iteration != runner.progress.iter:
            window.add(self._weight, runner.progress.iter)
        factor = window.factor
        if isinstance(factor, Tensor):
            return loss * factor.to(loss.dtype)
        return None if factor == 1.0 else loss * factor

    @hookimpl(tryfirst=True)  # others get the gradient of the whole window
    def before_optim_step(self, runner: Any, optim_wrapper: OptimWrapper) -> None:
        """Correct the gradients where the window holds something else than was expected."""
        window = self._windows.get(optim_wrapper.name)
        if window is None or window.held == 0:
            return
        correction = window.correction(runner.device, per_rank=self.weight != "batch")
        window.held = 0
        grads = [p.grad for p in optim_wrapper.parameters() if p.grad is not None]
        if isinstance(correction, Tensor) and grads:
            torch._foreach_mul_(grads, correction.to(grads[0].device, grads[0].dtype))
        elif correction != 1.0:
            torch._foreach_mul_(grads, correction)

    @hookimpl(tryfirst=True)  # others see the weights and counters of the finished epoch
    def after_train_epoch(self, runner: Any) -> None:
        """Close the last window where nobody could know that its last batch was the last."""
        if not runner.progress.is_last:
            for name in self._windows:
                optim_wrapper = runner.optim_wrapper.by_name(name)[name]
                if optim_wrapper.window_open:
                    optim_wrapper.step()

    def _expected(self, runner: Any, window: _Window) -> Weight:
        """The total weight that a window, whose first micro-batch this is, will probably have.

        Several ranks must expect the same, so there it is told by the first batch of the run, once
        for all; alone, by the first batch of the window and the batches that are left.
        """
        if dist.get_world_size() == 1 or self.weight == "batch":
            first = self._weight
            if isinstance(first, Tensor):
                first = torch.where(first > 0, first, torch.ones_like(first))
            return _left(runner.progress, self.steps) * (first or 1.0)
        if self._reference is None:
            first = torch.as_tensor(self._weight, dtype=torch.float32, device=runner.device)
            total = dist.sum_over_ranks(first.clone()).item()  # once in a run
            self._reference = total / dist.get_world_size() or 1.0
        return self.steps * self._reference

    def _count_tokens(self, batch: Any) -> Weight:
        tokens = self.tokens
        if callable(tokens):
            count = tokens(batch)
        else:
            try:
                count = batch[tokens]
            except (KeyError, IndexError, TypeError):
                raise KeyError(_lacks(batch, tokens)) from None
            if self.ignore_index is not None:
                count = count != self.ignore_index
        return _as_weight(count, tokens)

    def state_dict(self) -> dict[str, Any]:
        """What several ranks expect a micro-batch to weigh."""
        return {} if self._reference is None else {"reference": self._reference}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self._reference = state["reference"]


class _Window:
    """The micro-batches since the last step of one optimizer.

    The loss of each is multiplied by its weight over the *expected* total of the window, which is
    right at once where the guess is, and is corrected at the end where it was not.

    Attributes:
        held: Micro-batches in it.
        factor: By which the loss of the present one is multiplied.
        asked: Whether ``should_step`` was asked since the last backward pass: what follows is
            another micro-batch. Several losses without a question between are one.
        iteration: The iteration of the last one.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.held = 0
        self.factor: Weight = 1.0
        self.asked = False
        self.iteration = -1
        self._expected: Weight = 1.0
        self._total: Weight = 0.0

    def open(self, expected: Weight) -> None:
        """Begin, with the total weight that is expected."""
        self.held = 0
        self._total = 0.0
        self._expected = expected

    def add(self, weight: Weight, iteration: int) -> None:
        """Take a micro-batch in."""
        self.held += 1
        self.asked = False
        self.iteration = iteration
        self._total = self._total + weight
        self.factor = weight / self._expected

    def correction(self, device: torch.device, per_rank: bool) -> Weight:
        """By which the gradients are multiplied at the end.

        Args:
            device: Where ranks exchange tensors.
            per_rank: The totals of the ranks differ.
        """
        total, ranks = self._total, dist.get_world_size()
        if ranks > 1 and per_rank:
            # In float64 where the device has it: a count of tokens may pass float32's integers.
            dtype = torch.float32 if device.type == "mps" else torch.float64
            total = torch.as_tensor(total, dtype=dtype, device=device).clone()
            total = dist.sum_over_ranks(total) / ranks
            total = total.item() if device.type == "cpu" else total
        if isinstance(total, Tensor):  # stays on the device
            return torch.where(total > 0, self._expected / total, torch.zeros_like(total))
        return self._expected / total if total else 0.0


def _left(progress: Progress, steps: int) -> int:
    """Micro-batches of the window that begins, as far as the lengths are known."""
    left = steps
    if progress.epoch_length is not None:
        left = min(left, progress.epoch_length - progress.batch)
    if progress.max_iters is not None:
        left = min(left, progress.max_iters - progress.iter)
    return max(left, 1)


def _as_weight(count: Any, tokens: Any) -> Weight:
    """A count as a number; one on a device stays there, since reading it would synchronise."""
    if not isinstance(count, Tensor):
        try:
            count = float(count)
        except (TypeError, ValueError):
            raise TypeError(
                f"accumulate: tokens={tokens!r} gave {count!r}: a number or a tensor is needed"
            ) from None
    elif count.device.type != "cpu":
        return count.sum().double() if count.device.type != "mps" else count.sum().float()
    else:
        negative = count.dtype != torch.bool and bool((count < 0).any())
        count = -1.0 if negative else count.sum().item()
    if not count >= 0:
        raise ValueError(
            f"accumulate: tokens={tokens!r} gave a negative count (or NaN). A tensor is summed: "
            "for labels in which some are to be ignored, give ignore_index=-100 (say) as well"
        )
    return float(count)


def _lacks(batch: Any, key: Any) -> str:
    if isinstance(batch, Mapping):
        names = [name for name in batch if isinstance(name, str)]
        near = did_you_mean(str(key), names)
        return f"accumulate: the batch has no {key!r}.{near} It has {', '.join(names) or 'nothing'}"
    size = f" of {len(batch)}" if isinstance(batch, (list, tuple)) else ""
    return (
        f"accumulate: tokens={key!r} cannot be looked up in the batch, a "
        f"{type(batch).__name__}{size}: give a key, an index, or a function of the batch"
    )
