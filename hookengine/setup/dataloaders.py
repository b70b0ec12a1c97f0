"""Look into a torch DataLoader, and copy it with another sampler."""

from __future__ import annotations

import copy
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset


def samplers_of(dataloader: DataLoader[Any]) -> list[Any]:
    """Find the samplers of a torch DataLoader, nested ones included.

    A sampler may wrap another one as its ``sampler`` or ``batch_sampler``, as
    ``torch.utils.data.BatchSampler`` does.

    Args:
        dataloader: A DataLoader, or any object with its attributes.

    Returns:
        The samplers, the outermost first: the one that the DataLoader draws from. An iterable
        dataset has none.

    Raises:
        AttributeError: ``dataloader`` has no ``dataset``, ``sampler`` or ``batch_sampler``.
    """
    found: list[Any] = []
    if isinstance(dataloader.dataset, IterableDataset):
        return found
    batches = dataloader.batch_sampler
    sampler: Any = dataloader.sampler if batches is None else batches
    while sampler is not None and not any(sampler is one for one in found):
        found.append(sampler)
        inner = getattr(sampler, "sampler", None)
        sampler = getattr(sampler, "batch_sampler", None) if inner is None else inner
    return found


def samples_per_batch(dataloader: Any) -> int | None:
    """Return how many samples each batch takes in turn from the order of a pass.

    The last batch of a pass may take fewer.

    Args:
        dataloader: Any dataloader.

    Returns:
        The number; None if batches vary, as those of a ``batch_sampler`` may, if workers of an
        iterable dataset make them, or if it is not known how the dataloader makes them.
    """
    size = getattr(dataloader, "samples_per_batch", None)
    if size is not None or not isinstance(dataloader, DataLoader):
        return size
    is_iterable = isinstance(dataloader.dataset, IterableDataset)
    own_iter = type(dataloader).__iter__ is not DataLoader.__iter__
    if own_iter or (is_iterable and dataloader.num_workers):
        return None
    batches = dataloader.batch_sampler
    if batches is None:
        return None if is_iterable else 1
    is_torchs = type(batches).__iter__ is BatchSampler.__iter__
    return batches.batch_size if isinstance(batches, BatchSampler) and is_torchs else None


def copy_dataloader(dataloader: DataLoader[Any], **replaced: Any) -> DataLoader[Any]:
    """Copy a torch DataLoader and replace some of its attributes.

    The copy shares everything else with the original, but no running iterator or worker. It is of
    the same class and keeps attributes that a subclass has added: it is not built by the
    constructor, which in a subclass may take other arguments.

    Args:
        dataloader: The DataLoader; it is not changed.
        **replaced: New values by attribute name, such as ``sampler``, ``batch_sampler``,
            ``batch_size``, ``dataset`` or ``worker_init_fn``. torch raises ValueError if you set
            some of these on an existing DataLoader, because a running iterator would not see the
            change. The copy has no iterator yet, so this function can set them.

    Returns:
        The copy.
    """
    copied = copy.copy(dataloader)
    vars(copied).update(replaced, _iterator=None)  # DataLoader.__setattr__ would raise
    return copied
