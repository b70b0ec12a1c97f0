"""Recomputing batch-norm statistics, with torch's ``update_bn``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import islice
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from hookengine import dist, preserved_random_state
from hookengine_averaging.generators import preserved_generators
from hookengine_averaging.precise import wide


def compute_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    contexts: Iterable[AbstractContextManager[Any]],
    most: int | None = None,
    on_batch: Callable[[int], object] = lambda done: None,
) -> int:
    """Recompute the statistics of all batch-norm layers that the model does not keep frozen.

    A layer that sees no batch keeps its statistics. After an error, all layers do.

    Args:
        model: A model with ``loss_step(data)``. Only the statistics change.
        batches: The dataloader; the states of its random generators are preserved.
        contexts: The contexts in which the forward passes run (autocast).
        most: The number of batches after which to stop, for a dataloader that may have no end.
        on_batch: Called before the first batch and after each one, with the number of batches.

    Returns:
        The number of batches of this rank.
    """
    counted = _Batches(batches, most, on_batch)
    with (
        preserved_random_state(),
        preserved_generators(batches),
        _kept(model),
        ExitStack() as stack,
    ):
        for context in contexts:
            stack.enter_context(context)
        with _precise_means(batch_norms(model)):
            update_bn(counted, _Forward(model))
        _average_over_ranks(batch_norms(model))
    return counted.number


def _average_over_ranks(layers: list[nn.Module]) -> None:
    """Average the statistics over the ranks, by the number of batches that each layer has seen."""
    ranks = dist.get_world_size()
    seen = dist.all_gather_objects([_batches_seen(layer) for layer in layers])
    for index, layer in enumerate(layers) if ranks > 1 else ():
        numbers = [counts[index] for counts in seen]
        own, total = numbers[dist.get_rank()], sum(numbers)
        for buffer in layer.buffers() if total else ():
            if buffer.is_floating_point():
                if own * ranks != total:
                    buffer.mul_(own * ranks / total)
                dist.sum_over_ranks(buffer).div_(ranks)
            elif own == 0:
                buffer.fill_(1)  # other ranks have seen batches


def _batches_seen(layer: Any) -> int:
    return 0 if layer.num_batches_tracked is None else int(layer.num_batches_tracked)


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """Return the batch-norm layers of a model."""
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Preserve what ``update_bn`` must not change.

    This restores the modes of all layers, and the statistics of batch-norm layers that saw no
    batch, or that the model keeps frozen, in evaluation mode while it trains. After an error, it
    restores the statistics of all batch-norm layers.
    """
    modes = {layer: layer.training for layer in model.modules()}
    model.train()
    layers = batch_norms(model)
    kept = {layer: {n: b.clone() for n, b in layer.named_buffers()} for layer in layers}
    momenta = {layer: layer.momentum for layer in layers}
    restored = [layer for layer in layers if not layer.training]
    try:
        yield
        restored += [layer for layer in layers if _batches_seen(layer) == 0]
    except BaseException:
        restored = layers
        raise
    finally:
        for layer in restored:
            layer.momentum = momenta[layer]
            for name, buffer in layer.named_buffers():
                buffer.copy_(kept[layer][name])
        for layer, training in modes.items():
            layer.training = training


@contextmanager
def _precise_means(layers: Iterable[Any]) -> Iterator[None]:
    """Average the statistics of layers with a low precision in float32.

    Within ``update_bn``, a batch has the weight of one over the number of batches: from some
    hundred batches on, a mean in bfloat16 would hardly change.
    """
    sums: dict[Any, tuple[int, dict[str, Tensor]]] = {}

    def alone(layer: Any, *_: Any) -> None:
        layer.num_batches_tracked.zero_()  # so that its statistics become those of this batch

    def add(layer: Any, *_: Any) -> None:
        number, totals = sums.get(layer, (0, {}))
        for name in ("running_mean", "running_var"):
            value = getattr(layer, name).float()
            totals[name] = value if number == 0 else totals[name].add_(value)
        sums[layer] = number + 1, totals

    with ExitStack() as stack:
        for layer in layers:
            mean = layer.running_mean
            narrow = isinstance(mean, Tensor) and wide(mean.dtype) != mean.dtype
            if narrow and layer.training and layer.num_batches_tracked is not None:
                stack.enter_context(layer.register_forward_pre_hook(alone))
                stack.enter_context(layer.register_forward_hook(add))
        yield
    for layer, (number, totals) in sums.items():
        for name, total in totals.items():
            getattr(layer, name).copy_(total / number)
        layer.num_batches_tracked.fill_(number)


class _Batch:
    """A batch of any kind, which torch's ``update_bn`` passes on unchanged."""

    def __init__(self, data: Any) -> None:
        self.data = data


class _Batches:
    """The training batches, each in a ``_Batch``.

    Attributes:
        number: The number of batches so far.
    """

    def __init__(
        self, dataloader: Iterable[Any], most: int | None, on_batch: Callable[[int], object]
    ) -> None:
        self._dataloader = dataloader
        self._most = most
        self._on_batch = on_batch
        self.number = 0

    def __iter__(self) -> Iterator[_Batch]:
        self._on_batch(0)
        for batch in islice(self._dataloader, self._most):
            self.number += 1
            yield _Batch(batch)
            self._on_batch(self.number)


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
