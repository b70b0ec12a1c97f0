"""Float32 values of averages whose tensors have a lower precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class PreciseValues:
    """The averages of bfloat16, float16 and float8 tensors, in float32.

    One update moves an average by less than such a tensor can hold. The tensors of the copy
    therefore only hold the rounded averages. Where other code has replaced such a tensor or written
    to it, so that it differs from the rounded average, the average continues from the tensor.
    """

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}
        self._seen: dict[str, _Seen] = {}

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """Return the average that a tensor of the copy holds: itself if it is precise enough."""
        dtype = wide(tensor.dtype)
        if dtype == tensor.dtype:
            self._forget(name)
            return tensor
        value = self._copies.get(name)
        if value is None or not self._belongs(name, value, tensor):
            value = tensor.detach().to(dtype)
        self._copies[name] = value = value.to(tensor.device)
        self._seen[name] = _Seen(tensor)
        return value

    def refresh(self) -> None:
        """Continue from the tensors that other code has written to."""
        for name, seen in self._seen.items():
            if seen.has_changed():
                if not self._belongs(name, self._copies[name], seen.tensor):
                    self._copies[name].copy_(seen.tensor)
                seen.update()

    def store(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Write the averages into the tensors of the copy, given by name before the averages."""
        tensors, values = zip(*pairs.values(), strict=True)
        torch._foreach_copy_(list(tensors), list(values))
        for name in pairs:
            seen = self._seen[name]
            seen.version = seen.part._version

    def load(self, name: str, tensor: Tensor, loaded: Any) -> None:
        """Keep the precise value that torch is about to load into a tensor of the copy."""
        self._forget(name)
        is_narrow = wide(tensor.dtype) != tensor.dtype
        if is_narrow and isinstance(loaded, Tensor) and wide(loaded.dtype) == loaded.dtype:
            value = loaded.detach().to(device=tensor.device, dtype=wide(tensor.dtype))
            self._copies[name] = value.clone() if value.data_ptr() == loaded.data_ptr() else value

    def before_conversion(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the averages of tensors that may be converted to another dtype or device."""
        self.refresh()
        return {name: self._copies.get(name, tensor.data) for name, tensor in tensors.items()}

    def after_conversion(self, tensors: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
        """Keep the averages of tensors that may have been converted."""
        for name, tensor in tensors.items():
            value = before.get(name)
            was_rounded = name in self._copies
            if value is None or value.is_meta or not (was_rounded or value.dtype != tensor.dtype):
                continue
            dtype = wide(tensor.dtype)
            if dtype == tensor.dtype:
                self._forget(name)
            else:
                self._copies[name] = value.to(device=tensor.device, dtype=dtype)
            tensor.data.copy_(value)

    def _belongs(self, name: str, value: Tensor, tensor: Tensor) -> bool:
        """Return whether a tensor still holds the rounded value, in the same layout."""
        if _layout(value) != _layout(tensor):
            return False
        seen = self._seen.get(name)
        if seen is not None and seen.tensor is tensor and not seen.has_changed():
            return True
        rounded = local(value).to(device=tensor.device, dtype=tensor.dtype)
        return torch.equal(rounded, local(tensor))

    def _forget(self, name: str) -> None:
        self._copies.pop(name, None)
        self._seen.pop(name, None)

    def __getstate__(self) -> dict[str, Any]:
        return {"_copies": self._copies, "_seen": {}}  # the copy has other tensors


class _Seen:
    """A tensor of the copy, and what tells whether other code has written to it since."""

    __slots__ = ("part", "pointer", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.part = local(tensor)
        self.update()

    def update(self) -> None:
        """Take the tensor as it is now."""
        self.version, self.pointer = self.part._version, self.part.data_ptr()

    def has_changed(self) -> bool:
        """Return whether it was written to, or has got other memory, since the last update."""
        return self.part._version != self.version or self.part.data_ptr() != self.pointer


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of a floating-point or complex dtype are averaged."""
    if dtype.is_complex:
        return torch.complex64 if dtype.itemsize < 8 else dtype
    return torch.float32 if dtype.itemsize < 4 else dtype


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, which is all that an average needs."""
    to_local = getattr(tensor, "to_local", None)
    part: Tensor = tensor if to_local is None else tensor.detach().to_local()  # type: ignore[attr-defined]
    return part


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, local(tensor).shape, getattr(tensor, "placements", None)
