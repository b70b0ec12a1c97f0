"""A copy of a state in host memory, in buffers that are used again for the next copy."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

import torch
from torch import Tensor


class Snapshot:
    """Keeps one copy of a state in host memory, which is pinned for tensors on a CUDA device.

    Tensors that share memory share it in the copy. The copy is valid until the next one is taken.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def take(self, state: Any) -> Any:
        """Copy a state of tensors and plain containers (see ``checks.check_plain``).

        Returns:
            The copy. Copies of tensors on a CUDA device are complete after ``wait``.
        """
        buffers: dict[tuple[Any, ...], Tensor] = {}
        on_cuda = False
        seen: dict[tuple[Any, ...], Tensor] = {}

        def copy(value: Any, path: tuple[Any, ...]) -> Any:
            nonlocal on_cuda
            if isinstance(value, Tensor):
                same = _identity(value)
                if same in seen:
                    return seen[same]
                value = value.detach()
                on_cuda |= value.is_cuda
                buffer = self._buffer(path, value)
                buffer.copy_(value, non_blocking=value.is_cuda)
                buffers[path] = seen[same] = buffer
                return buffer
            kind = type(value)
            if kind is dict:
                return {k: copy(v, (*path, k)) for k, v in value.items()}
            if kind is OrderedDict:
                ordered = OrderedDict((k, copy(v, (*path, k))) for k, v in value.items())
                vars(ordered).update(vars(value))  # such as the versions that modules save
                return ordered
            if kind is Counter:
                return Counter(value)
            if kind in (list, tuple, set, torch.Size):
                return kind(copy(v, (*path, i)) for i, v in enumerate(value))
            return value

        with torch.no_grad():
            copied = copy(state, ())
        self._buffers = buffers  # drops those that are no longer needed
        if on_cuda:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        return copied

    def wait(self) -> None:
        """Wait until the copy is complete; called on the thread that writes it."""
        if self._copied is not None:
            self._copied.synchronize()

    def _buffer(self, path: tuple[Any, ...], value: Tensor) -> Tensor:
        buffer = self._buffers.get(path)
        if (
            buffer is not None
            and buffer.shape == value.shape
            and buffer.dtype == value.dtype
            and buffer.layout == value.layout
        ):
            return buffer
        if value.layout != torch.strided or value.is_quantized:
            return torch.empty_like(value, device="cpu")
        return torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Return a key that is equal for two tensors that are the same view of the same memory."""
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return (id(tensor),)
    views = tensor.is_conj(), tensor.is_neg()
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), *views
