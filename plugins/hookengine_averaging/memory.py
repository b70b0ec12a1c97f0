"""Memory of the copy's tensors: each one must have its own, or writing to it changes others."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def shared_memory(tensors: Iterable[Tensor]) -> set[int]:
    """Return the positions of the tensors to clone so that each can be written by itself.

    These are expanded tensors, several of whose elements share memory, and tensors that overlap
    with an earlier one, as views of it do.

    Args:
        tensors: Different tensors.
    """
    shared: set[int] = set()
    spans: dict[object, list[tuple[int, int, int]]] = {}
    for index, tensor in enumerate(tensors):
        plain = tensor.layout == torch.strided and not hasattr(tensor, "to_local")
        if not plain or tensor.numel() == 0 or tensor.is_meta:
            continue
        reach, overlaps = 0, False
        for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
            if size > 1:
                overlaps |= stride <= reach
                reach += stride * (size - 1)
        if overlaps:
            shared.add(index)
            continue
        start = tensor.data_ptr()
        end = start + (reach + 1) * tensor.element_size()
        spans.setdefault(tensor.device, []).append((start, index, end))
    for several in spans.values():
        furthest = 0
        for start, index, end in sorted(several):
            if start < furthest:
                shared.add(index)
            else:
                furthest = end
    return shared
