"""Seeding of single samples, where they are read."""

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
    """A seed for one purpose: a pure function of ``seed`` and what the purpose is called.

    Returns:
        0 to 2**63 - 1.
    """
    text = "/".join(map(str, (seed, *names)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & _MASK


def nth(seed: int, number: int) -> int:
    """The seed of the sample of that number in a pass: cheap, and far from its neighbours'."""
    mixed = (seed + (number + 1) * _GOLDEN) & _MASK
    mixed ^= mixed >> 31
    return (mixed * 0xBF58476D1CE4E5B9) & _MASK


def seed_here(seed: int) -> None:
    """Seed Python, NumPy (where it is in use) and torch's generator of the CPU."""
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from ``seed`` inside; afterwards the random states are what they were."""
    with preserved_random_state():
        seed_here(seed)
        yield


class SeededDataset:
    """A map-style dataset whose sample (seed, index) is read with that seed.

    So what is random in a sample depends neither on the worker that reads it nor on what was read
    before.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not there yet, while it is unpickled
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
        """Where the dataset reads whole batches, one seed for each of them; else None."""
        innermost = self.dataset
        while type(innermost) is Subset:
            innermost = innermost.dataset
        return self._batch if getattr(innermost, "__getitems__", None) else None

    def _batch(self, batch: tuple[int, Any]) -> Any:
        seed, indices = batch
        seed_here(seed)
        return self.dataset.__getitems__(indices)


class SeededIterable:
    """An iterable dataset whose workers begin each pass with a seed of the pass and the worker.

    Args:
        dataset: The dataset.
        seed: int64 tensor in shared memory, which the main process sets before each pass:
            workers that persist have no other way to learn of it.
    """

    def __init__(self, dataset: Any, seed: torch.Tensor) -> None:
        self.dataset = dataset
        self.seed = seed

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        seed_here(nth(int(self.seed), 0 if worker is None else worker.id))
        return iter(self.dataset)


class WorkerInit:
    """A ``worker_init_fn``: calls the user's, which sees the dataset itself.

    A scheduler sends SIGTERM to a whole group of processes. It is for the main one, which has its
    workers end when it has saved; so the first one gives a worker half a minute.
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
