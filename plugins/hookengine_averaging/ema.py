"""The plugin ``ema``: a moving average of the weights, evaluated instead of them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import nn

from hookengine import MODELS, Plugin, Runner, hookimpl, names_as_in, original_names
from hookengine_averaging.averaged import (
    BaseAveragedModel,
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
)
from hookengine_averaging.export import export_weights
from hookengine_averaging.span import steps_left

MOMENTUM = 0.0002
DOMINATED = 0.5
"""The share of the first weights in an average from which an evaluation of it misleads."""
REMEMBERED = 0.2
"""The share at the end of a run from which the momentum is too small for it."""


class Ema(Plugin, name="ema"):
    """Keep a moving average of the model's weights, and evaluate it.

    The average is updated after each iteration in which an optimizer took a step. Weights are never
    swapped: training continues with the raw weights, validation and testing run on a copy. A
    checkpoint has the raw weights under ``state_dict`` and the averaged ones under
    ``ema_state_dict`` (``NAME_state_dict`` if the plugin has another ``plugin_name``). Until the
    average begins, the raw weights are evaluated.

    Attributes:
        averaged: The averaged model; ``averaged.module`` has its weights.
    """

    momentum: float = Field(
        default=MOMENTUM, gt=0, lt=1, description="the weight of the current values"
    )
    gamma: int | None = Field(
        default=None,
        gt=0,
        description="start with a larger momentum: gamma / (gamma + updates), while it is larger",
    )
    begin_step: int = Field(
        default=0, ge=0, description="optimizer steps before the average begins"
    )
    begin_epoch: int = Field(
        default=0, ge=0, description="epochs before it begins, instead of steps"
    )
    interval: int = Field(default=1, gt=0, description="updates from one average to the next")
    update_buffers: bool = Field(
        default=False,
        description="average floating-point buffers (batch norm), too, instead of copying them",
    )
    evaluate: Literal["averaged", "raw", "both"] = Field(
        default="averaged",
        description="what to evaluate; with 'both', the metrics of the averaged weights are named "
        "ema/NAME",
    )
    ema_type: str | type[BaseAveragedModel] = Field(
        default="ExponentialMovingAverage", description="the averaged model, by name or class"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="more arguments of ema_type")

    def __post_init__(self) -> None:
        """Raise a TypeError if the options do not fit together."""
        if self.begin_step and self.begin_epoch:
            raise TypeError("ema: pass begin_step or begin_epoch, not both")
        annealed = (ExponentialMovingAverage, MomentumAnnealingEMA)
        exponential = {*annealed, *(cls.__name__ for cls in annealed)}
        if self.gamma is not None and self.ema_type not in exponential:
            raise TypeError(
                f"ema: gamma is for exponential averages, not {self.ema_type!r}. Drop it"
            )

    def configure(self, runner: Runner) -> None:
        """Reset the counters; raise a ValueError if two averages choose the evaluated weights."""
        for name, other in runner.plugins.items():
            rivals = isinstance(other, Ema) and other is not self
            if rivals and "raw" not in (self.evaluate, other.evaluate):
                raise ValueError(
                    f"{self.plugin_name!r} and {name!r} both choose the weights to evaluate. Pass "
                    "evaluate='raw' to one of them"
                )
        self._key = f"{self.plugin_name}_state_dict"
        self._steps = 0
        self._updates = 0
        self._told = False
        self._warned: set[bool] = set()
        self._loaded = False

    @hookimpl(trylast=True)  # all layers are replaced by then; nothing is wrapped yet
    def convert_model(self, model: nn.Module) -> None:
        """Copy the model."""
        self.averaged = self._build(model)

    @hookimpl(trylast=True)  # the model is wrapped by then, and its copy is wrapped like it
    def wrap_model(self, runner: Runner, role: Literal["train", "average"]) -> None:
        """Wrap the copy in the same way as the model."""
        if role == "train":
            self.averaged.to(runner.device)
            self._evaluated = runner.wrap(self.averaged.module, "average")

    def _build(self, model: nn.Module) -> BaseAveragedModel:
        kind = MomentumAnnealingEMA if self.gamma is not None else self.ema_type
        cls = MODELS.own(kind) if isinstance(kind, str) else kind
        if not (isinstance(cls, type) and issubclass(cls, BaseAveragedModel)):
            raise TypeError(f"ema: ema_type={kind!r} is not a BaseAveragedModel")
        parameters = inspect.signature(cls).parameters
        any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        defaults = {"momentum": MOMENTUM, "interval": 1, "update_buffers": False, "gamma": None}
        arguments = {}
        for name, default in defaults.items():
            value = getattr(self, name)
            if value != default and not any_name and name not in parameters:
                raise TypeError(f"ema: {cls.__name__} has no {name}. Drop this option")
            if value != default or (name in parameters and default is not None):
                arguments[name] = value
        return cls(model, **{**arguments, **self.options})

    # An iteration steps before the first of these events. If the length of the epoch is not known,
    # its last window of accumulated gradients is closed later, before the second.

    def after_train_iter(self, runner: Runner) -> None:
        """Update the average if an optimizer stepped."""
        self._update(runner, runner.progress.epoch)

    def after_train_epoch(self, runner: Runner) -> None:
        """Update the average if an optimizer stepped at the end of the epoch."""
        self._update(runner, runner.progress.epoch - 1)

    def _update(self, runner: Runner, epoch: int) -> None:
        steps = _steps(runner)
        if steps == self._steps:
            return
        self._steps = steps
        done = max(wrapper.steps for wrapper in runner.optim_wrapper.by_name().values())
        if done > self.begin_step and epoch >= self.begin_epoch:
            self.averaged.update_parameters(runner.bare_model)
            self._updates += 1

    def evaluated_models(self, runner: Runner) -> dict[str, nn.Module] | None:
        """Choose the averaged weights, the raw ones, or both."""
        if self.evaluate == "raw":
            return None
        averaged = self._evaluated
        if self._updates == 0:
            averaged = runner.model
            if not self._told:
                self._told = True
                runner.logger.info("ema: there is no average yet, so the raw weights are evaluated")
        else:
            self._warn_of_start(runner)
        return (
            {"": averaged}
            if self.evaluate == "averaged"
            else {"": runner.model, self.plugin_name: averaged}
        )

    def _warn_of_start(self, runner: Runner) -> None:
        """Warn once if the evaluated average is still close to the weights that it began with."""
        averaged, updates = self.averaged, self._updates
        left = _updates_left(runner)
        if left is None:
            return
        planned = updates + left
        now = averaged._weight_of_start(updates)
        end = averaged._weight_of_start(planned)
        if now is None or end is None or now <= DOMINATED:
            return
        is_short = end > REMEMBERED
        if is_short in self._warned:
            return
        self._warned.add(is_short)
        text = (
            f"{self.plugin_name}: this evaluates an average of {updates} updates, of which the "
            f"weights that it began with still make up {now:.0%}"
        )
        if not is_short:
            runner.logger.info(f"{text}. At the end of the run, they will make up {end:.0%}")
            return
        momentum = min(10 * averaged.interval / planned, 0.5)
        gamma = "" if type(averaged) is not ExponentialMovingAverage else ", or gamma=10, which"
        gamma = gamma and f"{gamma} starts with a larger momentum"
        given = getattr(averaged, "momentum", None)
        about = "about " if left and runner.progress.epoch_length is None else ""
        runner.logger.warning(
            f"{text}, because momentum={given} is small for a run of {about}{planned} updates: "
            f"the metrics are nearly those of the start. Use momentum={momentum:.1g}{gamma}"
        )

    def before_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the averaged weights."""
        checkpoint[self._key] = original_names(self.averaged.state_dict())

    def after_load_checkpoint(self, runner: Runner, checkpoint: Mapping[str, Any]) -> None:
        """Load the averaged weights, or start over if they are missing and that was allowed."""
        loaded, self._loaded = self._loaded, False
        if self._key in checkpoint:
            self.averaged.load_state_dict(names_as_in(self.averaged, checkpoint[self._key]))
        elif loaded:
            raise ValueError(
                f"the checkpoint has a state of {self.plugin_name!r} but no averaged weights "
                f"({self._key}): it is incomplete. To start the average over, remove that state "
                "from checkpoint['plugins'] and add its name to allow"
            )
        else:
            self.averaged.steps.zero_()
            self._updates = 0
            runner.logger.warning(
                f"ema: the checkpoint has no averaged weights ({self._key}): the average starts "
                "over from the raw ones"
            )
        self._steps = _steps(runner)

    def export(self, path: str | os.PathLike[str]) -> Path:
        """Write only the averaged weights, with the names of the bare model.

        Args:
            path: A path with the suffix ``.pth``, ``.pt`` or ``.safetensors``.

        Raises:
            RuntimeError: There is no average yet.
            ValueError: ``path`` has another suffix.
        """
        if self._updates == 0:
            raise RuntimeError("ema: there is no average yet to export. Train first")
        return export_weights(self.averaged.module, path)

    def state_dict(self) -> dict[str, Any]:
        """Return the type of the average, and how often it was updated."""
        return {"type": type(self.averaged).__name__, "updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the number of updates saved by ``state_dict``.

        Raises:
            ValueError: The average is of another type.
        """
        if state["type"] != (mine := type(self.averaged).__name__):
            raise ValueError(
                f"the averaged weights in the checkpoint are of type {state['type']}, but this run "
                f"uses {mine}. Resume with the same ema_type (gamma selects MomentumAnnealingEMA)"
            )
        self._updates = state["updates"]
        self._loaded = True


def _updates_left(runner: Runner) -> int | None:
    """Return how many updates the run will still have, or None if that is unknown."""
    wrappers = runner.optim_wrappers.values()
    if not wrappers:
        return 0
    return steps_left(runner.progress, min(wrapper.window_length for wrapper in wrappers))


def _steps(runner: Runner) -> int:
    """Return how many steps all optimizers together have taken."""
    if runner.optim_wrapper is None:
        return 0
    return sum(optim_wrapper.steps for optim_wrapper in runner.optim_wrapper.by_name().values())
