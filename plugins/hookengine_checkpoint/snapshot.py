"""A copy of a state in host memory, into buffers that are kept and used again."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
"""Values that ``torch.load(weights_only=True)`` reads, beside tensors and their containers."""


class Snapshot:
    """Copies states; one copy of a state in host memory, pinned where there is a CUDA device.

    Tensors that are one and the same stay so. The copy is valid until the next one is taken.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def take(self, state: Any) -> Any:
        """Copy a state; of tensors on a CUDA device the copy is ready after ``wait``.

        Raises:
            TypeError: something in it is no tensor and no plain container; the message says where.
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
                vars(ordered).update(vars(value))  # the versions that modules save
                return ordered
            if kind is Counter:
                return Counter(value)
            if kind in (list, tuple, set, torch.Size):
                return kind(copy(v, (*path, i)) for i, v in enumerate(value))
            return value

        with torch.no_grad():
            copied = copy(state, ())
        self._buffers = buffers  # what is not needed any more goes
        if on_cuda:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        return copied

    def wait(self) -> None:
        """Wait until the copy is ready; on the thread that writes it."""
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
    """What is equal for two tensors that are one and the same memory."""
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return (id(tensor),)
    views = tensor.is_conj(), tensor.is_neg()
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), *views


def check_plain(state: Any, where: str) -> None:
    """Refuse what only code could restore.

    Raises:
        TypeError: with its place in the state, and what to do.
    """
    for path, value in _odd(state, where):
        numpy = type(value).__module__.startswith("numpy")
        fix = "float(x), int(x) or torch.tensor(x)" if numpy else "numbers, strings and tensors"
        raise TypeError(
            f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint "
            f"cannot hold, since reading it would run code: keep {fix} in the state instead"
        )


def _odd(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    kind = type(value)
    if isinstance(value, Tensor) or kind in PLAIN:
        return
    if kind in (dict, OrderedDict, Counter):
        for key, item in value.items():
            if type(key) not in PLAIN and type(key) is not tuple:
                yield f"the key {key!r} of {path}", key
            yield from _odd(item, f"{path}[{key!r}]")
    elif kind in (list, tuple, set, torch.Size):
        for index, item in enumerate(value):
            yield from _odd(item, f"{path}[{index}]")
    else:
        yield path, value
