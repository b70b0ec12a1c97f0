"""Automatic mixed precision: autocast in every phase, and a loss scale where fp16 needs one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor
from torch.optim import Optimizer

from hookengine import OptimWrapper, Plugin, hookimpl

__all__ = ["Amp"]

SKIPS_BEFORE_A_WARNING = 20


def _name(dtype: Any) -> Any:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


class Amp(Plugin, name="amp"):
    """Compute in bfloat16 or float16 where that is safe, as ``torch.autocast`` decides.

    The forward pass of training, validation and testing runs under autocast. With float16 each
    optimizer has a ``torch.amp.GradScaler``: the loss is scaled last of all, the gradients are
    unscaled first of all, and a step with infinite or NaN gradients is skipped: ``steps`` stays,
    and nobody is told ``after_optim_step``. The scale is logged as ``loss_scale``; a record has its
    mean, as of every value.
    """

    dtype: Annotated[Literal["bfloat16", "float16"], BeforeValidator(_name)] = Field(
        default="bfloat16",
        description="float16 adds a loss scale, and is what older GPUs are fast at",
    )
    init_scale: float = Field(
        default=2.0**16, gt=0, le=2.0**126, description="of float16: loss scale at the start"
    )
    growth_factor: float = Field(
        default=2.0, gt=1, le=2.0**16, description="by which the scale grows"
    )
    backoff_factor: float = Field(
        default=0.5, gt=0, lt=1, description="times the scale after a skip"
    )
    growth_interval: int = Field(
        default=2000, gt=0, description="steps without a skip until it grows"
    )
    optimizer: str | None = Field(
        default=None, description="in training only this one of several optimizers"
    )

    def configure(self, runner: Any) -> None:
        """Refuse a device that cannot do it."""
        self._device_type: str = runner.device.type
        self._dtype: torch.dtype = getattr(torch, self.dtype)
        self._scaled: dict[str, _Scaled] = {}
        _check_supported(runner.device, self._dtype)

    def setup_optimizer(self, runner: Any, optim_wrapper: OptimWrapper) -> None:
        """Make the optimizer's loss scale."""
        several = runner.optim_wrapper.by_name()
        if optim_wrapper.name not in runner.optim_wrapper.by_name(self.optimizer):
            return
        if self._dtype is not torch.float16:
            return
        for parameter in optim_wrapper.parameters():
            if parameter.dtype is torch.float16:
                raise ValueError(
                    f"amp: the optimizer {optim_wrapper.name!r} trains parameters that are float16 "
                    "themselves, whose gradients cannot be unscaled: leave the model in float32 "
                    "(drop .half()); autocast converts what it computes with"
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
        """Take the hooks from the optimizers."""
        for scaled in self._scaled.values():
            scaled.hook.remove()

    def forward_context(self, optim_wrapper: OptimWrapper | None) -> torch.autocast | None:
        """Autocast."""
        if optim_wrapper is not None and self.optimizer not in (None, optim_wrapper.name):
            return None
        return torch.autocast(self._device_type, self._dtype)

    @hookimpl(trylast=True)  # the loss is complete
    def scale_loss(self, optim_wrapper: OptimWrapper, loss: Tensor) -> Tensor | None:
        """Multiply the loss by the loss scale."""
        scaled = self._scaled.get(optim_wrapper.name)
        if scaled is None:
            return None
        scaled.settle()
        return scaled.scaler.scale(loss)

    @hookimpl(tryfirst=True)
    def finish_gradients(self, optim_wrapper: OptimWrapper) -> None:
        """Divide the gradients by the loss scale, if their loss was multiplied by it."""
        scaled = self._scaled.get(optim_wrapper.name)
        if scaled is None:
            return
        scaled.settle()
        if scaled.unscaled or not optim_wrapper.window_open:
            return
        if any(parameter.grad is not None for parameter in optim_wrapper.parameters()):
            scaled.scaler.unscale_(optim_wrapper.optimizer)
            scaled.unscaled = True

    @hookimpl(trylast=True)  # another plugin may take or refuse the step
    def optim_step(self, runner: Any, optim_wrapper: OptimWrapper) -> bool | None:
        """Step, unless a gradient is infinite or NaN."""
        scaled = self._scaled.get(optim_wrapper.name)
        if scaled is None or not scaled.unscaled:
            return None
        taken = scaled.step()
        runner.log({scaled.label: scaled.value()})
        if scaled.skips == SKIPS_BEFORE_A_WARNING:
            runner.logger.warning(
                f"amp: {scaled.skips} steps in a row were skipped, since gradients are infinite or "
                f"NaN; the loss scale is down to {scaled.scaler.get_scale():g}. If that is still "
                "large, begin with a smaller init_scale; if not, look for a division by zero or a "
                "log of zero, lower the learning rate, or use dtype='bfloat16'"
            )
        return taken

    def state_dict(self) -> dict[str, Any]:
        """The loss scales."""
        for scaled in self._scaled.values():
            scaled.settle()
        return {name: scaled.scaler.state_dict() for name, scaled in self._scaled.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the loss scales; how they grow is told by the options of this run."""
        for name, scaled in self._scaled.items():
            scaled.load(state[name])


class _Scaled:
    """An optimizer and its loss scale.

    Args:
        scaler: Scales the loss and takes the step.
        optim_wrapper: The optimizer's.
        label: What the scale is called in the log.
        one: A one on the device.

    Attributes:
        unscaled: Whether the gradients were unscaled and no step followed yet.
        skips: Steps skipped in a row.
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
        self.hook = optim_wrapper.optimizer.register_step_post_hook(self._note_step)

    def _note_step(self, optimizer: Optimizer, *_: Any) -> None:
        """The optimizer's ``step`` was called: a fused one decides by itself whether to step.

        It does so on the device; to learn it takes the one synchronisation per step that the scaler
        makes for any other optimizer.
        """
        found_inf = getattr(optimizer, "found_inf", None)
        self._taken = found_inf is None or not found_inf.item()

    def step(self) -> bool:
        """Step if the gradients are finite; returns whether."""
        self._taken = False
        self.scaler.step(self.optim_wrapper.optimizer)
        self.update()
        self.skips = 0 if self._taken else self.skips + 1
        return self._taken

    def update(self) -> None:
        """Let the scale grow or shrink."""
        self.scaler.update()
        self.unscaled = False

    def settle(self) -> None:
        """Update after a step that another plugin took or refused."""
        if self.unscaled and not self.optim_wrapper.window_open:
            self.update()

    def value(self) -> Tensor:
        """The present scale, on the device: reading it would synchronise."""
        return self.scaler.scale(self._one)

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the scale and its age from a state."""
        if self.unscaled:
            self.update()
        kept = {key: state[key] for key in ("scale", "_growth_tracker")}
        self.scaler.load_state_dict({**self.scaler.state_dict(), **kept})


def _check_supported(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a dtype that autocast has not on this device, where torch itself would only warn."""
    reason = _why_not(device, dtype)
    if reason is None:
        return
    other = torch.bfloat16 if dtype is torch.float16 else torch.float16
    fix = f"dtype={_name(other)!r}, " if _why_not(device, other) is None else ""
    raise ValueError(
        f"amp: the device {device} cannot do {_name(dtype)}: {reason}. Use {fix}another device, or "
        "leave amp out"
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
