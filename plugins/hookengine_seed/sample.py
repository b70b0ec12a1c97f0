"""Seeding single samples where they are read."""

from __future__ import annotations

import hashlib
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import Subset, get_worker_info

from hookengine import preserved_random_state

_MASK = 2**63 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def derive(seed: int, *names: object) -> int:
    """Derive the seed for one purpose, a pure function of ``seed`` and the names of the purpose.

    Returns:
        The derived seed, from 0 to 2**63 - 1.
    """
    text = "/".join(map(str, (seed, *names)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & _MASK


def nth(seed: int, number: int) -> int:
    """Return the seed of a sample by its number in a pass, far from its neighbors' seeds.

    This function is cheaper than ``derive``.
    """
    mixed = (seed + (number + 1) * _GOLDEN) & _MASK
    mixed ^= mixed >> 31
    return (mixed * 0xBF58476D1CE4E5B9) & _MASK


def seed_here(seed: int) -> None:
    """Seed Python, NumPy (if it is imported) and torch's CPU generator."""
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from ``seed`` within the block, and restore the random states afterwards."""
    with preserved_random_state():
        seed_here(seed)
        yield


class SeededDataset:
    """A map-style dataset that takes (seed, index) and reads the sample with that seed.

    The randomness of a sample thus depends neither on the worker that reads it nor on the samples
    read before.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # does not exist yet during unpickling
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, sample: tuple[int, Any]) -> Any:
        seed, index = sample
        seed_here(seed)
        return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def __getitems__(self) -> Callable[[tuple[int, Any]], Any] | None:
        """A function that reads a batch with one seed, if the dataset reads batches; else None."""
        innermost = self.dataset
        while type(innermost) is Subset:
            innermost = innermost.dataset
        return self._batch if getattr(innermost, "__getitems__", None) else None

    def _batch(self, batch: tuple[int, Any]) -> Any:
        seed, indices = batch
        seed_here(seed)
        return self.dataset.__getitems__(indices)


class SeededIterable:
    """An iterable dataset whose workers start each pass with a seed of that pass and worker.

    Args:
        dataset: The dataset.
        seed: An int64 tensor in shared memory, which the main process sets before each pass.
            Persistent workers have no other way to receive the seed.
    """

    def __init__(self, dataset: Any, seed: torch.Tensor) -> None:
        self.dataset = dataset
        self.seed = seed

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        seed_here(nth(int(self.seed), 0 if worker is None else worker.id))
        return iter(self.dataset)


class WorkerInit:
    """A ``worker_init_fn`` that calls the user's function, which sees the dataset itself.

    A cluster scheduler sends SIGTERM to a whole group of processes, but only the main process
    should act on it: it saves a checkpoint and then ends its workers. The first SIGTERM therefore
    leaves a worker half a minute; a second one ends it immediately.
    """

    def __init__(self, worker_init_fn: Callable[[int], None] | None) -> None:
        self.worker_init_fn = worker_init_fn

    def __call__(self, worker_id: int) -> None:
        signal.signal(signal.SIGTERM, _end_later)
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, (SeededDataset, SeededIterable)):
            dataset: Any = info.dataset
            object.__setattr__(info, "dataset", dataset.dataset)  # torch refuses to set it
        if self.worker_init_fn is not None:
            self.worker_init_fn(worker_id)


def _end_later(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)
    if hasattr(signal, "alarm"):
        signal.alarm(30)
