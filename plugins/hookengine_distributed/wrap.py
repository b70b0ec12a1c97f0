"""Which wrapper a model gets, and what the wrapper does not see to by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from hookengine import MODEL_WRAPPERS, OptimWrapper, dist
from hookengine_distributed.ddp import (
    MMDistributedDataParallel,
    MMSeparateDistributedDataParallel,
)
from hookengine_distributed.exchange import average_gradients
from hookengine_distributed.fsdp import MMFullyShardedDataParallel


def wrapper_class(
    strategy: str, wrapper: str | type[nn.Module] | None, optimizers: int
) -> type[nn.Module]:
    """The class for a strategy; or the one that was asked for.

    Raises:
        KeyError: there is none of that name. TypeError: it has no ``train_step``. ValueError:
            several optimizers, and ``strategy="fsdp"``.
    """
    if wrapper is None:
        if strategy == "fsdp" and optimizers > 1:
            raise ValueError(
                "distributed: strategy='fsdp' shards a model that is called as a whole, and "
                "several optimizers train parts of it: take strategy='ddp'"
            )
        if strategy == "fsdp":
            return MMFullyShardedDataParallel
        return MMSeparateDistributedDataParallel if optimizers > 1 else MMDistributedDataParallel
    cls: type[nn.Module] = MODEL_WRAPPERS.get(wrapper) if isinstance(wrapper, str) else wrapper
    if not hasattr(cls, "train_step"):
        raise TypeError(
            f"distributed: the wrapper {cls.__name__} has no train_step(data, optim_wrapper), "
            "val_step(data) and test_step(data): derive it from MMDistributedDataParallel"
        )
    return cls


def wrap(cls: type[nn.Module], model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """The model in a wrapper; it has the weights of rank 0 already."""
    options = dict(options)
    if issubclass(cls, (MMSeparateDistributedDataParallel, DistributedDataParallel)):
        options.setdefault("init_sync", False)
    try:
        return cls(model, **options)
    except TypeError as error:
        error.add_note(f"while wrapping the model in {cls.__name__} with {options!r}")
        raise


def shapes(model: nn.Module) -> dict[str, str]:
    """What must be the same of a model on all ranks, by the names of its tensors."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: f"{tuple(tensor.shape)} {tensor.dtype}{' frozen' * (not tensor.requires_grad)}"
        for name, tensor in named.items()
        if not is_lazy(tensor)
    }


def look_after(optim_wrapper: OptimWrapper, wrapper: Any, model: nn.Module) -> None:
    """See to the parameters that DistributedDataParallel waits for in vain, or not at all.

    Args:
        optim_wrapper: Is about to step.
        wrapper: One of ours.
        model: In it, with the names of the parameters.

    Raises:
        RuntimeError: the other ranks wait for gradients that this one does not have.
    """
    held = wrapper.held
    odd = [
        p
        for p in optim_wrapper.parameters()
        if (p in held) != p.requires_grad or (p.grad is None and p.requires_grad)
    ]
    if not odd:
        return
    average_gradients(p for p in odd if p.requires_grad and p not in held)  # nobody else does
    if not isinstance(wrapper, MMDistributedDataParallel):
        return
    if wrapper.find_unused_parameters or wrapper.static_graph:
        return
    waited_for = {p for p in odd if p in held}
    names = [name for name, p in model.named_parameters() if p in waited_for]
    if names:
        raise RuntimeError(
            f"{len(names)} parameters got no gradient on rank {dist.get_rank()}, for which "
            f"DistributedDataParallel would wait: {', '.join(names[:8])}. See that the loss "
            "depends on them, or freeze them before the Runner is made (later, give them lr=0); "
            "where it depends on the batch, dict(type='distributed', options=dict("
            "find_unused_parameters=True))"
        )
