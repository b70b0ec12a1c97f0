"""Histograms of gradients and parameters, for every sink."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from hookengine import Histogram, OptimWrapper, Plugin, Runner, dist, hookimpl, missing_records

__all__ = ["Watch"]


class Watch(Plugin, name="watch"):
    """Log histograms of the gradients, the parameters, or both, every ``every`` optimizer steps.

    The gradients are those of an optimizer step: unscaled, of the whole batch, clipped. Histograms
    are computed on the device, without synchronization, and read with the next record. Tensors
    sharded by FSDP are gathered, one after another. A tensor without a distribution (a sparse
    gradient, a complex or empty parameter) is left out, with one warning per tensor.
    """

    what: Literal["gradients", "parameters", "all"] = Field(
        default="gradients", description="which histograms to log"
    )
    every: int = Field(default=1000, gt=0, description="optimizer steps between two histograms")
    bins: int = Field(default=64, gt=0, description="number of bins per histogram")

    def configure(self) -> None:
        """Forget which tensors were left out."""
        self._left_out: set[str] = set()

    def before_train(self, runner: Runner) -> None:
        """Warn if the histograms would go nowhere."""
        if dist.is_main_process() and (text := missing_records(runner)):
            runner.logger.warning(f"watch: {text}")

    @hookimpl(trylast=True, after="clip", every="every")  # the gradients are those of the step
    def before_optim_step(self, runner: Runner, optim_wrapper: OptimWrapper) -> None:
        """Compute histograms, before the first step and then every ``every`` steps."""
        mine = {id(parameter) for parameter in optim_wrapper.parameters()}
        tensors: dict[str, Tensor] = {}
        for name, parameter in runner.bare_model.named_parameters():
            if id(parameter) not in mine:
                continue
            if self.what != "gradients":
                tensors[f"parameters/{name}"] = parameter
            if self.what != "parameters" and parameter.grad is not None:
                tensors[f"gradients/{name}"] = parameter.grad
        histograms = {name: self._histogram(runner, name, t) for name, t in tensors.items()}
        runner.log({name: one for name, one in histograms.items() if one is not None})

    def _histogram(self, runner: Runner, name: str, tensor: Tensor) -> Histogram | None:
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # of all ranks
        if not dist.is_main_process():
            return None
        try:
            return Histogram(whole, self.bins)
        except (TypeError, ValueError, RuntimeError) as error:
            if name not in self._left_out:
                self._left_out.add(name)
                runner.logger.warning(f"watch: {name} is left out: {error}")
            return None
