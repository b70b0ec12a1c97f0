"""Gradient accumulation that gives the same gradient as one big batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from hookengine import OptimWrapper, Plugin, Runner, SampleCounter, dist, hookimpl
from hookengine_accumulate.count import count_samples, count_tokens
from hookengine_accumulate.sums import Weight
from hookengine_accumulate.window import Window, micro_batches_left

__all__ = ["Accumulate"]


class Accumulate(Plugin, name="accumulate"):
    """Step once per ``steps`` micro-batches, with the gradient of one big batch.

    A loss is a mean over the samples or the valid tokens of a batch. Each micro-batch is weighted
    by their number, so micro-batches of unequal size still give the gradient of one big batch. The
    last window of an epoch or a run may be shorter; it steps too, and is weighted by what it holds.
    A micro-batch without valid tokens is ignored, whatever its loss. A count on a GPU is never
    read, however: there, such a loss must have finite gradients, as ``F.cross_entropy`` has.

    With several ranks, whose gradients are averaged as in DDP, the weights of all ranks are taken
    into account. This adds an all-reduce of a single number per window.
    """

    steps: int = Field(ge=1, description="micro-batches per optimizer step")
    weight: Literal["sample", "batch", "token"] = Field(
        default="sample",
        description="what the loss averages over: samples or valid tokens; 'batch' weights all "
        "micro-batches equally",
    )
    tokens: str | int | Callable[[Any], Any] | None = Field(
        default=None,
        description="for weight='token': the key or index of the count in the batch, a number or "
        "a tensor to sum (lengths, a mask); or a function of the batch",
    )
    ignore_index: int | None = Field(
        default=None,
        description="the label to ignore; tokens then names a tensor of labels, and the other "
        "labels are counted",
    )
    optimizer: str | None = Field(
        default=None, description="accumulate only for the optimizer of this name"
    )

    def __post_init__(self) -> None:
        """Raise a TypeError if the options do not fit together."""
        if (self.weight == "token") != (self.tokens is not None):
            raise TypeError(
                "accumulate: weight='token' goes together with tokens=. Pass both, with tokens= "
                "the key of the count in the batch or a function, as in tokens=lambda batch: "
                "batch['mask'].sum()"
            )
        if self.ignore_index is not None and (self.tokens is None or callable(self.tokens)):
            raise TypeError(
                "accumulate: ignore_index needs tokens=KEY, the key of the labels in the batch"
            )

    def configure(self) -> None:
        """Reset the windows; ``setup_optimizer`` adds one per optimizer."""
        self._windows: dict[str, Window] = {}
        self._closing = False
        self._reference: float | None = None
        self._weight: Weight = 1.0
        self._last = 0.0  # the last weight that was not 0
        self._interrupted: tuple[Weight, float] | None = None  # both, while a step is repeated

    @hookimpl(tryfirst=True)  # schedules read the window length
    def setup_optimizer(self, runner: Runner, optim_wrapper: OptimWrapper) -> None:
        """Set the window length of the optimizer."""
        if optim_wrapper.name not in runner.optim_wrapper.by_name(self.optimizer):
            return
        if optim_wrapper.window_length != 1:
            raise ValueError(
                f"the gradients of the optimizer {optim_wrapper.name!r} are already accumulated "
                f"over {optim_wrapper.window_length} steps by another plugin. Remove one of them, "
                "or limit each to one optimizer with optimizer=NAME"
            )
        optim_wrapper.window_length = self.steps
        if self.steps > 1:
            self._windows[optim_wrapper.name] = Window(self.steps)

    def before_train_epoch(self, runner: Runner) -> None:
        """Find the parameters whose gradients are summed in float32."""
        for name, window in self._windows.items():
            _choose_sums(window, runner.optim_wrappers[name])

    def unconfigure(self, runner: Runner) -> None:
        """Reset the window lengths, so that every iteration steps again."""
        for name in self._windows:
            runner.optim_wrapper.by_name(name)[name].window_length = 1

    def before_train(self, runner: Runner) -> None:
        """Find out who counts the samples in a batch."""
        self._counter = SampleCounter(runner.dataloaders["train"], runner.bare_model)

    @hookimpl(after="*")  # after the plugins that replace the batch
    def before_train_iter(self, runner: Runner, data_batch: Any) -> None:
        """Count the samples or tokens that the loss of this batch averages over."""
        self._interrupted = None
        self._count(data_batch)

    def before_repeat(self, optim_wrapper: OptimWrapper, data_batch: Any) -> None:
        """Start a new micro-batch, and a new window if the gradients were discarded."""
        window = self._windows.get(optim_wrapper.name)
        if window is None:
            return
        if self._interrupted is None:
            self._interrupted = self._weight, self._last
        if not optim_wrapper.window_open:
            window.open(window.expected)  # the losses are as large as they were
        window.asked = True
        self._count(data_batch)

    def _count(self, data_batch: Any) -> None:
        if not self._windows:
            return
        if self.weight == "sample":
            self._weight = count_samples(self._counter, data_batch)
        elif self.weight == "token":
            self._weight = count_tokens(data_batch, self.tokens, self.ignore_index)

    def after_forward(self, losses: Any) -> dict[str, Any] | None:
        """Replace NaN and infinite losses with 0 if the micro-batch has no valid token."""
        nothing = self._weight_is_zero() and self._windows and self.optimizer is None
        if not nothing or not isinstance(losses, Mapping):
            return None
        return {name: _without_nan(value) for name, value in losses.items()}

    def _weight_is_zero(self) -> bool:
        return isinstance(self._weight, float) and self._weight == 0

    def should_step(self, runner: Runner, optim_wrapper: OptimWrapper) -> bool:
        """Step with the last micro-batch of a window, an epoch, or the run."""
        window = self._windows.get(optim_wrapper.name)
        if window is None:
            return True
        window.asked = True
        held = window.held if optim_wrapper.window_open else 0
        return held + 1 >= self.steps or runner.progress.is_last or self._closing

    @hookimpl(trylast=True)  # after plugins that change the loss
    def scale_loss(
        self, runner: Runner, optim_wrapper: OptimWrapper, loss: Tensor
    ) -> Tensor | None:
        """Weight the loss of this micro-batch."""
        window = self._windows.get(optim_wrapper.name)
        if window is None:
            return None
        if not optim_wrapper.window_open and not optim_wrapper.stepping:
            window.open()
            if window.groups != len(optim_wrapper.param_groups):
                _choose_sums(window, optim_wrapper)
        else:
            window.sums.take()
        if window.asked or window.held == 0 or window.iteration != runner.progress.iter:
            window.add(self._weight, runner.progress.iter)
        if window.expected is None:
            window.expected = self._expected(runner, window)
        if not isinstance(self._weight, Tensor):
            self._last = self._weight or self._last
        if self._weight_is_zero():
            return _zero_loss(optim_wrapper, loss)
        factor = self._weight / window.expected  # type: ignore[operator]  # known by now
        if isinstance(factor, float) and factor == 1.0:
            return None
        return loss * (factor.to(loss.dtype) if isinstance(factor, Tensor) else factor)

    @hookimpl(tryfirst=True, after="amp")  # amp must see infinite gradients as they are
    def finish_gradients(self, runner: Runner, optim_wrapper: OptimWrapper) -> None:
        """Correct the gradients if the weight of the window is not the expected one.

        Raises:
            ValueError: The gradients were computed again from another number of batches.
        """
        window = self._windows.get(optim_wrapper.name)
        if window is None or window.held == 0:
            return
        correction = window.correction(runner.device, per_rank=self.weight != "batch")
        held, window.held = window.held, 0
        if self._interrupted is not None:
            (self._weight, self._last), self._interrupted = self._interrupted, None
            if held != window.stepped:
                raise ValueError(
                    f"runner.repeat() got {held} batches, but the step has {window.stepped} "
                    "micro-batches. Pass all of them, each as before_train_iter returned it"
                )
        window.stepped = held
        given = window.sums.give(correction)
        if isinstance(correction, float) and correction == 1.0:
            return
        others = [p for p in optim_wrapper.parameters() if p not in given]
        grads = [p.grad for p in others if p.grad is not None]
        if isinstance(correction, Tensor):
            for grad in grads:
                grad.mul_(correction.to(grad.device))
        elif grads:
            torch._foreach_mul_(grads, correction)

    # These run first, so that other plugins see the weights and counters of a complete window.

    @hookimpl(tryfirst=True)
    def after_train_iter(self, runner: Runner) -> None:
        """Close the windows of optimizers that the last iteration did not use."""
        if runner.progress.is_last:
            self._close(runner)

    @hookimpl(tryfirst=True)
    def after_train_epoch(self, runner: Runner) -> None:
        """Close the windows left open because the length of the epoch was not known."""
        self._close(runner)

    def _close(self, runner: Runner) -> None:
        for name in self._windows:
            optim_wrapper = runner.optim_wrapper.by_name(name)[name]
            if optim_wrapper.window_open:
                self._closing = True  # another plugin may still veto the step
                try:
                    if runner.hooks.should_step(runner, optim_wrapper):
                        optim_wrapper.step()
                finally:
                    self._closing = False

    def _expected(self, runner: Runner, window: Window) -> Weight | None:
        """Estimate the total weight of the window; None means to try again at the next batch.

        All ranks must use the same estimate, so with several ranks the first batch of the run
        determines it for all windows. Otherwise, it is the number of batches left times the weight
        of the first batch of the window or of the batch before it, whichever is greater: a first
        batch with few tokens would blow up the losses of the others.
        """
        if dist.get_world_size() == 1 or self.weight == "batch":
            first = self._weight
            left = micro_batches_left(runner.progress, self.steps - window.held + 1)
            if isinstance(first, Tensor):
                return left * torch.where(first > 0, first, torch.ones_like(first))
            return left * max(first, self._last) or None
        if self._reference is None:
            first = torch.as_tensor(self._weight, dtype=torch.float32, device=runner.device)
            total = dist.sum_over_ranks(first.clone()).item()  # once per run
            self._reference = total / dist.get_world_size() or 1.0
        return self.steps * self._reference

    def state_dict(self) -> dict[str, Any]:
        """Return the expected weight of a micro-batch."""
        return {"reference": self._reference, "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the expected weight saved by ``state_dict``."""
        self._reference, self._last = state["reference"], state["last"]


def _choose_sums(window: Window, optim_wrapper: OptimWrapper) -> None:
    """Choose the gradients that are summed in float32; autograd sums those that ranks exchange."""
    window.groups = len(optim_wrapper.param_groups)
    window.sums.use(optim_wrapper.parameters() if dist.get_world_size() == 1 else ())


def _zero_loss(optim_wrapper: OptimWrapper, loss: Tensor) -> Tensor:
    """Return a loss of 0 that bypasses the model and gives each parameter a gradient of 0.

    DDP expects a gradient for each parameter. A sharded model is not bypassed, because all ranks
    need its backward pass: there, the loss of a batch without tokens must have finite gradients, as
    ``F.cross_entropy`` has.
    """
    parameters = [p for p in optim_wrapper.parameters() if p.requires_grad]
    if any(hasattr(parameter, "to_local") for parameter in parameters):
        return loss.nan_to_num(0.0, 0.0, 0.0) * 0
    return torch.stack([p.sum() * 0 for p in parameters]).sum()


def _without_nan(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.nan_to_num(0.0, 0.0, 0.0)
    return [_without_nan(item) for item in value] if isinstance(value, (list, tuple)) else value
