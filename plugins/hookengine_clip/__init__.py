"""Gradient clipping, by norm or by value."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

from hookengine import OptimWrapper, Plugin, Runner, hookimpl

__all__ = ["Clip"]


class Clip(Plugin, name="clip"):
    """Clip the gradients of each optimizer, just before its step (arXiv:1211.5063).

    Clipping comes after the other plugins that edit gradients (``trylast``): by then, they are
    divided by the loss scale, and averaged if they are accumulated. For steps that are taken, the
    norm before clipping is logged as ``grad_norm`` (``NAME/grad_norm`` with several optimizers),
    without synchronizing the device.
    """

    max_norm: float | None = Field(
        default=None,
        gt=0,
        description="the maximum norm of all gradients of an optimizer; inf only measures",
    )
    norm_type: float = Field(
        default=2.0, gt=0, description="the p of the p-norm; inf for the largest value"
    )
    clip_value: float | None = Field(
        default=None, gt=0, description="the maximum magnitude of each element, instead of max_norm"
    )
    error_if_nonfinite: bool = Field(
        default=False,
        description="raise an error instead of stepping with NaN or infinite gradients; "
        "synchronizes the device",
    )
    optimizer: str | None = Field(
        default=None, description="clip only the gradients of the optimizer of this name"
    )

    def __post_init__(self) -> None:
        """Raise a TypeError unless exactly one way of clipping is chosen."""
        if (self.max_norm is None) == (self.clip_value is None):
            raise TypeError(
                "clip takes either max_norm (clip by norm) or clip_value (clip by value); "
                f"got max_norm={self.max_norm}, clip_value={self.clip_value}"
            )

    def configure(self) -> None:
        """Forget all optimizers; ``setup_optimizer`` adds them."""
        self._labels: dict[str, str] = {}
        self._norms: dict[str, Tensor] = {}

    def setup_optimizer(self, runner: Runner, optim_wrapper: OptimWrapper) -> None:
        """Note whether this optimizer's gradients are clipped, and the name of their norm."""
        if optim_wrapper.name in runner.optim_wrapper.by_name(self.optimizer):
            for name, other in runner.plugins.items():
                if isinstance(other, Clip) and optim_wrapper.name in other._labels:
                    raise ValueError(
                        f"the gradients of the optimizer {optim_wrapper.name!r} are already "
                        f"clipped by the plugin {name!r}. Limit each plugin to one optimizer with "
                        "optimizer=NAME"
                    )
            several = len(runner.optim_wrappers) > 1
            label = f"{optim_wrapper.name}/grad_norm" if several else "grad_norm"
            self._labels[optim_wrapper.name] = label

    @hookimpl(trylast=True)  # what other plugins add to the gradients is clipped, too
    def before_optim_step(self, optim_wrapper: OptimWrapper) -> None:
        """Clip the gradients, and keep the norm they had before."""
        name = optim_wrapper.name
        if name not in self._labels:
            return
        parameters = [*optim_wrapper.parameters()]
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = total_norm(grads, self.norm_type)
        if hasattr(norm, "full_tensor"):  # each rank has the norm of its shards
            norm = norm.full_tensor()
        self._norms[name] = norm
        if self.max_norm is not None and self.max_norm != math.inf:
            clip_grads_with_norm_(parameters, self.max_norm, norm)
        if self.clip_value is not None:
            clip_grad_value_(parameters, self.clip_value)

    def after_optim_step(self, runner: Runner, optim_wrapper: OptimWrapper) -> None:
        """Log the norm before clipping."""
        norm = self._norms.get(optim_wrapper.name)
        if norm is not None:
            runner.log({self._labels[optim_wrapper.name]: norm})

    @hookimpl(trylast=True, after="amp")  # amp skips such steps by itself
    def optim_step(self, optim_wrapper: OptimWrapper) -> None:
        """Check that the gradients are finite, with ``error_if_nonfinite``.

        Raises:
            FloatingPointError: The norm of the gradients is infinite or NaN.
        """
        if self.error_if_nonfinite and optim_wrapper.name in self._labels:
            norm = self._norms[optim_wrapper.name]
            if not torch.isfinite(norm):
                raise FloatingPointError(
                    f"the norm of the gradients of {optim_wrapper.name!r} is {norm.item()}: a loss "
                    "or a gradient is not finite. The step was not taken, so the weights are those "
                    "of the last good step (error_if_nonfinite=False continues)"
                )


_SMALL_RANGE = {torch.float16, torch.float8_e4m3fn, torch.float8_e5m2}
"""Dtypes in which the norm of finite gradients may be infinite."""


def total_norm(grads: list[Tensor], norm_type: float) -> Tensor:
    """Return the norm of all gradients; that of float16 ones is computed in float32.

    In float16, it would be infinite from 65,520 on, and clipping would set the gradients to 0.
    """
    if _SMALL_RANGE.isdisjoint([grad.dtype for grad in grads]):
        return get_total_norm(grads, norm_type)
    short = [grad for grad in grads if grad.dtype in _SMALL_RANGE]
    norms = [torch.linalg.vector_norm(g, norm_type, dtype=torch.float32) for g in short]
    if others := [grad for grad in grads if grad.dtype not in _SMALL_RANGE]:
        norms.append(get_total_norm(others, norm_type))
    return get_total_norm(norms, norm_type)
