"""The share of each rank in a dataloader's samples."""

from __future__ import annotations

import copy
import hashlib
import random
import sys
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import nullcontext
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from hookengine import dist, length_of, preserved_random_state


class Shared:
    """What one rank gets of a sampler; the order is the sampler's own, and drawn by each rank.

    Args:
        sampler: Of samples or of batches.

    Attributes:
        seed: The order of each pass is drawn with it; None where whoever iterates sees to it that
            all ranks draw the same.
    """

    def __init__(self, sampler: Iterable[Any], rank: int, world_size: int) -> None:
        self.sampler = sampler
        self.rank, self.world_size = rank, world_size
        self.seed: int | None = None
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Have the next pass be that of ``epoch``."""
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
    """In turn: rank ``r`` of ``n`` gets the items ``r``, ``r + n``, ...; all of them as many.

    Args:
        drop: Drop what is left over; else the first items are repeated until all have as many.
    """

    def __init__(self, sampler: Iterable[Any], rank: int, world_size: int, drop: bool) -> None:
        super().__init__(sampler, rank, world_size)
        self.drop = drop

    def __len__(self) -> int:
        whole = len(cast("Sized", self.sampler))
        return whole // self.world_size if self.drop else -(-whole // self.world_size)

    def __iter__(self) -> Iterator[Any]:
        if length_of(self.sampler) is None:  # endless: nothing is left over
            return islice(iter(self.sampler), self.rank, None, self.world_size)
        order = self._draw()
        per_rank = len(order) // self.world_size if self.drop else len(self)
        order += order[: max(per_rank * self.world_size - len(order), 0)]
        return iter(order[self.rank : per_rank * self.world_size : self.world_size])


class Block(Shared):
    """Consecutive items: rank 0 the first ones; some ranks one more, and nothing twice."""

    @property
    def sizes(self) -> list[int]:
        """The number of items of each rank."""
        whole = len(cast("Sized", self.sampler))
        least, more = divmod(whole, self.world_size)
        return [least + (rank < more) for rank in range(self.world_size)]

    def __len__(self) -> int:
        return self.sizes[self.rank]

    def __iter__(self) -> Iterator[Any]:
        start = sum(self.sizes[: self.rank])
        return iter(self._draw()[start : start + len(self)])


def is_shared(loader: DataLoader[Any]) -> bool:
    """Whether a sampler of the user's shares the samples already (``DistributedSampler``)."""
    part: Any = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
    for _ in range(8):  # samplers within samplers
        if hasattr(part, "num_replicas"):
            return True
        part = getattr(part, "sampler", None) or getattr(part, "batch_sampler", None)
    return False


OF_ITS_OWN = "lists that differ are left as they are: each rank has its own"
_BY_ITSELF = "each rank gets all of it, unless it takes its share by itself (hookengine.dist)"


