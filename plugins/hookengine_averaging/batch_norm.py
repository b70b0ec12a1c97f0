"""Recomputing batch-norm statistics, with torch's ``update_bn``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from hookengine import dist, preserved_random_state


def compute_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    contexts: Iterable[AbstractContextManager[Any]],
) -> None:
    """Recompute the statistics of all batch-norm layers that the model does not keep frozen.

    Args:
        model: A model with ``loss_step(data)``. Only the statistics change, and after an error
            nothing does.
        batches: The dataloader; the states of its random generators are preserved.
        contexts: The contexts in which the forward passes run (autocast).
    """
    with preserved_random_state(), _kept(model, batches), ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        update_bn(_Batches(batches), _Forward(model))
        _average_over_ranks(model)


def _average_over_ranks(model: nn.Module) -> None:
    """Average the statistics over the ranks, which have each seen the same number of batches."""
    ranks = dist.get_world_size()
    for layer in batch_norms(model) if ranks > 1 else ():
        for buffer in layer.buffers():
            if buffer.is_floating_point():
                dist.sum_over_ranks(buffer).div_(ranks)


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """Return the batch-norm layers of a model."""
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]


@contextmanager
def _kept(model: nn.Module, dataloader: Any) -> Iterator[None]:
    """Preserve what ``update_bn`` must not change.

    This restores the modes of all layers, the dataloader's random generators, and the statistics of
    batch-norm layers that the model keeps frozen, in evaluation mode while it trains. After an
    error, it restores the statistics of all batch-norm layers.
    """
    modes = {layer: layer.training for layer in model.modules()}
    model.train()
    layers = batch_norms(model)
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
    """A batch of any kind, which torch's ``update_bn`` passes on unchanged."""

    def __init__(self, data: Any) -> None:
        self.data = data


class _Batches:
    """The training batches, each in a ``_Batch``."""

    def __init__(self, dataloader: Iterable[Any]) -> None:
        self.dataloader = dataloader

    def __iter__(self) -> Iterator[_Batch]:
        return map(_Batch, self.dataloader)


class _Forward(nn.Module):
    """The forward pass of the averaged model as in training, including the preprocessor.

    Args:
        model: A BaseModel, as ``runner.wrap`` returns it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: _Batch) -> None:
        """Run the model on the batch, so that its batch norm sees it."""
        self.model.loss_step(batch.data)  # type: ignore[operator]
