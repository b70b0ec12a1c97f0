"""Exporting the averaged weights as a file."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor, nn

from hookengine import dist, original_names, save_weights


def export_weights(module: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the weights of a module, on the CPU, as ``.pth`` or ``.safetensors``.

    All ranks call it together; only the main process writes.

    Raises:
        ValueError: ``path`` has another suffix.
        OSError: The file cannot be written.
    """
    path = save_weights({}, path, write=False)
    state = {
        name: _whole(value)
        for name, value in original_names(module.state_dict()).items()
        if isinstance(value, Tensor)
    }
    return save_weights(state, path, write=dist.is_main_process())


def _whole(tensor: Tensor) -> Tensor:
    """Return the tensor, gathered if it is sharded across ranks."""
    full_tensor = getattr(tensor, "full_tensor", None)
    whole: Tensor = tensor if full_tensor is None else full_tensor()
    return whole
