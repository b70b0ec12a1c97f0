"""Files of weights alone, with a checksum in each format."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from hookengine.records.run_folder import absolute_path

SUFFIXES = (".safetensors", ".pth", ".pt")
CHECKSUM = "hookengine.crc32"
"""The key of the checksum in the metadata of a ``.safetensors`` file."""


def save_weights(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], write: bool = True
) -> Path:
    """Write tensors by name as a ``.safetensors``, ``.pth`` or ``.pt`` file.

    ``torch.save`` stores a CRC-32 of each tensor. A ``.safetensors`` file gets one of all tensors,
    in its metadata.

    Args:
        tensors: Tensors on any device; tensors that share memory are written several times.
        path: The file. Its folder is created if it does not exist.
        write: Whether to write the file. False only checks ``path``, for ranks that do not write.

    Returns:
        The path of the file.

    Raises:
        ValueError: ``path`` has another suffix, or a tensor of a lazy layer has no values yet.
        OSError: The file cannot be written.
    """
    path = absolute_path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"weights can be exported as .pth or .safetensors, not as {path.name!r}. Change the "
            "suffix"
        )
    for name, tensor in tensors.items():
        if is_lazy(tensor):
            raise ValueError(
                f"{name} has no values yet, because its layer is lazy. Run one batch through the "
                "model before you export its weights"
            )
    if not write:
        return path
    copied = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            metadata = {"format": "pt", CHECKSUM: _checksum(copied)}
            safetensors.torch.save_file(copied, path, metadata)
        else:
            torch.save(copied, path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    return path


def load_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a ``.safetensors`` file onto the CPU, and compare it with its checksum if it has one.

    Raises:
        ValueError: The file cannot be read, or differs from what ``save_weights`` wrote.
        OSError: The file cannot be opened.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if CHECKSUM in metadata and metadata[CHECKSUM] != _checksum(tensors):
        raise ValueError("its checksum differs")
    return tensors


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the CRC-32 of the names, dtypes, shapes and values of tensors on the CPU."""
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), value)
        octets = tensor.contiguous().reshape(-1).view(torch.uint8)
        value = zlib.crc32(octets.numpy().data, value)
    return f"{value:08x}"
