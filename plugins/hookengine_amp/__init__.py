"""Automatic mixed precision: autocast in every phase, and a loss scale where fp16 needs one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from hookengine import OptimWrapper, Plugin, hookimpl

__all__ = ["Amp"]

SKIPS_BEFORE_A_WARNING = 20


class Amp(Plugin, name="amp"):
    """Compute in bfloat16 or float16 where that is safe, as ``torch.autocast`` decides.

    The forward pass of training, validation and testing runs under autocast. With float16 each
    optimizer has a ``torch.amp.GradScaler``: the loss is scaled last of all, the gradients are
    unscaled first of all, and a step with infinite or NaN gradients is skipped: ``steps`` stays,
    and nobody is told ``after_optim_step``. The present scale is logged as ``loss_scale``.
    """

    dtype: Literal["bfloat16", "float16"] = Field(
        "bfloat16", description="float16 adds a loss scale, and is what older GPUs are fast at"
    )
    init_scale: float = Field(2.0**16, gt=0, description="loss scale at the start")
    growth_factor: float = Field(2.0, gt=1, description="by which the scale grows")
    backoff_factor: float = Field(0.5, gt=0, lt=1, description="times the scale after a skip")
    growth_interval: int = Field(2000, gt=0, description="steps without a skip until it grows")
    optimizer: str | None = Field(None, description="only this one of several optimizers")

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
        self._scaled[optim_wrapper.name] = _Scaled(
            scaler, optim_wrapper.optimizer, label, torch.ones((), device=runner.device)
        )

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
        if scaled.unscaled and not optim_wrapper.window_open:
            scaled.update()  # another plugin took or refused the step
        return scaled.scaler.scale(loss)

    @hookimpl(tryfirst=True)  # whoever reads or edits gradients gets the real ones
    def before_optim_step(self, optim_wrapper: OptimWrapper) -> None:
        """Divide the gradients by the loss scale."""
        scaled = self._scaled.get(optim_wrapper.name)
        if scaled is not None:
            scaled.scaler.unscale_(optim_wrapper.optimizer)
            scaled.unscaled = True

    def optim_step(self, runner: Any, optim_wrapper: OptimWrapper) -> bool | None:
        """Step, unless a gradient is infinite or NaN."""
        scaled = self._scaled.get(optim_wrapper.name)
        if scaled is None:
            return None
        taken = scaled.step()
        runner.log({scaled.label: scaled.value()})
        if scaled.skips == SKIPS_BEFORE_A_WARNING:
            runner.logger.warning(
                f"amp: {scaled.skips} steps in a row were skipped, and the loss scale is down to "
                f"{scaled.scaler.get_scale():g}: the gradients are not finite whatever the scale. "
                "Look for a division by zero or a log of zero, lower the learning rate, or use "
                "dtype='bfloat16'"
            )
        return taken

    def state_dict(self) -> dict[str, Any]:
        """The loss scales."""
        return {name: scaled.scaler.state_dict() for name, scaled in self._scaled.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the loss scales; how they grow is told by the options of this run."""
        for name, scaled in self._scaled.items():
            scaled.load(state[name])


class _Scaled:
    """An optimizer and its loss scale.

    Args:
        scaler: Scales the loss and takes the step.
        optimizer: The optimizer.
        label: What the scale is called in the log.
        one: A one on the device.

    Attributes:
        unscaled: Whether the gradients were unscaled and no step followed yet.
        skips: Steps skipped in a row.
    """

    def __init__(
        self, scaler: torch.amp.GradScaler, optimizer: Optimizer, label: str, one: Tensor
    ) -> None:
        self.scaler = scaler
        self.optimizer = optimizer
        self.label = label
        self.unscaled = False
        self.skips = 0
        self._one = one
        self._taken = False
        self.hook = optimizer.register_step_post_hook(self._note_step)

    def _note_step(self, optimizer: Optimizer, *_: Any) -> None:
        """The optimizer's ``step`` was called: a fused one decides by itself whether to step."""
        found_inf = getattr(optimizer, "found_inf", None)
        self._taken = found_inf is None or not found_inf.item()

    def step(self) -> bool:
        """Step if the gradients are finite; returns whether."""
        self._taken = False
        self.scaler.step(self.optimizer)
        self.update()
        self.skips = 0 if self._taken else self.skips + 1
        return self._taken

    def update(self) -> None:
        """Let the scale grow or shrink."""
        self.scaler.update()
        self.unscaled = False

    def value(self) -> Tensor:
        """The present scale, on the device: reading it would synchronise."""
        return self.scaler.scale(self._one)

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the scale and its age from a state."""
        kept = {key: state[key] for key in ("scale", "_growth_tracker")}
        self.scaler.load_state_dict({**self.scaler.state_dict(), **kept})


def _check_supported(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a dtype that autocast has not on this device, where torch itself would only warn."""
    name = str(dtype).removeprefix("torch.")
    reason = f"torch has no autocast for {device.type}"
    if torch.amp.is_autocast_available(device.type):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                torch.autocast(device.type, dtype)
            return
        except (RuntimeError, UserWarning) as error:
            reason = str(error)
    other = "bfloat16" if name == "float16" else "float16"
    raise ValueError(
        f"amp: the device {device} cannot do {name}: {reason}. Use dtype={other!r}, another "
        "device, or leave amp out"
    )
