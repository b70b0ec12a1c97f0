"""The plugin ``ema``: a moving average of the weights, evaluated in their place."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import nn

from hookengine import MODELS, Plugin, hookimpl
from hookengine_averaging.averaged import (
    BaseAveragedModel,
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
)
from hookengine_averaging.export import export_weights

MOMENTUM = 0.0002


class Ema(Plugin, name="ema"):
    """Keep a moving average of the model's weights, and evaluate it.

    It is updated after each iteration in which an optimizer really stepped. Nothing is ever
    swapped: training goes on with the raw weights, validation and testing run on a copy. In a
    checkpoint the raw weights are under ``state_dict``, the averaged ones under
    ``ema_state_dict`` (``NAME_state_dict`` of one with another ``plugin_name``). Until the average
    begins, the raw weights are evaluated.

    Attributes:
        averaged: The averaged model; ``averaged.module`` has its weights.
    """

    momentum: float = Field(
        default=MOMENTUM, gt=0, lt=1, description="weight of the present values"
    )
    gamma: int | None = Field(
        default=None,
        gt=0,
        description="begin with a larger momentum, gamma / (gamma + updates) while that is larger",
    )
    begin_step: int = Field(
        default=0, ge=0, description="optimizer steps before the average begins"
    )
    begin_epoch: int = Field(default=0, ge=0, description="epochs before it begins, instead")
    interval: int = Field(default=1, gt=0, description="updates between two averages")
    update_buffers: bool = Field(
        default=False, description="average floating-point buffers (batch norm) too, else copy them"
    )
    evaluate: Literal["averaged", "raw", "both"] = Field(
        default="averaged",
        description="both: the metrics of the averaged weights are called ema/NAME",
    )
    ema_type: str | type[BaseAveragedModel] = Field(
        default="ExponentialMovingAverage", description="an averaged model, by name or class"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="further arguments of ema_type"
    )

    def __post_init__(self) -> None:
        """Refuse options that do not go together."""
        if self.begin_step and self.begin_epoch:
            raise TypeError("ema: give begin_step or begin_epoch, one of the two")
        annealed = (ExponentialMovingAverage, MomentumAnnealingEMA)
        exponential = {*annealed, *(cls.__name__ for cls in annealed)}
        if self.gamma is not None and self.ema_type not in exponential:
            raise TypeError(f"ema: gamma is for exponential averages, not for {self.ema_type!r}")

    def configure(self, runner: Any) -> None:
        """No average yet; refuse another one that chooses what is evaluated."""
        for name, other in runner.plugins.items():
            rivals = isinstance(other, Ema) and other is not self
            if rivals and "raw" not in (self.evaluate, other.evaluate):
                raise ValueError(
                    f"{self.plugin_name!r} and {name!r} both choose the weights that are "
                    "evaluated: give one of them evaluate='raw'"
                )
        self._key = f"{self.plugin_name}_state_dict"
        self._steps = 0
        self._updates = 0
        self._told = False
        self._loaded = False

    @hookimpl(trylast=True)  # layers are what they will be; nothing is wrapped yet
    def convert_model(self, model: nn.Module) -> None:
        """Take the copy."""
        self.averaged = self._build(model)

    @hookimpl(trylast=True)
    def wrap_model(self, runner: Any, role: str) -> None:
        """Have the copy wrapped as the model is."""
        if role == "train":
            self.averaged.to(runner.device)
            self._evaluated = runner.wrap(self.averaged.module, "average")

    def _build(self, model: nn.Module) -> BaseAveragedModel:
        kind = MomentumAnnealingEMA if self.gamma is not None else self.ema_type
        cls = MODELS.get(kind) if isinstance(kind, str) else kind
        if not (isinstance(cls, type) and issubclass(cls, BaseAveragedModel)):
            raise TypeError(f"ema: ema_type={kind!r} is no BaseAveragedModel")
        parameters = inspect.signature(cls).parameters
        any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        defaults = {"momentum": MOMENTUM, "interval": 1, "update_buffers": False, "gamma": None}
        arguments = {}
        for name, default in defaults.items():
            value = getattr(self, name)
            if value != default and not any_name and name not in parameters:
                raise TypeError(f"ema: {cls.__name__} has no {name}")
            if value != default or (name in parameters and default is not None):
                arguments[name] = value
        return cls(model, **{**arguments, **self.options})

    # An iteration steps before the first of these, or, where the length of the epoch was not known
    # and a window of accumulated gradients is closed after it, before the second.

    def after_train_iter(self, runner: Any) -> None:
        """Update, if an optimizer stepped."""
        self._update(runner, runner.progress.epoch)

    def after_train_epoch(self, runner: Any) -> None:
        """Likewise; the step was one of the epoch that has just ended."""
        self._update(runner, runner.progress.epoch - 1)

    def _update(self, runner: Any, epoch: int) -> None:
        steps = _steps(runner)
        if steps == self._steps:
            return
        self._steps = steps
        done = max(wrapper.steps for wrapper in runner.optim_wrapper.by_name().values())
        if done > self.begin_step and epoch >= self.begin_epoch:
            self.averaged.update_parameters(runner.bare_model)
            self._updates += 1

    def evaluated_models(self, runner: Any) -> dict[str, nn.Module] | None:
        """The averaged weights, the raw ones, or both."""
        if self.evaluate == "raw":
            return None
        averaged = self._evaluated
        if self._updates == 0:
            averaged = runner.model
            if not self._told:
                self._told = True
                runner.logger.info("ema: there is no average yet: the raw weights are evaluated")
        return (
            {"": averaged}
            if self.evaluate == "averaged"
            else {"": runner.model, self.plugin_name: averaged}
        )

    def before_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the averaged weights."""
        checkpoint[self._key] = self.averaged.state_dict()

    def after_load_checkpoint(self, runner: Any, checkpoint: Mapping[str, Any]) -> None:
        """Take the averaged weights, or begin anew where it was allowed that there are none."""
        loaded, self._loaded = self._loaded, False
        if self._key in checkpoint:
            self.averaged.load_state_dict(checkpoint[self._key])
        elif loaded:
            raise ValueError(
                f"the checkpoint has a state of {self.plugin_name!r} and no averaged weights "
                f"({self._key}): it was cut. To begin the average anew, drop the former from "
                "checkpoint['plugins'] and allow it by name"
            )
        else:
            self.averaged.steps.zero_()
            self._updates = 0
            runner.logger.warning(
                f"ema: the checkpoint has no averaged weights ({self._key}): the average begins "
                "anew with the raw ones"
            )
        self._steps = _steps(runner)

    def export(self, path: str | os.PathLike[str]) -> Path:
        """Write the averaged weights alone, with the names of the bare model.

        Args:
            path: Ends with ``.pth`` or ``.safetensors``.

        Raises:
            RuntimeError: there is no average yet. ValueError: another suffix.
        """
        if self._updates == 0:
            raise RuntimeError("ema: there is no average yet to export")
        return export_weights(self.averaged.module, path)

    def state_dict(self) -> dict[str, Any]:
        """How often the average was updated."""
        return {"type": type(self.averaged).__name__, "updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        if state["type"] != (mine := type(self.averaged).__name__):
            raise ValueError(
                f"the averaged weights of the checkpoint are of a {state['type']}, and this run "
                f"has a {mine}: go on with the same ema_type (gamma makes a MomentumAnnealingEMA)"
            )
        self._updates = state["updates"]
        self._loaded = True


def _steps(runner: Any) -> int:
    """Steps that all optimizers together have really taken."""
    if runner.optim_wrapper is None:
        return 0
    return sum(optim_wrapper.steps for optim_wrapper in runner.optim_wrapper.by_name().values())