def share(
    loader: Any, phase: str, drop: bool | None, split: bool
) -> tuple[Any, Shared | None, str]:
    """A dataloader of this rank's share, its sampler, and what to say about it.

    Nothing is shared (None, None) of what has no sampler, or one that shares already.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        kind = type(getattr(loader, "dataset", loader)).__name__
        return None, None, f"a {kind} is left as it is: {_BY_ITSELF}"
    if is_shared(loader):
        return None, None, "its sampler shares it already"
    if phase == "train":
        return share_training(loader, drop, split)
    evaluation = share_evaluation(loader)
    return evaluation or (None, None, f"its sampler has no length: {_BY_ITSELF}")


def share_training(
    loader: DataLoader[Any], drop: bool | None, split: bool
) -> tuple[DataLoader[Any], Dealt, str]:
    """A dataloader of this rank's share, its sampler, and what to say about it.

    Args:
        loader: The user's, which stays as it is.
        drop: See ``Dealt``; by default the dataloader's own ``drop_last``.
        split: The batch size is that of all ranks together.

    Raises:
        ValueError: there are fewer samples than ranks; or a batch size that cannot be split.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    size_text = ""
    inner = copy.copy(loader)
    own = vars(inner)
    own["_iterator"] = None
    drop = bool(getattr(loader, "drop_last", False)) if drop is None else drop
    if type(loader.batch_sampler) is BatchSampler:
        size = cast("int", loader.batch_size)
        if split and size % ranks:
            raise ValueError(
                f"split_batches=True: a batch of {size} samples cannot be split over {ranks} "
                f"ranks: take a multiple of {ranks}"
            )
        size //= ranks if split else 1
        sampler = Dealt(loader.sampler, rank, ranks, drop)
        own["sampler"], own["batch_size"] = sampler, size
        own["batch_sampler"] = BatchSampler(cast("Any", sampler), size, loader.drop_last)
        what, size_text = "samples", f" with batches of {size}"
        unit = f", in batches of {size}: {size * ranks} per iteration"
    elif loader.batch_sampler is not None:
        sampler = Dealt(loader.batch_sampler, rank, ranks, drop)
        own["batch_sampler"] = sampler
        what, unit = "batches", ""
    else:
        sampler = Dealt(loader.sampler, rank, ranks, drop)
        own["sampler"] = sampler
        what, unit = "samples", ""
    if split and what != "samples":
        raise ValueError(
            "split_batches=True splits batches of a batch_size; a batch_sampler of your own makes "
            "its batches by itself"
        )
    whole = length_of(sampler.sampler)
    if whole is None:
        return inner, sampler, f"its {what}, without an end, are dealt to {ranks} ranks in turn"
    if whole < ranks or length_of(inner) == 0:
        dropping = " and drop_last=True" * bool(loader.drop_last)
        raise ValueError(
            f"{whole} {what} to train on are too few for {ranks} ranks{size_text}{dropping}: some "
            "would have no batch. Start fewer processes, or take a smaller batch_size"
        )
    left = len(sampler) * ranks - whole
    rest = f" ({left} of them twice)" if left > 0 else f" ({-left} left out)" if left else ""
    return (
        inner,
        sampler,
        f"{len(sampler)} of its {whole} {what}{rest} to each of {ranks} ranks{unit}",
    )


def share_evaluation(loader: DataLoader[Any]) -> tuple[DataLoader[Any], Block, str] | None:
    """A dataloader of this rank's share, its sampler, and what to say; None without a length.

    The batches are those of one process, the first of them rank 0's, and none is evaluated twice.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    if length_of(getattr(loader, name)) is None:
        return None
    sampler = Block(getattr(loader, name), rank, ranks)
    inner = copy.copy(loader)
    vars(inner).update({"_iterator": None, name: sampler, "consecutive": True})
    least, most = min(sampler.sizes), max(sampler.sizes)
    counts = f"{most}" if least == most else f"{least} or {most}"
    whole = length_of(sampler.sampler)
    return inner, sampler, f"its {whole} batches are shared between {ranks} ranks, {counts} each"


class BatchList(list[Any]):
    """The share of a list of batches.

    Attributes:
        consecutive: Whether each rank has batches that follow those of the rank before.
    """

    consecutive = False


def share_list(batches: Sequence[Any], phase: str, drop: bool | None) -> tuple[BatchList, str]:
    """This rank's share of a list of batches, dealt in training and consecutive in evaluation.

    Raises:
        ValueError: there are fewer to train on than ranks.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    training = phase == "train"
    if training and len(batches) < ranks:
        raise ValueError(f"there are {len(batches)} batches to train on for {ranks} ranks")
    block = Block(batches, rank, ranks)
    share = BatchList(Dealt(batches, rank, ranks, bool(drop)) if training else block)
    share.consecutive = not training
    return share, f"{len(share)} of its {len(batches)} batches are this rank's"


def fingerprint(batches: Any) -> str:
    """What tells two lists of batches apart: their length, and some of the first and last one."""
    tensors = [tensor.detach().flatten() for tensor in _tensors([batches[0], batches[-1]])]
    values = [tensor[:32].tolist() for tensor in tensors if tensor.layout is torch.strided]
    return hashlib.sha256(repr((len(batches), values)).encode()).hexdigest()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
