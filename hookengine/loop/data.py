"""Dataloaders and batches: where a pass starts, and how many batches and samples there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol, TypeGuard

from torch import Tensor


class SeekableLoader(Protocol):
    """A dataloader that starts a pass at any batch by itself.

    ``setup_dataloader`` may return one. Before each pass of training, the kernel calls ``seek``.
    From any other dataloader, it fetches and drops the batches that a resumed run has already used.
    """

    def seek(self, epoch: int, batch: int) -> None:
        """Start the next pass, that of ``epoch``, at ``batch``; both count from 0."""

    def __iter__(self) -> Iterator[Any]:
        """Start the pass."""


def is_seekable(dataloader: Iterable[Any]) -> TypeGuard[SeekableLoader]:
    """Return whether a dataloader has ``seek``, or forwards it to a dataloader that it wraps."""
    return hasattr(dataloader, "seek")  # isinstance ignores __getattr__ since Python 3.12


def is_consecutive(dataloader: Iterable[Any]) -> bool:
    """Return whether each rank gets the batches that follow those of the previous rank.

    A dataloader says so with an attribute ``consecutive = True``. Evaluation then joins the results
    of the ranks in that order.
    """
    return bool(getattr(dataloader, "consecutive", False))


def batch_size(batch: Any) -> int:
    """Return the number of samples in a batch of any nesting.

    The number depends on the type of the batch:

    - A tensor holds as many samples as its first dimension.
    - A dict holds as many as its first value. If that value is a list, each item is a sample.
    - A tuple or list of tensors, nested or not, holds as many as its first tensor.
    - In a list of dicts or other objects, each item is a sample. The same goes for a list of
      tensors next to equally many targets, as in object detection.
    - Anything else counts as one sample.
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
    """Return whether each item is a sample, judging by ``others``, the rest of the batch.

    Otherwise the items are several inputs, each of which holds the whole batch.
    """
    if not others or not isinstance(items[0] if items else None, Tensor):
        return False
    target, size = others[0], items[0].shape[:1]
    as_one = all(isinstance(item, Tensor) and item.shape[:1] == size for item in items)
    if isinstance(target, Tensor):
        told = target.dim() and target.shape[0] == len(items)
        return bool(told) and not (as_one and size[0] in target.shape)
    if not isinstance(target, (list, tuple)) or len(target) != len(items):
        return False
    # Several inputs with several targets are one batch if they all share their first dimension.
    return not (as_one and all(isinstance(t, Tensor) and t.shape[:1] == size for t in target))


def length_of(dataloader: Iterable[Any]) -> int | None:
    """Return the number of batches, or None if the dataloader has no length."""
    try:
        return len(dataloader)  # type: ignore[arg-type]
    except TypeError:
        return None


def dataset_size(dataloader: Iterable[Any]) -> int | None:
    """Return the number of samples in the dataset of a dataloader, or None if it is unknown."""
    dataset = getattr(dataloader, "dataset", None)
    return None if dataset is None else length_of(dataset)


def iterate_from(
    dataloader: Iterable[Any], epoch: int, batch: int, behind: int = 0
) -> tuple[Iterator[Any], int]:
    """Start a pass over the dataloader at ``batch``.

    If the dataloader has a method ``seek(epoch, batch)``, this function calls it and the dataloader
    starts there by itself. An iterator (such as a generator) continues from its current position,
    so its next ``behind`` batches are fetched and dropped. A list or tuple is sliced. For any other
    dataloader, the first ``batch`` batches are fetched and dropped.

    Returns:
        The iterator, and how many batches were fetched and dropped.
    """
    if is_seekable(dataloader):
        dataloader.seek(epoch, batch)
        return iter(dataloader), 0
    if isinstance(dataloader, (list, tuple)):
        return iter(dataloader[batch:]), 0
    iterator = iter(dataloader)
    dropped = behind if iterator is dataloader else batch
    if dropped:
        next(islice(iterator, dropped - 1, dropped), None)
    return iterator, dropped
