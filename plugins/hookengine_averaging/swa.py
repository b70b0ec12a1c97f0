"""The plugin ``swa``: the mean of the weights of the last epochs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import SWALR, update_bn

from hookengine import OptimWrapper, Plugin, hookimpl, preserved_random_state
from hookengine_averaging.averaged import StochasticWeightAverage
from hookengine_averaging.ema import Ema
from hookengine_averaging.export import export_weights


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
        0.75, gt=0, description="epochs before averaging begins, or below 1 their share of the run"
    )
    lr: float | None = Field(
        None, gt=0, description="learning rate while averaging; None leaves it to the schedule"
    )
    anneal_epochs: int = Field(10, ge=0, description="epochs until the learning rate is there")
    anneal_strategy: Literal["cos", "linear"] = Field("cos", description="how it gets there")

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
        self._rates: dict[str, _Rates] = {}
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
            if not hasattr(self._evaluated, "loss_step") and _batch_norms(self._evaluated):
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
            self._rates[name] = _Rates(optim_wrapper, scheduler)
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
        if _batch_norms(model):
            with preserved_random_state(), _kept(model, batches), ExitStack() as contexts:
                for context in runner.hooks.forward_context(runner, model, None, "val"):
                    contexts.enter_context(context)
                update_bn(_Batches(batches), _Forward(model))
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


class _Rates:
    """The learning rates of one optimizer while weights are averaged.

    Args:
        optim_wrapper: The optimizer's.
        scheduler: Moves them.
    """

    def __init__(self, optim_wrapper: OptimWrapper, scheduler: SWALR) -> None:
        self.optim_wrapper = optim_wrapper
        self.scheduler = scheduler
        self._rates = optim_wrapper.get_lr()

    def restore(self) -> None:
        """Set them, whatever somebody else has set."""
        for group, lr in zip(self.optim_wrapper.param_groups, self._rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def step(self) -> None:
        """Move on, per epoch."""
        self.restore()
        with warnings.catch_warnings():
            # torch knows only of steps in this process: after a resume there may be none yet.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()
        self._rates = self.optim_wrapper.get_lr()

    def state_dict(self) -> dict[str, Any]:
        """Plain containers."""
        return {"scheduler": self.scheduler.state_dict(), "rates": self._rates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.scheduler.load_state_dict(state["scheduler"])
        self._rates = list(state["rates"])
        self.restore()


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]


@contextmanager
def _kept(model: nn.Module, dataloader: Any) -> Iterator[None]:
    """Keep what ``update_bn`` is not to change.

    The modes of all layers; the statistics of batch norm that the model holds frozen, in evaluation
    mode while it trains; after an error those of all. The dataloader's own random generators.
    """
    modes = {layer: layer.training for layer in model.modules()}
    model.train()
    layers = _batch_norms(model)
    kept = {layer: {n: b.clone() for n, b in layer.named_buffers()} for layer in layers}
    momenta = {layer: layer.momentum for layer in layers}
    frozen = [layer for layer in layers if not layer.training]
    sampler = getattr(dataloader, "sampler", None)
    generators = [getattr(owner, "generator", None) for owner in (dataloader, sampler)]
    states = [(g, g.get_state()) for g in generators if g is not None]
    try:
        yield
    except BaseException:
        frozen = layers
        raise
    finally:
        for layer in frozen:
            layer.momentum = momenta[layer]
            for name, buffer in layer.named_buffers():
                buffer.copy_(kept[layer][name])
        for layer, training in modes.items():
            layer.training = training
        for generator, state in states:
            generator.set_state(state)


class _Batch:
    """A batch of any kind, which torch's ``update_bn`` hands on as it is."""

    def __init__(self, data: Any) -> None:
        self.data = data


class _Batches:
    """The training batches."""

    def __init__(self, dataloader: Iterable[Any]) -> None:
        self.dataloader = dataloader

    def __iter__(self) -> Iterator[_Batch]:
        return map(_Batch, self.dataloader)


class _Forward(nn.Module):
    """The averaged model's forward pass as in training, preprocessor included.

    Args:
        model: A BaseModel, as ``runner.wrap`` returns it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: _Batch) -> None:
        """Let batch norm see the batch."""
        self.model.loss_step(batch.data)  # type: ignore[operator]
