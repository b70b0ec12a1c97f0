"""Dataloaders: where a pass starts, and how many batches and samples there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Protocol, TypeGuard


class SeekableLoader(Protocol):
    """A dataloader that starts a pass at any batch by itself.

    ``setup_dataloader`` may return one. Before each pass of training, the kernel calls ``seek``.
    From any other dataloader, it fetches and drops the batches that a resumed run has already used.

    It may have two more methods, for a run that resumes within an epoch with another batch size:

    - ``sample_at(epoch, batch) -> int | None`` returns how many samples of this rank come before a
      batch of a pass.
    - ``seek_sample(epoch, sample) -> int | None`` makes the pass of ``epoch`` yield the samples
      from ``sample`` on, when it starts at the batch that this method returns.

    Both return None if they cannot tell.
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


def length_of(dataloader: Iterable[Any]) -> int | None:
    """Return the number of batches, or None if the dataloader has no length."""
    try:
        return len(dataloader)  # type: ignore[arg-type]
    except (TypeError, ValueError, NotImplementedError, AttributeError, OverflowError):
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
