"""The wrapper of a model, and the parameters that the wrapper does not handle by itself."""

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
    """Return the wrapper class of a strategy, or the requested one.

    Raises:
        KeyError: No wrapper has that name.
        TypeError: The wrapper has no ``train_step``.
        ValueError: There are several optimizers with ``strategy="fsdp"``.
    """
    if wrapper is None:
        if strategy == "fsdp" and optimizers > 1:
            raise ValueError(
                "distributed: strategy='fsdp' shards a model that is called as a whole, but "
                "several optimizers train parts of it. Use strategy='ddp'"
            )
        if strategy == "fsdp":
            return MMFullyShardedDataParallel
        return MMSeparateDistributedDataParallel if optimizers > 1 else MMDistributedDataParallel
    cls: type[nn.Module] = MODEL_WRAPPERS.get(wrapper) if isinstance(wrapper, str) else wrapper
    if not hasattr(cls, "train_step"):
        raise TypeError(
            f"distributed: the wrapper {cls.__name__} has no train_step(data, optim_wrapper), "
            "val_step(data) and test_step(data). Derive it from MMDistributedDataParallel"
        )
    return cls


def wrap(cls: type[nn.Module], model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """Wrap the model, which already has the weights of rank 0."""
    options = dict(options)
    if issubclass(cls, (MMSeparateDistributedDataParallel, DistributedDataParallel)):
        options.setdefault("init_sync", False)
    try:
        return cls(model, **options)
    except TypeError as error:
        error.add_note(f"while wrapping the model in {cls.__name__} with {options!r}")
        raise


def shapes(model: nn.Module) -> dict[str, str]:
    """Return what must be the same on all ranks, by the names of the model's tensors."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: f"{tuple(tensor.shape)} {tensor.dtype}{' frozen' * (not tensor.requires_grad)}"
        for name, tensor in named.items()
    }


def require_shapes(model: nn.Module) -> None:
    """Reject a model with a lazy layer, whose tensors each rank would draw by itself.

    Raises:
        ValueError: A parameter or buffer has no shape yet.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(
                f"distributed: {name} has no shape yet, because its layer is lazy, and ranks "
                "cannot share it. Run one batch through the model before you create the Runner"
            )


def look_after(optim_wrapper: OptimWrapper, wrapper: Any, model: nn.Module) -> None:
    """Handle parameters that DistributedDataParallel waits for in vain, or does not handle.

    Args:
        optim_wrapper: The optimizer that is about to step.
        wrapper: The wrapper, one of this package.
        model: The wrapped model, which names the parameters.

    Raises:
        RuntimeError: The other ranks wait for gradients that this rank does not have.
    """
    held = wrapper.held
    odd = [
        p
        for p in optim_wrapper.parameters()
        if (p in held) != p.requires_grad or (p.grad is None and p.requires_grad)
    ]
    if not odd:
        return
    average_gradients(p for p in odd if p.requires_grad and p not in held)  # nothing else does
    if not isinstance(wrapper, MMDistributedDataParallel):
        return
    if wrapper.find_unused_parameters or wrapper.static_graph:
        return
    waited_for = {p for p in odd if p in held}
    names = [name for name, p in model.named_parameters() if p in waited_for]
    if names:
        raise RuntimeError(
            f"{len(names)} parameters got no gradient on rank {dist.get_rank()}, for which "
            f"DistributedDataParallel would wait: {', '.join(names[:8])}. Make the loss depend on "
            "them, or freeze them before you create the Runner. If their use depends on the batch, "
            "or they are frozen for some epochs, set dict(type='distributed', options=dict("
            "find_unused_parameters=True))"
        )
