"""Dataloaders and batches: what the Runner accepts, and how many samples a batch holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from torch import Tensor


def batch_size(batch: Any) -> int:
    """The number of samples in a batch of any nesting.

    A tensor holds its first dimension's; a dict what its first value holds, a list there being a
    list of samples; a tuple or list of tensors what the first of them holds; a list of dicts (or
    other objects) is a list of samples, and so is a list of tensors beside targets of that number
    (as detection has it). A batch that tells nothing counts as one sample.
    """
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 1
    if isinstance(batch, (list, tuple)) and batch:
        first = batch[0]
        if isinstance(first, Tensor):
            return first.shape[0] if first.dim() else len(batch)
        if isinstance(first, (list, tuple)):
            return len(first) if _are_samples(first, batch[1:]) else batch_size(first)
        return len(batch)
    if isinstance(batch, Mapping):
        first = next(iter(batch.values()), None)
        return len(first) if isinstance(first, (list, tuple)) else batch_size(first)
    return 1


def _are_samples(items: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether a list of tensors is one of samples, by what stands beside it."""
    if not others or not isinstance(items[0] if items else None, Tensor):
        return False
    target, size = others[0], items[0].shape[:1]
    as_one = all(isinstance(item, Tensor) and item.shape[:1] == size for item in items)
    if isinstance(target, Tensor):
        told = target.dim() and target.shape[0] == len(items)
        return bool(told) and not (as_one and size[0] in target.shape)
    if not isinstance(target, (list, tuple)) or len(target) != len(items):
        return False
    # Several inputs beside several targets are a batch, if all have one first dimension.
    return not (as_one and all(isinstance(t, Tensor) and t.shape[:1] == size for t in target))


def length_of(dataloader: Iterable[Any]) -> int | None:
    """The number of batches, or None where the dataloader does not tell."""
    try:
        return len(dataloader)  # type: ignore[arg-type]
    except TypeError:
        return None


def dataset_size(dataloader: Iterable[Any]) -> int | None:
    """The number of samples in the dataset behind a dataloader, or None where it does not tell."""
    dataset = getattr(dataloader, "dataset", None)
    return None if dataset is None else length_of(dataset)


def iterate_from(
    dataloader: Iterable[Any], epoch: int, batch: int, behind: int = 0
) -> tuple[Iterator[Any], int]:
    """Start a pass over the dataloader at ``batch``.

    A dataloader with a method ``seek(epoch, batch)`` is told, and starts there by itself. Of an
    iterator (a generator), which goes on where it is, ``behind`` batches are dropped; of any
    other dataloader the batches before.

    Returns:
        The iterator, and how many batches were fetched and dropped.
    """
    if (seek := getattr(dataloader, "seek", None)) is not None:
        seek(epoch, batch)
        return iter(dataloader), 0
    if isinstance(dataloader, (list, tuple)):
        return iter(dataloader[batch:]), 0
    iterator = iter(dataloader)
    dropped = behind if iterator is dataloader else batch
    if dropped:
        next(islice(iterator, dropped - 1, dropped), None)
    return iterator, dropped
