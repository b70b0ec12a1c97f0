"""Exporting the averaged weights as a file."""

from __future__ import annotations

import os
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from hookengine import dist, original_names


def export_weights(module: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the weights of a module, on the CPU, as ``.pth`` or ``.safetensors``.

    All ranks call it together; only the main process writes.

    Raises:
        ValueError: ``path`` has another suffix.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".pt", ".safetensors"):
        raise ValueError(f"weights can be exported as .pth or .safetensors, not as {path.name!r}")
    state = {
        name: _whole(value).detach().cpu().clone().contiguous()
        for name, value in original_names(module.state_dict()).items()
        if isinstance(value, Tensor)
    }
    if not dist.is_main_process():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return path


def _whole(tensor: Tensor) -> Tensor:
    """Return the tensor, gathered if it is sharded across ranks."""
    full_tensor = getattr(tensor, "full_tensor", None)
    whole: Tensor = tensor if full_tensor is None else full_tensor()
    return whole
