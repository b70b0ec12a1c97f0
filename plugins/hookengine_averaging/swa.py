"""The plugin ``swa``: the mean of the weights of the last epochs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import nn
from torch.optim.swa_utils import SWALR

from hookengine import OptimWrapper, Plugin, hookimpl
from hookengine_averaging.averaged import StochasticWeightAverage
from hookengine_averaging.batch_norm import batch_norms, compute_statistics
from hookengine_averaging.ema import Ema
from hookengine_averaging.export import export_weights
from hookengine_averaging.rates import Rates


class Swa(Plugin, name="swa"):
    """Average the weights at the end of each of the last epochs (arXiv:1803.05407).

    From then on the learning rate goes to a constant one, as torch's ``SWALR`` has it, whatever a
    schedule says. When the limit of training is reached, the batch-norm statistics of the averaged
    model are computed anew over the training data, with the data preprocessor; the validation that
    follows evaluates it too: its metrics are called ``swa/NAME``. After a stop before the limit
    ``finish(runner)`` does that.

    In a checkpoint the averaged weights are under ``swa_state_dict``.

    Attributes:
        averaged: The averaged model; ``averaged.module`` has its weights.
    """

    after = ("schedule", "accumulate")

    begin: int | float = Field(
        default=0.75,
        gt=0,
        description="epochs before averaging begins, or below 1 their share of the run",
    )
    lr: float | None = Field(
        default=None,
        gt=0,
        description="learning rate while averaging; None leaves it to the schedule",
    )
    anneal_epochs: int = Field(
        default=10, ge=0, description="epochs until the learning rate is there"
    )
    anneal_strategy: Literal["cos", "linear"] = Field(
        default="cos", description="how it gets there"
    )

    def __post_init__(self) -> None:
        """Refuse a begin that is neither epochs nor a share."""
        if self.begin >= 1 and isinstance(self.begin, float):
            raise TypeError(
                f"swa: begin={self.begin} is neither a whole number of epochs nor a share of the "
                "run below 1"
            )

    def configure(self, runner: Any) -> None:
        """No average yet; refuse another plugin that chooses what is evaluated."""
        for name, other in runner.plugins.items():
            if isinstance(other, Swa) and other is not self:
                raise ValueError(
                    f"one swa is enough for a run, got {self.plugin_name!r} and {name!r}"
                )
            if isinstance(other, Ema) and other.evaluate != "raw":
                raise ValueError(
                    f"swa and {name!r} both choose the weights that are evaluated: use one of "
                    "them, or dict(type='ema', evaluate='raw')"
                )
        self._updates = self._begin = 0
        self._ready = False
        self._rates: dict[str, Rates] = {}
        self._pending: dict[str, Any] = {}
        self._loaded = False

    @hookimpl(trylast=True)  # layers are what they will be; nothing is wrapped yet
    def convert_model(self, model: nn.Module) -> None:
        """Take the copy."""
        self.averaged = StochasticWeightAverage(model)

    @hookimpl(trylast=True)
    def wrap_model(self, runner: Any, role: str) -> None:
        """Have the copy wrapped as the model is."""
        if role == "train":
            self.averaged.to(runner.device)
            self._evaluated = runner.wrap(self.averaged.module, "average")
            if not hasattr(self._evaluated, "loss_step") and batch_norms(self._evaluated):
                raise TypeError(
                    "swa computes batch-norm statistics with loss_step(data), as BaseModel has it; "
                    f"{type(self._evaluated).__name__} has none"
                )

    def before_train(self, runner: Any) -> None:
        """Know when averaging begins."""
        epochs = runner.progress.max_epochs
        if epochs is None and self.begin < 1:
            raise ValueError(
                f"swa: begin={self.begin} is a share of the epochs, whose number is not known in a "
                "run by iterations: give a number of epochs"
            )
        if self._updates or self._rates or self._pending:
            return  # it has begun: a run that goes on does not begin later
        self._begin = int(self.begin * epochs) if self.begin < 1 else int(self.begin)
        if epochs is not None and self._begin >= epochs:
            runner.logger.warning(
                f"swa: averaging begins after epoch {self._begin}, and this run ends with epoch "
                f"{epochs}: nothing is averaged"
            )

    def before_train_epoch(self, runner: Any) -> None:
        """Begin with the learning rates of averaging, after the last epoch without."""
        if self.lr is None or self._rates or runner.progress.epoch < self._begin:
            return
        for name, optim_wrapper in runner.optim_wrapper.by_name().items():
            scheduler = SWALR(
                optim_wrapper.optimizer,
                swa_lr=self.lr,
                anneal_epochs=self.anneal_epochs,
                anneal_strategy=self.anneal_strategy,
            )
            self._rates[name] = Rates(optim_wrapper, scheduler)
            if name in self._pending:
                self._rates[name].load_state_dict(self._pending.pop(name))

    @hookimpl(tryfirst=True)
    def before_optim_step(self, optim_wrapper: OptimWrapper) -> None:
        """Take back what a schedule has set between two steps."""
        self._restore(optim_wrapper)

    def after_optim_step(self, optim_wrapper: OptimWrapper) -> None:
        """Take back what a schedule has set with this step."""
        self._restore(optim_wrapper)

    def _restore(self, optim_wrapper: OptimWrapper) -> None:
        rates = self._rates.get(optim_wrapper.name)
        if rates is not None:
            rates.restore()

    def after_train_iter(self, runner: Any) -> None:
        """Finish at the limit of a run by iterations."""
        progress = runner.progress
        if progress.max_epochs is None and progress.iter == progress.max_iters and self._updates:
            self.finish(runner)

    def after_train_epoch(self, runner: Any) -> None:
        """Average, and move the learning rates on; finish after the last epoch."""
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

    def after_train(self, runner: Any) -> None:
        """Say how to finish after a stop."""
        if self._updates and not self._ready:
            runner.logger.warning(
                f"swa: training ended before its limit; the mean of {self._updates} epochs is not "
                "finished: runner.plugins['swa'].finish(runner) computes its batch-norm statistics"
            )

    def finish(self, runner: Any) -> None:
        """Compute the averaged model's batch-norm statistics over the training data.

        Raises:
            RuntimeError: nothing is averaged yet.
        """
        if self._updates == 0:
            raise RuntimeError("swa: nothing is averaged yet")
        model, batches = self._evaluated, runner.train_loop.dataloader
        if batch_norms(model):
            contexts = runner.hooks.forward_context(runner, model, None, "val")
            compute_statistics(model, batches, contexts)
        self._ready = True

    def evaluated_models(self, runner: Any) -> dict[str, nn.Module] | None:
        """Beside the raw weights the averaged ones, once they are ready."""
        return {"": runner.model, "swa": self._evaluated} if self._ready else None

    def before_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the averaged weights."""
        checkpoint["swa_state_dict"] = self.averaged.state_dict()

    def after_load_checkpoint(self, runner: Any, checkpoint: Mapping[str, Any]) -> None:
        """Take the averaged weights, or begin anew where it was allowed that there are none."""
        self._rates.clear()
        loaded, self._loaded = self._loaded, False
        if "swa_state_dict" in checkpoint:
            self.averaged.load_state_dict(checkpoint["swa_state_dict"])
        elif loaded:
            raise ValueError(
                "the checkpoint has a state of 'swa' and no averaged weights (swa_state_dict): it "
                "was cut. To begin anew, drop 'swa' from checkpoint['plugins'] and allow=['swa']"
            )
        else:
            self.averaged.steps.zero_()
            self._updates, self._ready, self._pending = 0, False, {}
            runner.logger.warning(
                "swa: the checkpoint has no averaged weights (swa_state_dict): averaging begins "
                "anew"
            )

    def export(self, path: str | os.PathLike[str]) -> Path:
        """Write the averaged weights alone, with the names of the bare model.

        Args:
            path: Ends with ``.pth`` or ``.safetensors``.

        Raises:
            RuntimeError: there is no average yet, or its batch norm is not computed. ValueError:
                another suffix.
        """
        if not self._ready:
            raise RuntimeError(
                "swa: the averaged model is ready at the end of training, or after finish(runner)"
            )
        return export_weights(self.averaged.module, path)

    def state_dict(self) -> dict[str, Any]:
        """How often it was averaged, and where the learning rates stand."""
        made = {name: rates.state_dict() for name, rates in self._rates.items()}
        rates = {**self._pending, **made}
        return {
            "begin": self._begin,
            "updates": self._updates,
            "ready": self._ready,
            "rates": rates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self._begin = state["begin"]
        self._updates, self._ready = state["updates"], state["ready"]
        self._loaded = True
        self._pending = dict(state["rates"])
