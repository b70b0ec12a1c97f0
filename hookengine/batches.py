"""Count the samples in a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


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
