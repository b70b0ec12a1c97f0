"""The plugin ``swa``: the mean of the weights of the last epochs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn
from torch.optim.swa_utils import SWALR

from hookengine import (
    BaseModel,
    OptimWrapper,
    Plugin,
    Runner,
    dist,
    hookimpl,
    length_of,
    names_as_in,
    original_names,
)
from hookengine_averaging.averaged import StochasticWeightAverage
from hookengine_averaging.batch_norm import batch_norms, compute_statistics
from hookengine_averaging.ema import Ema
from hookengine_averaging.export import export_weights
from hookengine_averaging.rates import Rates
from hookengine_averaging.span import Clock, parse_span
from hookengine_averaging.timing import Timing


class Swa(Plugin, name="swa"):
    """Average the weights at the end of each of the last epochs (arXiv:1803.05407).

    From then on, the learning rate moves to a constant one, as with torch's ``SWALR``, and any
    schedule is overridden. When training reaches its limit, the batch-norm statistics of the
    averaged model are recomputed over the training data, with the data preprocessor. The validation
    that follows also evaluates this model, and names its metrics ``swa/NAME``. If training stops
    before its limit, call ``finish(runner)``.

    ``begin``, ``interval`` and ``anneal_epochs`` count epochs, or what a text says: ``"500
    iterations"``, or ``"500 steps"`` of the first optimizer. A run that is known to average nothing
    is refused before it starts.

    A checkpoint has the averaged weights under ``swa_state_dict``.

    Attributes:
        averaged: The averaged model; ``averaged.module`` has its weights.
    """

    # It overrides the rates that a schedule has set, and averages after the last step of an epoch.
    after: ClassVar[Sequence[str]] = ("schedule", "accumulate")

    begin: int | float | str = Field(
        default=0.75,
        description="epochs before averaging begins, '500 iterations' or '500 steps'; below 1, a "
        "fraction of the run",
    )
    interval: int | str = Field(
        default=1,
        description="epochs from one averaged value to the next, '500 iterations' or '500 steps'",
    )
    lr: float | None = Field(
        default=None,
        gt=0,
        description="the learning rate while averaging; None leaves it to the schedule",
    )
    anneal_epochs: int | str = Field(
        default=10,
        description="epochs until the learning rate reaches lr, '500 iterations' or '500 steps'",
    )
    anneal_strategy: Literal["cos", "linear"] = Field(
        default="cos", description="the shape of this annealing"
    )

    def __post_init__(self) -> None:
        """Raise a TypeError if an option is neither a number of epochs nor a text with a unit."""
        self._timing = Timing(self.begin, self.interval)
        self._anneal = parse_span("anneal_epochs", self.anneal_epochs, least=0)

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
        self._timing = Timing(self.begin, self.interval)
        self._updates = 0
        self._ready = self._told = False
        self._replacing: set[str] = set()  # plugins that have replaced a training batch
        self._warned = False
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
        """Determine when averaging begins.

        Raises:
            ValueError: The run is too short to average anything.
        """
        self._told = False
        timing, progress, cfg = self._timing, runner.progress, runner.train_cfg
        timing.set_limits(progress.max_epochs, progress.max_iters)
        clock = Clock(progress, _window(runner))
        if timing.has_begun or timing.count_averages(clock) != 0:
            return
        planned = cfg and timing.count_averages(clock, cfg.max_epochs, cfg.max_iters)
        if self._updates == 0 and not planned:
            raise ValueError(
                f"swa: nothing would be averaged: {timing}. Set begin= or interval= to a smaller "
                "number of epochs, or to a text such as '100 iterations'"
            )
        runner.logger.warning(f"swa: {timing}, so nothing is averaged")  # train(max_epochs=...)
        self._told = True

    def before_train_epoch(self, runner: Runner) -> None:
        """Begin if it is time; take over the learning rates again after a resume."""
        if self._timing.begins(runner.progress) or (self._timing.has_begun and not self._rates):
            self._take_rates(runner)

    def _take_rates(self, runner: Runner) -> None:
        if self.lr is None:
            return
        for name, optim_wrapper in runner.optim_wrappers.items():
            scheduler = SWALR(
                optim_wrapper.optimizer,
                swa_lr=self.lr,
                anneal_epochs=self._anneal.number,
                anneal_strategy=self.anneal_strategy,
            )
            self._rates[name] = Rates(optim_wrapper, scheduler)
            if name in self._pending:
                self._rates[name].load_state_dict(self._pending.pop(name))

    def _step_rates(self, unit: str, names: Iterable[str] | None = None) -> None:
        """Advance the learning rates, if they are annealed in this unit."""
        if unit == self._anneal.unit:
            for name in self._rates if names is None else names:
                if name in self._rates:
                    self._rates[name].step()

    def _average(self, runner: Runner) -> None:
        self.averaged.update_parameters(runner.bare_model)
        self._updates += 1
        self._ready = False

    @hookimpl(tryfirst=True)  # the others see the rates of this step
    def before_optim_step(self, optim_wrapper: OptimWrapper) -> None:
        """Override what a schedule has set between two steps."""
        self._restore(optim_wrapper)

    def after_optim_step(self, optim_wrapper: OptimWrapper) -> None:
        """Override what a schedule has set with this step."""
        self._step_rates("steps", [optim_wrapper.name])
        self._restore(optim_wrapper)

    def _restore(self, optim_wrapper: OptimWrapper) -> None:
        rates = self._rates.get(optim_wrapper.name)
        if rates is not None:
            rates.restore()

    def after_train_iter(self, runner: Runner) -> None:
        """Update the average between epochs; finish a run whose limit is in iterations."""
        progress = runner.progress
        if (replacing := runner.hooks.replaced.get("before_train_iter")) is not None:
            self._replacing.add(replacing)
        self._step_rates("iterations")
        ends = progress.max_epochs is None and progress.iter == progress.max_iters
        if not ends and self._timing.by_epoch:
            return
        if self._timing.begins(progress, within=True):
            self._take_rates(runner)
        # The last validation comes before the end of the epoch.
        if self._timing.averages(progress, closes_epoch=ends):
            self._average(runner)
        if ends:
            self._conclude(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        """Update the average and advance the learning rates; finish after the last epoch."""
        progress = runner.progress
        self._step_rates("epochs")
        if self._timing.begins(progress, within=True):  # a window of steps was closed late
            self._take_rates(runner)
        if self._timing.averages(progress):
            self._average(runner)
        if progress.epoch == progress.max_epochs or (
            progress.max_epochs is None and progress.iter == progress.max_iters
        ):
            self._conclude(runner)

    def after_train(self, runner: Runner) -> None:
        """Warn if nothing was averaged, or training stopped before its limit; say how to finish."""
        if self._updates == 0:
            self._warn_of_nothing(runner, runner.progress.stopped is not None)
        elif not self._ready:
            what = "epochs" if self._timing.by_epoch else "values"
            runner.logger.warning(
                f"swa: training ended before its limit; the mean of {self._updates} {what} is not "
                "finished. To compute its batch-norm statistics, call "
                "runner.plugins['swa'].finish(runner)"
            )

    def on_exception(self, runner: Runner, error: BaseException) -> None:
        """Warn if nothing has been averaged when training is interrupted."""
        if isinstance(error, KeyboardInterrupt) and self._updates == 0:
            self._warn_of_nothing(runner, stopped=True)

    def _warn_of_nothing(self, runner: Runner, stopped: bool) -> None:
        if self._told:
            return
        progress = runner.progress
        ended = f"{progress.iter} iterations ({progress.epoch} epochs, {progress.step} steps)"
        if stopped:
            runner.logger.warning(
                f"swa: nothing was averaged, because training was stopped after {ended}. Resume "
                f"the run to continue: {self._timing.plan}"
            )
        else:
            runner.logger.warning(
                f"swa: nothing was averaged: {self._timing}; it ended after {ended}"
            )

    def finish(self, runner: Runner, batches: Iterable[Any] | None = None) -> None:
        """Compute the averaged model's batch-norm statistics over the training data.

        Args:
            runner: The Runner.
            batches: Other batches than those of the training dataloader.

        Raises:
            RuntimeError: Nothing has been averaged yet, or there was no batch. The averaged model
                then keeps its statistics.
        """
        if self._updates == 0:
            raise RuntimeError("swa: nothing has been averaged yet. Train past begin first")
        if not self._compute_statistics(runner, batches):
            raise RuntimeError(
                f"swa: there was no batch to compute batch-norm statistics of: {_ONCE}. Pass other "
                "batches: finish(runner, batches)"
            )
        self._ready = True

    def _conclude(self, runner: Runner) -> None:
        """Finish at the limit of training, with or without batches for the statistics."""
        if self._updates == 0 or self._ready:
            return
        if not self._compute_statistics(runner, None):
            runner.logger.warning(
                "swa: the training dataloader gave no batch to compute batch-norm statistics of: "
                f"{_ONCE}. The averaged model keeps the statistics of the weights that were "
                "averaged last. To compute its own, pass a dataloader that starts over each time, "
                "or call runner.plugins['swa'].finish(runner, batches)"
            )
        self._ready = True

    def _compute_statistics(self, runner: Runner, batches: Iterable[Any] | None) -> bool:
        """Compute the statistics, if the model has any; return False if there was no batch."""
        model, progress = self._evaluated, runner.progress
        if not batch_norms(model):
            return True
        most = None
        if batches is None:
            batches = runner.dataloaders["train"]
            # An iterator belongs to training, which may continue with its next batch.
            found = dist.all_gather_objects(isinstance(batches, Iterator))
            if any(found):
                return False
            self._warn_of_replaced_batches(runner)
            if progress.epoch_length is None:
                most = progress.iter  # it may have no end
        contexts = runner.hooks.forward_context(runner, model, None, "val")
        total = most or length_of(batches)

        def tell(done: int) -> None:
            if done != total:
                runner.hooks.on_progress(runner, "swa batch norm", done, total)

        number = compute_statistics(model, batches, contexts, most, tell)
        runner.hooks.on_progress(runner, "swa batch norm", number, number)
        seen = sum(dist.all_gather_objects(number))
        expected = (progress.epoch_length or 0) * dist.get_world_size() if most is None else 0
        if 0 < seen < expected / 2:
            runner.logger.warning(
                f"swa: the batch-norm statistics are of {seen} batches only, because the training "
                f"dataloader did not give its {expected} batches again"
            )
        return seen > 0

    def _warn_of_replaced_batches(self, runner: Runner) -> None:
        """Warn once if plugins have replaced training batches, which the statistics do not see.

        The pass cannot emit ``before_train_iter``: other plugins count iterations in it.
        """
        if self._warned or not self._replacing:
            return
        self._warned = True
        names = ", ".join(repr(name) for name in sorted(self._replacing))
        runner.logger.warning(
            "swa: the batch-norm statistics are of the batches as the training dataloader gives "
            f"them, without what {names}, and any plugin before it, makes of them in "
            "before_train_iter. If batches are changed like that for evaluation too (normalized, "
            "for example), do so in the data preprocessor or the dataset, or call "
            "runner.plugins['swa'].finish(runner, batches) with changed batches"
        )

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
            self._timing.start_over()
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
            "updates": self._updates,
            "ready": self._ready,
            "rates": rates,
            **self._timing.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state saved by ``state_dict``."""
        self._updates, self._ready = state["updates"], state["ready"]
        self._loaded = True
        self._pending = dict(state["rates"])
        if "interval" not in state:  # an earlier release averaged every epoch
            has_begun = bool(self._updates or self._pending)
            begun, passed = (state["begin"], self._updates) if has_begun else (None, 0)
            state = {**state, "interval": [1, "epochs"], "begun": begun, "passed": passed}
        self._timing.load_state_dict(state)


_ONCE = "it is empty, or can be iterated over only once"


def _window(runner: Runner) -> int | None:
    """Return the iterations per step; None if the model's own ``train_step`` decides on steps."""
    if getattr(type(runner.bare_model), "train_step", BaseModel.train_step) is BaseModel.train_step:
        return next(iter(runner.optim_wrappers.values())).window_length
    return None
