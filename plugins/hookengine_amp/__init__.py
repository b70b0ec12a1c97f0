"""Automatic mixed precision: autocast in every phase, and a loss scale for float16."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor
from torch.optim import Optimizer

from hookengine import OptimWrapper, Plugin, Runner, hookimpl

__all__ = ["Amp"]

SKIPS_BEFORE_A_WARNING = 20


def _name(dtype: Any) -> Any:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


class Amp(Plugin, name="amp"):
    """Compute in bfloat16 or float16 where ``torch.autocast`` considers it safe.

    The forward passes of training, validation and testing run under autocast. With float16, each
    optimizer has a ``torch.amp.GradScaler``: the loss is scaled after all other plugins, and the
    gradients are unscaled before them. A step with infinite or NaN gradients is skipped: it is not
    counted in ``steps``, and ``after_optim_step`` is not called. The scale is logged as
    ``loss_scale``; like every value, it is averaged over the iterations of a record.
    """

    dtype: Annotated[Literal["bfloat16", "float16"], BeforeValidator(_name)] = Field(
        default="bfloat16",
        description="bfloat16, or float16 with a loss scale, which is faster on older GPUs",
    )
    init_scale: float = Field(
        default=2.0**16, gt=0, le=2.0**126, description="for float16: the initial loss scale"
    )
    growth_factor: float = Field(
        default=2.0, gt=1, le=2.0**16, description="the factor by which the loss scale grows"
    )
    backoff_factor: float = Field(
        default=0.5, gt=0, lt=1, description="the factor of the loss scale after a skipped step"
    )
    growth_interval: int = Field(
        default=2000, gt=0, description="consecutive steps without a skip until it grows"
    )
    optimizer: str | None = Field(
        default=None, description="in training, use autocast only for the optimizer of this name"
    )

    def configure(self, runner: Runner) -> None:
        """Raise a ValueError if the device does not support the dtype."""
        self._device_type: str = runner.device.type
        self._dtype: torch.dtype = getattr(torch, self.dtype)
        self._scaled: dict[str, _Scaled] = {}
        _check_supported(runner.device, self._dtype)

    def setup_optimizer(self, runner: Runner, optim_wrapper: OptimWrapper) -> None:
        """Create the loss scale of the optimizer, with float16."""
        several = runner.optim_wrapper.by_name()
        if optim_wrapper.name not in runner.optim_wrapper.by_name(self.optimizer):
            return
        if self._dtype is not torch.float16:
            return
        for parameter in optim_wrapper.parameters():
            if parameter.dtype is torch.float16:
                raise ValueError(
                    f"amp: the optimizer {optim_wrapper.name!r} trains parameters that are float16 "
                    "themselves, and their gradients cannot be unscaled. Keep the model in float32 "
                    "(drop .half()): autocast casts the inputs of each operation"
                )
        scaler = torch.amp.GradScaler(
            self._device_type,
            init_scale=self.init_scale,
            growth_factor=self.growth_factor,
            backoff_factor=self.backoff_factor,
            growth_interval=self.growth_interval,
        )
        label = f"{optim_wrapper.name}/loss_scale" if len(several) > 1 else "loss_scale"
        one = torch.ones((), device=runner.device)
        self._scaled[optim_wrapper.name] = _Scaled(scaler, optim_wrapper, label, one)

    def unconfigure(self) -> None:
        """Remove the hooks from the optimizers."""
        for scaled in self._scaled.values():
            scaled.hook.remove()

    def forward_context(self, optim_wrapper: OptimWrapper | None) -> torch.autocast | None:
        """Return an autocast context."""
        if optim_wrapper is not None and self.optimizer not in (None, optim_wrapper.name):
            return None
        return torch.autocast(self._device_type, self._dtype)

    def before_repeat(self, optim_wrapper: OptimWrapper) -> None:
        """Forget the cast weights and the unscaled gradients of the passes before."""
        if optim_wrapper.window_open:
            return
        torch.clear_autocast_cache()  # the step may be taken within a context of autocast
        if scaled := self._scaled.get(optim_wrapper.name):
            scaled.start_over()

    @hookimpl(trylast=True, after="accumulate")  # the loss is complete, also its weight
    def scale_loss(self, optim_wrapper: OptimWrapper, loss: Tensor) -> Tensor | None:
        """Multiply the loss by the loss scale.

        Raises:
            RuntimeError: The gradients of this step are already unscaled.
        """
        scaled = self._scaled.get(optim_wrapper.name)
        if scaled is None:
            return None
        scaled.settle()
        if scaled.unscaled:
            raise RuntimeError(
                f"amp: the gradients of {optim_wrapper.name!r} are already divided by the loss "
                "scale, so those of another loss cannot be added before the step. To compute all "
                "of them again, call runner.repeat(data_batch) in before_optim_step"
            )
        return scaled.scaler.scale(loss)

    @hookimpl(tryfirst=True, after="distributed")  # an infinity of one rank is one of all ranks
    def finish_gradients(self, optim_wrapper: OptimWrapper) -> None:
        """Divide the gradients by the loss scale, if a scaled loss was backpropagated."""
        scaled = self._scaled.get(optim_wrapper.name)
        if scaled is None:
            return
        scaled.settle()
        if scaled.unscaled or not optim_wrapper.window_open:
            return
        if any(parameter.grad is not None for parameter in optim_wrapper.parameters()):
            scaled.scaler.unscale_(optim_wrapper.optimizer)
            scaled.unscaled = True

    @hookimpl(trylast=True)  # another plugin may take or skip the step
    def optim_step(self, runner: Runner, optim_wrapper: OptimWrapper) -> bool | None:
        """Take the step, or skip it if a gradient is infinite or NaN."""
        scaled = self._scaled.get(optim_wrapper.name)
        if scaled is None or not scaled.unscaled:
            return None
        taken = scaled.step()
        runner.log({scaled.label: scaled.value()})
        if scaled.skips == SKIPS_BEFORE_A_WARNING:
            runner.logger.warning(
                f"amp: {scaled.skips} steps in a row were skipped because of infinite or NaN "
                f"gradients; the loss scale is down to {scaled.scaler.get_scale():g}. If that is "
                "still large, start with a smaller init_scale. If not, look for a division by zero "
                "or a log of zero, lower the learning rate, or use dtype='bfloat16'"
            )
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return the loss scale of each optimizer by name."""
        for scaled in self._scaled.values():
            scaled.settle()
        return {name: scaled.scaler.state_dict() for name, scaled in self._scaled.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the loss scales; the options of this run determine how they grow."""
        for name, scaled in self._scaled.items():
            scaled.load(state[name])


class _Scaled:
    """An optimizer and its loss scale.

    Args:
        scaler: Scales the loss and takes the step.
        optim_wrapper: The wrapper of the optimizer.
        label: The name of the scale in the log.
        one: A tensor of value 1 on the device.

    Attributes:
        unscaled: Whether the gradients were unscaled and no step has followed yet.
        skips: Number of steps skipped in a row.
    """

    def __init__(
        self, scaler: torch.amp.GradScaler, optim_wrapper: OptimWrapper, label: str, one: Tensor
    ) -> None:
        self.scaler = scaler
        self.optim_wrapper = optim_wrapper
        self.label = label
        self.unscaled = False
        self.skips = 0
        self._one = one
        self._taken = False
        note = weakref.WeakMethod(self._note_step)  # your optimizer does not keep the Runner alive
        self.hook = optim_wrapper.optimizer.register_step_post_hook(
            lambda optimizer, *_: None if (call := note()) is None else call(optimizer)
        )

    def _note_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Note whether the optimizer, whose ``step`` was called, took the step.

        A fused optimizer decides by itself, on the device. Reading its decision costs one
        synchronization per step, the same that the scaler makes for any other optimizer.
        """
        found_inf = getattr(optimizer, "found_inf", None)
        self._taken = found_inf is None or not found_inf.item()

    def step(self) -> bool:
        """Step if the gradients are finite; return whether the step was taken."""
        self._taken = False
        self.scaler.step(self.optim_wrapper.optimizer)
        self.update()
        self.skips = 0 if self._taken else self.skips + 1
        return self._taken

    def update(self) -> None:
        """Update the scale: it grows or shrinks."""
        self.scaler.update()
        self.unscaled = False

    def start_over(self) -> None:
        """Forget whether the gradients were finite; the scale and its growth stay as they are."""
        if self.unscaled:
            self.scaler.update(self.value())  # setting a scale, torch counts no step
            self.unscaled = False

    def settle(self) -> None:
        """Update the scale after a step that another plugin took or skipped."""
        if self.unscaled and not self.optim_wrapper.window_open:
            self.update()

    def value(self) -> Tensor:
        """Return the current scale as a tensor on the device, to avoid synchronizing it."""
        return self.scaler.scale(self._one)

    def load(self, state: Mapping[str, Any]) -> None:
        """Load the scale, and the number of steps since it last changed, from a state."""
        if self.unscaled:
            self.update()
        kept = {key: state[key] for key in ("scale", "_growth_tracker")}
        self.scaler.load_state_dict({**self.scaler.state_dict(), **kept})


def _check_supported(device: torch.device, dtype: torch.dtype) -> None:
    """Raise a ValueError if autocast lacks the dtype on this device; torch would only warn."""
    reason = _why_not(device, dtype)
    if reason is None:
        return
    other = torch.bfloat16 if dtype is torch.float16 else torch.float16
    fix = f"dtype={_name(other)!r}, " if _why_not(device, other) is None else ""
    raise ValueError(
        f"amp: the device {device} does not support {_name(dtype)}: {reason}. Use {fix}another "
        "device, or disable amp"
    )


def _why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if not torch.amp.is_autocast_available(device.type):
        return f"torch has no autocast for {device.type}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.autocast(device.type, dtype)
    except (RuntimeError, UserWarning) as error:
        return str(error).rstrip(". ")
    return None
