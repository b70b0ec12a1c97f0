"""The plugin ``swa``: the mean of the weights of the last epochs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn
from torch.optim.swa_utils import SWALR

from hookengine import OptimWrapper, Plugin, Runner, hookimpl, names_as_in, original_names
from hookengine_averaging.averaged import StochasticWeightAverage
from hookengine_averaging.batch_norm import batch_norms, compute_statistics
from hookengine_averaging.ema import Ema
from hookengine_averaging.export import export_weights
from hookengine_averaging.rates import Rates


class Swa(Plugin, name="swa"):
    """Average the weights at the end of each of the last epochs (arXiv:1803.05407).

    From then on, the learning rate moves to a constant one, as with torch's ``SWALR``, and any
    schedule is overridden. When training reaches its limit, the batch-norm statistics of the
    averaged model are recomputed over the training data, with the data preprocessor. The validation
    that follows also evaluates this model, and names its metrics ``swa/NAME``. If training stops
    before its limit, call ``finish(runner)``.

    A checkpoint has the averaged weights under ``swa_state_dict``.

    Attributes:
        averaged: The averaged model; ``averaged.module`` has its weights.
    """

    # It overrides the rates that a schedule has set, and averages after the last step of an epoch.
    after: ClassVar[Sequence[str]] = ("schedule", "accumulate")

    begin: int | float = Field(
        default=0.75,
        gt=0,
        description="epochs before averaging begins; below 1, a fraction of the run",
    )
    lr: float | None = Field(
        default=None,
        gt=0,
        description="the learning rate while averaging; None leaves it to the schedule",
    )
    anneal_epochs: int = Field(
        default=10, ge=0, description="epochs until the learning rate reaches lr"
    )
    anneal_strategy: Literal["cos", "linear"] = Field(
        default="cos", description="the shape of this annealing"
    )

    def __post_init__(self) -> None:
        """Raise a TypeError if ``begin`` is neither a number of epochs nor a fraction."""
        if self.begin >= 1 and isinstance(self.begin, float):
            raise TypeError(
                f"swa: begin={self.begin} must be an int, the number of epochs, or a fraction of "
                "the run below 1"
            )

    def configure(self, runner: Runner) -> None:
        """Reset the state; raise a ValueError if another plugin chooses the evaluated weights."""
        for name, other in runner.plugins.items():
            if isinstance(other, Swa) and other is not self:
                raise ValueError(
                    f"a run can have only one swa, got {self.plugin_name!r} and {name!r}"
                )
            if isinstance(other, Ema) and other.evaluate != "raw":
                raise ValueError(
                    f"swa and {name!r} both choose the weights to evaluate. Enable only one of "
                    "them, or use dict(type='ema', evaluate='raw')"
                )
        self._updates = self._begin = 0
        self._ready = False
        self._rates: dict[str, Rates] = {}
        self._pending: dict[str, Any] = {}
        self._loaded = False

    @hookimpl(trylast=True)  # all layers are replaced by then; nothing is wrapped yet
    def convert_model(self, model: nn.Module) -> None:
        """Copy the model."""
        self.averaged = StochasticWeightAverage(model)

    @hookimpl(trylast=True)  # the model is wrapped by then, and its copy is wrapped like it
    def wrap_model(self, runner: Runner, role: Literal["train", "average"]) -> None:
        """Wrap the copy in the same way as the model."""
        if role == "train":
            self.averaged.to(runner.device)
            self._evaluated = runner.wrap(self.averaged.module, "average")
            if not hasattr(self._evaluated, "loss_step") and batch_norms(self._evaluated):
                raise TypeError(
                    "swa computes batch-norm statistics with loss_step(data), as in BaseModel, but "
                    f"{type(self._evaluated).__name__} has none"
                )

    def before_train(self, runner: Runner) -> None:
        """Determine when averaging begins."""
        epochs, begin = runner.progress.max_epochs, self.begin
        if begin < 1:
            if epochs is None:
                raise ValueError(
                    f"swa: begin={begin} is a fraction of the epochs, but max_iters limits this "
                    "run, so their number is unknown. Pass a number of epochs"
                )
            begin *= epochs
        if self._updates or self._rates or self._pending:
            return  # averaging has begun, and training again does not move its begin
        self._begin = int(begin)
        if epochs is not None and self._begin >= epochs:
            runner.logger.warning(
                f"swa: averaging begins after epoch {self._begin}, but this run ends with epoch "
                f"{epochs}, so nothing is averaged"
            )

    def before_train_epoch(self, runner: Runner) -> None:
        """Take over the learning rates once averaging begins."""
        if self.lr is None or self._rates or runner.progress.epoch < self._begin:
            return
        for name, optim_wrapper in runner.optim_wrappers.items():
            scheduler = SWALR(
                optim_wrapper.optimizer,
                swa_lr=self.lr,
                anneal_epochs=self.anneal_epochs,
                anneal_strategy=self.anneal_strategy,
            )
            self._rates[name] = Rates(optim_wrapper, scheduler)
            if name in self._pending:
                self._rates[name].load_state_dict(self._pending.pop(name))

    @hookimpl(tryfirst=True)  # the others see the rates of this step
    def before_optim_step(self, optim_wrapper: OptimWrapper) -> None:
        """Override what a schedule has set between two steps."""
        self._restore(optim_wrapper)

    def after_optim_step(self, optim_wrapper: OptimWrapper) -> None:
        """Override what a schedule has set with this step."""
        self._restore(optim_wrapper)

    def _restore(self, optim_wrapper: OptimWrapper) -> None:
        rates = self._rates.get(optim_wrapper.name)
        if rates is not None:
            rates.restore()

    def after_train_iter(self, runner: Runner) -> None:
        """Finish when a run that is limited by iterations reaches its limit."""
        progress = runner.progress
        if progress.max_epochs is None and progress.iter == progress.max_iters and self._updates:
            self.finish(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        """Update the average and advance the learning rates; finish after the last epoch."""
        for rates in self._rates.values():
            rates.step()
        progress = runner.progress
        if progress.epoch > self._begin:
            self.averaged.update_parameters(runner.bare_model)
            self._updates += 1
            self._ready = False
        last = progress.epoch == progress.max_epochs or (
            progress.max_epochs is None and progress.iter == progress.max_iters
        )
        if last and self._updates:
            self.finish(runner)

    def after_train(self, runner: Runner) -> None:
        """Warn if training stopped before its limit, and say how to finish."""
        if self._updates and not self._ready:
            runner.logger.warning(
                f"swa: training ended before its limit; the mean of {self._updates} epochs is not "
                "finished. To compute its batch-norm statistics, call "
                "runner.plugins['swa'].finish(runner)"
            )

    def finish(self, runner: Runner) -> None:
        """Compute the averaged model's batch-norm statistics over the training data.

        Raises:
            RuntimeError: Nothing has been averaged yet.
        """
        if self._updates == 0:
            raise RuntimeError("swa: nothing has been averaged yet. Train past begin first")
        model, batches = self._evaluated, runner.dataloaders["train"]
        if batch_norms(model):
            contexts = runner.hooks.forward_context(runner, model, None, "val")
            compute_statistics(model, batches, contexts)
        self._ready = True

    def evaluated_models(self, runner: Runner) -> dict[str, nn.Module] | None:
        """Evaluate the averaged weights beside the raw ones, once they are ready."""
        return {"": runner.model, "swa": self._evaluated} if self._ready else None

    def before_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the averaged weights."""
        checkpoint["swa_state_dict"] = original_names(self.averaged.state_dict())

    def after_load_checkpoint(self, runner: Runner, checkpoint: Mapping[str, Any]) -> None:
        """Load the averaged weights, or start over if they are missing and that was allowed."""
        self._rates.clear()
        loaded, self._loaded = self._loaded, False
        if "swa_state_dict" in checkpoint:
            saved = names_as_in(self.averaged, checkpoint["swa_state_dict"])
            self.averaged.load_state_dict(saved)
        elif loaded:
            raise ValueError(
                "the checkpoint has a state of 'swa' but no averaged weights (swa_state_dict): it "
                "is incomplete. To start over, remove 'swa' from checkpoint['plugins'] and pass "
                "allow=['swa']"
            )
        else:
            self.averaged.steps.zero_()
            self._updates, self._ready, self._pending = 0, False, {}
            runner.logger.warning(
                "swa: the checkpoint has no averaged weights (swa_state_dict): averaging starts "
                "over"
            )

    def export(self, path: str | os.PathLike[str]) -> Path:
        """Write only the averaged weights, with the names of the bare model.

        Args:
            path: A path with the suffix ``.pth``, ``.pt`` or ``.safetensors``.

        Raises:
            RuntimeError: There is no average yet, or its batch-norm statistics are not computed.
            ValueError: ``path`` has another suffix.
        """
        if not self._ready:
            raise RuntimeError(
                "swa: the averaged model is not ready yet. It is ready at the end of training, or "
                "after finish(runner)"
            )
        return export_weights(self.averaged.module, path)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the average and of the learning rates."""
        made = {name: rates.state_dict() for name, rates in self._rates.items()}
        rates = {**self._pending, **made}
        return {
            "begin": self._begin,
            "updates": self._updates,
            "ready": self._ready,
            "rates": rates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state saved by ``state_dict``."""
        self._begin = state["begin"]
        self._updates, self._ready = state["updates"], state["ready"]
        self._loaded = True
        self._pending = dict(state["rates"])
