"""The share of each rank in a dataloader's samples."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import nullcontext
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from hookengine import Phase, copy_dataloader, dist, length_of, preserved_random_state, samplers_of


class Shared:
    """One rank's share of a sampler. Each rank draws the whole order from the sampler itself.

    Args:
        sampler: Yields indices of samples, or batches of them.
        rank: This rank.
        world_size: The number of ranks.

    Attributes:
        seed: The seed for the order of each pass; None if the caller makes all ranks draw the same
            order.
    """

    def __init__(self, sampler: Iterable[Any], rank: int, world_size: int) -> None:
        self.sampler = sampler
        self.rank, self.world_size = rank, world_size
        self.seed: int | None = None
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass that of ``epoch``."""
        self._epoch = epoch

    def _draw(self) -> list[Any]:
        with nullcontext() if self.seed is None else preserved_random_state():
            if self.seed is not None:
                seed = (self.seed + self._epoch) % 2**63
                torch.manual_seed(seed)
                random.seed(seed)
                if (numpy := sys.modules.get("numpy")) is not None:
                    numpy.random.seed(seed & 0xFFFFFFFF)
            return list(self.sampler)


class Dealt(Shared):
    """Every ``n``-th item: rank ``r`` of ``n`` gets ``r``, ``r + n``, ...; all get equally many.

    Args:
        sampler: Yields indices of samples, or batches of them.
        rank: This rank.
        world_size: The number of ranks.
        drop: Whether to drop the remainder; otherwise the first items are repeated to fill it.
    """

    def __init__(self, sampler: Iterable[Any], rank: int, world_size: int, drop: bool) -> None:
        super().__init__(sampler, rank, world_size)
        self.drop = drop

    def __len__(self) -> int:
        whole = len(cast("Sized", self.sampler))
        return whole // self.world_size if self.drop else -(-whole // self.world_size)

    def __iter__(self) -> Iterator[Any]:
        if length_of(self.sampler) is None:  # endless: there is no remainder
            return islice(iter(self.sampler), self.rank, None, self.world_size)
        order = self._draw()
        per_rank = len(order) // self.world_size if self.drop else len(self)
        order += order[: max(per_rank * self.world_size - len(order), 0)]
        return iter(order[self.rank : per_rank * self.world_size : self.world_size])


class Block(Shared):
    """Consecutive items, rank 0's first. Some ranks get one more; no item is repeated."""

    @property
    def sizes(self) -> list[int]:
        """Return the number of items of each rank."""
        whole = len(cast("Sized", self.sampler))
        least, more = divmod(whole, self.world_size)
        return [least + (rank < more) for rank in range(self.world_size)]

    def __len__(self) -> int:
        return self.sizes[self.rank]

    def __iter__(self) -> Iterator[Any]:
        start = sum(self.sizes[: self.rank])
        return iter(self._draw()[start : start + len(self)])


def is_shared(loader: DataLoader[Any]) -> bool:
    """Return whether a sampler already gives each rank its share (``DistributedSampler``)."""
    return any(hasattr(sampler, "num_replicas") for sampler in samplers_of(loader))


OF_ITS_OWN = "the lists differ between ranks and are left unchanged: each rank uses its own"
_BY_ITSELF = "each rank gets all of it, unless it selects its share itself (hookengine.dist)"


