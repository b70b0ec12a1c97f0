"""Several processes: DDP and FSDP, shares of the data, and decisions that all ranks share."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as torch_dist
from pydantic import Field
from torch import nn

from hookengine import (
    MODEL_WRAPPERS,
    OptimWrapper,
    Phase,
    Plugin,
    Runner,
    dist,
    hookimpl,
    is_seekable,
    length_of,
    options_of,
)
from hookengine_distributed.agreement import Agreement
from hookengine_distributed.ddp import (
    MMDistributedDataParallel,
    MMSeparateDistributedDataParallel,
)
from hookengine_distributed.evaluation import Evaluation
from hookengine_distributed.exchange import average_gradients
from hookengine_distributed.fsdp import MMFullyShardedDataParallel
from hookengine_distributed.launch import (
    Launch,
    backend_of,
    choose_backend,
    join,
    leave,
    own_device,
    uncaught,
    use,
)
from hookengine_distributed.sameness import described, exchange, require_same
from hookengine_distributed.shares import OF_ITS_OWN, Shared, fingerprint, share, share_list
from hookengine_distributed.watch import RankError, Watch
from hookengine_distributed.wrap import look_after, require_shapes, shapes, wrap, wrapper_class

__all__ = [
    "Distributed",
    "MMDistributedDataParallel",
    "MMFullyShardedDataParallel",
    "MMSeparateDistributedDataParallel",
    "RankError",
]


class Distributed(Plugin, name="distributed"):
    """Run the same training script on several processes, started by ``torchrun``.

    The plugin does nothing in a single process. With several, it joins their process group (NCCL on
    CUDA, gloo on the CPU), and gives each process its device, the weights of rank 0, a share of
    every dataloader and a wrapper around the model that exchanges gradients. Your settings are not
    changed: a batch size is that of one rank, and the learning rate is not rescaled.

    - In training, all ranks get the same number of samples: the first ones are repeated as needed
      or, with ``drop_last``, the remainder is dropped. In evaluation, each rank gets some of the
      batches of a single process, and no batch is evaluated twice.
    - All ranks stop, save and end together. An error on one rank ends all of them.
    - Plugin options, parameters or datasets that differ between ranks raise an error.
    """

    strategy: Literal["ddp", "fsdp", "none"] = Field(
        default="ddp", description="'none': the model's own train_step exchanges gradients"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="wrapper arguments, such as find_unused_parameters=True"
    )
    wrapper: str | type[nn.Module] | None = Field(
        default=None, description="a different wrapper: its name in MODEL_WRAPPERS, or its class"
    )
    backend: str | None = Field(
        default=None, description="by default NCCL on CUDA and gloo on the CPU"
    )
    timeout: float | None = Field(
        default=None, gt=0, description="seconds to wait for other ranks; by default torch's"
    )
    share_data: bool = Field(
        default=True, description="give each rank its share of the dataloaders"
    )
    split_batches: bool = Field(
        default=False, description="the batch size is that of all ranks together, not of each"
    )
    uneven: Literal["repeat", "drop"] | None = Field(
        default=None,
        description="how to even out training samples; by default as the dataloader's drop_last",
    )

    def __post_init__(self) -> None:
        """Reject options that contradict each other."""
        if self.wrapper is not None and self.strategy != "ddp":
            raise TypeError("distributed takes a strategy or a wrapper, not both")
        if self.options and self.strategy == "none":
            raise TypeError("distributed: strategy='none' wraps nothing. Remove options")

    # -- the life of the process group ----------------------------------------------------------

    @hookimpl(tryfirst=True)  # other plugins use the device and the ranks
    def configure(self, runner: Runner) -> None:
        """Join the process group, and check that all ranks have the same options."""
        self._ranks = 1
        self._watch: Watch | None = None
        self._wrapper: Any = None
        self._models: list[nn.Module] = []
        self._shares: dict[str, Shared] = {}
        self._batches: dict[str, list[int | None]] = {}
        self._evaluation = Evaluation()
        self._after_val = False
        launch = Launch.read()
        if launch is not None:
            runner.use_device(own_device(runner.device, launch))
        if not dist.is_distributed():
            if launch is None:
                return
            join(launch, choose_backend(runner.device, self.backend), self.timeout)
        if dist.get_world_size() == 1:
            return
        use()
        self._ranks = dist.get_world_size()
        self._watch = Watch(runner)
        beside: Any = torch_dist.new_group(backend="gloo")
        self._agreement = Agreement(beside)
        self._seed: int = dist.broadcast_object(torch.initial_seed())
        require_same("options", _options(runner))
        if not runner.named:
            runner.use_name(dist.broadcast_object(runner.name))

    @hookimpl(tryfirst=True)  # no plugin trains on if a rank has failed
    def before_train(self, runner: Runner) -> None:
        """Check that no rank has failed, and that all ranks train the same."""
        if self._watch is not None:
            self._watch.check()
            counters = "max_epochs", "max_iters", "epoch", "iter", "batch"
            require_same("training", {n: getattr(runner.progress, n) for n in counters})

    @hookimpl(tryfirst=True)  # the next event after the reservation of the folder on rank 0
    def initialize_model(self, runner: Runner) -> None:
        """Use the name that rank 0 has reserved for the run."""
        if self._watch is not None:
            name = dist.broadcast_object(runner.name)
            if name != runner.name:
                runner.use_name(name)

    @hookimpl(tryfirst=True)  # the other ranks are waiting
    def on_exception(self, error: BaseException) -> None:
        """Report the error to the other ranks."""
        if self._watch is not None:
            self._watch.tell(error)

    @hookimpl(after="*")  # other plugins may still need the other ranks
    def unconfigure(self) -> None:
        """Leave the process group, after reporting any error to the other ranks."""
        if self._watch is None:
            return
        error = sys.exception() or uncaught()
        if error is not None and not isinstance(error, SystemExit):
            self._watch.tell(error)
        self._watch.stop()
        self._watch = None
        leave()

    # -- the model ------------------------------------------------------------------------------

    def wrap_model(
        self, runner: Runner, model: nn.Module, role: Literal["train", "average"]
    ) -> nn.Module | None:
        """Give all ranks the weights of rank 0, and wrap the model."""
        if self._ranks == 1:
            return None
        wrappers = tuple(MODEL_WRAPPERS.objects())
        given = next((m for m in (model, runner.bare_model) if isinstance(m, wrappers)), None)
        if given is not None:  # a plain module and its loss are put around it
            raise TypeError(
                f"distributed: the model is already wrapped in {type(given).__name__}. Pass the "
                "model itself to the Runner; to choose how it is wrapped, use "
                "dict(type='distributed', wrapper=..., options=dict(...))"
            )
        require_shapes(model)
        require_same("model", shapes(model))
        tensors = [*model.parameters(), *model.buffers()]
        with torch.no_grad():
            dist.broadcast_tensors(t for t in tensors if not hasattr(t, "to_local"))
        self._models.append(model)
        self._bare = runner.bare_model
        if self.strategy == "none":
            return None
        cls = wrapper_class(self.strategy, self.wrapper, len(runner.optimizer_names))
        trains = any(parameter.requires_grad for parameter in model.parameters())
        if not issubclass(cls, MMFullyShardedDataParallel) and (role == "average" or not trains):
            return None  # there are no gradients to exchange
        wrapper = wrap(cls, model, self.options)
        if role == "train":
            self._wrapper = wrapper
            runner.logger.info(
                f"distributed: {self._ranks} ranks ({backend_of(runner.device)}), "
                f"{type(wrapper).__name__}"
            )
        return wrapper

    def setup_optimizer(self, runner: Runner, optim_wrapper: OptimWrapper) -> None:
        """Reject optimizers that differ between ranks."""
        if self._ranks > 1:
            facts = {"class": type(optim_wrapper.optimizer).__name__}
            for number, group in enumerate(optim_wrapper.param_groups):
                facts |= {
                    f"{name} of group {number}": described(value)
                    for name, value in group.items()
                    if name != "params"
                }
                facts[f"size of group {number}"] = str(len(group["params"]))
            require_same(f"optimizer {optim_wrapper.name!r}", facts)

    def forward_context(self, optim_wrapper: OptimWrapper | None) -> None:
        """Note in the wrapper which optimizer's step the next forward pass is for."""
        if optim_wrapper is not None and (told := getattr(self._wrapper, "exchange", None)):
            told.expect(optim_wrapper)

    @hookimpl(tryfirst=True)  # a plugin that runs the backward pass ends the question
    def backward(self) -> None:
        """Note in the wrapper that a backward pass begins; the kernel runs that pass."""
        if told := getattr(self._wrapper, "exchange", None):
            told.before_backward()

    @hookimpl(tryfirst=True)  # the others see the gradients of all ranks
    def finish_gradients(self, runner: Runner, optim_wrapper: OptimWrapper) -> None:
        """Exchange gradients that no backward pass has exchanged; raise if none ever would."""
        wrapper, told = self._wrapper, getattr(self._wrapper, "exchange", None)
        if told is None:
            return
        told.check(type(runner.bare_model).__name__.removeprefix("FSDP"))
        if not told.take_local(optim_wrapper.name):
            if not isinstance(wrapper, MMFullyShardedDataParallel):
                look_after(optim_wrapper, wrapper, runner.bare_model)
        elif isinstance(wrapper, MMFullyShardedDataParallel):
            wrapper.exchange_now()
        else:
            average_gradients(optim_wrapper.parameters())

    # -- the data -------------------------------------------------------------------------------

    @hookimpl(tryfirst=True)  # before other plugins wrap it
    def setup_dataloader(self, runner: Runner, dataloader: Iterable[Any], phase: Phase) -> Any:
        """Replace the dataloader with this rank's share of it."""
        if self._ranks == 1:
            return None
        name = f"{phase}_dataloader"
        shared, text = self._share(dataloader, phase, name)
        runner.logger.info(f"distributed: {name}: {text}")
        loader = dataloader if shared is None else shared
        self._batches[phase] = exchange(f"{name}'s length", length_of(loader))
        if phase == "train" and len(set(self._batches[phase])) > 1:
            raise ValueError(
                f"{name} has {', '.join(map(str, self._batches[phase]))} batches on the ranks, but "
                "all ranks must train on the same number, because every step needs all of them"
            )
        return shared

    def _share(self, loader: Any, phase: Phase, name: str) -> tuple[Any, str]:
        samples = length_of(getattr(loader, "dataset", ()))
        require_same(name, {"class": type(loader).__name__, "samples": samples})
        if not self.share_data:
            return None, "left unchanged (share_data=False)"
        drop = None if self.uneven is None else self.uneven == "drop"
        if isinstance(loader, (list, tuple)):
            alike = len(set(exchange(name, fingerprint(loader)))) == 1
            return share_list(loader, phase, drop) if alike else (None, OF_ITS_OWN)
        shared, sampler, text = share(loader, phase, drop, self.split_batches)
        if sampler is not None:
            self._shares[phase] = sampler
        return shared, text

    def before_train_epoch(self, runner: Runner) -> None:
        """Make all ranks draw the same order of samples."""
        self._draw_alike(runner, "train", runner.progress.epoch)

    def _draw_alike(self, runner: Runner, phase: Phase, epoch: int) -> None:
        share = self._shares.get(phase)
        # With seek, a pass is already a function of its number.
        if share is not None and not is_seekable(runner.dataloaders[phase]):
            share.seed = self._seed
            share.set_epoch(epoch)

    # -- evaluation -----------------------------------------------------------------------------

    def before_val_epoch(self, runner: Runner) -> None:
        """Give all ranks the buffers of rank 0, which are the ones that are saved."""
        self._before_evaluation("validation")
        self._draw_alike(runner, "val", 0)
        self._evaluation.begin(self._models)

    def before_test_epoch(self, runner: Runner) -> None:
        """Give all ranks the buffers of rank 0."""
        self._before_evaluation("test")
        self._draw_alike(runner, "test", 0)
        self._evaluation.begin(self._models)

    def _before_evaluation(self, name: str) -> None:
        if self._watch is not None:
            self._watch.check()
            require_same(name, {})

    @hookimpl(after="*")  # after other plugins may have replaced the batch
    def before_val_iter(self, batch_idx: int, data_batch: Any) -> None:
        """Keep the batch for forward passes whose results are discarded."""
        self._evaluation.keep(data_batch, batch_idx == 0, self._batches.get("val", ()))

    @hookimpl(after="*")  # after other plugins may have replaced the batch
    def before_test_iter(self, batch_idx: int, data_batch: Any) -> None:
        """Keep the batch for forward passes whose results are discarded."""
        self._evaluation.keep(data_batch, batch_idx == 0, self._batches.get("test", ()))

    def before_metrics(self, runner: Runner, model: nn.Module, phase: Phase) -> None:
        """Join the forward passes of ranks with more batches, if the model is sharded."""
        self._evaluation.catch_up(runner, model, phase, self._batches.get(phase, ()))

    def after_val(self) -> None:
        """Restore this rank's own buffers; the next requests are agreed on immediately."""
        self._evaluation.end()
        self._after_val = True

    def after_test(self) -> None:
        """Restore this rank's own buffers."""
        self._evaluation.end()

    # -- decisions ------------------------------------------------------------------------------

    def agree(self, runner: Runner, requests: Mapping[str, str]) -> dict[str, str] | None:
        """Combine the requests of all ranks.

        The answer is immediate between epochs and after a validation. Within an epoch, it comes
        about a second later.
        """
        if self._watch is None:
            return None
        self._watch.check()
        at_once = self._after_val or runner.progress.batch == 0
        self._after_val = False
        return self._agreement.settle(requests, at_once)

    # -- state ----------------------------------------------------------------------------------

    def rank_state_dict(self) -> dict[str, Any]:
        """Return the buffers of this rank; those of rank 0 are saved with the model."""
        if self._ranks == 1 or dist.is_main_process():
            return {}
        return {"buffers": {name: b.detach().cpu() for name, b in self._bare.named_buffers()}}

    def load_rank_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the buffers saved by ``rank_state_dict``."""
        if self._ranks == 1:
            return
        own = dict(self._bare.named_buffers())
        with torch.no_grad():
            for name, saved in state.get("buffers", {}).items():
                own[name].copy_(saved)


def _options(runner: Runner) -> dict[str, str]:
    """Return the options of the Runner, which must be the same on all ranks."""
    facts = {f"the plugin {n!r}": described(options_of(p)) for n, p in runner.plugins.items()}
    for phase in ("train", "val", "test"):
        facts[f"{phase}_cfg"] = described(getattr(runner, f"{phase}_cfg"))
    facts["optim_wrapper"] = ", ".join(runner.optimizer_names)
    facts["device"] = runner.device.type
    facts["name"] = runner.name if runner.named else "none"
    facts["resume"] = described(runner.resume_from)
    return facts
