"""The random generators that a dataloader draws from, wherever it keeps them."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

SEARCHED = 10_000
"""How many objects are searched at most: a dataset may hold one for each sample."""
LONG = 100
"""Containers with more items hold samples."""
_LEAVES = (str, bytes, int, float, type(None), type, ModuleType, Tensor, np.ndarray)


@contextmanager
def preserved_generators(dataloader: Any) -> Iterator[None]:
    """Restore the generators of a dataloader at the end: its own, and those of its parts.

    The parts are samplers, batch samplers, dataloaders that it wraps, and the dataset.
    """
    restores = [_restore(generator) for generator in generators_of(dataloader)]
    try:
        yield
    finally:
        for restore in restores:
            restore()


def generators_of(dataloader: Any) -> list[Any]:
    """Find the generators of torch, NumPy and Python that an object and its parts hold."""
    found: list[Any] = []
    seen: set[int] = set()
    left = deque([dataloader])
    while left and len(seen) < SEARCHED:
        part = left.popleft()
        if id(part) in seen or isinstance(part, _LEAVES):
            continue
        seen.add(id(part))
        kinds = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
        if isinstance(part, kinds):
            found.append(part)
        elif isinstance(part, dict):
            left += part.values() if len(part) <= LONG else ()
        elif isinstance(part, (list, tuple, set)):
            left += part if len(part) <= LONG else ()
        else:
            left += getattr(part, "__dict__", {}).values()
    return found


def _restore(generator: Any) -> Callable[[], object]:
    """Return a function that sets a generator back to its present state."""
    if isinstance(generator, np.random.Generator):
        bits, numbers = generator.bit_generator, generator.bit_generator.state
        return lambda: setattr(bits, "state", numbers)
    if isinstance(generator, random.Random):
        state = generator.getstate()
        return lambda: generator.setstate(state)
    kept = generator.get_state()
    return lambda: generator.set_state(kept)