def share(
    loader: Any, phase: Phase, drop: bool | None, split: bool
) -> tuple[Any, Shared | None, str]:
    """Give this rank its share of a dataloader.

    Args:
        loader: The user's dataloader.
        phase: ``train``, ``val`` or ``test``.
        drop: See ``share_training``.
        split: See ``share_training``.

    Returns:
        The dataloader of this rank's share, the sampler that selects it, and a text for the log.
        The first two are None if the dataloader has no sampler, or one that already shares.

    Raises:
        ValueError: As ``share_training``.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        kind = type(getattr(loader, "dataset", loader)).__name__
        return None, None, f"a {kind} is left unchanged: {_BY_ITSELF}"
    if is_shared(loader):
        return None, None, "its sampler already gives each rank its share"
    if phase == "train":
        return share_training(loader, drop, split)
    evaluation = share_evaluation(loader)
    return evaluation or (None, None, f"its sampler has no length: {_BY_ITSELF}")


def share_training(
    loader: DataLoader[Any], drop: bool | None, split: bool
) -> tuple[DataLoader[Any], Dealt, str]:
    """Give this rank its share of a training dataloader: every ``world_size``-th item.

    Args:
        loader: The user's DataLoader; it is not changed.
        drop: See ``Dealt``; by default the DataLoader's ``drop_last``.
        split: Whether ``batch_size`` is that of all ranks together.

    Returns:
        The DataLoader of this rank's share, the sampler that selects it, and a text for the log.

    Raises:
        ValueError: There are fewer samples than ranks, or the batch size cannot be split.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    drop = bool(getattr(loader, "drop_last", False)) if drop is None else drop
    what, unit, size_text = "samples", "", ""
    if type(loader.batch_sampler) is BatchSampler:
        size = cast("int", loader.batch_size)
        if split and size % ranks:
            raise ValueError(
                f"split_batches=True: a batch of {size} samples cannot be split over {ranks} "
                f"ranks: use a multiple of {ranks}"
            )
        size //= ranks if split else 1
        sampler = Dealt(loader.sampler, rank, ranks, drop)
        batches = BatchSampler(cast("Any", sampler), size, loader.drop_last)
        shared = copy_dataloader(loader, sampler=sampler, batch_size=size, batch_sampler=batches)
        size_text = f" with batches of {size}"
        unit = f", in batches of {size}: {size * ranks} per iteration"
    elif loader.batch_sampler is not None:
        sampler = Dealt(loader.batch_sampler, rank, ranks, drop)
        shared = copy_dataloader(loader, batch_sampler=sampler)
        what = "batches"
    else:
        sampler = Dealt(loader.sampler, rank, ranks, drop)
        shared = copy_dataloader(loader, sampler=sampler)
    if split and what != "samples":
        raise ValueError(
            "split_batches=True splits batches of a given batch_size, but this dataloader has its "
            "own batch_sampler: leave split_batches out and let the batch_sampler make batches of "
            "one rank's size"
        )
    whole = length_of(sampler.sampler)
    if whole is None:
        return shared, sampler, f"its {what}, which have no end, are dealt to {ranks} ranks in turn"
    if whole < ranks or length_of(shared) == 0:
        dropping = " and drop_last=True" * bool(loader.drop_last)
        raise ValueError(
            f"{whole} {what} to train on are too few for {ranks} ranks{size_text}{dropping}: some "
            "ranks would have no batch. Start fewer processes or use a smaller batch_size"
        )
    left = len(sampler) * ranks - whole
    rest = f" ({left} repeated)" if left > 0 else f" ({-left} dropped)" if left else ""
    text = f"each of {ranks} ranks gets {len(sampler)} of its {whole} {what}{rest}{unit}"
    return shared, sampler, text


def share_evaluation(loader: DataLoader[Any]) -> tuple[DataLoader[Any], Block, str] | None:
    """Give this rank its share of an evaluation dataloader: consecutive batches, none twice.

    The batches are the same as those of a single process, the first ones being rank 0's.

    Returns:
        The DataLoader of this rank's share, the sampler that selects it, and a text for the log;
        None if the sampler has no length.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    if length_of(getattr(loader, name)) is None:
        return None
    sampler = Block(getattr(loader, name), rank, ranks)
    shared = copy_dataloader(loader, **{name: sampler, "consecutive": True})
    least, most = min(sampler.sizes), max(sampler.sizes)
    counts = f"{most}" if least == most else f"{least} or {most}"
    whole = length_of(sampler.sampler)
    return shared, sampler, f"each of {ranks} ranks gets {counts} of its {whole} batches"


class BatchList(list[Any]):
    """One rank's share of a list of batches.

    Attributes:
        consecutive: Whether each rank's batches follow those of the rank before.
        count_samples: Counts the samples in a batch, if the list of all batches has such a method.
    """

    consecutive = False
    count_samples: Callable[[Any], Any] | None = None


def share_list(batches: Sequence[Any], phase: Phase, drop: bool | None) -> tuple[BatchList, str]:
    """Give this rank its share of a list: every n-th batch in training, consecutive in evaluation.

    Args:
        batches: The batches of all ranks, the same list on each.
        phase: ``train``, ``val`` or ``test``.
        drop: See ``Dealt``; False by default.

    Returns:
        The batches of this rank, and a text for the log.

    Raises:
        ValueError: There are fewer batches to train on than ranks.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    training = phase == "train"
    if training and len(batches) < ranks:
        raise ValueError(
            f"there are {len(batches)} batches to train on for {ranks} ranks: start fewer processes"
        )
    block = Block(batches, rank, ranks)
    share = BatchList(Dealt(batches, rank, ranks, bool(drop)) if training else block)
    share.consecutive = not training
    share.count_samples = getattr(batches, "count_samples", None)
    return share, f"this rank gets {len(share)} of its {len(batches)} batches"


def fingerprint(batches: Any) -> str:
    """Return a hash of a list of batches: of its length and values of its first and last batch."""
    tensors = [t.detach() for t in _tensors([batches[0], batches[-1]]) if t.layout is torch.strided]
    values = [tensor.flatten()[:32].tolist() for tensor in tensors]
    return hashlib.sha256(repr((len(batches), values)).encode()).hexdigest()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield from value.unbind() if value.is_nested else (value,)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
