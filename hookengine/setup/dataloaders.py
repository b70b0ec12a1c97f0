"""Check a dataloader, look into a torch DataLoader, and copy it with another sampler."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, default_collate

_JOIN = (
    "Pass one of them, or join the datasets, as in DataLoader(ConcatDataset([first, second]), "
    "batch_size=32)"
)


def check_single(dataloader: Any, name: str) -> None:
    """Raise a TypeError if ``dataloader`` is a list, tuple or dict of dataloaders or datasets.

    A list of batches is a dataloader, and a dict with a dataset holds the arguments of one.

    Args:
        dataloader: What the user passed.
        name: The argument of the Runner, for the message.
    """
    if isinstance(dataloader, Mapping):
        items = [] if "dataset" in dataloader else [*dataloader.values()]
    else:
        items = [*dataloader] if isinstance(dataloader, (list, tuple)) else []
    for item in items:
        kind = _kind_of_loader(item)
        if kind is not None:
            what = type(dataloader).__name__
            raise TypeError(
                f"{name} takes one dataloader, or a list of batches, got a {what} that holds "
                f"{kind}. {_JOIN}"
            )


def _kind_of_loader(item: Any) -> str | None:
    """Describe an item that yields batches or samples; None for a batch."""
    if isinstance(item, Mapping):
        dataset, others = (
            item.get("dataset"),
            item.keys() & inspect.signature(DataLoader).parameters,
        )
        configured = isinstance(dataset, Mapping) and "type" in dataset
        if isinstance(dataset, Dataset) or configured or (dataset is not None and len(others) > 1):
            return "the arguments of a dataloader"
        return None
    if isinstance(item, (Tensor, list, tuple, str)):
        return None
    is_iterator = isinstance(item, Iterator)
    has_dataset = hasattr(item, "__iter__") and hasattr(item, "dataset")
    if isinstance(item, (DataLoader, Dataset)) or is_iterator or has_dataset:
        return f"{'an' if type(item).__name__[0] in 'AEIOUaeiou' else 'a'} {type(item).__name__}"
    return None


def check_dataset(dataset: Any, collate: Any, name: str) -> None:
    """Raise a TypeError for what only looks like a dataset, and would fail at the first batch.

    Args:
        dataset: The dataset of a torch DataLoader.
        collate: The collate function. Your own one may take any kind of sample.
        name: The argument of the Runner, for the message.
    """
    start = f"the dataset of {name} is"
    if isinstance(dataset, type):
        raise TypeError(f"{start} the class {dataset.__name__}. Pass an instance of it")
    if isinstance(dataset, DataLoader):
        raise TypeError(f"{start} a DataLoader, which yields batches. Pass {name}=DataLoader(...)")
    if isinstance(dataset, (str, bytes)):
        raise TypeError(
            f"{start} a {type(dataset).__name__}. Pass an object that holds the samples"
        )
    if isinstance(dataset, (list, tuple)) and collate in (None, default_collate):
        kinds = {"datasets" for item in dataset if isinstance(item, Dataset) or _is_class(item)}
        kinds |= {"dataloaders" for item in dataset if isinstance(item, DataLoader)}
        if kinds:
            raise TypeError(f"{start} a {type(dataset).__name__} of {' and '.join(kinds)}. {_JOIN}")


def _is_class(item: Any) -> bool:
    """Return whether an item is ``dict(type=class, ...)``, which stands for an object."""
    return isinstance(item, Mapping) and isinstance(item.get("type"), type)


def is_used_up(dataloader: Any) -> bool:
    """Return whether a dataloader is known to be empty after one pass.

    Generators and the iterators of Python and torch are. An iterator of another class may start
    over when it is iterated again.
    """
    module = type(dataloader).__module__
    known = module in ("builtins", "itertools", "torch.utils.data.dataloader")
    return isinstance(dataloader, Iterator) and known


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
